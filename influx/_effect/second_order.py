from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._chunks import map_blocks
from .._cost import cost_of
from .._engine import Alternative, Piece, choose
from .._linalg import ravel, two_derivatives
from .base import AbstractEffect


class SecondOrder(AbstractEffect):
    """What `effect` says of whole groups, to second order in the data weights: columns are groups.

    Groups are taken `at_once` at a time.
    """

    effect: AbstractEffect
    masks: Float[Array, "k n"]
    at_once: int | None = eqx.field(static=True, default=None)

    def scheduled(self, f, query, queries, kept, limits):
        def pair(query, lost):
            return _change(f, lost, query)

        m = jax.eval_shape(lambda q: f.measurement(f.risk, f.model, q), query)
        k, n = self.masks.shape
        cost = cost_of(pair, query, jax.ShapeDtypeStruct((n,), self.masks.dtype))
        piece = Piece(("all parameters",), "second order of a group, m along its path", cost)
        way = Alternative(lambda _, points: replace(self, at_once=points), (piece,))
        schedule = choose((way,), limits, queries, k, max(1, m.size) * k, m.dtype)
        return replace(f, effect=schedule.scorer), schedule

    def lost(self, f, masks):
        return self.effect.lost(f, masks)

    def of_change(self, f, change):
        return self.effect.of_change(f, change)

    def prepare(self, f, query):
        return query

    def columns(self, f, prepared, indices):
        lost = self.lost(f, self.masks if indices is None else self.masks[indices])
        block = lambda places: jax.vmap(lambda row: _change(f, row, prepared))(lost[places])
        at_once = self.at_once or f.response.limits.rows(8 * f.risk.n, lost.dtype)
        changes = map_blocks(block, len(lost), at_once)
        return self.of_change(f, jnp.moveaxis(changes, 0, -1))


def _change(f, lost: Float[Array, " n"], query) -> Array:
    _, rebuild = ravel(f.model)
    watched = lambda theta: f.measurement(f.risk, rebuild(theta), query)
    return change_along(f, watched, f.response.path(lost))


def change_along(f, watched, path) -> Array:
    """∇m·θ′ + ½(∇m·θ″ + θ′ᵀ∇²mθ′): the Taylor series of m along θ̂ + εθ′ + ½ε²θ″, at ε = 1."""
    theta, _ = ravel(f.model)
    first, second = path
    along = lambda e: watched(theta + e * first + 0.5 * e**2 * second)
    slope, bend = two_derivatives(along, theta.dtype)
    return slope + 0.5 * bend
