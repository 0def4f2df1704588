"""A measurement on a ball of parameters: its value at the centre, and how far it can be from it."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._influence import Influence
from .._jacobian import AbstractJacobian
from .._linalg import einsum, ravel
from .._measurement import MeasurementConstants
from .affine import AffineRows, OutputSizes, output_sizes


class Ball(eqx.Module):
    """m on a ball: its value at the centre, up to `rounding`, and how far it can be from it within
    radius r."""

    value: Array
    slope: Array
    lipschitz: Array
    smoothness: Array
    rounding: Array

    def error(self, radius: Array) -> Array:
        local = self.slope * radius + 0.5 * self.smoothness * radius**2
        return jnp.minimum(_product(self.lipschitz, radius), local) + self.rounding


def _product(lipschitz, radius):
    """L·r, infinite for an infinite L even at r = 0."""
    return jnp.where(jnp.isfinite(lipschitz), lipschitz * radius, jnp.inf)


class Reach(eqx.Module):
    """What a query's outputs can do on a ball: ‖A‖₂ and A Aᵀ, and how far they round. `terms` is how
    many numbers xᵀAAᵀx sums on its way."""

    norm: Float[Array, ""]
    outer: Float[Array, "K K"]
    sizes: OutputSizes
    terms: int = eqx.field(static=True)

    def length(self, rows: Float[Array, "*c K"]) -> Float[Array, "*c"]:
        """‖Aᵀx‖ from above: where terms of xᵀAAᵀx cancel it is rounding, of either sign."""
        square = einsum("...k,kl,...l->...", rows, self.outer, rows)
        size = jnp.sum(jnp.square(rows), axis=-1) * jnp.square(self.sizes.norms)
        rounding = self.terms * jnp.finfo(square.dtype).eps / 2
        return jnp.sqrt(jnp.maximum(square, 0) + rounding * size)


def reach(f: Influence, jacobian: AbstractJacobian, rows: AffineRows) -> Reach:
    """That of each input, its rows and their Jacobian given."""
    terms = jacobian.length + 2 * jacobian.outputs + 16
    return Reach(jacobian.norms(), jacobian.outer(), output_sizes(f, jacobian, rows), terms)


class _Outcome(NamedTuple):
    """m as computed, ∂m in the outputs, and a bound on these outputs' error."""

    value: Float[Array, "*c"]
    rows: Float[Array, "*c K"]
    error: Float[Array, ""]


def _outcome(f: Influence, measurement, step, query, within: Reach) -> _Outcome:
    theta, rebuild = ravel(f.model)
    x, y = query
    output = f.risk.output(rebuild(theta + step), x)
    of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
    flat = output.reshape(-1)
    error = within.sizes.error(jnp.linalg.norm(step))
    return _Outcome(of_output(flat), jax.jacrev(of_output)(flat), error)


def ball(f: Influence, measurement, step, query, within: Reach) -> Ball:
    """One query's measurement at θ̂ + step."""
    outcome = _outcome(f, measurement, step, query, within)
    return _ball(outcome, measurement.constants(f.risk, f.model), within)


def _ball(outcome: _Outcome, bounds: MeasurementConstants, within: Reach) -> Ball:
    slope = within.length(outcome.rows) + _slope_rounding(outcome, bounds, within, 0)
    # The components of a vector measurement share their bounds.
    shared = lambda bound: jnp.broadcast_to(bound, slope.shape)
    return Ball(
        outcome.value,
        slope,
        shared(bounds.lipschitz * within.norm),
        shared(bounds.smoothness * within.norm**2),
        _value_rounding(outcome, bounds),
    )


def slope_scale(lipschitz) -> Array:
    """The steepest slope as a scale of rounding. A loss without one is a polynomial of its output:
    its roundings are relative, and this is 0."""
    return jnp.where(jnp.isfinite(lipschitz), lipschitz, 0)


def _few(outcome: _Outcome) -> float:
    """A sum over K outputs with a few operations around it, relative."""
    return (64 + outcome.rows.shape[-1]) * float(jnp.finfo(outcome.rows.dtype).eps) / 2


def _value_rounding(outcome: _Outcome, bounds: MeasurementConstants) -> Array:
    """How far a computed m can be from m: the output's error carried on, and the rounding inside m,
    relative to the value and to the steepest slope."""
    value, rows, error = outcome
    carried = jnp.linalg.norm(rows, axis=-1) * error + bounds.smoothness * error**2
    return _few(outcome) * (jnp.abs(value) + slope_scale(bounds.lipschitz)) + carried


def _slope_rounding(
    outcome: _Outcome, bounds: MeasurementConstants, within: Reach, terms: int
) -> Array:
    """How far a computed Aᵀ∂m can be from it, each number of it a sum of so many terms besides."""
    unit = jnp.finfo(outcome.rows.dtype).eps / 2
    size = jnp.linalg.norm(outcome.rows, axis=-1)
    inside = _few(outcome) * (size + slope_scale(bounds.lipschitz))
    carried = bounds.smoothness * outcome.error
    return within.sizes.norms * (terms * unit * size + inside + carried)


def mean_ball(f: Influence, step, queries, within: Reach) -> Ball:
    """The mean of a scalar measurement over queries at θ̂ + step."""
    theta, rebuild = ravel(f.model)

    def average(t):
        return jnp.mean(jax.vmap(lambda q: f.measurement(f.risk, rebuild(t), q))(queries))

    def one(query, within):
        outcome = _outcome(f, f.measurement, step, query, within)
        terms = within.outer.shape[-1] * count + within.terms
        return _ball(outcome, bounds, within), _slope_rounding(outcome, bounds, within, terms)

    bounds, count = f.measurement.constants(f.risk, f.model), within.norm.size
    value, gradient = jax.value_and_grad(average)(theta + step)
    each, of_slope = jax.vmap(one)(queries, within)
    of_sum = count * jnp.finfo(value.dtype).eps / 2 * jnp.mean(jnp.abs(each.value))
    return Ball(
        value,
        jnp.linalg.norm(gradient) + jnp.mean(of_slope),
        jnp.mean(each.lipschitz),
        jnp.mean(each.smoothness),
        jnp.mean(each.rounding) + of_sum,
    )
