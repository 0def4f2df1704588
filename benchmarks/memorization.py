"""What labels, scores and signs agree with: subsets retrained, and every point left out.

    python -m benchmarks.memorization            # or only a part of it: study, signs
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.memorization wide [0 or 0.1]

**Labels and scores** against Feldman and Zhang's estimates from trainings on random subsets of 70 %
(`subsampled_memorization`), of three outcomes: whether argmax is the label (theirs), whether p_y > ½
(what labels here are about), and p_y (what scores here are about); and against leave-one-out where all n
retrainings are feasible. Digits: logistic regression, l2 = 1e-3, 1,000 subsets. Breast cancer: MLP
30-32-2, 400 subsets. MNIST: MLP 784-256-128-10, 120 subsets. The networks' subsets repeat one start and
one order of batches. "Ceiling" is the highest correlation that anything free of noise could have with
an estimate: √(2r/(1 + r)), r the correlation of the estimates from either half of the subsets. ρ is
Spearman's, AUC that of the points whose estimate is above 0.25 (their threshold) or 0.5.
Networks: memorization to first order with EK-FAC (`damping="auto"`), and one Newton step on the last
layer alone, the others frozen. Float32 but for digits.

**Signs**: sign(Gᵢ) against the change of the held-out loss on retraining without point i, for every
point, to ‖∇J₋ᵢ‖ < 1e-13, float64. G is `value`'s: the derivative, or that of the removal after a Newton
step and chord steps (`step="newton"`, `refine`). Erased: 1/n and l2 stay (`.value`). Renormalised: the
mean over n − 1 points (`.value_centred`). "Not": signs that disagree, and the largest change among them
relative to the median change of all points. Certified, wrongly so, and enclosed: `certify` after as many
steps. Digits and breast cancer: logistic regression. MNIST: the last layer of trained networks, refitted
on its frozen inputs.

**Wide**: the same for the last layer of the convolutional network, 15,690 parameters, on 400 points
drawn at random. One Hessian serves all of it: the certificate, and the retrainings by chord steps. With
several threads OpenBLAS crashes in its Cholesky factorisation.

What is compared with certificates is float64 retraining, which ends where their own gradient is 0: it
tests radius and constants, not the allowance for rounding, which tests in extended precision judge.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import influx as ix
from benchmarks import _tasks
from benchmarks.removal import digits
from influx.extend import AbstractTrainer

NOISES, THRESHOLDS = (0.0, 0.1), (0.25, 0.5)
EXACT = ix.Newton(tolerance=1e-13)
KRYLOV = ix.Newton(tolerance=1e-13, solver=lx.CG(rtol=1e-6, atol=1e-15))


def flipped(data, share: float, seed: int = 0):
    """`data` with a share of its labels moved to another class."""
    X, y = data
    rng, classes = np.random.default_rng(seed), int(y.max()) + 1
    y = np.array(y)
    wrong = rng.permutation(len(y))[: int(share * len(y))]
    y[wrong] = (y[wrong] + rng.integers(1, classes, wrong.size)) % classes
    return X, jnp.asarray(y)


# --- Labels and scores --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A trained model, what repeats its training, and how `memorization` is asked of it."""

    name: str
    risk: ix.EmpiricalRisk
    start: object
    trainer: ix.extend.AbstractTrainer
    heldout: tuple
    trials: int
    memorizations: dict[str, Callable]
    valued_by: Callable
    leave_one_out: bool


def digits_study(noise: float) -> Study:
    risk, model, rest = logistic(*digits(noise), 1e-3)
    f = ix.influence(risk, model, ix.Hessian())
    ways = {
        "Newton step": lambda _: ix.memorization(f),
        "first order": lambda _: ix.memorization(f, "first-order"),
    }
    name = f"digits, logistic regression, {noise:.0%} flipped"
    return Study(name, risk, model, ix.Newton(), rest, 1000, ways, lambda _: f, True)


def network_study(name: str, title: str, noise: float, trials: int, leave_one_out: bool) -> Study:
    task = _tasks.TASKS[name]
    train, test = task.data()
    risk = ix.EmpiricalRisk(flipped(train, noise), ix.SoftmaxCrossEntropy(), l2=task.l2)
    whole = lambda model: ix.influence(risk, model, ix.EKFAC(damping="auto"))

    def head(model):
        return ix.influence(*ix.restrict(risk, model, lambda m: m.layers[-1]), ix.GaussNewton())

    ways = {
        "first order, EK-FAC": lambda model: ix.memorization(whole(model), "first-order"),
        "Newton step, last layer": lambda model: ix.memorization(head(model)),
    }
    start, trainer = task.model(jr.key(0)), task.trainer(jr.key(100))
    title = f"{title}, {noise:.0%} flipped"
    return Study(title, risk, start, trainer, test, trials, ways, whole, leave_one_out)


OUTCOMES = ("correct", "p_y > ½", "p_y")


def outcomes(model, example):
    x, y = example
    logits = model(x)
    p = jax.nn.softmax(logits)[y]
    return jnp.stack([(jnp.argmax(logits) == y).astype(p.dtype), (p > 0.5).astype(p.dtype), p])


class Estimate(NamedTuple):
    value: np.ndarray
    ceiling: float
    error: float


def estimates(s: Study) -> dict[str, Estimate]:
    """Of each outcome, the mean of two estimates from half of the subsets each."""
    run = lambda seed: ix.subsampled_memorization(
        s.risk, s.start, s.trainer,
        key=jr.key(seed), trials=s.trials // 2, outcome=outcomes,
    )  # fmt: skip
    halves = [run(seed) for seed in (1, 2)]
    values = np.array([h.memorization for h in halves])
    errors = np.sqrt(np.mean(np.square([h.standard_error for h in halves]), axis=(0, 2)) / 2)
    return {
        name: Estimate(values[:, c].mean(axis=0), ceiling(*values[:, c]), float(errors[c]))
        for c, name in enumerate(OUTCOMES)
    }


def rank(a, b) -> float:
    return float(spearmanr(a, b).statistic)


def ceiling(a, b) -> float:
    r = rank(a, b)
    return float(np.sqrt(2 * r / (1 + r))) if r > 0 else 0.0


def auc(score, positive) -> str:
    return f"{roc_auc_score(positive, score):.3f}" if 0 < positive.sum() < positive.size else "–"


def study(console: Console, s: Study) -> None:
    began = time.perf_counter()
    model = ix.fit(s.risk, s.start, s.trainer)
    probabilities = lambda m: jnp.exp(-s.risk.losses(m))
    p, fz = np.asarray(probabilities(model)), estimates(s)
    ways = {name: way(model) for name, way in s.memorizations.items()}
    scores = {name: np.asarray(m.score) for name, m in ways.items()}
    scores["1 − p_y"] = 1 - p
    truth = None
    if s.leave_one_out:
        without = ix.leave_one_out(s.risk, s.start, s.trainer, outcome=probabilities)
        without = np.diagonal(np.asarray(without))
        scores["leave one out"] = p - without
        truth = np.where(p <= 0.5, 2, np.where(without <= 0.5, 1, 0))
    bounds = [(name, t) for name in OUTCOMES[:2] for t in THRESHOLDS]
    columns = [f"ρ {name}" for name in (*fz, "leave one out")]
    table = Table("score", *columns, *(f"AUC {name}: {t}" for name, t in bounds))
    for name, score in scores.items():
        ranks = [f"{rank(score, e.value):.3f}" for e in fz.values()]
        ranks += [f"{rank(score, scores['leave one out']):.4f}" if s.leave_one_out else "–"]
        table.add_row(name, *ranks, *(auc(score, fz[kind].value > t) for kind, t in bounds))
    table.add_row("ceiling", *(f"{e.ceiling:.3f}" for e in fz.values()))
    table.add_row("standard error of FZ", *(f"{e.error:.3f}" for e in fz.values()))
    console.print(f"\n{s.name}: {s.risk.n} points, {s.trials} subsets", table)
    labels(console, {name: np.asarray(m.label) for name, m in ways.items()}, fz, truth)
    crossed(console, s, ix.value(s.valued_by(model), s.heldout), *next(iter(ways.items())))
    console.print(f"{time.perf_counter() - began:.0f} s")


def labels(console: Console, found: dict, fz: dict[str, Estimate], truth) -> None:
    """How many of the points of each label Feldman and Zhang's estimates call memorized."""
    columns = [
        f"{kind}: {what}"
        for kind in OUTCOMES[:2]
        for what in ("mean", *(f"> {t}" for t in THRESHOLDS))
    ]
    table = Table("label", "points", *columns)
    for name, label in found.items():
        for k, title in enumerate(ix.LABELS):
            cells = []
            for kind in OUTCOMES[:2]:
                value = fz[kind].value[label == k]
                cells.append(f"{value.mean():.3f}" if value.size else "–")
                cells += [f"{(value > t).sum()}" for t in THRESHOLDS]
            table.add_row(f"{title}, {name}", str((label == k).sum()), *cells)
    console.print("FZ of each label: mean, and how many above a threshold", table)
    if truth is not None:
        for name, label in found.items():
            console.print(
                f"labels as on leave-one-out retraining, {name}: {(label == truth).mean():.2%}"
            )


def crossed(console: Console, s: Study, worth: ix.Value, name: str, found) -> None:
    """Labels × the sign of the value, and its verdicts."""
    value, verdict = np.asarray(worth.value), np.asarray(worth.verdict)
    table = Table(name, "G > 0", "G ≤ 0", "mean G", *ix.VERDICTS)
    for k, title in enumerate(ix.LABELS):
        here = np.asarray(found.label) == k
        signs = [str((here & sign).sum()) for sign in (value > 0, value <= 0)]
        mean = f"{value[here].mean():+.3f}" if here.any() else "–"
        table.add_row(title, *signs, mean, *(str((here & (verdict == v)).sum()) for v in range(3)))
    console.print(f"value on {s.heldout[1].size} held-out points", table)


# --- Signs --------------------------------------------------------------------------------------------


def logistic(train, heldout, l2: float, trainer=EXACT):
    """Softmax regression at its minimum, in float64."""
    wide = lambda data: (jnp.asarray(data[0], float), jnp.asarray(data[1]))
    train, heldout = wide(train), wide(heldout)
    risk = ix.EmpiricalRisk(train, ix.SoftmaxCrossEntropy(), l2=l2)
    size = train[0].shape[1], int(train[1].max()) + 1
    zero = jtu.tree_map(jnp.zeros_like, eqx.nn.Linear(*size, dtype=float, key=jr.key(0)))
    return risk, ix.fit(risk, zero, trainer), heldout


def cancer_logistic(noise: float):
    train, test = _tasks.breast_cancer()
    return logistic(flipped(train, noise), test, 1e-2)


def digits_logistic(noise: float):
    return logistic(*digits(noise), 1e-2)


def head_of(name: str, layer: Callable, trainer=EXACT):
    def problem(noise: float):
        task = _tasks.TASKS[name]
        with jax.enable_x64(False):
            train, test = task.data()
            train = flipped(train, noise)
            risk = ix.EmpiricalRisk(train, ix.SoftmaxCrossEntropy(), l2=task.l2)
            model = task.fitted(risk, 0)
            features = jax.jit(jax.vmap(eqx.tree_at(layer, model, eqx.nn.Identity())))
            sides = [(np.asarray(features(X)), np.asarray(y)) for X, y in (train, test)]
        return logistic(*sides, task.l2, trainer)

    return problem


class Held(AbstractTrainer):
    """The chord steps that `Newton` attempts first, their inverse Hessian given. Where they end depends
    on it by no more than 2(tolerance + rounding of ∇J)/μ. Trainings that take many of them are repeated
    by Newton–CG."""

    inverse: Any
    chord: AbstractTrainer

    def init(self, objective, model, weights):
        return self.inverse

    def train(self, state, objective, model, weights):
        return self.chord.train(state, objective, model, weights)

    def attempts(self):
        return (self, KRYLOV)

    def items(self, objective, model):
        return self.chord.items(objective, model)

    def examples(self, n):
        return n

    def remedies(self):
        return self.chord.remedies()


def held(f: ix.Influence) -> Held:
    """With the inverse that the influence holds for its Newton steps."""
    chord = replace(EXACT.attempts()[0], max_steps=25)
    return Held(f.response.newton.columns, chord)


SIGNS = {
    "digits": digits_logistic,
    "breast cancer": cancer_logistic,
    "MNIST, head of the MLP": head_of("mlp", lambda m: m.layers[-1]),
    "MNIST, head of the transformer": head_of("transformer", lambda m: m.head),
}
WIDE = {"MNIST, head of the CNN": head_of("cnn", lambda m: m.head, KRYLOV)}


def signs(
    console: Console, name: str, noise: float, points: int | None = None, refines=(0, 1, 2, 3)
) -> None:
    """One problem's table: of all points, retrained by `Newton`; or of `points` of them drawn at random,
    retrained by chord steps with the inverse Hessian of the influence."""
    risk, model, heldout = (SIGNS | WIDE)[name](noise)
    n, f = risk.n, ix.influence(risk, model, ix.Hessian())
    trainer, chunk = (EXACT, None) if points is None else (held(f), 50)
    rng = np.random.default_rng(0)
    rows = np.arange(n) if points is None else rng.choice(n, points, replace=False)
    loss = jax.jit(lambda m: jnp.mean(risk.losses(m, heldout)))
    table = Table(
        f"{noise:.0%} flipped", "median change", "value", "agree", "not", "the largest",
        "certified", "wrongly", "enclosed", "seconds",
    )  # fmt: skip
    grown = risk.with_weights(risk.weights * n / (n - 1))
    first, worth, spent = ix.value(f, heldout, indices=rows), {}, {}
    for refine in refines:
        start = time.perf_counter()
        found = ix.value(f, heldout, "newton", refine=refine, indices=rows)
        worth[refine] = jax.block_until_ready(found)
        spent[refine] = f"{time.perf_counter() - start:.0f}"
    conventions = {"erased": (risk, "value"), "renormalised": (grown, "value_centred")}
    unresolved = ""
    for convention, (trained_on, field) in conventions.items():
        start = time.perf_counter()
        after = ix.leave_one_out(
            trained_on, model, trainer, indices=rows, outcome=loss, chunk_size=chunk
        )
        change = np.asarray(after - loss(model))
        seconds = f"{time.perf_counter() - start:.0f}"
        where = convention, f"{np.median(np.abs(change)):.1e}"
        signed = lambda found, field=field, change=change: agreement(getattr(found, field), change)
        table.add_row(*where, "first order", *signed(first), *3 * [""], f"retraining: {seconds}")
        for refine in refines:
            start = time.perf_counter()
            renormalise = convention == "renormalised"
            got = ix.certify(
                f, heldout, indices=rows, mean=True, refine=refine, renormalise=renormalise
            )
            lower, upper, sure = (np.asarray(x) for x in (got.lower, got.upper, got.certified))
            seconds = f"{spent[refine]} (both), {time.perf_counter() - start:.0f}"
            wrong = (sure & (np.where(lower > 0, 1, -1) != np.sign(change))).sum()
            inside = ((lower <= change) & (change <= upper)).sum()
            steps = "Newton step" + f" + {refine} chord" * (refine > 0)
            table.add_row(
                *where, steps, *signed(worth[refine]),
                f"{sure.mean():.2%}", str(wrong), str(inside), seconds,
            )  # fmt: skip
        below = (np.abs(change) <= np.finfo(float).eps * float(loss(model))).sum()
        unresolved += f"; {convention}, {below} changes are below the rounding of the loss"
    console.print(f"\n{name}: {rows.size} points, {heldout[1].size} held out{unresolved}", table)


def agreement(predicted, change) -> tuple[str, str, str]:
    """The share of signs that agree, the number that do not, and the largest change among those
    relative to the median one."""
    bad = np.sign(predicted) != np.sign(change)
    sizes = np.abs(change) / np.median(np.abs(change))
    largest = f"{sizes[bad].max():.1e}" if bad.any() else ""
    return f"{1 - bad.mean():.2%}", str(bad.sum()), largest


PARTS = ("study", "signs")


def main(console: Console, parts=PARTS) -> None:
    noises = [float(part) for part in parts if part not in (*PARTS, "wide")] or NOISES
    if "study" in parts:
        for noise in NOISES:
            with jax.enable_x64(True):
                study(console, digits_study(noise))
            study(console, network_study("cancer", "breast cancer, MLP", noise, 400, True))
            study(console, network_study("mlp", "MNIST, MLP", noise, 120, False))
    if "signs" in parts:
        with jax.enable_x64(True):
            for name in SIGNS:
                for noise in NOISES:
                    signs(console, name, noise)
    if "wide" in parts:
        with jax.enable_x64(True):
            for name in WIDE:
                for noise in noises:
                    signs(console, name, noise, points=400, refines=(0, 3, 12))


if __name__ == "__main__":
    main(Console(width=150), sys.argv[1:] or PARTS)
