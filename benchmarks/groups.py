"""Groups to first and second order against retraining without them, and the most influential subset.

    python -m benchmarks.groups

Digits, 1,500 training rows, multinomial logistic regression, l2 = 1e-2 on every parameter (as in
`benchmarks.removal`). Measured: the margins of 100 held-out digits. Groups of each kind and size, 40 of
them: at random; of one class (of two classes at 10 % of the points, of three at 20 %: a class has 10 %);
the nearest training points of a held-out digit. Truth: `leave_subset_out`, to ‖∇J‖ < 1e-10.

Spearman's correlation is over the 40 groups of a row, the mean over queries; the median error and the
slope of the actual on the predicted change are over all pairs of group and query, and so is the share
of pairs in which the second order is nearer.

Subsets: for 40 of these digits, the training points whose removal lowers the margin most, by
`most_influential_subset` and by adding up the scores of single points (`top_k`); the margins after
retraining without each. "At least" counts queries where the first subset lowers the margin by no less.

Networks, where no curvature is H: the tasks "digits" and "cancer" of `benchmarks._tasks`, float32, 30
random groups of 2 and 10 % of the points, the margins of 60 queries, against the run repeated without
each group.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import influx as ix
from benchmarks import lds
from benchmarks._tasks import TASKS
from benchmarks.removal import N, digits, fitted, margins
from influx._agreement import agreement

QUERIES, GROUPS, SHARES = 100, 40, (0.01, 0.02, 0.05, 0.1, 0.2)
SUBSETS, SIZES = 40, (5, 15, 30)


def at_random(rng, train, rest, size):
    return [rng.permutation(N)[:size] for _ in range(GROUPS)]


def of_a_class(rng, train, rest, size):
    labels, count = np.asarray(train[1]), -(-size // 120)
    draws = [np.isin(labels, rng.permutation(10)[:count]) for _ in range(GROUPS)]
    return [rng.permutation(np.flatnonzero(member))[:size] for member in draws]


def nearest(rng, train, rest, size):
    X, centres = np.asarray(train[0]), np.asarray(rest[0])[-GROUPS:]
    return [np.argsort(np.linalg.norm(X - x, axis=1))[:size] for x in centres]


CURVATURES = {
    'EKFAC(damping="auto")': ix.EKFAC(),
    "EKFAC(damping=1e-2)": ix.EKFAC(damping=1e-2),
    "CG(GaussNewton(damping=1e-2))": ix.CG(ix.GaussNewton(damping=1e-2)),
}
KINDS = {"random": at_random, "one class": of_a_class, "neighbours": nearest}


def masks_of(groups) -> np.ndarray:
    return np.stack([np.isin(np.arange(N), members) for members in groups]).astype(float)


def correlation(predicted, actual) -> float:
    """The mean over queries [m, k] of Spearman's over groups."""
    return float(np.mean([spearmanr(a, b)[0] for a, b in zip(predicted, actual)]))


def groups(console: Console, train, rest, f, change) -> None:
    table = Table("groups", "points", title="Margins without a group: order 1, order 2")
    for name in ("Spearman", "median |error|", "slope", "order 2 nearer"):
        table.add_column(name)
    rng = np.random.default_rng(0)
    queries = jax.tree_util.tree_map(lambda x: x[:QUERIES], rest)
    for kind, draw in KINDS.items():
        found = []
        for share in SHARES:
            masks = masks_of(draw(rng, train, rest, round(share * N)))
            guesses = [np.asarray(ix.groups(f, masks, order=k)(queries)) for k in (1, 2)]
            found.append((*guesses, change(1 - masks)[:, :QUERIES].T))
            row(table, kind, (f"{share:.0%}",), *found[-1])
        row(table, kind, ("all sizes",), *(np.concatenate(part, axis=1) for part in zip(*found)))
    console.print(table)


def row(table: Table, kind: str, points: tuple[str, ...], *values) -> None:
    *guesses, actual = values
    errors = [np.abs(guess - actual) for guess in guesses]
    both = lambda figures, digits: ", ".join(f"{x:.{digits}f}" for x in figures)
    table.add_row(
        kind, *points, both((correlation(guess, actual) for guess in guesses), 4),
        both((np.median(error) for error in errors), 5),
        both((agreement(guess, actual).slope for guess in guesses), 2),
        f"{np.mean(errors[1] < errors[0]):.0%}",
    )  # fmt: skip


def subsets(console: Console, rest, model, f, change) -> None:
    queries = jax.tree_util.tree_map(lambda x: x[:SUBSETS], rest)
    table = Table(
        "points", "subset", "actual change", "predicted", "flipped", "at least", "seconds"
    )
    before = np.asarray(margins(jax.vmap(model)(queries[0]), queries[1]))
    fitted_right = before > 0
    for size in SIZES:
        start = time.perf_counter()
        greedy = jax.block_until_ready(ix.most_influential_subset(f, queries, size, "lowest"))
        seconds = time.perf_counter() - start
        top = ix.top_k(f, queries, size).lowest
        found = {
            "greedy, second order": (greedy.indices, greedy.values[:, -1], seconds),
            "top_k, first order": (top.indices, jnp.sum(top.values, axis=1), None),
        }
        actual = {
            name: np.diagonal(change(1 - masks_of(np.asarray(indices))))
            for name, (indices, _, _) in found.items()
        }
        ahead = np.mean(actual["greedy, second order"] <= actual["top_k, first order"] + 1e-9)
        for name, (_, predicted, took) in found.items():
            flips = (before + actual[name] < 0) & fitted_right
            table.add_row(
                str(size), name, f"{actual[name].mean():.4f}", f"{float(predicted.mean()):.4f}",
                f"{flips.sum()} of {fitted_right.sum()}",
                *(() if took is None else (f"{ahead:.0%}", f"{took:.1f}")),
            )  # fmt: skip
    console.print(table)


def networks(console: Console) -> None:
    table = Table("curvature", "task", "points", title="Networks: order 1, order 2")
    for name in ("Spearman", "median |error|", "slope", "order 2 nearer"):
        table.add_column(name)
    for task in (TASKS["digits"], TASKS["cancer"]):
        risk = task.risk()
        model = task.fitted(risk, 0)
        queries = jax.tree_util.tree_map(lambda x: x[:60], task.data()[1])
        watched = lds.outcome(risk, queries)
        start, trainer = task.model(jr.key(0)), task.trainer(jr.key(100))
        for share in (0.02, 0.1):
            rng = np.random.default_rng(0)
            orders = [rng.permutation(risk.n) for _ in range(30)]
            masks = np.stack([order < share * risk.n for order in orders]).astype(np.float32)
            after = ix.leave_subset_out(risk, start, trainer, masks=1 - masks, outcome=watched)
            actual = (np.asarray(after) - np.asarray(watched(model))[None]).T
            for name, curvature in CURVATURES.items():
                f = ix.classification(ix.influence(risk, model, curvature), "margin")
                guesses = [
                    np.asarray(ix.removal(ix.groups(f, masks, order=k))(queries)) for k in (1, 2)
                ]
                row(table, name, (task.name, f"{share:.0%}"), *guesses, actual)
    console.print(table)


def main() -> None:
    console = Console(width=120)
    networks(console)
    jax.config.update("jax_enable_x64", True)
    train, rest = digits(0.0)
    risk, model = fitted(train)
    f = ix.removal(ix.classification(ix.influence(risk, model, ix.Hessian()), "margin"))
    watched = lambda m: margins(jax.vmap(m)(rest[0]), rest[1])
    before = np.asarray(eqx.filter_jit(watched)(model))

    def change(masks):
        after = ix.leave_subset_out(risk, model, ix.Newton(), masks=masks, outcome=watched)
        return np.asarray(after) - before[None]

    groups(console, train, rest, f, change)
    subsets(console, rest, model, f, change)


if __name__ == "__main__":
    main()
