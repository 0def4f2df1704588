"""The operations that are linear in a parameter: matrix products, convolutions, and table look-ups."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .._linalg import each_times
from .tap import Tap
from .view import View
from .windows import slices

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


def convolution(equation, operand: int, view: View, key: int):
    """Each window of the input is one activation; groups of channels are matrices of their own."""
    params = equation.params
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    numbers, S = params["dimension_numbers"], params["feature_group_count"]
    kernel = tuple(view.shape[a] for a in numbers.rhs_spec[2:])
    o, i = view.shape[numbers.rhs_spec[0]], view.shape[numbers.rhs_spec[1]]
    out = equation.outvars[0].aval
    to_rows = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    dtypes = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
    # Channels last: a window's rows are then copied by runs of them.
    axes = (numbers.rhs_spec[0], *numbers.rhs_spec[2:], numbers.rhs_spec[1])
    l, r = o // S, i * math.prod(kernel)

    def activation(operands):
        x = operands[0].transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        rows = jnp.stack(_seen(x, kernel, params), axis=-2)  # [N, *places, kernel, channels]
        rows = rows.reshape(-1, math.prod(kernel), S, i)
        return rows.transpose(2, 0, 1, 3).reshape(S, -1, r)

    def cotangent(g):
        return g.transpose(*to_rows).reshape(-1, S, l).transpose(1, 0, 2)

    def output(rows, operands):
        matrices = operands[1].transpose(axes).reshape(S, l, r)
        made = each_times(rows, matrices.swapaxes(1, 2)).swapaxes(0, 1)
        return made.reshape(*(out.shape[a] for a in to_rows)).transpose(*np.argsort(to_rows))

    tap = Tap(
        key=key,
        view=view,
        axes=axes,
        matrix_shape=(S, l, r),
        activation=activation,
        cotangent=cotangent,
        struct=jax.ShapeDtypeStruct(out.shape, out.dtype),
        output=output if len(dtypes) == 1 else None,
    )
    channel = [1] * out.ndim
    channel[numbers.out_spec[1]] = o
    return tap, np.broadcast_to(np.arange(o).reshape(channel), out.shape)


def _seen(x: Array, kernel: tuple[int, ...], params) -> list[Array]:
    """What the places of an input [N, *spatial, channels] see of it: for each offset in the kernel one
    array [N, *places, channels]."""
    ends, inside = ((0, 0, 0),), zip(params["padding"], params["lhs_dilation"])
    x = lax.pad(x, jnp.zeros((), x.dtype), (*ends, *((*pad, d - 1) for pad, d in inside), *ends))
    one = lambda sizes: (1, *sizes, 1)
    return slices(x, one(kernel), one(params["window_strides"]), one(params["rhs_dilation"]))


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
