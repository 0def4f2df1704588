"""Convolutions with the channels last.

XLA for CPUs turns convolutions into the order that it is fast at, but not those in the body of a loop:
there one of Equinox's order, with the channels before the space, takes several times as long (jax issue
12868). What is done a block at a time is such a body.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

from ._equations import CALLS, apply, inner_program


def channels_last(fn: Callable) -> Callable:
    """`fn` of arrays with the axes of its convolutions in the order (batch, space, channels)."""

    def ordered(*args):
        closed, answer = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = jtu.tree_leaves(args)
        if _convolves(closed.jaxpr):
            outs = _run(closed.jaxpr, closed.consts, leaves)
        else:
            outs = jaxpr_as_fun(closed)(*leaves)
        return jtu.tree_unflatten(jtu.tree_structure(answer), outs)

    return ordered


def _convolves(program: Jaxpr) -> bool:
    names = [equation.primitive.name for equation in program.eqns]
    if "conv_general_dilated" in names:
        return True
    calls = [e for e, name in zip(program.eqns, names) if name in CALLS]
    return any(_convolves(inner_program(e)[0]) for e in calls)


def _run(program: Jaxpr, consts, inputs) -> list[Array]:
    values = dict(zip(program.constvars, consts)) | dict(zip(program.invars, inputs))
    value = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in program.eqns:
        operands, name = [value(v) for v in equation.invars], equation.primitive.name
        if name == "conv_general_dilated":
            outs = [_convolution(*operands, **equation.params)]
        elif name in CALLS and _convolves(inner_program(equation)[0]):
            outs = _run(*inner_program(equation), operands)
        else:
            outs = apply(program, equation, operands)
        values.update(zip(equation.outvars, outs))
    return [value(v) for v in program.outvars]


def _convolution(image, kernel, *, dimension_numbers, window_strides, padding, **params) -> Array:
    """The same convolution, its operands and its result transposed."""
    of_image, of_kernel, of_result = dimension_numbers
    last = image.ndim - 1
    space = tuple(range(1, last))
    image = jnp.transpose(image, (of_image[0], *of_image[2:], of_image[1]))
    kernel = jnp.transpose(kernel, (*of_kernel[2:], of_kernel[1], of_kernel[0]))
    order = jax.lax.ConvDimensionNumbers(
        (0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space)
    )
    result = jax.lax.conv_general_dilated(
        image, kernel, window_strides, padding, dimension_numbers=order, **params
    )
    places = dict(zip((of_result[0], of_result[1], *of_result[2:]), (0, last, *space)))
    return jnp.transpose(result, [places[axis] for axis in range(result.ndim)])
