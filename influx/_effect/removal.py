import jax
import jax.numpy as jnp

from .._misc import chunk_length, map_blocks, ravel
from .base import AbstractEffect
from .derivative import Derivative


class FirstOrder(AbstractEffect):
    """m(θ̂₋ᵢ) − m(θ̂) ≈ −wᵢ I(i; m)/n."""

    def prepare(self, f, query):
        return Derivative().prepare(f, query)

    def columns(self, f, prepared, indices):
        weights = f.risk.weights if indices is None else f.risk.weights[indices]
        scores = Derivative().columns(f, prepared, indices)
        return -jnp.broadcast_to(weights, scores.shape) * scores / f.risk.n


class Newton(AbstractEffect):
    """m(θ̂ + Δθᵢ) − m(θ̂ + δ₀): m *evaluated*, not linearised, after one Newton step without i (P10).

    δ₀ is the Newton step with every point kept, so that what is left of training is not counted as an
    effect of the removal; it is 0 at a stationary point.
    """

    def prepare(self, f, query):
        return query, _outcome(f, f.response.settle(), query)

    def columns(self, f, prepared, indices):
        query, before = prepared
        indices = jnp.arange(f.risk.n) if indices is None else indices
        theta, _ = ravel(f.model)

        def block(places):
            steps = f.response.displace(indices[places])
            return jax.vmap(lambda step: _outcome(f, step, query))(steps)

        after = map_blocks(block, indices.size, chunk_length(8 * theta.size, theta.dtype))
        return jnp.moveaxis(after - before[None], 0, -1)


def _outcome(f, step, query) -> jax.Array:
    theta, rebuild = ravel(f.model)
    return f.measurement(f.risk, rebuild(theta + step), query)
