"""What is done a block at a time, in the form that XLA for CPUs is fast at.

Each block is the body of a loop, and so is each step of a training run. There XLA leaves convolutions in
the order of axes that they have, and one of Equinox's, with the channels before the space, takes several
times as long (jax issue 12868). And a sum over an axis of a small array, such as a layer norm's, may
take many times as long as the product with ones that it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

from ._equations import CALLS, CHECKPOINTS, apply, inner_program


def loop_body(fn: Callable) -> Callable:
    """`fn` of arrays with the axes of its convolutions in the order (batch, space, channels), and its
    sums as products."""
    return _rewritten(fn, lambda equation: _is_convolution(equation) or _is_slow_sum(equation))


def channels_last(fn: Callable) -> Callable:
    """`fn` of arrays with the axes of its convolutions in that order, and nothing else changed: what is
    trained without one keeps its last digits."""
    return _rewritten(fn, _is_convolution)


def has_kernel_of(fn: Callable, *args) -> bool:
    """Whether a convolution that `fn(*args)` shows has a kernel that depends on `args`."""
    program = jax.make_jaxpr(fn)(*args).jaxpr
    return _follow(program, [True] * len(program.invars))[0]


def _follow(program: Jaxpr, given: list[bool]) -> tuple[bool, list[bool]]:
    """Whether a kernel depends on the inputs `given`, and which outputs do."""
    known = {v for v, is_given in zip(program.invars, given) if is_given}
    depends = lambda v: not isinstance(v, Literal) and v in known
    found = False
    for equation in program.eqns:
        inputs = [depends(v) for v in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        if _is_convolution(equation):
            found |= inputs[1]
        elif equation.primitive.name in CALLS:
            inside, outputs = _follow(inner_program(equation)[0], inputs)
            found |= inside
        known.update(v for v, is_known in zip(equation.outvars, outputs) if is_known)
    return found, [depends(v) for v in program.outvars]


def _rewritten(fn: Callable, slow: Callable[[Any], bool]) -> Callable:
    def rewritten(*args):
        closed, answer = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = jtu.tree_leaves(args)
        if _has(closed.jaxpr, slow):
            outs = _run(closed.jaxpr, closed.consts, leaves, slow)
        else:
            outs = jaxpr_as_fun(closed)(*leaves)
        return jtu.tree_unflatten(jtu.tree_structure(answer), outs)

    return rewritten


def _has(program: Jaxpr, slow: Callable[[Any], bool]) -> bool:
    inner = [inner_program(e)[0] for e in program.eqns if e.primitive.name in CALLS]
    return any(map(slow, program.eqns)) or any(_has(p, slow) for p in inner)


def _run(program: Jaxpr, consts, inputs, slow: Callable[[Any], bool]) -> list[Array]:
    values = dict(zip(program.constvars, consts)) | dict(zip(program.invars, inputs))
    value = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in program.eqns:
        operands = [value(v) for v in equation.invars]
        if slow(equation) and _is_convolution(equation):
            outs = [_convolution(*operands, **equation.params)]
        elif slow(equation):
            outs = [_sum(operands[0], equation.params["axes"])]
        elif equation.primitive.name in CALLS and _has(inner_program(equation)[0], slow):
            outs = _run_inside(program, equation, operands, slow)
        else:
            outs = apply(program, equation, operands)
        values.update(zip(equation.outvars, outs))
    return [value(v) for v in program.outvars]


def _run_inside(program: Jaxpr, equation, operands, slow: Callable[[Any], bool]) -> list[Array]:
    """A program inside the program: what is to be computed again for derivatives stays so."""
    inner, consts = inner_program(equation)
    if equation.primitive.name not in CHECKPOINTS:
        return _run(inner, consts, operands, slow)
    closed = jax.make_jaxpr(lambda *inputs: _run(inner, consts, inputs, slow))(*operands)
    if closed.consts:
        return _run(inner, consts, operands, slow)
    again = equation.replace(params={**equation.params, "jaxpr": closed.jaxpr})
    return apply(program, again, operands)


def _is_convolution(equation) -> bool:
    return equation.primitive.name == "conv_general_dilated"


def _is_slow_sum(equation) -> bool:
    """Of float32 or float64, over axes side by side: over others a product is no faster."""
    if equation.primitive.name != "reduce_sum":
        return False
    axes, (operand,) = sorted(equation.params["axes"]), equation.invars
    beside = bool(axes) and axes == list(range(axes[0], axes[-1] + 1))
    return beside and operand.aval.dtype in (jnp.float32, jnp.float64)


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum over axes side by side, as a product with ones: no axis of x moves."""
    axes = tuple(sorted(axes))
    before = tuple(range(axes[0])) if axes[-1] < x.ndim - 1 else ()
    ones = jnp.ones([x.shape[axis] for axis in (*before, *axes)], x.dtype)
    summed = axes, tuple(range(len(before), ones.ndim))
    return jax.lax.dot_general(x, ones, (summed, (before, before)), jax.lax.Precision.HIGHEST)


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
