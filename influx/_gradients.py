"""Per-example gradients gᵢ = ∇ℓ(zᵢ, θ), a chunk of examples at a time."""

import jax
from jaxtyping import Array, Float

from ._chunks import Limits, chunked_map
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


def map_gradients(fn, risk: EmpiricalRisk, model: Model, data=None, *, limits: Limits = Limits()):  # noqa: B008
    """`fn(zᵢ, gᵢ)` stacked over the examples of `data` (the training data by default)."""
    data = risk.data if data is None else data
    theta, _ = ravel(model)
    chunk = limits.rows(4 * theta.size, theta.dtype)
    return chunked_map(lambda z: fn(z, example_gradient(risk, model, z)), data, chunk)
