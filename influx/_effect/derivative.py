from dataclasses import replace
from typing import Any

import equinox as eqx
import jax

from .base import AbstractEffect


class Prepared(eqx.Module):
    """What a response made ready for one query, and the shape of the measurement there."""

    state: Any
    components: tuple[int, ...] = eqx.field(static=True)


class Derivative(AbstractEffect):
    """I(i; m) = n · ∂m/∂wᵢ, divided by the scale."""

    def scheduled(self, f, query, queries, kept, limits):
        response, schedule = f.response.scheduled(f.measurement, query, queries, kept, limits)
        return replace(f, response=response), schedule

    def lost(self, f, masks):
        return masks

    def of_change(self, f, change):
        return -f.risk.n * change

    def prepare(self, f, query):
        shape = jax.eval_shape(lambda q: f.measurement(f.risk, f.model, q), query).shape
        return Prepared(f.response.prepare(f.measurement, query), shape)

    def columns(self, f, prepared, indices):
        state = prepared.state
        scores = f.scale.divide(
            f.response.columns(state, indices),
            indices,
            lambda: f.response.quadratic(state),
            lambda others: f.response.columns(state, others),
        )
        return scores.reshape(*prepared.components, -1)
