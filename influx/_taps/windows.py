"""Windows over an array, by strided slices: exact, and cheap to differentiate."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


def slices(
    x: Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> list[Array]:
    """For each offset in a window, row-major, the entries of `x` there, for all places of the window."""
    places = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, d, s in zip(x.shape, window, dilation, strides)
    ]
    found = []
    for offset in np.ndindex(*window):
        start = [k * d for k, d in zip(offset, dilation)]
        stop = [a + (p - 1) * s + 1 for a, p, s in zip(start, places, strides)]
        found.append(lax.slice(x, start, stop, strides))
    return found


def max_pool(x: Array, params) -> Array:
    """JAX's `reduce_window_max` of these parameters, with the same derivative (NaN apart): that of the
    first largest entry of each window.

    JAX differentiates it by an operation that runs entry after entry on a CPU, and takes longer than
    all else in a small convolutional network. A selection among slices has a derivative entry by entry.
    """
    sides = zip(params["padding"], params["base_dilation"])
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    x = lax.pad(x, lowest, [(*pad, d - 1) for pad, d in sides])
    window, dilation = params["window_dimensions"], params["window_dilation"]
    parts = slices(x, window, params["window_strides"], dilation)
    largest = jnp.argmax(lax.stop_gradient(jnp.stack(parts)), axis=0).astype(jnp.int32)
    return lax.select_n(largest, *parts)
