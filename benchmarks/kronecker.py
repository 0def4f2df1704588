"""K-FAC and EK-FAC of influx beside kronfluence 1.0.1: time, memory and agreement, in one run.

    python -m benchmarks.kronecker [mlp cnn transformer] [--rows 4000 1000] [--folder KEPT]

MNIST-5k, 4,000 training points and 1,000 queries (`--rows` takes fewer), float32, the tasks of
`benchmarks._tasks`. Both sides get the same weights and data, each setting in a process of its own, one
after the other. "Cold" is a whole process from its start to the first answers, imports and compilation
included; the other times are of a second round in that process, its rows in a new order. kronfluence
samples one label a point for its Fisher; influx sums over all ten in the task "mlp", and samples one too
in the others.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._tasks import TASKS

TOLERANCE = "0.05"
DAMPINGS = ("1e-3", "1e-5")
FISHER = {"mlp": "exact", "cnn": "sampled", "transformer": "sampled"}


def save(task: str, folder: Path, rows: tuple[int | None, int | None] = (None, None)) -> Path:
    """Train the task; its weights and logits, and the first rows of data and queries, as a file."""
    chosen = TASKS[task]
    model = chosen.fitted(chosen.risk(), 0)
    n, m = rows
    (X, y), (Xq, yq) = chosen.data()
    X, y, Xq, yq = X[:n], y[:n], Xq[:m], yq[:m]
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    weights = {f"weight{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    path = folder / f"{task}.npz"
    np.savez(path, X=X, y=y, Xq=Xq, yq=yq, logits=jax.vmap(model)(Xq), **weights)
    return path


def run(module: str, source: Path, *options: str):
    """The answers of one process, started when the clock is read."""
    name = "".join((source.stem, module, *options)).replace("/", "")
    target = source.with_name(f"{name}.npz")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"benchmarks.{module}",
        str(source),
        str(target),
    ]
    named = ["--task", source.stem, *options]
    subprocess.run([*command, "--started", repr(time.time()), *named], check=True)
    return np.load(target)


def cost(answer) -> list[float]:
    """Seconds of fit, pairs, self, their sum and the cold process; peak memory in MB."""
    parts = [float(answer[f"time_{part}"]) for part in ("fit", "pairs", "self")]
    return [*parts, sum(parts), float(answer["time_process"]), float(answer["peak"]) / 1e6]


def closeness(got, want) -> list[str]:
    """Relative error in Frobenius norm, Pearson's correlation, mean overlap of the ten largest."""
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    pearson = np.corrcoef(got.ravel(), want.ravel())[0, 1]
    top = lambda scores: np.argsort(-np.abs(scores), axis=1)[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(top(got), top(want))])
    return [f"{error:.1e}", f"{pearson:.7f}", f"{shared:.1%}"]


def costs(console: Console, source: Path) -> dict:
    """The table of times and memory; influx's answers by tolerance."""
    rounds, fisher = ("--rounds", "2"), ("--fisher", FISHER[source.stem])
    peer = cost(run("_kronfluence", source, *rounds))
    answers = {
        tolerance: run("_influx_kronecker", source, *fisher, "--tolerance", tolerance, *rounds)
        for tolerance in (TOLERANCE, "0")
    }
    table = Table(title=f"{source.stem}: EK-FAC, seconds warm, seconds cold, MB")
    for column in ("", "fit", "all pairs", "self", "warm", "cold process", "peak MB"):
        table.add_column(column)
    shown = lambda values: [*(f"{x:.2f}" for x in values[:-1]), f"{values[-1]:.0f}"]
    table.add_row("kronfluence, sampled Fisher", *shown(peer))
    for tolerance, answer in answers.items():
        table.add_row(f"influx, {fisher[1]} Fisher, tolerance {tolerance}", *shown(cost(answer)))
        ratios = [f"{a / b:.1f} ×" for a, b in zip(peer, cost(answer))]
        table.add_row("  kronfluence / influx", *ratios)
    console.print(table)
    return answers


def agreements(console: Console, source: Path, answers: dict) -> None:
    """The table of nearness: influx's two ways, and influx with kronfluence, sign turned."""
    table = Table(title=f"{source.stem}: agreement of all pairs")
    for column in ("", "relative error", "Pearson", "same among ten largest"):
        table.add_column(column)
    exact = answers["0"]["scores"]
    table.add_row(f"tolerance {TOLERANCE}, and 0", *closeness(answers[TOLERANCE]["scores"], exact))
    if FISHER[source.stem] == "exact":  # labels drawn in float64 are others
        fisher = "--fisher", "exact"
        double = run("_influx_kronecker", source, *fisher, "--double", "--no-self")
        table.add_row("float32, and float64", *closeness(exact, double["scores"]))
    # K-FAC where a layer's weights are used in one place: elsewhere the two scale it differently.
    for strategy in ("kfac", "ekfac") if source.stem == "mlp" else ("ekfac",):
        for damping in DAMPINGS:
            same = (
                "--strategy",
                strategy,
                "--fisher",
                "empirical",
                "--damping",
                damping,
                "--no-self",
            )
            ours = run("_influx_kronecker", source, *same, "--l2", "0", "--tracked")
            theirs = run("_kronfluence", source, *same)
            name = f"influx, and kronfluence: {strategy}, empirical, λ = {damping}"
            table.add_row(name, *closeness(ours["scores"], -theirs["scores"]))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["mlp", "cnn", "transformer"])
    parser.add_argument("--rows", type=int, nargs=2, default=(None, None))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for task in options.tasks:
            source = save(task, folder, options.rows)
            agreements(console, source, costs(console, source))
    console.print(f"Load {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
