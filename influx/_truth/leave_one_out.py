from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PyTree

from .._checks import check_indices, require_concrete
from .._custom_types import Model
from .._risk import EmpiricalRisk
from .._train import AbstractTrainer
from .._validate import validate
from .retrain import erase, retrain


def leave_one_out(
    risk: EmpiricalRisk,
    model: Model,
    trainer: AbstractTrainer,
    *,
    indices=None,
    outcome: Callable[[Any], PyTree[Array]] | None = None,
    chunk_size: int | None = None,
) -> PyTree[Array]:
    """Ground truth: the models retrained without each point, or a function of them.

    ```python
    heldout_loss = lambda model: risk.losses(model, (Xq, yq))
    without = influx.leave_one_out(risk, model, influx.Newton(), outcome=heldout_loss)
    change = without - heldout_loss(model)                                      # [n, m]
    ```

    Row r minimises J(·, w) with w of point `indices[r]` set to 0: **1/n and Ω stay** (erase). Compare
    changes with `removal(f)`, or with −wᵢ I(i; m)/n. Every retraining starts at `model`.

    **Arguments:**

    - `model`: trained on `risk`; with `Newton()` any start finds the minimum of a convex risk, and a
      fitted one finds it fast.
    - `indices`: which points, each in 0…n−1; all by default.
    - `outcome`: a function of the retrained model (whole, where `risk` is restricted); by default all
      its parameters as one vector [P]. A function that is defined once compiles once.
    - `chunk_size`: retrainings at once; `None` fits them to a byte budget. Results do not depend on
      it, beyond rounding.

    **Returns:** the outcomes, stacked: leaves [k, ...].

    **Raises:** `ValueError` for indices out of range; `RuntimeError` naming the retrainings that did
    not converge.

    **Cost:** with `Newton()` one Hessian and its inverse, then some 5 gradients of J per point, all in
    one program.

    **Source:** the definition of influence's target: Cook & Weisberg, "Residuals and Influence in
    Regression" (1982).
    """
    require_concrete("leave_one_out", risk, model)
    risk = validate(risk, model)
    return retrain(
        risk,
        model,
        trainer,
        weigh=erase,
        lanes=check_indices(indices, risk.n),
        typical=risk.weights,
        outcome=outcome,
        chunk_size=chunk_size,
    )
