from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from .._chunks import map_blocks
from .._cost import cost_of
from .._engine import Alternative, Piece, choose
from .._linalg import ravel
from .._response import Without, require_convergence
from .base import AbstractEffect
from .derivative import Derivative


class FirstOrder(AbstractEffect):
    """m(θ̂₋ᵢ) − m(θ̂) ≈ −wᵢ I(i; m)/n."""

    def scheduled(self, f, query, queries, kept, limits):
        return Derivative().scheduled(f, query, queries, kept, limits)

    def lost(self, f, masks):
        return f.risk.weights[None] * masks

    def of_change(self, f, change):
        return change

    def prepare(self, f, query):
        return Derivative().prepare(f, query)

    def columns(self, f, prepared, indices):
        weights = f.risk.weights if indices is None else f.risk.weights[indices]
        scores = Derivative().columns(f, prepared, indices)
        return -jnp.broadcast_to(weights, scores.shape) * scores / f.risk.n


class Newton(AbstractEffect):
    """m(θ̂ + Δθᵢ) − m(θ̂ + δ₀): m *evaluated*, not linearised, after one Newton step without i and
    `refine` chord steps (P10).

    δ₀ is the same with every point kept, so that what is left of training is not counted as an effect of
    the removal; it is 0 at a stationary point. Training points are taken `points` at a time.
    """

    refine: int = eqx.field(static=True, default=0)
    points: int | None = eqx.field(static=True, default=None)

    def scheduled(self, f, query, queries, kept, limits):
        without = Without(f.response, self.refine)

        def pair(query, index):
            steps, _ = without.steps(index[None], f.response.displace(index[None]))
            return _outcome(f, steps[0], query)

        m = jax.eval_shape(lambda q: f.measurement(f.risk, f.model, q), query)
        cost = cost_of(pair, query, jax.ShapeDtypeStruct((), jnp.arange(0).dtype))
        piece = Piece(("all parameters",), "one Newton step a point, m evaluated", cost)
        way = Alternative(lambda _, points: replace(self, points=points), (piece,))
        kept = max(1, m.size) * kept
        schedule = choose((way,), limits, queries, f.risk.n, kept, m.dtype)
        return replace(f, effect=schedule.scorer), schedule

    def lost(self, f, masks):
        raise ValueError(
            "Newton removals of single points do not add up to that of a group. Use "
            '`removal(groups(f, masks, order=2), "first-order")`, or retrain with `leave_subset_out`.'
        )

    def of_change(self, f, change):
        return self.lost(f, change)

    def prepare(self, f, query):
        settled, settles = Without(f.response, self.refine).settled()
        return (query, settles), _outcome(f, settled, query)

    def columns(self, f, prepared, indices):
        (query, settles), before = prepared
        indices = jnp.arange(f.risk.n) if indices is None else indices
        theta, _ = ravel(f.model)
        without = Without(f.response, self.refine)

        def block(places):
            points = indices[places]
            steps, converge = without.steps(points, f.response.displace(points))
            after = jax.vmap(lambda step: _outcome(f, step, query))(steps)
            return require_convergence(after, settles, converge, points)

        points = self.points or f.response.limits.rows(8 * theta.size, theta.dtype)
        after = map_blocks(block, indices.size, points)
        return jnp.moveaxis(after - before[None], 0, -1)


def _outcome(f, step, query) -> jax.Array:
    theta, rebuild = ravel(f.model)
    return f.measurement(f.risk, rebuild(theta + step), query)
