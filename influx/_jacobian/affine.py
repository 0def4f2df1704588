"""Whether outputs are affine in θ, read off the program."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._chunks import take
from .._custom_types import Model
from .._linalg import ravel
from .._risk import EmpiricalRisk


def is_affine(risk: EmpiricalRisk, model: Model) -> bool:
    """Whether the outputs are affine in the parameters, read off the program, not the layers' names.

    An affine map is one that JAX can transpose (the transpose is traced, never run) and that casts
    nothing that depends on the parameters to fewer digits.
    """
    theta, rebuild = ravel(model)
    x = take(risk.data[0], 0)
    output = lambda t: risk.output(rebuild(t), x)
    shape = jax.eval_shape(output, theta)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        return False
    try:
        jax.eval_shape(lambda ct: jax.linear_transpose(output, theta)(ct), shape)
    except (
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        KeyError,
    ):  # each primitive that cannot be transposed says so in its own way
        return False
    program = jax.make_jaxpr(output)(theta).jaxpr
    return not _casts(program, {*program.invars})


_ROUNDING = ("convert_element_type", "reduce_precision")


def _casts(program, dependent: set) -> bool:
    """Whether something in `dependent`, or computed from it, is cast to fewer digits."""
    for equation in program.eqns:
        inputs = [v for v in equation.invars if not hasattr(v, "val") and v in dependent]
        if not inputs:
            continue
        dependent.update(equation.outvars)
        if equation.primitive.name in _ROUNDING:
            old, new = inputs[0].aval.dtype, equation.outvars[0].aval.dtype
            exact = jnp.issubdtype(new, jnp.floating) and jnp.finfo(new).bits >= jnp.finfo(old).bits
            if equation.primitive.name == "reduce_precision" or not exact:
                return True
        for part in jtu.tree_leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and _casts(inner, {*inner.invars}):
                return True
    return False
