"""Scores from gradients of all parameters at once: any curvature."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._chunks import Limits, chunked_map, leading_length, row_struct, take
from .._cost import Cost, Parts, cost_of
from .._gradients import example_gradient, map_gradients
from .._linalg import dot, ravel
from .base import AbstractScoring
from .schedule import Alternative, Piece


class PerExample(AbstractScoring):
    """One pass of per-example gradients for all queries of a chunk, and a product [k, P] × [P, n]."""

    limits: Limits = eqx.field(static=True, default=Limits())
    points: int | None = eqx.field(static=True, default=None)

    def alternatives(self, response, measurement, query):
        k, solved = _gradient_and_solve(response, measurement, query)
        one, like = row_struct(response.risk.data), _rows_like(response, k)
        score = lambda rows, z: dot(rows, example_gradient(response.risk, response.model, z))
        cost = cost_of(score, like, one)
        gradients = Piece(_paths(response), "per-example gradients", cost, _bytes(like))
        per_example = Alternative(self.settled, (*solved, gradients))
        if not has_forward(response):
            return (per_example,)
        forward = (*solved, forward_piece(response, k))
        return per_example, Alternative(ForwardMode(self.limits).settled, forward, whole=True)

    def settled(self, ways, points):
        return replace(self, points=points)

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
        limits = self.limits if self.points is None else Limits(self.points)
        return map_gradients(fn, *parts, limits=limits)


class ForwardMode(AbstractScoring):
    """For each query the derivative of all training losses in the direction H⁻¹∇m, by one product of
    forward mode: no per-example gradient. For few queries."""

    limits: Limits = eqx.field(static=True, default=Limits())
    points: int | None = eqx.field(static=True, default=None)

    def alternatives(self, response, measurement, query):
        k, solved = _gradient_and_solve(response, measurement, query)
        return (Alternative(self.settled, (*solved, forward_piece(response, k)), whole=True),)

    def settled(self, ways, points):
        return replace(self, points=points)

    def prepare(self, response, measurement, query):
        return _solved(response, measurement, query)

    def columns(self, response, prepared, indices):
        _, solved = prepared
        return forward_columns(response, solved, indices, self.points)

    def quadratic(self, response, prepared):
        return PerExample(self.limits).quadratic(response, prepared)

    def own(self, response, measurement, power):
        return PerExample(self.limits).own(response, measurement, power)


def _solved(response, measurement, query):
    """∇m, one row a component, and (H + λI)⁻¹ of each."""
    rows = jnp.atleast_2d(measurement.gradient(response.risk, response.model, query))
    return rows, response.solve(rows)


def forward_columns(response, solved, indices, points: int | None):
    """−∇ℓᵢ · v for each row v of `solved`: the products of forward mode."""
    data = response.risk.data if indices is None else take(response.risk.data, indices)
    directions = jax.vmap(_directions(response))(solved)
    along = _along(response)
    count = leading_length(data)
    return -jnp.transpose(chunked_map(lambda z: along(directions, z), data, points or count))


def has_forward(response) -> bool:
    """Whether losses can be differentiated forwards: a model with a `jax.custom_vjp` has no way."""
    directions = jax.eval_shape(jax.vmap(_directions(response)), _rows_like(response, 1))
    try:
        jax.eval_shape(_along(response), directions, row_struct(response.risk.data))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False
    return True


def forward_piece(response, k: int) -> Piece:
    """What these cost, for k directions a query."""
    directions = jax.eval_shape(jax.vmap(_directions(response)), _rows_like(response, k))
    cost = cost_of(_along(response), directions, row_struct(response.risk.data))
    return Piece(_paths(response), "forward mode", cost, _bytes(directions))


def _directions(response):
    """A vector of all parameters ↦ a pytree like the model's."""
    _, rebuild = ravel(response.model)
    return lambda v: eqx.filter(rebuild(v), eqx.is_inexact_array)


def _along(response):
    """(directions, example) ↦ the derivatives of the example's loss in each of them."""
    risk = response.risk
    params, static = eqx.partition(response.model, eqx.is_inexact_array)

    def along(directions, example):
        loss = lambda p: risk.example_loss(eqx.combine(p, static), example)
        return jax.vmap(lambda d: jax.jvp(loss, (params,), (d,))[1])(directions)

    return along


def _gradient_and_solve(response, measurement, query) -> tuple[int, tuple[Piece, ...]]:
    """How many components m has, and what their gradients and solves cost."""
    risk, model = response.risk, response.model
    gradient = lambda q, _: jnp.atleast_2d(measurement.gradient(risk, model, q))
    k = jax.eval_shape(gradient, query, None).shape[0]
    paths = _paths(response)
    like = _rows_like(response, k)
    flops, kept = response.factored.solve_flops, Cost(live=Parts(query=2 * _bytes(like)))
    if flops is None:
        step = cost_of(lambda v, _: jax.vmap(response.factored.matvec)(v), like, None)
        solve = Piece(paths, "a solve, per step", step.plus(kept))
    else:
        solve = Piece(paths, "a solve", kept.plus(Cost(flops=Parts(query=k * flops))))
    return k, (Piece(paths, "gradients of queries", cost_of(gradient, query, None)), solve)


def _rows_like(response, k: int) -> jax.ShapeDtypeStruct:
    theta, _ = ravel(response.model)
    return jax.ShapeDtypeStruct((k, theta.size), theta.dtype)


def _paths(response) -> tuple[str, ...]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(response.model, eqx.is_inexact_array))
    return tuple(jtu.keystr(path) for path, _ in leaves)


def _bytes(tree) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree)))
