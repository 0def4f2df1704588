"""EK-FAC fits of the task "mlp" written out by hand, beside influx's, in gradient passes.

    python -m benchmarks.fit_by_hand

For that one network: rows held between the two passes, the inputs that are 0 throughout left out, no
copies for biases, Gram matrices by strips, blocks of the best of three lengths. What it gives up (any
other model, data weights, compensated sums, a bound on memory) is not counted, nor are
eigendecompositions: bases are random, and so are sampled labels, which cost what others do. "Its
products" counts the multiplications and additions of matrix products alone, as if all of them ran at
the gradient's speed; the last row of each kind counts what any fit needs that takes all inputs: rows
made once, and half of every Gram matrix. All times are of one run, in turn as in `benchmarks.cost`.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.console import Console
from rich.table import Table

import influx as ix
from benchmarks._tasks import TASKS
from benchmarks.cost import least, parts_of_fit

SIZES, LENGTHS = (784, 256, 128, 10), (500, 1000, 4000)


def times(A, B):
    return jnp.matmul(A, B, precision=jax.lax.Precision.HIGHEST)


def gram(A):
    """AᵀA from its diagonal on, in three strips where it is wide, and column sums, for the bias."""
    d = A.shape[1]
    cuts = np.linspace(0, d, 4 if d >= 256 else 2).astype(int)
    return [times(A[:, a:b].T, A[:, a:]) for a, b in pairwise(cuts)], jnp.sum(A, axis=0)


def sampled(z, labels):
    return (jax.nn.softmax(z) - jax.nn.one_hot(labels, 10))[:, None]


def exact(z, _):
    """Nine rows u with Σ uuᵀ = diag p − ppᵀ: the Cholesky factor."""
    p = jax.nn.softmax(z)
    tail = jnp.cumsum(p[:, ::-1], axis=1)[:, ::-1]
    size = jnp.sqrt(p[:, :-1] * tail[:, 1:] / tail[:, :-1])
    later = jnp.triu(jnp.ones((9, 10)), 1) * p[:, None, :] / tail[:, 1:, None]
    return size[:, :, None] * (jnp.eye(9, 10) - later)


def rows(model, X, labels, cotangents):
    """Activations and output gradients of all layers, those of the input left to the caller."""
    (W1, b1), (W2, b2), (W3, b3) = model
    z1 = times(X, W1.T) + b1
    a1 = jax.nn.relu(z1)
    z2 = times(a1, W2.T) + b2
    a2 = jax.nn.relu(z2)
    g3 = cotangents(times(a2, W3.T) + b3, labels)
    count = g3.shape[1]
    each = lambda mask: jnp.broadcast_to(mask[:, None], (len(X), count, mask.shape[1]))
    flat = lambda x: x.reshape(-1, x.shape[-1])
    g3 = flat(g3)
    g2 = times(g3, W3) * flat(each(z2 > 0))
    return a1, a2, times(g2, W2) * flat(each(z1 > 0)), g2, g3


def over_blocks(of_block, blocks):
    """Σ of what `of_block` answers first, and all it answers second."""
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(of_block, jax.tree.map(lambda x: x[0], blocks))[0],
    )

    def step(total, block):
        more, kept = of_block(block)
        return jax.tree.map(jnp.add, total, more), kept

    return jax.lax.scan(step, start, blocks)


def factors(cotangents, length):
    @jax.jit
    def run(model, X, labels):
        def of_block(block):
            held = rows(model, *block, cotangents)
            return [gram(side) for side in (block[0], *held)], held

        blocks = X.reshape(-1, length, X.shape[1]), labels.reshape(-1, length)
        return over_blocks(of_block, blocks)

    return run


def second_moments(length):
    @jax.jit
    def run(X, held, bases):
        def of_block(block):
            X, (a1, a2, *gradients) = block
            found = []
            for a, g, (of_a, of_g) in zip((X, a1, a2), gradients, bases):
                left = times(g, of_g).reshape(len(X), -1, of_g.shape[1])
                left = jnp.einsum("bkl,bkl->bl", left, left)
                right = jnp.square(times(a, of_a[:-1]) + of_a[-1])
                found.append(times(right.T, left))
            return found, None

        return over_blocks(of_block, (X.reshape(-1, length, X.shape[1]), held))[0]

    return run


@jax.jit
def gradient(model, X, y):
    def risk(model):
        z = X
        for W, b in model[:-1]:
            z = jax.nn.relu(z @ W.T + b)
        logp = jax.nn.log_softmax(z @ model[-1][0].T + model[-1][1])
        return -jnp.mean(jnp.take_along_axis(logp, y[:, None], axis=1))

    return jax.grad(risk)(model)


def by_strips(d: int) -> float:
    """The share that is computed of a Gram matrix."""
    return 2 / 3 if d >= 256 else 1.0


def products(inputs: int, count: int, passes: int, share=by_strips) -> float:
    """Multiplications and additions of a fit with `count` cotangents a point, whose rows are made in so
    many passes, over those of a gradient."""
    sizes = (inputs, *SIZES[1:])
    layers = list(pairwise(sizes))
    sides = [(a, 1) for a in sizes[:-1]] + [(g, count) for g in sizes[1:]]
    grams = sum(k * d * d * share(d) for d, k in sides)
    rotations = sum(k * d * d for d, k in sides)
    forward = sum(a * g for a, g in layers)
    back = count * sum(a * g for a, g in layers[1:])
    whole = list(pairwise(SIZES))
    gradient = 2 * sum(a * g for a, g in whole) + sum(a * g for a, g in whole[1:])
    return (passes * (forward + back) + grams + rotations + forward) / gradient


def main() -> None:
    task = TASKS["mlp"]
    risk = task.risk()
    X, y = risk.data
    fitted = task.fitted(risk, 0)
    model = [(layer.weight, layer.bias) for layer in fitted.layers]
    used = np.flatnonzero(np.any(np.asarray(X) != 0, axis=0))
    live, small = X[:, used], [(model[0][0][:, used], model[0][1]), *model[1:]]
    draws = jr.randint(jr.key(0), (len(X),), 0, 10)
    orthogonal = lambda d: jnp.asarray(
        np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0], X.dtype
    )
    sizes = (len(used), *SIZES[1:])
    bases = [(orthogonal(a + 1), orthogonal(g)) for a, g in pairwise(sizes)]
    fits = ix.EKFAC("sampled", key=jr.key(0), damping=1e-3), ix.EKFAC(damping=1e-3)
    calls = [lambda: gradient(model, X, y)]
    for cotangents, curvature in zip((sampled, exact), fits):
        for length in LENGTHS:
            first, second = factors(cotangents, length), second_moments(length)
            held = first(small, live, draws)[1]
            calls.append(lambda first=first: first(small, live, draws))
            calls.append(lambda second=second, held=held: second(live, held, bases))
        calls += parts_of_fit(curvature, risk, fitted)[:2]
    one, *found = least(*calls)
    title = f"{len(used)} of {X.shape[1]} inputs; a gradient pass takes {1e3 * one:.1f} ms"
    table = Table(title=title)
    for column in ("", "factors", "diagonal", "gradient passes", "its products"):
        table.add_column(column)
    shown = lambda label, pair, count: table.add_row(
        label, *(f"{x:.2f}" for x in (*pair, sum(pair), count))
    )
    for name, count, seconds in zip(
        ("sampled labels", "exact, 10 classes"), (1, 9), np.reshape(found, (2, -1, 2)) / one
    ):
        best = min(seconds[:-1], key=sum)
        shown(f"{name}, by hand", best, products(len(used), count, 1))
        shown(f"{name}, influx", seconds[-1], products(SIZES[0], count, 2))
        least_of_all = f"{products(SIZES[0], count, 1, share=lambda d: 1 / 2):.2f}"
        table.add_row("  all inputs, half of each Gram", "", "", "", least_of_all)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
