"""Fewer parameters: a map from a risk to a risk (theory: P9)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._custom_types import Model, Where
from ._risk import EmpiricalRisk, l2_tree, validate


class Whole(eqx.Module):
    """Puts a part back into the model it was taken from, whose other leaves stay frozen."""

    model: Model
    where: Where = eqx.field(static=True)
    outer: Callable[[Any], Any]

    def __call__(self, part: Model) -> Model:
        return self.outer(eqx.tree_at(self.where, self.model, part, is_leaf=lambda x: x is None))


def restrict(risk: EmpiricalRisk, model: Model, where: Where) -> tuple[EmpiricalRisk, Model]:
    """The same problem in the parameters that `where` selects; the others are frozen.

    ```python
    small, small_model = influx.restrict(risk, model, lambda m: m.layers[-1])
    f = influx.influence(small, small_model, influx.GaussNewton())
    ```

    With θ = (φ, ψ) and ψ kept, its influence is I_ψ = −m_ψᵀ H_ψψ⁻¹ g_ψ: exactly the influence in a
    model whose φ is frozen (P9a). How far it is from the full one, `restriction_bound` encloses.

    **Arguments:** `where` selects a part of `model`, as in `equinox.tree_at`; a tuple of parts too.

    **Returns:** `(small, small_model)`: the restricted risk, and the selected part. Measurements
    still see the rebuilt whole model.

    **Raises:** `ValueError` where `where` selects nothing that holds parameters.

    **Source:** Koh & Liang, "Understanding Black-box Predictions via Influence Functions",
    arXiv:1703.04730, for the last layer; the bound is this project's (P9).
    """
    validate(risk, model)
    params = eqx.filter(model, eqx.is_inexact_array)
    try:
        part = where(model)
        small_l2 = where(l2_tree(risk.l2, params))
        whole = Whole(model, where, risk.whole)
        whole(part)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`where` must select a part of the model, as in `lambda m: m.layers[-1]`: {error}"
        ) from error
    if not jtu.tree_leaves(eqx.filter(part, eqx.is_inexact_array)):
        raise ValueError(
            "`where` selects nothing that holds parameters. Select a layer or an array, "
            "e.g. `lambda m: m.layers[-1]` or `lambda m: m.layers[-1].weight`."
        )
    leaves, structure = jtu.tree_flatten(params)
    chosen = jtu.tree_leaves(where(jtu.tree_unflatten(structure, range(len(leaves)))))
    if len(set(chosen)) < len(chosen):
        raise ValueError("`where` selects a parameter twice. Name each layer or array once.")
    small = EmpiricalRisk(
        risk.data,
        risk.loss,
        l2=small_l2,
        weights=risk.weights,
        predict=risk.predict,
        whole=whole,
    )
    return small, part
