"""Models as vectors, and products at full precision."""

from collections.abc import Callable
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ._chunks import Limits, chunked_map
from ._cost import cost_of
from ._custom_types import Model


def ravel(model: Model):
    """The parameters of `model` as one vector, and the map from a vector back to a model.

    **Returns:** `(theta, rebuild)`, `theta` of shape [P], `rebuild(theta)` a model like `model`.
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(params)
    return theta, lambda vector: eqx.combine(unravel(vector), static)


def at_once(matvec: Callable[[Array], Array], like: Float[Array, " P"]) -> int:
    """How many products with a matrix the byte budget holds at a time (at least one)."""
    alive = cost_of(lambda v, _: matvec(v), like, like).live.query
    return max(1, int(Limits().bytes // max(1, alive)))


def products(matvec: Callable[[Array], Array], rows: Float[Array, "k P"]) -> Float[Array, "k P"]:
    """A matrix's products with some vectors, as many at a time as the byte budget holds."""
    return chunked_map(matvec, rows, at_once(matvec, rows[0]))


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


def each_times(rows: Array, matrices: Array) -> Array:
    """Rows [..., S, t, d] times one matrix each of [S, d, e]. Where S is 1 a plain product: XLA is
    slower on a batch of one."""
    if matrices.shape[0] == 1:
        return dot(rows, matrices[0])
    return einsum("...std,sde->...ste", rows, matrices)


# Strips that a symmetric product is computed in, and the width from which that pays.
_STRIPS, _WIDE = 3, 256


def gram_strips(
    weighted: Float[Array, "S n d"], rows: Float[Array, "S n d"]
) -> list[Float[Array, "S _ _"]]:
    """Σ w x xᵀ over rows x, given w x and x, in strips of the matrix from its diagonal on: ⅔ of the work
    for three."""
    d = rows.shape[-1]
    edges = [0, d] if d < _WIDE else [d * i // _STRIPS for i in range(_STRIPS + 1)]
    strip = lambda a, b: einsum("snd,sne->sde", weighted[..., a:b], rows[..., a:])
    return [strip(a, b) for a, b in pairwise(edges)]


def from_strips(strips: list[Float[Array, "S _ _"]]) -> Float[Array, "S d d"]:
    """The symmetric matrices of which `gram_strips` answers strips."""
    d = strips[0].shape[-1]
    filled = lambda strip: jnp.pad(strip, ((0, 0), (0, 0), (d - strip.shape[-1], 0)))
    upper = jnp.concatenate([filled(strip) for strip in strips], axis=1)
    return jnp.triu(upper) + jnp.triu(upper, 1).swapaxes(-1, -2)
