"""Width and cost of `restriction_bound` against `steps`: the last layer of a 2-layer network.

    python -m benchmarks.restriction

Digits, 400 training rows, a 64-16-10 tanh network, Gauss–Newton + l2 = 1e-2, 40 queries. The full
influence (a dense solve) is computed only to judge the enclosure. "Width" is upper − lower of the
enclosure of |I − I_ψ|; medians over all 16,000 pairs.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.console import Console
from rich.table import Table

import influx as ix

from .removal import digits


def main(console: Console) -> None:
    (X, y), (Xq, yq) = digits(0.0)
    risk = ix.EmpiricalRisk((X[:400], y[:400]), ix.SoftmaxCrossEntropy(), l2=1e-2)
    start = eqx.nn.MLP(64, 10, 16, 1, activation=jnp.tanh, key=jr.key(0))
    model = ix.fit(risk, start, ix.LBFGS(tolerance=1e-6))
    queries = (Xq[:40], yq[:40])
    full = ix.influence(risk, model, ix.GaussNewton())(queries)
    f = ix.influence(risk, model, ix.CG(ix.GaussNewton()))  # forms nothing, solves nothing here
    last = lambda m: m.layers[-1]
    table = Table("steps", "contain", "median width / true", "products", "seconds (warm)")
    for steps in (1, 3, 6, 9, 12, 15, 18):
        run = lambda steps=steps: ix.restriction_bound(f, last, queries, steps=steps)
        jax.block_until_ready(run())
        begin = time.perf_counter()
        bound = jax.block_until_ready(run())
        seconds = time.perf_counter() - begin
        true = jnp.abs(full - bound.restricted)
        inside = np.asarray((bound.lower <= true) & (true <= bound.upper))
        width = float(jnp.median(bound.upper - bound.lower) / jnp.median(true))
        table.add_row(
            str(steps), f"{inside.sum()} of {inside.size}", f"{width:.2g}",
            str((steps + 2) * (risk.n + 40)), f"{seconds:.1f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Console(width=100))
