"""Influence through the training run itself: its derivative in the data weights."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import is_concrete
from .._chunks import Limits, even_length
from .._cost import cost_of
from .._custom_types import Model
from .._engine import Alternative, Piece, choose
from .._linalg import ravel
from .._risk import EmpiricalRisk
from .._train import SGD, check_trainer
from .base import AbstractResponse
from .reverse import pull, run


class Unrolled(eqx.Module):
    r"""R = ∂θ_T/∂w, the derivative of the training run that starts at the model given.

    ```python
    trainer = influx.SGD(optax.sgd(0.02, momentum=0.9), batch_size=250, epochs=10, key=jr.key(0))
    f = influx.influence(risk, model0, influx.Unrolled(trainer))
    f((Xq, yq))                     # [m, n]; f.model is the trained model
    ```

    I(i; m) = n · ∂m(θ_T(w))/∂wᵢ with the start, the order of the batches and every number of the
    optimiser held fixed: what `leave_subset_out(risk, model0, trainer, ...)` does to m, to first order.
    No minimum, convexity, curvature or damping is asked for. As a full-batch gradient descent on a
    strongly convex J gets longer it tends to the implicit response (P14); a short run does not answer as
    a minimum does, even one that starts there. Momentum, Adam, schedules, weight decay, clipping:
    whatever optax optimiser, as long as its update is differentiable where the run passes. Adam's is
    not where a gradient has always been 0, as of a pixel that is: give it an `eps_root` above 0.

    A derivative is taken at the risk's own weights. To foresee models from which a large share ρ of the
    points is erased, take it where they are on average: `risk.with_weights(np.full(n, 1 - ρ))`; models
    whose other points weigh 1/(1 − ρ) are on average at weights 1. Their steps follow the mean over
    the points that are left, exactly where a batch is all the data and else on average over batches.

    It is worth what the derivative is worth: a run may be so rough in its data weights that a tangent
    says nothing of removing a point. `diagnose` measures that (*metasmoothness*).

    **Arguments:** `trainer`: an `SGD`.

    **Cost:** the run, once, at `influence`; then per chunk of queries (or components of a
    vector measurement) a second run and as many Hessian products as it has steps, each for all: about
    2.6 runs for a single query. It keeps 2√T states of the T steps, and the order of the data.

    **Raises:** `ValueError` for a trainer that is no `SGD`; `RuntimeError` where the run diverges,
    or at a query where its derivative is not finite.

    **Source:** Maclaurin, Duvenaud & Adams, "Gradient-based Hyperparameter Optimization through
    Reversible Learning", arXiv:1502.03492; Hara, Nitanda & Maehara, "Data Cleansing for Models
    Trained with SGD", arXiv:1906.08473; Engstrom et al., "Optimizing ML Training with Metagradient
    Descent", arXiv:2503.13751.
    """

    trainer: SGD

    def __init__(self, trainer: Any):
        check_trainer(trainer)
        if not isinstance(trainer, SGD):
            raise ValueError(
                f"`Unrolled` differentiates a run step by step, and {type(trainer).__name__} ends at a "
                "minimum however it got there: the derivative of that is "
                "`influence(risk, fit(risk, model, trainer), Hessian())`. For a run of fixed steps use "
                "Unrolled(SGD(optimiser, batch_size=, epochs=, key=))."
            )
        self.trainer = trainer


class TrainingRun(AbstractResponse):
    """The response of `Unrolled`: the run, done once, with a state kept every √T steps."""

    risk: EmpiricalRisk
    model: Model
    trainer: SGD
    states: PyTree[Array]  # [segments, ...]: at the start of each
    batches: Int[Array, "segments steps B"]
    limits: Limits = eqx.field(static=True)

    def __init__(
        self,
        risk: EmpiricalRisk,
        model: Model,
        trainer: SGD,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ):
        self.risk, self.trainer, self.limits = risk, trainer, limits
        self.model, self.states, self.batches = run(trainer, risk, model)
        theta, _ = ravel(self.model)
        if is_concrete(theta) and not np.isfinite(np.asarray(theta)).all():
            raise RuntimeError(f"There is nothing to differentiate. {trainer.remedies()}")

    @property
    def start(self) -> Model:
        """The model that the run started from."""
        params, _ = jtu.tree_map(lambda x: x[0], self.states)
        return eqx.combine(params, self.model)

    def scheduled(self, measurement, query, queries, kept, limits):
        m = jax.eval_shape(lambda q: measurement(self.risk, self.model, q), query)
        cost = cost_of(lambda q, _: self.prepare(measurement, q), query, query)
        way = Alternative(
            lambda *_: self, (Piece(("all parameters",), "backwards through the run", cost),)
        )
        kept = max(1, m.size) * kept
        # Chunks are of queries: training points are never in any here.
        points = replace(limits, chunk_size=None)
        schedule = choose((way,), points, queries, self.risk.n, kept, m.dtype)
        if limits.chunk_size is not None:
            at_once = min(schedule.queries, even_length(queries, limits.chunk_size))
            schedule = replace(schedule, queries=at_once)
        return self, schedule

    def prepare(self, measurement, query):
        """All its scores: one pass backwards answers every training point."""
        rows = jnp.atleast_2d(measurement.gradient(self.risk, self.model, query))
        parts = self.trainer, self.risk, self.model, self.states, self.batches
        scores = self.risk.n * jax.vmap(lambda row: pull(*parts, row))(rows)
        lost = jnp.all(jnp.isfinite(rows)) & ~jnp.all(jnp.isfinite(scores))
        return eqx.error_if(scores, lost, _NO_DERIVATIVE)

    def columns(self, prepared, indices):
        return prepared if indices is None else prepared[:, indices]

    def quadratic(self, prepared):
        raise ValueError(_no_size("∇mᵀH⁻¹∇m"))

    def own(self, measurement, *, power=1):
        raise ValueError(_no_size("The influence of each training point on itself"))

    def solve(self, vectors):
        raise ValueError(_no_size("H⁻¹v"))

    def check_displace(self):
        raise ValueError(
            "A Newton step without a point needs a curvature, and an unrolled response has none. Use "
            '`removal(f, "first-order")` or `value(f, heldout)`, or retrain with `leave_one_out(risk, '
            "model0, trainer)`; with a curvature at the trained model: `influence(risk, f.model, "
            "GaussNewton())`."
        )

    def displace(self, indices):
        return self.check_displace()

    def check_path(self):
        raise ValueError(
            "The second order of a group needs a curvature, and an unrolled response has none. Use "
            "`groups(f, masks)`, the first order, or retrain with `leave_subset_out(risk, model0, "
            "trainer, masks=1 - masks)`; with a curvature at the trained model: "
            "`influence(risk, f.model, GaussNewton())`."
        )

    def path(self, lost):
        return self.check_path()

    def settle(self):
        return self.check_displace()


_NO_DERIVATIVE = (
    "The derivative of the training run is not finite. Either an update has none: Adam divides by √v, "
    "which is 0 where a gradient has always been 0 (a pixel that never changes), and needs "
    "`optax.adam(..., eps_root=1e-8)`; a norm that is clipped has none at 0. Or it grows at every step "
    '(`diagnose(f)["metasmoothness"]`): use a smaller learning rate or fewer epochs.'
)


def _no_size(what: str) -> str:
    return (
        f"{what} is not defined for an unrolled response: it has no curvature, and its own sᵢ would "
        "take a reverse run for each training point, and may be negative. Use "
        "`relative(f, Reference(i))`, or a curvature at the trained model: "
        "`influence(risk, f.model, GaussNewton())`."
    )
