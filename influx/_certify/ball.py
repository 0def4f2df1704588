"""A measurement on a ball of parameters: its value at the centre, and how far it can be from it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._influence import Influence
from .._linalg import einsum, ravel


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


def ball(f: Influence, measurement, step, query, outer, norm) -> Ball:
    """One query's measurement at θ̂ + step; `outer` is A Aᵀ of its output, `norm` is ‖A‖₂."""
    theta, rebuild = ravel(f.model)
    x, y = query
    output = f.risk.output(rebuild(theta + step), x)
    of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
    flat = output.reshape(-1)
    rows = jax.jacrev(of_output)(flat)
    slope = jnp.sqrt(jnp.maximum(einsum("...k,kl,...l->...", rows, outer, rows), 0))
    bounds = measurement.constants(f.risk, f.model)
    # The components of a vector measurement share their bounds.
    shared = lambda bound: jnp.broadcast_to(bound, slope.shape)
    value, steepness = of_output(flat), jnp.linalg.norm(rows, axis=-1)
    return Ball(
        value,
        slope,
        shared(bounds.lipschitz * norm),
        shared(bounds.smoothness * norm**2),
        _value_rounding(value, steepness, bounds.smoothness, flat, norm, theta + step),
    )


def _value_rounding(value, steepness, smoothness, output, norm, theta) -> Array:
    """How far a computed m can be from m: the error of the output, carried on by ∂m, and that of the
    few operations from there on. An output Aθ + b is wrong by P·u·(‖A‖‖θ‖ + ‖b‖), and ‖b‖ is at most
    ‖output‖ + ‖A‖‖θ‖."""
    unit = jnp.finfo(value.dtype).eps / 2
    shift = unit * theta.size * (2 * norm * jnp.linalg.norm(theta) + jnp.linalg.norm(output))
    few = 64 + output.size  # a sum over K outputs, and what is done to it
    return few * unit * (jnp.abs(value) + 1) + steepness * shift + smoothness * shift**2


def mean_ball(f: Influence, step, queries, norms) -> Ball:
    """The mean of a scalar measurement over queries at θ̂ + step; `norms` are their ‖A‖."""
    theta, rebuild = ravel(f.model)

    def average(t):
        return jnp.mean(jax.vmap(lambda q: f.measurement(f.risk, rebuild(t), q))(queries))

    value, gradient = jax.value_and_grad(average)(theta + step)
    bounds = f.measurement.constants(f.risk, f.model)

    measurement: Any = f.measurement  # of the output: `constants` has answered

    def rounding(query, norm):
        x, y = query
        output = f.risk.output(rebuild(theta + step), x)
        of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
        at, row = jax.value_and_grad(of_output)(output.reshape(-1))
        steepness, flat = jnp.linalg.norm(row), output.reshape(-1)
        return _value_rounding(at, steepness, bounds.smoothness, flat, norm, theta + step), at

    each, values = jax.vmap(rounding)(queries, norms)
    of_sum = norms.size * jnp.finfo(value.dtype).eps / 2 * jnp.mean(jnp.abs(values))
    return Ball(
        value,
        jnp.linalg.norm(gradient),
        jnp.mean(bounds.lipschitz * norms),
        jnp.mean(bounds.smoothness * norms**2),
        jnp.mean(each) + of_sum,
    )
