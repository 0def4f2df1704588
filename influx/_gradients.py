"""Per-example gradients gᵢ = ∇ℓ(zᵢ, θ), a chunk of examples at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._chunks import Limits, chunk_length, chunked_map, chunked_sum
from ._custom_types import Example, Model
from ._linalg import ravel
from ._risk import EmpiricalRisk


def example_gradient(risk: EmpiricalRisk, model: Model, example: Example) -> Float[Array, " P"]:
    """g = ∇ℓ(z, θ), in the order of `ravel(model)`."""
    theta, rebuild = ravel(model)
    return jax.grad(lambda t: risk.example_loss(rebuild(t), example))(theta)


def risk_gradient(risk: EmpiricalRisk, model: Model, weights=None) -> Float[Array, " P"]:
    """∇J(θ, w): zero at a stationary point."""
    theta, rebuild = ravel(model)
    return jax.grad(lambda t: risk.objective(rebuild(t), weights))(theta)


def gradient_size(risk: EmpiricalRisk, model: Model) -> Float[Array, " P"]:
    """(1/n) Σ wᵢ|gᵢ| + |∇Ω|, entry by entry: the sizes of the terms that ∇J is the sum of."""
    theta, _ = ravel(model)
    size = lambda z, w: w * jnp.abs(example_gradient(risk, model, z))
    block = lambda args: jnp.sum(jax.vmap(size)(*args), axis=0)
    total = chunked_sum(block, (risk.data, risk.weights), chunk_length(4 * theta.size, theta.dtype))
    return total / risk.n + jnp.abs(risk.l2_vector(model) * theta)


def map_gradients(fn, risk: EmpiricalRisk, model: Model, data=None, *, limits: Limits = Limits()):  # noqa: B008
    """`fn(zᵢ, gᵢ)` stacked over the examples of `data` (the training data by default)."""
    data = risk.data if data is None else data
    theta, _ = ravel(model)
    chunk = limits.rows(4 * theta.size, theta.dtype)
    return chunked_map(lambda z: fn(z, example_gradient(risk, model, z)), data, chunk)
