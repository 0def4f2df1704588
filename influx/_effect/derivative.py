import jax.numpy as jnp

from .base import AbstractEffect


class Derivative(AbstractEffect):
    """I(i; m) = n · ∂m/∂wᵢ, divided by the scale."""

    def prepare(self, f, query):
        gradient = f.measurement.gradient(f.risk, f.model, query)
        return gradient, f.response.prepare(jnp.atleast_2d(gradient))

    def columns(self, f, prepared, indices):
        gradient, solved = prepared
        scores = f.scale.divide(
            f.response.columns(solved, indices),
            indices,
            lambda: f.response.quadratic(jnp.atleast_2d(gradient)),
            lambda others: f.response.columns(solved, others),
        )
        return scores.reshape(*gradient.shape[:-1], -1)
