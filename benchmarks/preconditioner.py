"""Steps and seconds of conjugate gradients with and without a preconditioner.

    python -m benchmarks.preconditioner

- MNIST-5k, the 784-256-128-10 network of `benchmarks._tasks` (235,146 parameters), float32, rtol 1e-4.
- Digits, the 64-64-10 network (4,810), float64, rtol 1e-8.
- 400 points whose 12 inputs differ in size by a factor of 100, a 12-10-3 network (163), float64, rtol
  1e-8, next to no l2: fewer parameters than points, and a condition number of 1e7.

Each solves with Gauss–Newton + l2 + λ for the gradients of a few queries, one after the other. "Apart"
is the difference of the scores from those of plain CG, in Frobenius norm, relative; both are within
the tolerance of the same solution, so that it only says that they agree. Times of a solve are warm,
"ready in" includes compilation.
"""

import os
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import influx as ix
from benchmarks._tasks import MLP, TASKS
from influx.extend import ravel


def candidates(damping: float, ranks: tuple[int, ...]) -> dict[str, ix.EKFAC | ix.Nystrom | None]:
    gauss_newton = ix.GaussNewton(damping=damping)
    nystrom = {f"Nystrom, rank {k}": ix.Nystrom(gauss_newton, k, key=jr.key(0)) for k in ranks}
    return {"none": None, "EKFAC": ix.EKFAC(), **nystrom}


@eqx.filter_jit
def _gradients(f: ix.Influence, queries):
    return jax.vmap(lambda z: f.measurement.gradient(f.risk, f.model, z))(queries)


@eqx.filter_jit
def _solve(f: ix.Influence, v):
    return f.response.factored.counted_solve(v)


@eqx.filter_jit
def _scores(f: ix.Influence, x):
    """−xᵀgᵢ for all training points, by forward mode."""
    theta, rebuild = ravel(f.model)
    return -jax.jvp(lambda t: f.risk.losses(rebuild(t)), (theta,), (x,))[1]


def timed(call: Callable):
    """Seconds, and what was called for."""
    begin = time.perf_counter()
    answer = call()
    jax.block_until_ready(eqx.filter(answer, eqx.is_array))
    return time.perf_counter() - begin, answer


def rows(table: Table, risk, model, queries, damping: float, rtol: float, ranks) -> None:
    plain = None
    for name, preconditioner in candidates(damping, ranks).items():
        gauss_newton = ix.GaussNewton(damping=damping)
        curvature = ix.CG(gauss_newton, rtol=rtol, max_steps=9999, preconditioner=preconditioner)
        ready, f = timed(lambda c=curvature: ix.influence(risk, model, c))
        vectors = _gradients(f, queries)
        jax.block_until_ready(_solve(f, 0 * vectors[0]))  # compiles; ends at once
        took, found = zip(*(timed(lambda f=f, v=v: _solve(f, v)) for v in vectors))
        assert all(bool(done) for _, done, _ in found)
        scores = np.stack([_scores(f, x) for x, _, _ in found])
        plain = scores if plain is None else plain
        apart = np.linalg.norm(scores - plain) / np.linalg.norm(plain)
        steps = np.mean([int(count) for _, _, count in found])
        table.add_row(
            f"{damping:g}", name, f"{ready:.2g}", f"{steps:.0f}", f"{np.mean(took):.2g}",
            f"{apart:.0e}" if preconditioner else "",
        )  # fmt: skip


def fitted(task: str, dtype):
    """The task's risk, model and queries in a dtype."""
    cast = lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a
    train, queries = jax.tree.map(cast, TASKS[task].data())
    risk = ix.EmpiricalRisk(train, ix.SoftmaxCrossEntropy(), l2=TASKS[task].l2)
    model = jax.tree.map(cast, TASKS[task].model(jr.key(0)))
    return risk, ix.fit(risk, model, TASKS[task].trainer(jr.key(100))), queries


def uneven():
    """Inputs of very different sizes, next to no l2."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(440, 12)) * np.logspace(0, -2, 12)
    y = np.argmax(X[:, :3] * [0.3, 0.5, 0.8] + 0.3 * rng.normal(size=(440, 3)), axis=1)
    risk = ix.EmpiricalRisk((X[:400], y[:400]), ix.SoftmaxCrossEntropy(), l2=1e-6)
    trainer = ix.SGD(optax.adam(1e-2), batch_size=40, epochs=40, key=jr.key(1))
    return (
        risk,
        ix.fit(risk, MLP((12, 10, 3), jnp.tanh, key=jr.key(0)), trainer),
        (X[400:], y[400:]),
    )


def table_of(title: str) -> Table:
    table = Table(title=title)
    for column in ("λ", "preconditioner", "ready in", "steps", "seconds a solve", "apart"):
        table.add_column(column)
    return table


def main(console: Console) -> None:
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.")
    few = lambda queries, k: jax.tree.map(lambda a: a[:k], queries)
    risk, model, queries = fitted("mlp", jnp.float32)
    table = table_of("MNIST-5k, 235,146 parameters, l2 = 1e-3, float32, rtol 1e-4")
    for damping in (1e-3, 1e-4):
        rows(table, risk, model, few(queries, 1), damping, 1e-4, (100,))
    console.print(table)

    jax.config.update("jax_enable_x64", True)
    risk, model, queries = fitted("digits", jnp.float64)
    table = table_of("Digits, 4,810 parameters, l2 = 1e-3, float64, rtol 1e-8")
    for damping in (1e-3, 1e-4):
        rows(table, risk, model, few(queries, 5), damping, 1e-8, (100,))
    console.print(table)

    risk, model, queries = uneven()
    table = table_of("Uneven inputs, 163 parameters, l2 = 1e-6, float64, rtol 1e-8")
    rows(table, risk, model, few(queries, 10), 0.0, 1e-8, (50,))
    console.print(table)
    console.print(f"Load {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main(Console(width=100))
