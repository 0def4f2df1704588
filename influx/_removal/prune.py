"""Fit, value each point, remove the harmful ones, refit: with what was predicted and what came of it."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_whole, require_concrete
from .._chunks import leading_length
from .._curvature import AbstractCurvature, Hessian, check_curvature
from .._custom_types import Model
from .._influence import Influence, influence
from .._linalg import ravel
from .._risk import EmpiricalRisk
from .._train import AbstractTrainer, check_trainer
from .._train.fit import fitted
from .._validate import validate
from .._value import Value, value
from .heldout import change, check_share, halves
from .removed import Removed, removed_table

OUTCOMES = (
    "accepted",
    "refused: the deciding half predicts no fall",
    "refused: the actual change left the trust region",
    "refused: the fall is within its standard error",
)
ENDS = (
    "nothing left that is harmful beyond two standard errors",
    "the budget is spent",
    "every step was refused, down to a single point",
    "the rounds are spent",
)
_ACCEPTED, _NO_FALL, _LEFT_TRUST, _WITHIN_ERROR = range(len(OUTCOMES))
_NOTHING_LEFT, _BUDGET, _ALL_REFUSED, _ROUNDS = ENDS
_WIDEN = 0.25  # of a prediction that was this near, the next step is twice as large


class PruneHistory(eqx.Module):
    """What `prune` tried, a row a step; changes are of the mean held-out loss.

    - `removed`: points the step took out; `total`: those out after it
    - `promised`: Σ wᵢGᵢ/n on the choosing half, which was sought out and so promises too much
    - `predicted`: one Newton step without the points, evaluated on the deciding half
    - `actual`: after refitting, on the deciding half; NaN where the step was refused before a refit
    - `standard_error`: that of `actual`, a mean of paired differences
    - `outcome`: 0 accepted; refused, since 1 the deciding half predicts no fall, 2 the ratio left the
      trust region, 3 the fall is within its standard error
    - `gradients`: example gradients spent so far: trainer steps times the examples of a step, one
      per point and held-out point at each valuation, one per point at each prediction, a third per
      forward pass. Factorizations of the curvature are not gradients, and not counted.
    - `spent`: all of them, the last valuation included
    - `end`: why pruning ended
    """

    removed: Int[Array, " t"]
    total: Int[Array, " t"]
    promised: Float[Array, " t"]
    predicted: Float[Array, " t"]
    actual: Float[Array, " t"]
    standard_error: Float[Array, " t"]
    outcome: Int[Array, " t"]
    gradients: Float[Array, " t"]
    spent: float
    end: str = eqx.field(static=True)

    @property
    def ratio(self) -> Float[Array, " t"]:
        """actual / predicted: 1 where the prediction held."""
        return self.actual / self.predicted

    def __str__(self) -> str:
        columns = (self.removed, self.total, self.promised, self.predicted, self.actual, self.ratio)
        head = f"{'removed':>7} {'total':>6} {'promised':>9} {'predicted':>9} {'actual':>9} {'ratio':>6}"
        rows = [
            f"{r:>7} {t:>6} {p:>+9.4f} {q:>+9.4f} {a:>+9.4f} {x:>6.2f}  {OUTCOMES[o]}"
            for r, t, p, q, a, x, o in zip(*map(np.asarray, (*columns, self.outcome)))
        ]
        return "\n".join([head, *rows, f"ended: {self.end}"])


class Pruned(eqx.Module):
    """What `prune` answers: the `model`, the mask `kept` [n], the `history`, and the table `removed`."""

    model: Model
    kept: Bool[Array, " n"]
    history: PruneHistory
    removed: Removed


class _Fitted(NamedTuple):
    """A model, the data weights it was fitted at, and the example gradients spent until then."""

    weights: Float[Array, " n"]
    model: Model
    gradients: float


class _Step(NamedTuple):
    """A row of the history."""

    removed: int
    total: int
    promised: float
    predicted: float
    actual: float
    standard_error: float
    outcome: int
    gradients: float


class _Problem(NamedTuple):
    """What does not change from step to step."""

    risk: EmpiricalRisk
    start: Model
    trainer: AbstractTrainer
    curvature: AbstractCurvature
    choosing: PyTree[Array]
    deciding: PyTree[Array]

    def fit(self, weights: Float[Array, " n"], spent: float) -> _Fitted:
        model, trained = fitted(self.risk.with_weights(weights), self.start, self.trainer)
        read = float(trained.steps) * self.trainer.examples(self.risk.n)
        return _Fitted(weights, model, spent + read)

    def at(self, weights: Float[Array, " n"], model: Model) -> Influence:
        return influence(self.risk.with_weights(weights), model, self.curvature)


def prune(
    risk: EmpiricalRisk,
    model: Model,
    trainer: AbstractTrainer,
    *,
    heldout: PyTree[Array],
    budget: float = 0.5,
    step: float = 0.05,
    trust: float = 0.25,
    rounds: int = 40,
    curvature: AbstractCurvature = Hessian(),  # noqa: B008  (frozen)
) -> Pruned:
    r"""Remove training points that harm the model, as long as held-out data confirm it.

    ```python
    pruned = influx.prune(risk, model, influx.Newton(), heldout=(Xh, yh))
    print(pruned.history, pruned.removed)
    ```

    A round fits `model`, takes the `value` Gᵢ of each point, and tries to remove the most harmful
    ones, harmful by more than two standard errors, at most k of them. It predicts the change of
    held-out loss by one Newton step under the new weights, refits, and measures the change. With
    ρ = actual/predicted as in trust-region methods, the step is

    - *accepted* where the prediction is a fall, ρ ≥ `trust`, and the fall is more than its standard
      error; k doubles where all k were taken and |ρ − 1| ≤ ¼;
    - *refused* otherwise, by name: the points return, and the next step tries half as many.

    It ends where nothing harmful is left, the budget or the rounds are spent, or a single point was
    refused.

    **Held-out data in two halves.** Rows 0, 2, 4, … choose the points, rows 1, 3, 5, … decide: they
    give `predicted` and `actual`. Read on the half that chose, the loss falls by chance as well.
    Repeated decisions wear out the second half slowly; report results on data that took no part.
    Held-out labels with the same noise as the training labels serve, if less well: for a proper loss
    such data reward an unsure model.

    Removal sets data weights to 0 (1/n and l2 stay); the caller's data are not touched. Every refit
    starts at `model`, so that runs of `SGD` see the same batches and differ in the weights alone.

    **Arguments:** `budget`: the largest share of the points that may go; `step`: the first k, as a
    share; `trust`: the least ρ; `rounds`: the most steps tried; `curvature`: as in `influence`
    (`GaussNewton` with damping for networks).

    **Raises:** `ValueError` for held-out data that are missing or unlike the training data, fewer
    than 4 of them, and shares outside (0, 1); `RuntimeError` where the trainer does not converge.

    **Cost:** a step is a fit, two factored curvatures and |V|/2 solves.

    **Source:** Koh & Liang, arXiv:1703.04730, for the values; Conn, Gould & Toint, "Trust-Region
    Methods" (2000), for the ratio; Kounavis, Dia & Ramazanli, arXiv:2305.16094, for the aim.
    """
    check_trainer(trainer)
    check_curvature(curvature)
    budget = check_share(budget, "budget", "the largest share of the points to remove")
    step = check_share(step, "step", "the share of the points that the first step removes")
    trust = check_share(trust, "trust", "the least ratio of actual to predicted change")
    rounds = check_whole("rounds", rounds)
    require_concrete("prune", risk, model)
    risk = validate(risk, model)
    choosing, deciding = halves(risk, model, heldout)
    most = _points(budget, risk.n)
    if most == 0:
        raise ValueError(
            f"`budget={budget:g}` of {risk.n} points is none: nothing would be removed. A single point "
            f"is the share 1 / {risk.n}."
        )
    problem = _Problem(risk, model, trainer, curvature, choosing, deciding)
    return _descend(problem, most, max(1, _points(step, risk.n)), trust, rounds)


def _points(share: float, n: int) -> int:
    """The points in a share of n, of which k/n are k, however it rounds."""
    return int(share * n * (1 + 1e-12))


def _descend(problem: _Problem, most: int, k: int, trust: float, rounds: int) -> Pruned:
    """Steps of at most k points, until one of the four ends."""
    risk = problem.risk
    now, steps, end = problem.fit(risk.weights, 0.0), [], _ROUNDS
    scores = np.full(risk.n, np.nan)
    now, f, valued = _valued(problem, now)
    while len(steps) < rounds:
        gains = np.asarray(now.weights * valued.value)  # removing i changes the loss by this / n
        harmful = np.flatnonzero((np.asarray(valued.verdict) == 1) & (gains < 0))
        left = most - int(np.sum(np.asarray(now.weights != risk.weights)))
        chosen = harmful[np.argsort(gains[harmful], kind="stable")][: min(k, left)]
        if chosen.size == 0:
            end = _NOTHING_LEFT if harmful.size == 0 else _BUDGET
            break
        promised = gains[chosen].sum() / risk.n
        now, step = _try(problem, f, now, chosen, promised, trust)
        steps.append(step)
        if step.outcome == _ACCEPTED:
            scores[chosen] = np.asarray(valued.value)[chosen]
            near = abs(step.actual / step.predicted - 1) <= _WIDEN
            k = 2 * k if near and chosen.size == k else k
            now, f, valued = _valued(problem, now)
        elif chosen.size == 1:
            end = _ALL_REFUSED
            break
        else:  # model and values are what they were
            k = chosen.size // 2
    return _answer(problem, now, steps, scores, end)


def _valued(problem: _Problem, now: _Fitted) -> tuple[_Fitted, Influence, Value]:
    f = problem.at(now.weights, now.model)
    cost = problem.risk.n + leading_length(problem.choosing)
    return now._replace(gradients=now.gradients + cost), f, value(f, problem.choosing)


def _try(
    problem: _Problem, f: Influence, now: _Fitted, chosen, promised: float, trust: float
) -> tuple[_Fitted, _Step]:
    """The state after an attempt to remove `chosen`, and the attempt's row of the history."""
    risk, deciding = problem.risk, problem.deciding
    weights = now.weights.at[chosen].set(0)
    predicted = float(_newton_change(f, problem.at(weights, now.model), deciding))
    now, actual, error = now._replace(gradients=now.gradients + risk.n), np.nan, np.nan
    outcome = _NO_FALL
    if predicted < 0:
        trial = problem.fit(weights, now.gradients + 2 * leading_length(deciding) / 3)
        losses = lambda model: risk.losses(model, deciding)
        actual, error = map(float, change(losses(now.model), losses(trial.model)))
        now = now._replace(gradients=trial.gradients)
        if actual / predicted < trust:
            outcome = _LEFT_TRUST
        elif actual > -error:
            outcome = _WITHIN_ERROR
        else:
            outcome, now = _ACCEPTED, trial
    total = int(np.sum(np.asarray(now.weights != risk.weights)))
    return now, _Step(
        chosen.size, total, promised, predicted, actual, error, outcome, now.gradients
    )


@eqx.filter_jit
def _newton_change(f: Influence, without: Influence, data: PyTree[Array]) -> Float[Array, ""]:
    """L(θ̂ + Δ) − L(θ̂ + δ₀): one Newton step under the new weights against one under the old ones,
    so that what is left of training is not counted as an effect of the removal (P10)."""
    theta, rebuild = ravel(f.model)
    loss = lambda g: jnp.mean(g.risk.losses(rebuild(theta + g.response.settle()), data))
    return loss(without) - loss(f)


def _answer(problem: _Problem, now: _Fitted, steps: list[_Step], scores, end: str) -> Pruned:
    columns = {
        name: jnp.asarray([getattr(step, name) for step in steps], kind)
        for name, kind in _Step.__annotations__.items()
    }
    history = PruneHistory(**columns, spent=now.gradients, end=end)
    table = removed_table(problem.risk, now.model, ~np.isnan(scores), scores, "harmful: value")
    return Pruned(now.model, now.weights > 0, history, table)
