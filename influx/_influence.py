"""Influence = risk × response × measurement × scale × effect: the module that transforms rewrite."""

from dataclasses import replace

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, PyTree

from ._checks import check_chunk, check_memory
from ._chunks import Limits, chunked_map, leading_length, map_blocks, row_struct, take
from ._curvature import AbstractCurvature, Hessian, check_curvature
from ._custom_types import Model, Scores
from ._effect import AbstractEffect, Derivative, SecondOrder
from ._engine import Schedule
from ._linalg import dot
from ._measurement import AbstractMeasurement, Loss
from ._response import AbstractResponse, Implicit, TrainingRun, Unrolled
from ._risk import EmpiricalRisk
from ._scale import AbstractScale, Unscaled
from ._validate import validate


class Influence(eqx.Module):
    """Influence of every training point on a measurement: call it with queries.

    Made by `influence` and rewritten by the transforms `classification`, `measure`, `relative`,
    `removal` and `groups`, each of which answers another `Influence` sharing the same factored
    curvature. A pytree: it may be saved, donated and passed through `eqx.filter_jit`.
    """

    response: AbstractResponse
    measurement: AbstractMeasurement
    scale: AbstractScale
    effect: AbstractEffect
    masks: Float[Array, "k n"] | None
    order: int = eqx.field(static=True, default=1)  # of groups, in the data weights

    def __call__(self, queries: PyTree[Array]) -> Scores:
        """Scores of all pairs.

        **Arguments:** `queries`: `(inputs, targets)` like the training data, with m rows; for
        `measure(f, fn)` any pytree of arrays with a leading axis of m.

        **Returns:** [m, n], columns = training points; [m, c, n] for a vector measurement; [m, k] or
        [m, c, k] for k groups. Unit and sign are those of `influence`, unless a transform changed
        them. NaN stands only where a relative influence is undefined (0/0).

        **Raises:** `ValueError` for queries that the measurement cannot take.
        """
        self.measurement.check(self.risk, self.model, queries)
        return _scores(self, queries)

    @property
    def risk(self) -> EmpiricalRisk:
        """What was trained."""
        return self.response.risk

    @property
    def model(self) -> Model:
        """Its minimiser θ̂, or the model at the end of the run."""
        return self.response.model

    @property
    def undefined(self) -> Bool[Array, " n"]:
        """Training points whose relative influence is 0/0, and stands as NaN in the scores."""
        return self.scale.undefined(self.risk.n)


def influence(
    risk: EmpiricalRisk,
    model: Model,
    curvature: AbstractCurvature | Unrolled = Hessian(),  # noqa: B008  (frozen)
    *,
    chunk_size: int | None = None,
    memory: int | None = None,
) -> Influence:
    r"""I(i; m) = n · ∂m(θ̂(w))/∂wᵢ = −∇mᵀ (H + λI)⁻¹ gᵢ, with m the loss of a query.

    ```python
    f = influx.influence(risk, model, influx.Hessian())
    f((Xq, yq))                     # [m, n]
    ```

    **Sign.** Positive: training *more* on point i raises m. For a loss: negative is helpful, positive
    harmful. Removing point i changes m by about −wᵢ I(i; m)/n: see `removal`.

    **Arguments:**

    - `risk`, `model`: what was trained, and its minimiser θ̂. The model is not retrained; whether it
      is at a minimum, `diagnose` says. With `Unrolled(trainer)`: the model that training starts from.
    - `curvature`: `Hessian`, `GaussNewton`, `Fisher`, `KFAC`, `EKFAC`, `BlockDiagonal`, `Mixture`,
      `Diagonal`, `Identity`, or one behind its products (`CG`, `MINRES`, `Neumann`, `Arnoldi`,
      `Nystrom`, `Projected`). Formed and factored here, once. `Unrolled(trainer)` has none:
      it trains, here and once, and differentiates that run.
    - `chunk_size`: training points at a time (`Unrolled`: queries); by default what fits `memory`.
    - `memory`: bytes that the temporaries of scoring may take, beside the scores themselves; by default
      256 MiB, or twice what a given `chunk_size` takes with one query, where that is more. It bounds
      queries and training points at a time, not what the curvature takes to be formed. Scores depend on
      neither; `plan(f, queries)` prints what was chosen.

    **Raises:** `ValueError` where risk and model do not fit (see `EmpiricalRisk`), or the curvature is
    indefinite or singular; on a call, where `memory` does not hold one query's share of the work.

    **Cost:** that of the curvature, once; then, per call, m solves and one pass over the training data;
    with a `tolerance`, `KFAC` and `EKFAC` take products of small matrices in place of solves.

    **Source:** Koh & Liang, "Understanding Black-box Predictions via Influence Functions",
    arXiv:1703.04730 (their I_up,loss); Kounavis, Dia & Ramazanli, arXiv:2305.16094.
    """
    limits = Limits(check_chunk(chunk_size), check_memory(memory))
    if isinstance(curvature, Unrolled):
        risk = validate(risk, model)
        response = TrainingRun(risk, model, curvature.trainer, limits=limits)
    else:
        check_curvature(curvature)
        risk = validate(risk, model)
        response = Implicit(risk, model, curvature, limits=limits)
    return Influence(response, Loss(), Unscaled(), Derivative(), None)


def check_influence(verb: str, f: Influence) -> None:
    """What a verb or transform takes is an `Influence`."""
    if not isinstance(f, Influence):
        raise ValueError(
            f"`{verb}` takes what `influx.influence(risk, model, ...)` answers, got {type(f).__name__}."
        )


@eqx.filter_jit
def _scores(f: Influence, queries: PyTree[Array]) -> Scores:
    f, schedule = scheduled(f, queries)

    def one(prepared):
        scores = f.effect.columns(f, prepared, None)
        return scores if f.masks is None else dot(scores, f.masks.T)

    answers = lambda block: jax.vmap(one)(prepared_queries(f, schedule, block))
    rows = lambda indices: answers(take(queries, indices))
    return map_blocks(rows, leading_length(queries), schedule.queries)


def prepared_queries(f: Influence, schedule: Schedule, queries: PyTree[Array]) -> PyTree[Array]:
    """What each query of a block needs once, with few of them worked on at a time."""
    return chunked_map(lambda query: f.effect.prepare(f, query), queries, schedule.prepared)


def scheduled(
    f: Influence, queries: PyTree[Array], kept: int | None = None, limits: Limits | None = None
) -> tuple[Influence, Schedule]:
    """f, ready to score these queries in the cheapest way within its limits (or others), and what was
    chosen.

    `kept` numbers are kept of each component's scores, n by default. Nothing but shapes is looked at.
    """
    query = row_struct(queries)
    kept = f.risk.n if kept is None else kept
    limits = f.response.limits if limits is None else limits
    if f.masks is not None and f.order == 2:
        f = replace(f, effect=SecondOrder(f.effect, f.masks), masks=None)
    return f.effect.scheduled(f, query, leading_length(queries), kept, limits)
