from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ._custom_types import Model, Scalar, ScalarLike

# Temporaries of one chunk are kept within this size. Results do not depend on it (a law under test).
BYTE_BUDGET = 256 * 2**20


def ravel(model: Model):
    """The parameters of `model` as one vector, and the map from a vector back to a model.

    **Returns:** `(theta, rebuild)`, `theta` of shape [P], `rebuild(theta)` a model like `model`.
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(params)
    return theta, lambda vector: eqx.combine(unravel(vector), static)


def ravel_gradient(tree: PyTree) -> Float[Array, " P"]:
    """A gradient (a model-shaped pytree, `None` where not differentiated) as one vector [P]."""
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def is_concrete(tree: PyTree) -> bool:
    """Whether every array of `tree` holds values, so that they may be inspected."""
    return not any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(tree))


def require_concrete(verb: str, *trees: PyTree) -> None:
    """Refuse to run inside a trace, for verbs that look at numbers to decide."""
    if not is_concrete(trees):
        raise ValueError(
            f"`{verb}` looks at numbers to decide what it answers, and inside `jax.jit`, `jax.vmap` or "
            "`jax.grad` there are none yet. Call it outside."
        )


def leading_length(tree: PyTree) -> int:
    return jtu.tree_leaves(tree)[0].shape[0]


def take(tree: PyTree, indices) -> PyTree:
    return jtu.tree_map(lambda x: x[indices], tree)


def check_whole(
    name: str, value: Any, *, least: int = 1, most: int | None = None, hint: str = ""
) -> int:
    """A count: a whole number, of Python or NumPy, within bounds."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bounds = f"at least {least}" if most is None else f"in {least}…{most}"
        raise ValueError(f"`{name}` must be a whole number, {bounds}, got {value!r}.{hint}")
    return int(value)


def check_chunk(chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size, hint=" None chooses one.")


@dataclass(frozen=True)
class Limits:
    """What a user allows: `chunk_size` training points at a time, and `memory` bytes of temporaries;
    `None` leaves the one to the other, and the other to `BYTE_BUDGET`."""

    chunk_size: int | None = None
    memory: int | None = None

    @property
    def bytes(self) -> int:
        return BYTE_BUDGET if self.memory is None else self.memory

    def rows(self, row_items: int, dtype) -> int:
        """How many rows of `row_items` numbers at a time (at least one)."""
        if self.chunk_size is not None:
            return self.chunk_size
        return max(1, int(self.bytes // (max(1, row_items) * jnp.dtype(dtype).itemsize)))


def check_memory(memory: int | None) -> None:
    if memory is not None:
        hint = " It counts bytes: for one gigabyte write memory=10**9. None is 256 MiB."
        check_whole("memory", memory, hint=hint)


def chunk_length(row_items: int, dtype, chunk_size: int | None = None) -> int:
    """How many rows of `row_items` numbers fit into the byte budget (at least one)."""
    return Limits(chunk_size).rows(row_items, dtype)


def chunked_map(fn, xs: PyTree, chunk: int) -> PyTree:
    """`jax.vmap(fn)(xs)`, `chunk` rows at a time: the same result in less memory."""
    if chunk >= leading_length(xs):
        return jax.vmap(fn)(xs)
    return map_blocks(lambda i: jax.vmap(fn)(take(xs, i)), leading_length(xs), chunk)


def chunked_sum(fn, xs: PyTree, chunk: int) -> PyTree:
    """`sum(fn(block) for block in blocks of xs)`, `fn` taking rows [b, ...] and answering a sum."""
    n = leading_length(xs)
    if chunk >= n:
        return fn(xs)
    size = even_length(n, chunk)
    full = n // size
    blocks = jtu.tree_map(lambda x: x[: full * size].reshape(full, size, *x.shape[1:]), xs)
    zeros = lambda struct: jnp.zeros(struct.shape, struct.dtype)
    start = jtu.tree_map(zeros, jax.eval_shape(fn, take(blocks, 0)))
    add = lambda total, block: (jtu.tree_map(jnp.add, total, fn(block)), None)
    total, _ = jax.lax.scan(add, start, blocks)
    if full * size < n:
        total = jtu.tree_map(jnp.add, total, fn(take(xs, slice(full * size, None))))
    return total


def even_length(n: int, chunk: int) -> int:
    """The length of the fewest blocks of at most `chunk` that 0…n−1 falls into, all of them equal."""
    return -(-n // -(-n // max(1, min(chunk, n))))


def map_blocks(fn, n: int, chunk: int) -> PyTree:
    """`fn(indices)` for equal consecutive blocks of at most `chunk` of 0…n−1, joined again.

    The last block is filled up with n − 1, so that `fn` compiles once.
    """
    if chunk >= n:
        return fn(jnp.arange(n))
    size = even_length(n, chunk)
    count = -(-n // size)
    indices = jnp.minimum(jnp.arange(count * size), n - 1)
    blocks = jax.lax.map(fn, indices.reshape(count, size))
    return jtu.tree_map(lambda x: x.reshape(count * size, *x.shape[2:])[:n], blocks)


def check_damping(damping: ScalarLike) -> Scalar:
    """A damping λ, a number at least zero, as an array: another λ is then no other program."""
    if not is_concrete(damping):
        return jnp.asarray(damping)
    if not np.issubdtype(np.asarray(damping).dtype, np.number) or np.ndim(damping) != 0:
        raise ValueError(f"`damping` must be one number, got {damping!r}.")
    if not np.isfinite(damping) or damping < 0:
        raise ValueError(
            f"`damping` is λ in (H + λI) and must be at least 0, got {damping}. "
            "Use damping=0. for the plain inverse, or a positive number such as 1e-3."
        )
    return damping if isinstance(damping, jax.Array) else np.asarray(damping, float)


def two_derivatives(fn: Callable[[Array], PyTree], dtype) -> tuple[PyTree, PyTree]:
    """f′(0) and f″(0) of a function of one number: forward mode, nested."""
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    slope = lambda e: jax.jvp(fn, (e,), (one,))[1]
    return jax.jvp(slope, (zero,), (one,))


def dot(a: Array, b: Array) -> Array:
    """`a @ b` at full precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def einsum(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` at full precision."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
