"""Scores from gradients of all parameters at once: any curvature."""

import equinox as eqx
import jax
import jax.numpy as jnp

from .._gradients import map_gradients
from .._misc import chunk_length, chunked_map, dot, ravel, take
from .base import AbstractScoring

# One product of forward mode takes about two passes forward; per-example gradients take three, and
# writing and reading them costs as much as some tens of products. Measured on a network of 235,146
# parameters the two are even at some 70 rows.
_FEW_ROWS = 32


class PerExample(AbstractScoring):
    """One pass of per-example gradients for all queries of a chunk, and a product [k, P] × [P, n]."""

    chunk_size: int | None = eqx.field(static=True, default=None)

    def for_rows(self, rows):
        return ForwardMode(self.chunk_size) if rows <= _FEW_ROWS else self

    def prepare(self, response, measurement, query):
        return _solved(response, measurement, query)

    def columns(self, response, prepared, indices):
        _, solved = prepared
        products = self._map(response, lambda _, g: dot(solved, g), indices)
        return -jnp.transpose(products)

    def quadratic(self, response, prepared):
        gradient, solved = prepared
        return jnp.sum(gradient * solved, axis=1)

    def own(self, response, measurement, power):
        def one(example, g):
            rows = jnp.atleast_2d(measurement.gradient(response.risk, response.model, example))
            for _ in range(power):
                g = response.factored.solve(g)
            return dot(rows, g)

        return self._map(response, one, None)

    def _map(self, response, fn, indices):
        data = response.risk.data if indices is None else take(response.risk.data, indices)
        parts = response.risk, response.model, data
        return map_gradients(fn, *parts, chunk_size=self.chunk_size)


class ForwardMode(AbstractScoring):
    """For each query the derivative of all training losses in the direction H⁻¹∇m, by one product of
    forward mode: no per-example gradient. For few queries."""

    chunk_size: int | None = eqx.field(static=True, default=None)

    def for_rows(self, rows):
        return self if rows <= _FEW_ROWS else PerExample(self.chunk_size)

    def prepare(self, response, measurement, query):
        return _solved(response, measurement, query)

    def columns(self, response, prepared, indices):
        _, solved = prepared
        risk, (theta, rebuild) = response.risk, ravel(response.model)
        data = risk.data if indices is None else take(risk.data, indices)

        def along(example):
            loss = lambda t: risk.example_loss(rebuild(t), example)
            return jax.vmap(lambda x: jax.jvp(loss, (theta,), (x,))[1])(solved)

        # Activations, not gradients, are what a chunk holds.
        chunk = chunk_length(4096, theta.dtype, self.chunk_size)
        return -jnp.transpose(chunked_map(along, data, chunk))

    def quadratic(self, response, prepared):
        return PerExample(self.chunk_size).quadratic(response, prepared)

    def own(self, response, measurement, power):
        return PerExample(self.chunk_size).own(response, measurement, power)


def _solved(response, measurement, query):
    """∇m, one row a component, and (H + λI)⁻¹ of each."""
    rows = jnp.atleast_2d(measurement.gradient(response.risk, response.model, query))
    return rows, response.solve(rows)
