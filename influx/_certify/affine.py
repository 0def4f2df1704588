"""The problem that a certificate is about: outputs Aθ + b, with A and b held as arrays.

What is computed from them is inner products in a known order, whose rounding has a bound. Rounding
within the model's own program has none that A and b would tell: terms may cancel on the way.
"""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._chunks import chunk_length, chunked_map
from .._curvature.newton_step import HeldWoodbury
from .._gradients import risk_gradient
from .._influence import Influence
from .._jacobian import AbstractJacobian, HeadJacobian, OutputJacobian
from .._linalg import dot, ravel
from .._response import implicit_response
from .._risk import itself


class Rows(NamedTuple):
    """The outputs of n inputs: their slopes A, or the features of a linear head, and constants b."""

    slope: Float[Array, "n K P"] | Float[Array, "n d"]
    constant: Float[Array, "n K"]


class Output(eqx.Module):
    """Aθ + b for one input's rows, in the output's shape."""

    shape: tuple[int, ...] = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)  # of a head: those of its leaves

    def __call__(self, model, row: Rows):
        theta, _ = ravel(model)
        if row.slope.ndim == 1:
            head = HeadJacobian(row.slope[None], row.constant.size, self.widths)
            products = head.push(theta)[0]
        else:
            products = dot(row.slope, theta)
        return (products + row.constant).reshape(self.shape)


def affine_jacobian(f: Influence) -> AbstractJacobian:
    """That of the training outputs."""
    jacobian = implicit_response(f.response, "certify").jacobian
    assert jacobian is not None  # `certify` has seen to it
    return jacobian


def output_struct(f: Influence) -> jax.ShapeDtypeStruct:
    output = implicit_response(f.response, "certify").output
    assert output is not None  # `certify` has seen to it
    return output


@eqx.filter_jit
def affine_rows(f: Influence, jacobian: AbstractJacobian, inputs: PyTree[Array]) -> Rows:
    """A and b at some inputs, `jacobian` being theirs; b is the output of parameters that are all 0."""
    theta, rebuild = ravel(f.model)
    at_zero = lambda x: f.risk.output(rebuild(jnp.zeros_like(theta)), x).reshape(-1)
    chunk = chunk_length(2 * theta.size, theta.dtype)
    constant = chunked_map(at_zero, inputs, chunk)
    if isinstance(jacobian, HeadJacobian) and isinstance(affine_jacobian(f), HeadJacobian):
        return Rows(jacobian.features, constant)
    return Rows(jacobian.dense(), constant)


def affine(f: Influence) -> Influence:
    """`f` on the affine problem: the same to rounding, and it reads `Rows` for inputs."""
    response, jacobian = implicit_response(f.response, "certify"), affine_jacobian(f)
    rows = affine_rows(f, jacobian, f.risk.data[0])
    widths = jacobian.widths if isinstance(jacobian, HeadJacobian) else ()
    output = Output(output_struct(f).shape, widths)
    where = lambda risk: (risk.data, risk.predict, risk.whole)
    risk = eqx.tree_at(where, f.risk, ((rows, f.risk.data[1]), output, itself))
    if not widths:
        jacobian = OutputJacobian(risk, f.model, rows)
    newton = response.newton
    if isinstance(newton, HeldWoodbury):  # it holds what the other gradient left
        apart = risk_gradient(risk, f.model) - risk_gradient(f.risk, f.model)
        newton = replace(newton, slack=newton.slack + jnp.linalg.norm(apart))
    where = lambda r: (r.risk, r.jacobian, r.newton)
    is_none = lambda x: x is None
    response = eqx.tree_at(where, response, (risk, jacobian, newton), is_leaf=is_none)
    return eqx.tree_at(lambda f: f.response, f, response)


class OutputSizes(eqx.Module):
    """What bounds the rounding of Aθ + b and of Aᵀu, example by example.

    An inner product of N terms is wrong by at most N·u times the sum of their sizes, u the unit
    roundoff; the sizes are |A||θ| + |b|. `norms` are those of |A|, `constant` those of b.
    """

    norms: Float[Array, " n"]
    constant: Float[Array, " n"]
    terms: int = eqx.field(static=True)

    def of(self, length: Float[Array, ""]) -> Float[Array, " n"]:
        """A bound on ‖|A||θ| + |b|‖ for parameters of that length."""
        return self.norms * length + self.constant

    def error(self, length: Float[Array, ""]) -> Float[Array, " n"]:
        """A bound on the distance of a computed Aθ + b from the true one."""
        return self.terms * (jnp.finfo(self.norms.dtype).eps / 2) * self.of(length)


def output_sizes(jacobian: AbstractJacobian, rows: Rows) -> OutputSizes:
    constant = jnp.linalg.norm(rows.constant, axis=1)
    terms = jacobian.length + jacobian.outputs + 16  # and few more around the inner product
    return OutputSizes(jacobian.absolute_norms(), constant, terms)
