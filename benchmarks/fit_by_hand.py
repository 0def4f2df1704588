"""The least that EK-FAC fits of the task "mlp" cost by these products, in gradient passes.

    python -m benchmarks.fit_by_hand

Written out for that one network: rows held between the two passes, the inputs that are 0 throughout left
out, no copies for biases, Gram matrices by strips, blocks of the best of three lengths. What it gives up
(any other model, data weights, compensated sums, a bound on memory) is not counted, nor are
eigendecompositions. Times are the least of many calls; "by products" counts the multiplications and
additions of matrix products alone, as if all of them ran at the gradient's speed.
"""

import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from benchmarks._tasks import TASKS

LENGTHS, ROUNDS, CALLS = (500, 1000, 4000), 4, 6


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


def least(calls) -> list[float]:
    return list(np.min([[in_a_row(call) for call in calls] for _ in range(ROUNDS)], axis=0))


def in_a_row(call) -> float:
    time.sleep(0.3)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products(inputs: int, count: int, strips: float = 2 / 3) -> float:
    """Multiplications and additions a point of both passes of a fit with `count` cotangents."""
    a, g = (inputs, 256, 128), (256, 128, 10)
    gram = sum(d * d * (strips if d >= 256 else 1) for d in a)
    gram += count * sum(d * d * (strips if d >= 256 else 1) for d in g)
    forward, back = inputs * 256 + 256 * 128 + 128 * 10, count * (10 * 128 + 128 * 256)
    rotated = sum(d * d for d in a) + count * sum(d * d for d in g)
    return 2.0 * (forward + back + gram + rotated + sum(x * y for x, y in zip(a, g)))


def main() -> None:
    task = TASKS["mlp"]
    risk = task.risk()
    X, y = risk.data
    model = [(layer.weight, layer.bias) for layer in task.fitted(risk, 0).layers]
    used = np.flatnonzero(np.any(np.asarray(X) != 0, axis=0))
    live = X[:, used], [(model[0][0][:, used], model[0][1]), *model[1:]]
    draws = jr.categorical(jr.key(0), jnp.zeros((len(X), 10)))
    orthogonal = lambda d: jnp.asarray(
        np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0], X.dtype
    )
    bases = [
        (orthogonal(a + 1), orthogonal(g)) for a, g in zip((len(used), 256, 128), (256, 128, 10))
    ]
    calls = [lambda: gradient(model, X, y)]
    for cotangents in (sampled, exact):
        for length in LENGTHS:
            first, second = factors(cotangents, length), second_moments(length)
            held = first(live[1], live[0], draws)[1]
            calls.append(lambda first=first: first(live[1], live[0], draws))
            calls.append(lambda second=second, held=held: second(live[0], held, bases))
    one, *found = least(calls)
    layers = [(784, 256), (256, 128), (128, 10)]
    of_gradient = 2.0 * (3 * sum(a * b for a, b in layers) - 784 * 256)
    print(f"{len(used)} of {X.shape[1]} inputs; a gradient pass takes {1e3 * one:.1f} ms")
    for name, count, of_lengths in zip(
        ("sampled", "exact"), (1, 9), np.reshape(found, (2, len(LENGTHS), 2)) / one
    ):
        first, second = min(of_lengths, key=sum)
        by_products = products(len(used), count) / of_gradient
        print(
            f"{name}: factors {first:.2f}, diagonal {second:.2f}, together {first + second:.2f} "
            f"gradient passes; by products {by_products:.2f}, with all inputs and rows made twice "
            f"{twice(count) / of_gradient:.2f}"
        )


def twice(count: int) -> float:
    again = 784 * 256 + 256 * 128 + 128 * 10 + count * (10 * 128 + 128 * 256)
    return products(784, count) + 2.0 * again


if __name__ == "__main__":
    main()
