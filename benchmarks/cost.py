"""What Kronecker-factored influence costs in passes over the data, and how that grows.

    python -m benchmarks.cost [mlp cnn transformer growth]        # by default all of them

Passes: the networks of `benchmarks._tasks` on 4,000 images, float32. A gradient pass is ∇J over all
points, a forward pass all their losses. What of EK-FAC's fit runs over the data, the factors and the
diagonal in their eigenbasis, is timed apart from the eigenvectors. A time is the least of several warm
calls in a row, in several rounds that all calls of a row share: the first calls after a pause take up to
twice as long, and LAPACK's threads keep a processor busy for some time after their work is done, which
would be charged to whatever comes next. A whole fit does its parts once each, one after the other: it
takes longer than they do.

Growth: synthetic inputs of 256 features, 256-width-width-10 networks at their initial weights, EK-FAC of
tolerance 0.05; fit, 64 queries against all n, self-influence, each setting in a process of its own, of
which memory is the peak above what was in use before. Exponents are slopes of log cost against log size
by least squares.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from rich.console import Console
from rich.table import Table

import influx as ix
from benchmarks._measure import peak_bytes
from benchmarks._tasks import MLP, TASKS
from influx._curvature.kronecker_diagonal import second_moments
from influx._curvature.kronecker_factors import eigenblock, factors
from influx._gradients import risk_gradient

NETWORKS = "mlp", "cnn", "transformer"
POINTS = (1_000, 4_000, 16_000, 64_000)
WIDTHS = (64, 128, 256, 512, 1024)
FEATURES, QUERIES, TOLERANCE = 256, 64, 0.05
ROUNDS, PAUSE, CALLS = 3, 0.3, 6


def least(*calls) -> list[float]:
    """The least time of each call, warm."""
    return list(np.min([[least_of_a_row(call) for call in calls] for _ in range(ROUNDS)], axis=0))


def least_of_a_row(call) -> float:
    time.sleep(PAUSE)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(eqx.filter(call(), eqx.is_array))
        times.append(time.perf_counter() - start)
    return min(times)


def parts_of_fit(curvature, risk, model) -> list[Callable]:
    """Calls for its two passes over the data, and for the eigenvectors between them."""
    first = lambda: factors(curvature.fisher, curvature.sharing, risk, model)
    found = first()
    eigenvectors = lambda: [eigenblock(*layer) for layer in found]
    blocks = eigenvectors()
    second = lambda: second_moments(curvature.fisher, blocks, risk, model)
    return [first, second, eigenvectors]


def passes(console: Console, name: str) -> None:
    task = TASKS[name]
    risk = task.risk()
    model = task.fitted(risk, 0)
    gradient = eqx.Partial(eqx.filter_jit(risk_gradient), risk, model)
    forward = eqx.Partial(eqx.filter_jit(lambda risk, model: risk.losses(model)), risk, model)
    fits = {
        "fit, sampled labels": ix.EKFAC("sampled", key=jr.key(0), damping=1e-3),
        "fit, exact, 10 classes": ix.EKFAC(damping=1e-3),
    }
    calls = [
        call
        for curvature in fits.values()
        for call in (
            eqx.Partial(curvature.factor, risk, model),
            *parts_of_fit(curvature, risk, model),
        )
    ]
    f = ix.influence(risk, model, ix.EKFAC(damping=1e-3))
    query = jax.tree_util.tree_map(lambda x: x[:1], task.data()[1])
    *of_fits, one_gradient, scored, one_forward = least(*calls, gradient, lambda: f(query), forward)
    table = Table(title=f"passes over {risk.n:,} points, {name}")
    parts = "factors", "diagonal", "eigenvectors"
    for column in ("", "milliseconds", *parts, "passes over the data", "of kind"):
        table.add_column(column)
    shown = lambda seconds: f"{1e3 * seconds:.0f}"
    for title, seconds in zip(fits, np.reshape(of_fits, (len(fits), -1))):
        _, first, second, _ = seconds
        ratio = f"{(first + second) / one_gradient:.2f}"
        table.add_row(title, *map(shown, seconds), ratio, "gradient")
    blank = [""] * len(parts)
    table.add_row("one query", shown(scored), *blank, f"{scored / one_forward:.2f}", "forward")
    table.add_row("a gradient pass", shown(one_gradient))
    table.add_row("a forward pass", shown(one_forward))
    console.print(table)


def one_setting(n: int, width: int) -> dict[str, float]:
    """Seconds and bytes of one size."""
    X = jr.normal(jr.key(0), (n, FEATURES))
    y = jr.randint(jr.key(1), (n,), 0, 10)
    risk = ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy(), l2=1e-3)
    model = MLP((FEATURES, width, width, 10), jax.nn.gelu, key=jr.key(2))
    queries = jr.normal(jr.key(3), (QUERIES, FEATURES)), jr.randint(jr.key(4), (QUERIES,), 0, 10)
    before = peak_bytes()
    fit = lambda: ix.influence(risk, model, ix.EKFAC(tolerance=TOLERANCE, damping=1e-3))
    f = fit()
    calls = fit, lambda: f(queries), lambda: ix.self_influence(f)
    found = dict(zip(("fit", "pairs", "self"), least(*calls)))
    return found | {"memory": peak_bytes() - before}


def growth(console: Console, title: str, sizes, settings) -> None:
    rows = [measured(*setting) for setting in settings]
    table = Table(title=title)
    for column in ("", *map(str, sizes), "exponent"):
        table.add_column(column)
    for name in ("fit", "pairs", "self"):
        values = [row[name] for row in rows]
        table.add_row(f"{name}, ms", *(f"{1e3 * v:.0f}" for v in values), slope(sizes, values))
    memory = [row["memory"] / 1e6 for row in rows]
    table.add_row("peak, MB", *(f"{v:.0f}" for v in memory), slope(sizes, memory))
    console.print(table)


def slope(sizes, values) -> str:
    return f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"


def measured(n: int, width: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cost", "--one", str(n), str(width)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[*NETWORKS, "growth"])
    parser.add_argument("--one", nargs=2, type=int)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_setting(*options.one)))
        return
    console = Console(width=120)
    for name in options.parts:
        if name != "growth":
            passes(console, name)
            continue
        growth(console, "n training points, width 256", POINTS, [(n, 256) for n in POINTS])
        growth(console, "width, n = 4,000", WIDTHS, [(4_000, w) for w in WIDTHS])


if __name__ == "__main__":
    main()
