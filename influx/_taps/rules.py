"""The operations that are linear in a parameter: matrix products, convolutions, and table look-ups."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .convolution import convolution
from .tap import Tap
from .view import View

Rule = Callable[[Any, int, View, int], tuple[Tap, np.ndarray | None] | None]


def dot_general(equation, operand: int, view: View, key: int):
    """Weights [b, o, i] and activations [b, t, i], in any order of the axes."""
    contract, batch = equation.params["dimension_numbers"]
    other = 1 - operand
    x = equation.invars[other].aval
    wc, wb, xc, xb = contract[operand], batch[operand], contract[other], batch[other]
    wf = tuple(a for a in range(len(view.shape)) if a not in (*wc, *wb))
    xf = tuple(a for a in range(x.ndim) if a not in (*xc, *xb))
    of_batch = tuple(view.shape[a] for a in wb)
    of_out = tuple(view.shape[a] for a in wf)
    places = tuple(x.shape[a] for a in xf)
    S, l, r = math.prod(of_batch), math.prod(of_out), math.prod(view.shape[a] for a in wc)
    T = math.prod(places)
    # The output's axes: batch, free axes of the first operand, free axes of the second.
    b, o, t = len(wb), len(wf), len(xf)
    if operand == 0:
        order = (*range(b), *range(b + o, b + o + t), *range(b, b + o))
        spread = of_batch + of_out + (1,) * t
    else:
        order = tuple(range(b + t + o))
        spread = of_batch + (1,) * t + of_out
    out = equation.outvars[0].aval
    tap = Tap(
        key=key,
        view=view,
        axes=(*wb, *wf, *wc),
        matrix_shape=(S, l, r),
        activation=lambda operands: operands[other].transpose(*xb, *xf, *xc).reshape(S, T, r),
        cotangent=lambda g: g.transpose(*order).reshape(S, T, l),
        struct=jax.ShapeDtypeStruct(out.shape, out.dtype),
    )
    return tap, np.broadcast_to(np.arange(S * l).reshape(spread), out.shape)


def gather(equation, operand: int, view: View, key: int):
    """Whole rows of a table [V, …], looked up at the indices."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    whole_rows = sizes[0] == 1 and tuple(sizes[1:]) == view.shape[1:]
    plain = not numbers.operand_batching_dims and 0 in numbers.start_index_map
    if operand != 0 or not whole_rows or not plain:
        return None
    column, V = numbers.start_index_map.index(0), view.shape[0]
    mode = equation.params["mode"]

    def activation(operands):
        rows = operands[1][..., column].reshape(1, -1)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            return jnp.where((rows < 0) | (rows >= V), V, rows)  # no row at all
        return jnp.clip(rows, 0, V - 1)

    out = equation.outvars[0].aval
    offset = numbers.offset_dims
    order = (*(a for a in range(out.ndim) if a not in offset), *offset)
    return _table(equation, view, key, activation, order), None


def dynamic_slice(equation, operand: int, view: View, key: int):
    """One row of a table [V, …]."""
    sizes = tuple(equation.params["slice_sizes"])
    if operand != 0 or sizes != (1, *view.shape[1:]):
        return None
    clipped = lambda operands: jnp.clip(operands[1], 0, view.shape[0] - 1).reshape(1, 1)
    order = tuple(range(len(view.shape)))
    return _table(equation, view, key, clipped, order), None


def _table(equation, view: View, key: int, activation, order) -> Tap:
    out = equation.outvars[0].aval
    V, l = view.shape[0], math.prod(view.shape[1:])
    return Tap(
        key=key,
        view=view,
        axes=(*range(1, len(view.shape)), 0),
        matrix_shape=(1, l, V),
        activation=activation,
        cotangent=lambda g: g.transpose(*order).reshape(1, -1, l),
        struct=jax.ShapeDtypeStruct(out.shape, out.dtype),
        indexed=True,
    )


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
}
