"""Training that stops spending gradients on points that are mislabelled, or explained already."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_whole, require_concrete
from .._chunks import leading_length, take
from .._custom_types import Model, Where
from .._jacobian import head_features, output_jacobian
from .._restriction import restrict
from .._risk import EmpiricalRisk
from .._train import SGD
from .._validate import class_labels, class_logits_shape, require_labels, validate
from .evidence import score_margin
from .heldout import change, check_share, halves
from .removed import Removed, removed_table
from .ridge_head import ridge_head

# On the scale of the closed-form head's scores, where an exact fit gives a label 1. Fixed, with
# the defaults of `train_with_removal`, on rows and seeds that no benchmark reads.
CONTRADICTED, EXPLAINED = -0.15, 0.4
_RATE = 0.25  # of the explained points are trained on in an epoch
_FORWARD = 1 / 3  # of a gradient


class RemovalHistory(eqx.Module):
    """What `train_with_removal` did, a row an epoch.

    - `gradients`: example gradients spent so far, under the rule of `train_with_removal`
    - `trained`: points trained on in the epoch
    - `harmful`, `explained`: how many points were so at the last valuation
    - `heldout`: the mean probability of the deciding half's labels after the epoch
    - `valued`: whether the points were valued before the epoch
    - `plain`: the gradients of the trainer's own run
    - `returned`: the epoch whose model was returned
    - `watched`: `watch(model)` after each epoch, stacked; `None` without `watch`
    """

    gradients: Float[Array, " e"]
    trained: Int[Array, " e"]
    harmful: Int[Array, " e"]
    explained: Int[Array, " e"]
    heldout: Float[Array, " e"]
    valued: Bool[Array, " e"]
    plain: int
    returned: int
    watched: PyTree[Array]

    def __str__(self) -> str:
        columns = (self.gradients, self.trained, self.harmful, self.explained, self.heldout)
        names = "gradients", "trained", "harmful", "explained", "held-out p"
        head = "epoch " + " ".join(f"{name:>10}" for name in names)
        rows = [
            f"{e:>5} {g:>10.0f} {t:>10} {h:>10} {x:>10} {p:>10.4f}{' valued' if v else ''}"
            for e, (g, t, h, x, p, v) in enumerate(zip(*map(np.asarray, (*columns, self.valued))))
        ]
        share = float(self.gradients[-1]) / self.plain
        last = f"returned: epoch {self.returned}; {share:.0%} of the gradients of the plain run"
        return "\n".join([head, *rows, last])


class TrainedWithRemoval(eqx.Module):
    """What `train_with_removal` answers: the `model`, the mask `kept` [n] of points that are not harmful
    at the last valuation, the `history`, and the table `removed` of the others."""

    model: Model
    kept: Bool[Array, " n"]
    history: RemovalHistory
    removed: Removed


class _Verdicts(NamedTuple):
    """Margins and values averaged over the valuations so far, and what follows from them."""

    margin: Float[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    present: Bool[np.ndarray, " n"]

    @property
    def harmful(self) -> Bool[np.ndarray, " n"]:
        contradicted = (self.margin < CONTRADICTED) | ((self.margin < 0) & (self.value <= 0))
        return self.present & contradicted

    @property
    def explained(self) -> Bool[np.ndarray, " n"]:
        return self.present & (self.margin > EXPLAINED)


def train_with_removal(
    risk: EmpiricalRisk,
    model0: Model,
    trainer: SGD,
    *,
    heldout: PyTree[Array],
    head: Where,
    budget: float = 0.5,
    warmup: int = 6,
    every: int = 3,
    watch: Callable[[Model], PyTree[Array]] | None = None,
) -> TrainedWithRemoval:
    r"""Train a classifier on the points that help it, at a share of the gradients.

    ```python
    trainer = influx.SGD(optax.sgd(0.02, momentum=0.9), batch_size=50, epochs=30, key=jr.key(0))
    trained = influx.train_with_removal(
        risk, model0, trainer, heldout=(Xh, yh), head=lambda m: m.layers[-1]
    )
    trained.model, trained.kept; print(trained.history, trained.removed)
    ```

    After `warmup` plain epochs, and then every `every` epochs, all points are valued: `head` is refitted
    by least squares on its features, which gives each point's *margin without it* (its label's score
    minus the best other one's: 1 where the fit is exact) and its *value* (the influence on the mean
    score that held-out points give to their labels), exactly for a ridge that stays what it is, at the
    cost of a d × d inverse. Both are averaged with those of earlier valuations, half and half. A point
    is

    - *harmful*, and not trained on, where the margin without it is below −0.15, or is below 0 and its
      value is not positive: the others contradict its label, and held-out data do not need it;
    - *explained* where that margin exceeds 0.4: each is trained on with a chance of a quarter, drawn
      anew for an epoch.

    Every valuation judges all points again, so that removed ones may return; the head is refitted on
    those that it does not contradict. Mini-batches are full ones of the trainer's size, of the points
    that are trained on: no gradient is computed and then masked. Their mean *renormalises* (a plain mean
    over the points left). Labels are never changed.

    **Held-out data in two halves**: rows 0, 2, 4, … value the points, rows 1, 3, 5, … pick the epoch
    whose model is returned: the last one whose mean probability of their labels is within a standard
    error (of the paired difference) of the best so far, since the best of many on so few points is luck.
    Both measures are linear in scores or probabilities: held-out labels may be as noisy as the training
    labels.

    **Gradients spent**, in gradients of one example: 1 for each example of a mini-batch, 1 for each
    point and held-out point valued (a forward pass is a third of a gradient, and the closed form costs
    O(d²) a point), ⅓ for each held-out point an epoch. The last epoch is cut short where
    `budget` times the trainer's own run is spent.

    **Arguments:** `head`: selects the last linear layer, as in `restrict`; `budget`: as above, in
    (0, 1); `watch`: any function of the model, whose arrays after each epoch are stacked in
    `history.watched` and decide nothing. Data weights count in mini-batches and in the head.

    **Raises:** `ValueError` where `trainer` is no `SGD`, `head` selects no linear layer with one feature
    vector for all outputs, the loss has no classes, held-out data are missing or unlike the training
    data, or `budget` does not reach beyond the warm-up; `RuntimeError` where training diverges, or no
    batch is left to train on.

    **Limits.** Points that the others contradict are not all mislabelled: on clean labels some hard and
    right ones go too, and half the gradients do not always reach what the whole plain run does.

    **Source:** Kounavis, Dia & Ramazanli, arXiv:2305.16094 (removal as part of learning); the rule is
    this project's own. Cook & Weisberg, "Residuals and Influence in Regression" (1982), for the exact
    margins.
    """
    budget = check_share(budget, "budget", "the share of the plain run's gradients to spend")
    if not isinstance(trainer, SGD):
        raise ValueError(
            f"`train_with_removal` takes steps of `influx.SGD(...)`, got {trainer!r}. With Newton() or "
            "LBFGS() use `prune`."
        )
    if watch is not None and not callable(watch):
        raise ValueError(f"`watch` must be a function of the model, or None; got {watch!r}.")
    warmup, every = check_whole("warmup", warmup), check_whole("every", every)
    require_concrete("train_with_removal", risk, model0)
    risk = validate(risk, model0)
    choosing, deciding = halves(risk, model0, heldout)
    _check_classifier(risk, model0, head)
    if watch is not None:
        _check_watched(watch(model0))
    run = _Run(
        risk, trainer, head, choosing, deciding, np.asarray(risk.weights) > 0, watch or _nothing
    )
    return _train(run, model0, budget, warmup, every)


def _check_watched(found: PyTree) -> None:
    leaves = jtu.tree_leaves(found)
    if not all(eqx.is_array_like(leaf) for leaf in leaves):
        kinds = ", ".join(
            sorted({type(leaf).__name__ for leaf in leaves if not eqx.is_array_like(leaf)})
        )
        raise ValueError(
            "`watch` must answer arrays or numbers, to be stacked over epochs; got a pytree with leaves "
            f"of type {kinds}. To keep a model: `lambda m: eqx.filter(m, eqx.is_array)`."
        )


def _nothing(model: Model) -> None:
    return None


def _check_classifier(risk: EmpiricalRisk, model: Model, head: Where) -> None:
    class_logits_shape(risk, model)
    require_labels(risk)
    small, part = restrict(risk, model, head)
    few = take(risk.data[0], jnp.arange(min(risk.n, 16)))
    if not output_jacobian(small, part, few).closed_form:
        raise ValueError(
            "`head` must select the last linear layer, whose outputs are the class logits: with weight "
            "[C, d] (and bias [C]) on one feature vector. For instance `head=lambda m: m.layers[-1]`."
        )


class _Run(NamedTuple):
    """What does not change from epoch to epoch."""

    risk: EmpiricalRisk
    trainer: SGD
    head: Where
    choosing: PyTree[Array]
    deciding: PyTree[Array]
    present: Bool[np.ndarray, " n"]
    watch: Callable[[Model], PyTree[Array]]

    def batches(self, epoch: int, active: Bool[np.ndarray, " n"]) -> tuple[Array, int]:
        """The epoch's order of the active points, filled up to length n, and its full batches."""
        key = jr.fold_in(self.trainer.key, epoch)
        order = np.asarray(jr.permutation(key, self.risk.n))
        order = np.concatenate([order[active[order]], order[~active[order]]])
        return jnp.asarray(order), int(active.sum()) // self.trainer.batch_size

    def active(self, epoch: int, found: _Verdicts | None) -> Bool[np.ndarray, " n"]:
        if found is None:
            return self.present
        key = jr.fold_in(jr.fold_in(self.trainer.key, epoch), 1)
        drawn = np.asarray(jr.uniform(key, (self.risk.n,))) < _RATE
        return self.present & ~found.harmful & (~found.explained | drawn)

    @property
    def valuation(self) -> int:
        """The gradients that valuing all points once counts as."""
        return int(self.present.sum()) + leading_length(self.choosing)


class _Epoch(NamedTuple):
    """A row of the history."""

    gradients: float
    trained: int
    harmful: int
    explained: int
    heldout: float
    valued: bool
    watched: PyTree[Array]


def _train(run: _Run, model0: Model, budget: float, warmup: int, every: int) -> TrainedWithRemoval:
    size = run.trainer.batch_size
    params, static = eqx.partition(model0, eqx.is_inexact_array)
    state, found = run.trainer.start(params), None
    plain = run.trainer.epochs * run.trainer.batches(run.risk.n, jnp.asarray(0)).size
    check = _FORWARD * leading_length(run.deciding)
    _check_budget(run, budget * plain, warmup, check)
    spent, best, returned, epochs = 0.0, None, (0, params), []
    for epoch in itertools.count():
        cost, valued = check, epoch >= warmup and (epoch - warmup) % every == 0
        cost += run.valuation * valued
        affordable = int(budget * plain - spent - cost) // size
        if affordable < 1:
            break
        verdicts = _revalue(run, eqx.combine(state[0], static), found) if valued else found
        order, steps = run.batches(epoch, run.active(epoch, verdicts))
        if steps == 0:  # fewer points are left than a batch takes
            break
        found, steps = verdicts, min(steps, affordable)
        state = _epoch(run.trainer, run.risk, static, state, order, jnp.asarray(steps))
        spent += cost + steps * size
        p = _probabilities(run.risk, eqx.combine(state[0], static), run.deciding)
        if not bool(jnp.all(jnp.isfinite(p))):
            raise RuntimeError(f"Training diverged in epoch {epoch}. {run.trainer.remedies()}")
        best = p if best is None or jnp.mean(p) > jnp.mean(best) else best
        fall, error = change(p, best)
        returned = (epoch, state[0]) if fall <= error else returned
        harmful, explained = (
            (0, 0) if found is None else (found.harmful.sum(), found.explained.sum())
        )
        watched = run.watch(eqx.combine(state[0], static))
        heldout = float(jnp.mean(p))
        epochs.append(
            _Epoch(spent, steps * size, int(harmful), int(explained), heldout, valued, watched)
        )
    if found is None:
        raise RuntimeError(
            f"Of {int(run.present.sum())} points fewer than `batch_size={size}` are left once harmful "
            "and explained ones are set aside, so that nothing was trained without them. Use a smaller "
            "batch, or check the labels: harmful are points that the others contradict."
        )
    chosen, params = returned
    return _answer(run, eqx.combine(params, static), found, epochs, plain, chosen)


def _check_budget(run: _Run, budget: float, warmup: int, check: float) -> None:
    size, present = run.trainer.batch_size, int(run.present.sum())
    if present < size:
        raise ValueError(
            f"`batch_size` is {size}, and only {present} training points have a weight above 0. Use "
            f"batch_size={present} at most."
        )
    first = warmup * (present // size * size + check)
    if budget < first + run.valuation + check + size:
        raise ValueError(
            f"The budget is {budget:.0f} gradients, and {warmup} plain epochs with one valuation after "
            f"them spend {first + run.valuation:.0f}: nothing would be removed. Raise `budget` or the "
            "trainer's epochs, or lower `warmup`."
        )


@eqx.filter_jit
def _epoch(trainer: SGD, risk: EmpiricalRisk, static, state, order: Int[Array, " n"], steps):
    """As many full batches of `order` as `steps` says, as a number held in an array."""

    def step(i, state):
        batch = jax.lax.dynamic_slice(order, (i * trainer.batch_size,), (trainer.batch_size,))
        return trainer.step(risk, static, risk.weights, state, batch)

    return jax.lax.fori_loop(0, steps, step, state)


@eqx.filter_jit
def _probabilities(risk: EmpiricalRisk, model: Model, data: PyTree[Array]) -> Float[Array, " m"]:
    """The probability of each label of `data`."""

    def one(example):
        logits = risk.loss.class_logits(risk.output(model, example[0]))
        return jax.nn.softmax(logits)[class_labels(example[1])[0]]

    return jax.vmap(one)(data)


def _revalue(run: _Run, model: Model, before: _Verdicts | None) -> _Verdicts:
    kept = run.present if before is None else run.present & (before.margin >= 0)
    small, part = restrict(run.risk, model, run.head)
    weights = run.risk.weights * jnp.asarray(kept, run.risk.weights.dtype)
    margin, value = map(np.asarray, _margins(small, part, weights, run.choosing))
    if before is not None:
        margin, value = 0.5 * (before.margin + margin), 0.5 * (before.value + value)
    return _Verdicts(margin, value, run.present)


@eqx.filter_jit
def _margins(small: EmpiricalRisk, part: Model, weights, choosing: PyTree[Array]):
    """Margins without each point and values, by a head refitted on the points that a first one, on
    those of positive weight, does not contradict."""
    labels = class_labels(small.data[1])
    features = head_features(small, part, small.data[0])
    others = head_features(small, part, choosing[0]), class_labels(choosing[1])
    classes = class_logits_shape(small, part).shape[0]
    first = ridge_head(features, labels, weights, others, classes)
    agreed = score_margin(first.without, labels) >= 0
    kept = small.weights * agreed.astype(weights.dtype)
    second = ridge_head(features, labels, kept, others, classes)
    return score_margin(second.without, labels), second.value


def _answer(
    run: _Run, model: Model, found: _Verdicts, epochs: list[_Epoch], plain: int, returned: int
) -> TrainedWithRemoval:
    columns = jtu.tree_map(lambda *x: jnp.stack([jnp.asarray(each) for each in x]), *epochs)
    reason = "the others contradict its label: margin without it"
    table = removed_table(run.risk, model, found.harmful, found.margin, reason)
    kept = jnp.asarray(run.present & ~found.harmful)
    history = RemovalHistory(**columns._asdict(), plain=plain, returned=returned)
    return TrainedWithRemoval(model, kept, history, table)
