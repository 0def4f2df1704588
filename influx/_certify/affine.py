"""The problem that a certificate is about: outputs Aθ + b, with A and b held as arrays.

What is computed from them is inner products, whose rounding has a bound. Rounding within the model's
own program has none that A and b would tell: terms may cancel on the way. An inner product of N terms is
summed in blocks, which bounds its rounding by their number and length in place of N.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._chunks import chunk_length, chunked_map
from .._influence import Influence
from .._jacobian import AbstractJacobian, HeadJacobian, OutputJacobian
from .._linalg import einsum, ravel
from .._response import implicit_response
from .._risk import itself

_BLOCK = 160  # terms, at most: shorter blocks round less, and each is a product by itself


class AffineRows(NamedTuple):
    """The outputs of n inputs: their slopes A, or the features of a linear head, in blocks, and their
    constants b."""

    slope: Float[Array, "n K blocks s"] | Float[Array, "n blocks s"]
    constant: Float[Array, "n K"]


def _block_shape(length: int) -> tuple[int, int]:
    """Blocks, and the terms of each."""
    blocks = -(-length // _BLOCK)
    return blocks, -(-length // blocks)


def _in_blocks(rows: Float[Array, "*b N"]) -> Float[Array, "*b blocks s"]:
    shape = _block_shape(rows.shape[-1])
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, math.prod(shape) - rows.shape[-1])]
    return jnp.pad(rows, padding).reshape(*rows.shape[:-1], *shape)


class AffineOutput(eqx.Module):
    """Aθ + b for one input's rows, in the output's shape."""

    shape: tuple[int, ...] = eqx.field(static=True)
    head: HeadJacobian | None  # of no examples: how the parameters of a head are laid out

    def __call__(self, model, row: AffineRows):
        theta, _ = ravel(model)
        if row.slope.ndim == 2:
            assert self.head is not None  # `affine_rows` has seen to it
            parts = einsum("bs,kbs->kb", row.slope, _in_blocks(self.head.split(theta)))
        else:
            parts = einsum("kbs,bs->kb", row.slope, _in_blocks(theta))
        # A barrier, or XLA may make one product of all blocks and their sum.
        products = jnp.sum(jax.lax.optimization_barrier(parts), axis=1)
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
def affine_rows(f: Influence, jacobian: AbstractJacobian, inputs: PyTree[Array]) -> AffineRows:
    """A and b at some inputs, `jacobian` being theirs; b is the output of parameters that are all 0."""
    theta, rebuild = ravel(f.model)
    at_zero = lambda x: f.risk.output(rebuild(jnp.zeros_like(theta)), x).reshape(-1)
    chunk = chunk_length(2 * theta.size, theta.dtype)
    constant = chunked_map(at_zero, inputs, chunk)
    if isinstance(jacobian, HeadJacobian) and isinstance(affine_jacobian(f), HeadJacobian):
        return AffineRows(_in_blocks(jacobian.features), constant)
    return AffineRows(_in_blocks(jacobian.dense()), constant)


def affine(f: Influence) -> Influence:
    """`f` on the affine problem: the same to rounding, and it reads `AffineRows` for inputs. Its
    curvature stays that of `f`: the steps that it proposes are judged here, not trusted."""
    response, jacobian = implicit_response(f.response, "certify"), affine_jacobian(f)
    rows = affine_rows(f, jacobian, f.risk.data[0])
    head = jacobian.take(jnp.arange(0)) if isinstance(jacobian, HeadJacobian) else None
    output = AffineOutput(output_struct(f).shape, head)
    where = lambda risk: (risk.data, risk.predict, risk.whole)
    risk = eqx.tree_at(where, f.risk, ((rows, f.risk.data[1]), output, itself))
    if head is None:
        jacobian = OutputJacobian(risk, f.model, rows)
    response = eqx.tree_at(lambda r: (r.risk, r.jacobian), response, (risk, jacobian))
    return eqx.tree_at(lambda f: f.response, f, response)


class OutputSizes(eqx.Module):
    """What bounds the rounding of Aθ + b and of Aᵀu, example by example.

    An inner product of N terms is wrong by at most N·u times the sum of their sizes, u the unit
    roundoff: in an output, |A||θ| + |b|. `norms` are ‖|A|‖₂, `settled` is ‖|A||θ̂| + |b|‖.
    """

    norms: Float[Array, " n"]
    settled: Float[Array, " n"]
    terms: int = eqx.field(static=True)

    def error(self, moved: Float[Array, ""]) -> Float[Array, " n"]:
        """A bound on ‖computed − true outputs‖ at parameters so far from θ̂."""
        unit = jnp.finfo(self.norms.dtype).eps / 2
        return self.terms * unit * (self.settled + self.norms * moved)


def output_sizes(f: Influence, jacobian: AbstractJacobian, rows: AffineRows) -> OutputSizes:
    """Those of an affine problem's outputs at some rows: its outputs on absolute values."""
    theta, rebuild = ravel(f.model)
    at = lambda row: jnp.linalg.norm(f.risk.output(rebuild(jnp.abs(theta)), row).reshape(-1))
    settled = jax.vmap(at)(jtu.tree_map(jnp.abs, rows))
    terms = sum(rows.slope.shape[-2:]) + jacobian.outputs + 16  # with a few around them
    return OutputSizes(jacobian.absolute_norms(), settled, terms)
