"""The least that a sampled EK-FAC fit of the task "mlp" costs by these products, in gradient passes.

    python -m benchmarks.fit_by_hand

Written out for that one network: rows held between the two passes, inputs that are 0 throughout left
out, Gram matrices by strips, no chunks. What it gives up (any other model, a bound on memory) is not
counted. Each figure is the least of 30 calls; eigendecompositions are left out.
"""

import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from benchmarks._tasks import TASKS


def gram(A):
    """AᵀA by three strips from the diagonal on."""
    cuts = np.linspace(0, A.shape[1], 4).astype(int)
    total = jnp.zeros((A.shape[1],) * 2, A.dtype)
    for a, b in pairwise(cuts):
        total = total.at[a:b, a:].set(A[:, a:b].T @ A[:, a:])
    return jnp.triu(total) + jnp.triu(total, 1).T


@jax.jit
def factors(model, X, live, labels):
    """Rows (activations, output gradients) of each layer, and their Gram matrices."""
    (W1, b1), (W2, b2), (W3, b3) = model
    z1 = X @ W1.T + b1
    a1 = jax.nn.relu(z1)
    z2 = a1 @ W2.T + b2
    a2 = jax.nn.relu(z2)
    g3 = jax.nn.softmax(a2 @ W3.T + b3) - jax.nn.one_hot(labels, 10)
    g2 = (g3 @ W3) * (z2 > 0)
    g1 = (g2 @ W2) * (z1 > 0)
    ones = jnp.ones((len(X), 1), X.dtype)
    sides = [jnp.concatenate([a, ones], axis=1) for a in (live, a1, a2)], [g1, g2, g3]
    return sides, [[gram(side) for side in of_layers] for of_layers in sides]


@jax.jit
def second_moments(sides, bases):
    rotated = [[rows @ Q for rows, Q in zip(*pair)] for pair in zip(sides, bases)]
    return [jnp.square(a).T @ jnp.square(g) for a, g in zip(*rotated)]


@jax.jit
def gradient(model, X, y):
    def risk(model):
        z = X
        for W, b in model[:-1]:
            z = jax.nn.relu(z @ W.T + b)
        logp = jax.nn.log_softmax(z @ model[-1][0].T + model[-1][1])
        return -jnp.mean(jnp.take_along_axis(logp, y[:, None], axis=1))

    return jax.grad(risk)(model)


def least(fn, *args) -> float:
    seconds = []
    for _ in range(31):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    task = TASKS["mlp"]
    (X, y), _ = task.data()
    model = [(layer.weight, layer.bias) for layer in task.model(jr.key(0)).layers]
    live = X[:, np.flatnonzero(np.any(np.asarray(X) != 0, axis=0))]
    sides, grams = factors(model, X, live, y)
    bases = [[jnp.linalg.eigh(G)[1] for G in of_layers] for of_layers in grams]
    one = least(gradient, model, X, y)
    first, second = least(factors, model, X, live, y), least(second_moments, sides, bases)
    print(f"{live.shape[1]} of {X.shape[1]} inputs; a gradient pass takes {1e3 * one:.1f} ms")
    print(f"factors {first / one:.2f}, second moments {second / one:.2f}", end=", ")
    print(f"together {(first + second) / one:.2f} gradient passes")


if __name__ == "__main__":
    main()
