"""A measurement on a ball of parameters: its value at the centre, and how far it can be from it."""

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
    """What a query's outputs can do on a ball: ‖A‖₂ and A Aᵀ, and how far they round."""

    norm: Float[Array, ""]
    outer: Float[Array, "K K"]
    sizes: OutputSizes


def reach(f: Influence, jacobian: AbstractJacobian, rows: AffineRows) -> Reach:
    """That of each input, its rows and their Jacobian given."""
    return Reach(jacobian.norms(), jacobian.outer(), output_sizes(f, jacobian, rows))


def ball(f: Influence, measurement, step, query, within: Reach) -> Ball:
    """One query's measurement at θ̂ + step."""
    theta, rebuild = ravel(f.model)
    x, y = query
    output = f.risk.output(rebuild(theta + step), x)
    of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
    flat = output.reshape(-1)
    value, rows = of_output(flat), jax.jacrev(of_output)(flat)
    slope = jnp.sqrt(jnp.maximum(einsum("...k,kl,...l->...", rows, within.outer, rows), 0))
    bounds = measurement.constants(f.risk, f.model)
    # The components of a vector measurement share their bounds.
    shared = lambda bound: jnp.broadcast_to(bound, slope.shape)
    return Ball(
        value,
        slope,
        shared(bounds.lipschitz * within.norm),
        shared(bounds.smoothness * within.norm**2),
        _value_rounding(value, rows, bounds, within.sizes.error(jnp.linalg.norm(step))),
    )


def slope_scale(lipschitz) -> Array:
    """The steepest slope as a scale of rounding. A loss without one is a polynomial of its output:
    its roundings are relative, and this is 0."""
    return jnp.where(jnp.isfinite(lipschitz), lipschitz, 0)


def _value_rounding(value, rows, bounds: MeasurementConstants, error) -> Array:
    """How far a computed m can be from m, `rows` being ∂m and `error` bounding that of its output: the
    output's error carried on, and that of a sum over K outputs with a few operations around it, relative
    to the value and to the steepest slope."""
    few = (64 + rows.shape[-1]) * jnp.finfo(value.dtype).eps / 2
    carried = jnp.linalg.norm(rows, axis=-1) * error + bounds.smoothness * error**2
    return few * (jnp.abs(value) + slope_scale(bounds.lipschitz)) + carried


def mean_ball(f: Influence, step, queries, within: Reach) -> Ball:
    """The mean of a scalar measurement over queries at θ̂ + step."""
    theta, rebuild = ravel(f.model)

    def average(t):
        return jnp.mean(jax.vmap(lambda q: f.measurement(f.risk, rebuild(t), q))(queries))

    value, gradient = jax.value_and_grad(average)(theta + step)
    each = jax.vmap(lambda q, w: ball(f, f.measurement, step, q, w))(queries, within)
    of_sum = within.norm.size * jnp.finfo(value.dtype).eps / 2 * jnp.mean(jnp.abs(each.value))
    return Ball(
        value,
        jnp.linalg.norm(gradient),
        jnp.mean(each.lipschitz),
        jnp.mean(each.smoothness),
        jnp.mean(each.rounding) + of_sum,
    )
