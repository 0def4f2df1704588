"""Work on many rows, a chunk at a time: in bounded memory, with the same results."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._loop_body import loop_body

# Temporaries of one chunk are kept within this size. Results do not depend on it (a law under test).
BYTE_BUDGET = 256 * 2**20


def leading_length(tree: PyTree) -> int:
    return jtu.tree_leaves(tree)[0].shape[0]


def row_struct(tree: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """The shape and dtype of one row."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def take(tree: PyTree, indices) -> PyTree:
    return jtu.tree_map(lambda x: x[indices], tree)


@dataclass(frozen=True)
class Limits:
    """What a user allows: `chunk_size` training points at a time, and `memory` bytes of temporaries;
    `None` leaves the one to the other, and the other to `BYTE_BUDGET` (more beside a chunk that was
    asked for: `_engine.choose`)."""

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


def chunk_length(row_items: int, dtype, chunk_size: int | None = None) -> int:
    """How many rows of `row_items` numbers fit into the byte budget (at least one)."""
    return Limits(chunk_size).rows(row_items, dtype)


def chunked_map(fn, xs: PyTree, chunk: int) -> PyTree:
    """`jax.vmap(fn)(xs)`, `chunk` rows at a time: the same result in less memory."""
    if chunk >= leading_length(xs):
        return jax.vmap(fn)(xs)
    return map_blocks(lambda i: jax.vmap(fn)(take(xs, i)), leading_length(xs), chunk)


def chunked_sum(fn, xs: PyTree, chunk: int, *, compensated: bool = False) -> PyTree:
    """`sum(fn(block) for block in blocks of xs)`, `fn` taking rows [b, ...] and answering a sum.

    `compensated`: what adding a block rounds off is added with the next (Kahan's summation), so that the
    error does not grow with the number of blocks; the sum is held twice.
    """
    n = leading_length(xs)
    if chunk >= n:
        return fn(xs)
    size = dividing_length(n, chunk)
    full = n // size
    blocks = jtu.tree_map(lambda x: x[: full * size].reshape(full, size, *x.shape[1:]), xs)
    zeros = lambda struct: jnp.zeros(struct.shape, struct.dtype)
    start = jtu.tree_map(zeros, jax.eval_shape(fn, take(blocks, 0)))
    inside = loop_body(fn)
    step = lambda sums, block: (_add(sums[0], sums[1], inside(block)), None)
    (total, lost), _ = jax.lax.scan(step, (start, start if compensated else None), blocks)
    if full * size < n:
        total, _ = _add(total, lost, fn(take(xs, slice(full * size, None))))
    return total


def _add(total: PyTree, lost: PyTree | None, more: PyTree) -> tuple[PyTree, PyTree | None]:
    """total + more, and what rounding loses of it where `lost`, what it lost before, is kept."""
    if lost is None:
        return jtu.tree_map(jnp.add, total, more), None
    more = jtu.tree_map(jnp.add, more, lost)
    new = jtu.tree_map(jnp.add, total, more)
    return new, jtu.tree_map(lambda m, after, before: m - (after - before), more, new, total)


def even_length(n: int, chunk: int) -> int:
    """The length of the fewest blocks of at most `chunk` that 0…n−1 falls into, all of them equal."""
    return -(-n // -(-n // max(1, min(chunk, n))))


def dividing_length(n: int, chunk: int) -> int:
    """The longest length of at most `chunk`, and more than half of it, that leaves no rest of n; else
    the even length. For a rest the body of a loop over blocks is compiled again, which takes longer than
    more and shorter blocks do."""
    return next((x for x in range(chunk, chunk // 2, -1) if n % x == 0), even_length(n, chunk))


def map_blocks(fn, n: int, chunk: int) -> PyTree:
    """`fn(indices)` for equal consecutive blocks of at most `chunk` of 0…n−1, joined again.

    The last block is filled up with n − 1, so that `fn` compiles once.
    """
    if chunk >= n:
        return fn(jnp.arange(n))
    size = even_length(n, chunk)
    count = -(-n // size)
    indices = jnp.minimum(jnp.arange(count * size), n - 1)
    blocks = jax.lax.map(loop_body(fn), indices.reshape(count, size))
    return jtu.tree_map(lambda x: x.reshape(count * size, *x.shape[2:])[:n], blocks)
