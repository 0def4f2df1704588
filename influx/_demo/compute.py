"""Everything the demo finds, as pure functions of its problem; nothing is printed or written."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.nn as jnn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import influx as ix

from .._agreement import Agreement, agreement
from .._chunks import take
from .._removal.evidence import logits_without
from .problem import Config, Problem, load

STAGES = (
    "Fitting by Newton",
    "Factoring the Hessian",
    "Memorization labels",
    "Certificates",
    "Value on held-out digits",
    "Training points behind test digits",
    "Predicting removals",
    "Retraining without single points",
    "Removing harmful points and refitting",
)


@dataclass(frozen=True)
class Examples:
    """Test digits, and the training points with the most extreme influence on their loss."""

    indices: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray
    top: ix.TopK


@dataclass(frozen=True)
class Retraining:
    """Removals predicted and carried out, per held-out digit and retrained point, [heldout, k].

    `changes[method, measurement]` are predicted ("first-order", "newton") or "actual" changes of
    "loss" or "margin"; `margin_without` is each retrained point's own margin, [k].
    """

    points: np.ndarray
    changes: dict[tuple[str, str], np.ndarray]
    margin_without: np.ndarray

    def agreement(self, method: str, measurement: str) -> Agreement:
        return agreement(self.changes[method, measurement], self.changes["actual", measurement])


@dataclass(frozen=True)
class Ranking:
    """How many flipped labels stand among the first `k` points of an order."""

    first: tuple[int, ...]
    by_margin_without: tuple[int, ...]
    by_margin: tuple[int, ...]
    by_chance: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """A fitted model on held-out and test digits; `removed` points were left out of its training."""

    removed: np.ndarray
    heldout_loss: float
    heldout_accuracy: float
    test_losses: np.ndarray
    test_correct: np.ndarray

    @property
    def test_loss(self) -> float:
        return float(self.test_losses.mean())

    @property
    def test_accuracy(self) -> float:
        return float(self.test_correct.mean())

    def loss_change(self, before: "Quality") -> tuple[float, float]:
        """Mean change of the test loss, and its standard error over the test digits (paired)."""
        change = self.test_losses - before.test_losses
        return float(change.mean()), float(change.std(ddof=1) / np.sqrt(change.size))


@dataclass(frozen=True)
class Results:
    """What `run` found. Arrays over training points are in the order of `problem.risk.data`."""

    config: Config
    problem: Problem
    memorization: ix.Memorization
    certificate: ix.Certificate
    value: ix.Value
    others: np.ndarray
    examples: Examples
    retraining: Retraining
    ranking: Ranking
    qualities: dict[str, Quality]

    @property
    def suggested(self) -> np.ndarray:
        """The label the other points give each training point."""
        return self.others.argmax(axis=1)

    def certificate_contains_retrained(self) -> np.ndarray:
        """Whether the certificate of each retrained point encloses its retrained margin, [k]."""
        points, truth = self.retraining.points, self.retraining.margin_without
        lower, upper = (np.asarray(x) for x in (self.certificate.lower, self.certificate.upper))
        return (lower[points] <= truth) & (truth <= upper[points])

    def label_against_value(self) -> np.ndarray:
        """[3, 2] counts: memorization label against the sign of the value (G > 0, G ≤ 0)."""
        harmful = np.asarray(self.value.value) <= 0
        label = np.asarray(self.memorization.label)
        return np.stack([[np.sum((label == c) & (harmful == s)) for s in (0, 1)] for c in range(3)])


def run(config: Config, on_stage: Callable[[str], None] = lambda _: None) -> Results:
    """The whole computation; `on_stage` is called with the name of each of `STAGES` as it begins.

    Needs float64 (`jax_enable_x64`): certificates refuse anything less.
    """
    stages = iter(STAGES)
    begin = lambda: on_stage(next(stages))
    begin()
    problem = load(config)
    begin()
    f = ix.influence(problem.risk, problem.model, ix.Hessian())
    begin()
    memorization, others = ix.memorization(f), np.asarray(others_probabilities(f))
    begin()
    certificate = ix.certify(f)
    begin()
    value = ix.value(f, problem.heldout)
    begin()
    examples = behind_test_digits(f, problem)
    begin()
    points = np.random.default_rng((config.seed, 1)).permutation(config.train)[: config.retrain]
    predicted = predicted_changes(f, problem, points)
    begin()
    retraining = retrain(problem, points, predicted)
    begin()
    qualities = remove_and_refit(problem, value, config)
    ranking = rank_flipped(memorization, problem.flipped)
    return Results(
        config, problem, memorization, certificate, value, others, examples, retraining, ranking,
        qualities,
    )  # fmt: skip


def others_probabilities(f: ix.Influence) -> Float[Array, "n C"]:
    """p(xᵢ; θ̂₋ᵢ): what the other points believe of each training point (one Newton step, P10).

    Its argmax is the suggested label. A label suggested by the model that was trained on the point
    would lean towards the label in question.
    """
    return jnn.softmax(logits_without(f))


def behind_test_digits(f: ix.Influence, problem: Problem, k: int = 4) -> Examples:
    """Two misread test digits, the least certain of those read correctly, and a typical one."""
    x, y = problem.test
    losses = np.asarray(problem.risk.losses(problem.model, problem.test))
    predicted = np.asarray(jnp.argmax(jax.vmap(problem.model)(x), axis=1))
    by_loss = np.argsort(-losses, kind="stable")
    wrong = predicted[by_loss] != np.asarray(y)[by_loss]
    right = by_loss[~wrong]
    indices = np.concatenate([by_loss[wrong][:2], right[:1], right[right.size // 2 :][:1]])
    top = ix.top_k(f, take(problem.test, jnp.asarray(indices)), k)
    return Examples(indices, predicted[indices], losses[indices], top)


def loss_and_margin(problem: Problem) -> Callable:
    """(model, example) -> [its loss, its log-odds margin], one measurement of two components."""
    loss = problem.risk.loss

    def measured(model, example):
        x, y = example
        logits = model(x)
        others = jnp.arange(logits.size) != y
        return jnp.stack([loss(logits, y), logits[y] - jnn.logsumexp(logits, where=others)])

    return measured


def predicted_changes(f: ix.Influence, problem: Problem, points: np.ndarray) -> dict:
    """Held-out changes on removal, by influence and by one Newton step, at the `points`."""
    measured = ix.measure(f, loss_and_margin(problem))
    changes = {}
    for method in ("first-order", "newton"):
        both = np.asarray(ix.removal(measured, method)(problem.heldout))[:, :, points]
        changes[method, "loss"], changes[method, "margin"] = both[:, 0], both[:, 1]
    return changes


def retrain(problem: Problem, points: np.ndarray, predicted: dict) -> Retraining:
    """Minimise again without each of the `points`, and measure what was predicted."""
    measured = loss_and_margin(problem)

    def outcome(model):
        at = lambda data: jax.vmap(lambda z: measured(model, z))(data)
        return jnp.concatenate([at(problem.heldout), at(take(problem.risk.data, points))])

    after = ix.leave_one_out(
        problem.risk, problem.model, ix.Newton(), indices=jnp.asarray(points), outcome=outcome
    )
    m = problem.heldout[1].size
    actual = np.asarray(after[:, :m] - outcome(problem.model)[None, :m])
    own = np.asarray(after[np.arange(points.size), m + np.arange(points.size), 1])
    changes = dict(predicted)
    changes["actual", "loss"], changes["actual", "margin"] = actual[..., 0].T, actual[..., 1].T
    return Retraining(points, changes, own)


def rank_flipped(memorization: ix.Memorization, flipped: np.ndarray) -> Ranking:
    """Flipped labels among the first points, lowest margin first; chance puts flips·k/n there."""
    flips = int(flipped.sum())
    first = (flips, min(flipped.size, math.ceil(1.2 * flips)))
    count = lambda margin: tuple(
        int(flipped[np.argsort(np.asarray(margin), kind="stable")[:k]].sum()) for k in first
    )
    return Ranking(
        first,
        count(memorization.margin_without),
        count(memorization.margin),
        tuple(flips * k / flipped.size for k in first),
    )


def remove_and_refit(problem: Problem, value: ix.Value, config: Config) -> dict[str, Quality]:
    """Refit without the points whose verdict is *harmful*: Gᵢ < 0 beyond two standard errors.

    The rule has no parameter to tune and reads the held-out digits alone; the test digits and the
    knowledge of which labels were flipped play no part. Two references frame the answer: as many
    points drawn at random, and exactly the flipped labels, which only the demo knows.
    """
    harmful = np.flatnonzero(np.asarray(value.verdict) == 1)
    rng = np.random.default_rng((config.seed, 2))
    chosen = {
        "before": np.arange(0),
        "after": harmful,
        "at random": rng.permutation(config.train)[: harmful.size],
        "flipped": np.flatnonzero(problem.flipped),
    }
    return {name: refit_without(problem, removed) for name, removed in chosen.items()}


def refit_without(problem: Problem, removed: np.ndarray) -> Quality:
    """The model trained without some points, judged on held-out and test digits."""
    weights = jnp.asarray(np.where(np.isin(np.arange(problem.risk.n), removed), 0.0, 1.0))
    risk = problem.risk.with_weights(weights)
    model = ix.fit(risk, problem.model, ix.Newton())

    def judged(data):
        correct = jnp.argmax(jax.vmap(model)(data[0]), axis=1) == data[1]
        return np.asarray(risk.losses(model, data)), np.asarray(correct)

    losses, correct = judged(problem.heldout)
    return Quality(removed, float(losses.mean()), float(correct.mean()), *judged(problem.test))
