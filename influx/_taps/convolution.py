"""Convolutions: each window of the input is one activation."""

import functools
import math
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


def convolution(equation, operand: int, view: View, key: int):
    """Each window of the input is one activation; groups of channels are matrices of their own."""
    params = equation.params
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    numbers, S = params["dimension_numbers"], params["feature_group_count"]
    kernel = tuple(view.shape[a] for a in numbers.rhs_spec[2:])
    o, i = view.shape[numbers.rhs_spec[0]], view.shape[numbers.rhs_spec[1]]
    out = equation.outvars[0].aval
    to_rows = _channels_at_end(numbers.out_spec)
    dtypes = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
    # Channels last: a window's rows are then copied by runs of them.
    axes = _channels_at_end(numbers.rhs_spec)
    l, r = o // S, i * math.prod(kernel)

    def activation(operands):
        x = operands[0].transpose(_channels_at_end(numbers.lhs_spec))
        rows = jnp.stack(_seen(x, kernel, params), axis=-2)  # [N, *places, kernel, channels]
        rows = rows.reshape(-1, math.prod(kernel), S, i)
        return rows.transpose(2, 0, 1, 3).reshape(S, -1, r)

    def cotangent(g):
        return g.transpose(to_rows).reshape(-1, S, l).transpose(1, 0, 2)

    def product(rows, kernel):
        matrices = kernel.transpose(axes).reshape(S, l, r)
        made = each_times(rows, matrices.swapaxes(1, 2)).swapaxes(0, 1)
        return made.reshape(*(out.shape[a] for a in to_rows)).transpose(np.argsort(to_rows))

    def output(rows, operands) -> Any:
        x, kernel = operands
        return _from_rows(product, functools.partial(_channels_last, params), rows, x, kernel)

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _from_rows(product, operation, rows, x, kernel):
    """The product of the windows at hand, `operation(x, kernel)`, with the latter's derivative: that of
    the product would hold a cotangent of every window, for every cotangent of the model's output."""
    return product(rows, kernel)


def _from_rows_forward(product, operation, rows, x, kernel):
    return product(rows, kernel), (x, kernel)


def _from_rows_backward(product, operation, operands, cotangent):
    _, pull = jax.vjp(operation, *operands)
    return (None, *pull(cotangent))


_from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _channels_last(params, x: Array, kernel: Array) -> Array:
    """The convolution with channels last, [N, *spatial, channels], and a kernel [*spatial, out, in].

    Its derivative in `x` is then of the one order that XLA runs as a product of matrices inside a loop
    on a CPU. Any other order it runs entry by entry there, several times as long.
    """
    numbers, d = params["dimension_numbers"], x.ndim - 2
    first, space = numbers.rhs_spec[:2], numbers.rhs_spec[2:]
    image = (0, d + 1, *range(1, d + 1))
    moved = lax.ConvDimensionNumbers(image, (d, d + 1, *range(d)), image)
    out = lax.conv_general_dilated(
        x.transpose(_channels_at_end(numbers.lhs_spec)),
        kernel.transpose(*space, *first),
        **{**params, "dimension_numbers": moved},
    )
    return out.transpose(np.argsort(_channels_at_end(numbers.out_spec)))


def _channels_at_end(spec: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `spec`, (first, channels, *spatial), as (first, *spatial, channels)."""
    return (spec[0], *spec[2:], spec[1])
