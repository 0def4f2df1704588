"""Unrolled influence of a network against retraining on subsets, beside EK-FAC and gradient products.

    python -m benchmarks.unrolled [--quick] [smooth] [centred] [rough]

MNIST-5k, 4,000 training points, float32: an MLP 784-256-128-10 by SGD with momentum 0.9, l2 = 1e-3:
"smooth" in its data weights (GELU, batches of 250, step 0.02, pixels in [0, 1]), the same on "centred"
pixels (less their mean, times 1.5), and "rough" (ReLU, batches of 64, step 0.05, pixels in [0, 1]).
Outcomes are the margins of 100 test points after training anew without a random 1, 5 or 20 % of the
points, 40 such subsets each, from the same start and in the same order of batches: erased, so that a
batch's gradient is still divided by its size and the whole pull of the data falls with the share; and
renormalised, the others with the weight 1/(1 − share), so that it stays.
A row is the linear datamodeling score (LDS) of a method at the three sizes. "At weights
1 − share" is the derivative of the run in which every point has the weight that it has on average over
the erased subsets (over the renormalised ones it is 1); all else is at weights 1. Costs are of compiled
calls, in training runs (a compiled `fit`), the median of five pairs timed in turn.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import influx as ix
from benchmarks._tasks import MLP, mnist

SHARES, SUBSETS, QUERIES, ROUNDS = (0.01, 0.05, 0.2), 40, 100, 5


@dataclass(frozen=True)
class Setting:
    activation: Callable
    batch_size: int
    rate: float
    scale: float | None = None  # of pixels less their mean; None leaves them in [0, 1]

    @property
    def name(self) -> str:
        pixels = "" if self.scale is None else f", pixels centred, times {self.scale}"
        return f"{self.activation.__name__}, batches of {self.batch_size}, step {self.rate}{pixels}"

    def data(self):
        """Training and test data."""
        (X, y), (T, t) = mnist()
        if self.scale is None:
            return (X, y), (T, t)
        pixels = lambda images: self.scale * (images - X.mean())
        return (pixels(X), y), (pixels(T), t)

    def trainer(self) -> ix.SGD:
        optimiser = optax.sgd(self.rate, momentum=0.9)
        return ix.SGD(optimiser, batch_size=self.batch_size, epochs=10, key=jr.key(1))

    def start(self) -> MLP:
        return MLP((784, 256, 128, 10), self.activation, key=jr.key(0))


SETTINGS = {
    "smooth": Setting(jax.nn.gelu, 250, 0.02),
    "centred": Setting(jax.nn.gelu, 250, 0.02, scale=1.5),
    "rough": Setting(jax.nn.relu, 64, 0.05),
}


def margins(model, queries):
    logits = jax.vmap(model)(queries[0])
    own = jnp.take_along_axis(logits, queries[1][:, None], axis=1)[:, 0]
    others = jnp.arange(logits.shape[1])[None] != queries[1][:, None]
    return own - jax.nn.logsumexp(logits, axis=1, where=others)


def subsets(n: int, share: float, count: int) -> np.ndarray:
    """Masks [count, n] that each leave out a random `share`."""
    rng = np.random.default_rng(int(1000 * share))
    left_out = [rng.choice(n, round(share * n), replace=False) for _ in range(count)]
    masks = np.ones((count, n), np.float32)
    for mask, indices in zip(masks, left_out):
        mask[indices] = 0
    return masks


def handle(risk: ix.EmpiricalRisk, setting: Setting) -> ix.Influence:
    """Unrolled influence on margins, at the weights of the risk."""
    run = ix.influence(risk, setting.start(), ix.Unrolled(setting.trainer()))
    return ix.classification(run, "margin")


def handles(risk: ix.EmpiricalRisk, setting: Setting) -> dict[str, ix.Influence]:
    """The methods, on one trained model."""
    unrolled = handle(risk, setting)
    curvatures = {"EK-FAC": ix.EKFAC(tolerance=0.05), "gradient products": ix.Identity()}
    margin = lambda curvature: ix.classification(
        ix.influence(risk, unrolled.model, curvature), "margin"
    )
    return {"unrolled": unrolled, **{name: margin(x) for name, x in curvatures.items()}}


def agreement(console: Console, setting: Setting, subsets_each: int, count: int) -> None:
    data, test = setting.data()
    risk = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=1e-3)
    queries = jtu.tree_map(lambda x: x[:count], test)
    outcome = lambda model: margins(model, queries)
    masks = {share: subsets(risk.n, share, subsets_each) for share in SHARES}

    def retrained(weights: dict[float, np.ndarray]) -> dict[float, np.ndarray]:
        stacked = np.concatenate(list(weights.values()))
        after = ix.leave_subset_out(
            risk, setting.start(), setting.trainer(), masks=stacked, outcome=outcome
        )
        return dict(zip(SHARES, np.split(np.asarray(after), len(SHARES))))

    found = handles(risk, setting)
    scores = {name: [f(queries)] * len(SHARES) for name, f in found.items()}
    scores["unrolled at weights 1 − share"] = [
        handle(risk.with_weights(np.full(risk.n, 1 - share, np.float32)), setting)(queries)
        for share in SHARES
    ]
    table = Table(title=f"{setting.name}: LDS ± standard error, {count} queries")
    for column in ("", *(f"without {share:.0%}" for share in SHARES)):
        table.add_column(column)
    erased = retrained(masks)
    renormalised = retrained({s: mask / np.float32(1 - s) for s, mask in masks.items()})
    for removed, outcomes in (("erased", erased), ("renormalised", renormalised)):
        for name, by_share in scores.items():
            if "1 − share" not in name or removed == "erased":
                cells = [ix.lds(x, masks[s], outcomes[s]) for s, x in zip(SHARES, by_share)]
                shown = (f"{c.value:.3f} ± {c.standard_error:.3f}" for c in cells)
                table.add_row(f"{removed}: {name}", *shown)
    console.print(table)
    plain = found["unrolled"]
    accuracy = jnp.mean(jnp.argmax(jax.vmap(plain.model)(test[0]), axis=1) == test[1])
    console.print(f"Test accuracy {accuracy:.3f}.")
    costs(console, risk, setting, plain, test)
    console.print(f"{ix.diagnose(plain)}\n")


def costs(console: Console, risk, setting: Setting, f: ix.Influence, test) -> None:
    """Queries and a diagnosis in training runs, and the temporaries of the queries."""
    trainer, start = setting.trainer(), setting.start()
    train = lambda: ix.fit(risk, start, trainer)
    for count in (1, 16):
        queries = jtu.tree_map(lambda x, count=count: x[:count], test)
        compiled = eqx.filter_jit(lambda f, q: f(q)).lower(f, queries).compile().compiled
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
        ratio = in_turns(train, lambda queries=queries: f(queries)) / count
        console.print(
            f"{count} at once: {ratio:.2f} training runs a query, {temporaries:.0f} MB of temporaries."
        )
    console.print(f"A diagnosis: {in_turns(train, lambda: ix.diagnose(f)):.1f} training runs.")


def in_turns(first: Callable, second: Callable) -> float:
    """The median of the second's time over the first's, one after the other, compiled before."""
    ratios = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for call in (first, second):
            begin = time.perf_counter()
            jax.block_until_ready(eqx.filter(call(), eqx.is_array))
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios[1:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="8 subsets and 20 queries")
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all by default")
    asked = parser.parse_args()
    unknown = set(asked.settings) - set(SETTINGS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(SETTINGS)}")
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.")
    for name in asked.settings or SETTINGS:
        agreement(console, SETTINGS[name], *((8, 20) if asked.quick else (SUBSETS, QUERIES)))
    console.print(f"Load {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
