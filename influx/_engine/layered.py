"""Scores layer by layer, for curvatures of one Kronecker-factored block a layer."""

import abc
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._curvature import EigenBlock, Kronecker
from .._measurement import Loss
from .._misc import chunk_length, chunked_map, einsum, map_blocks, take
from .._taps import Layer, Rows, Watched, ruled
from .base import AbstractScoring


class AbstractPrepared(eqx.Module):
    """What one query needs of one layer; `size` is its share of ∇mᵀ(H + λI)⁻¹∇m."""

    size: eqx.AbstractVar[Float[Array, " k"]]

    @abc.abstractmethod
    def products(self, block: EigenBlock, rows: Rows) -> Float[Array, "k b"]:
        """∇mᵀ(H + λI)⁻¹gᵢ of the layer, for the rows of a chunk of training points."""


class Terms(AbstractPrepared):
    """A rank-one gradient, each factor times the weights of the ρ terms of the inverse: a score is
    Σ_ρ (left · g)(right · a)."""

    left: Float[Array, "k S u l"]
    right: Float[Array, "S u r"]
    size: Float[Array, " k"]

    def products(self, block, rows):
        left, right = jax.vmap(_rank_one)(jax.vmap(block.rotate_rows)(rows))
        by_left = einsum("ksul,bsl->ksub", self.left, left[:, 0])
        by_right = einsum("sur,bsr->sub", self.right, right)
        return jnp.sum(by_left * by_right[None], axis=(1, 2))


class Solved(AbstractPrepared):
    """(H + λI)⁻¹∇m of a layer as a matrix."""

    matrix: Float[Array, "k S l r"]
    size: Float[Array, " k"]

    def products(self, block, rows):
        if rows.indexed:
            return _table_products(self.matrix, rows)
        gradients = jax.vmap(lambda row: _gradient(block.layer, row)[0])(rows)
        return einsum("kslr,bslr->kb", self.matrix, gradients)


class Layered(AbstractScoring):
    """Scores as sums over layers of what a layer's structure makes cheapest.

    - *terms*: where the layer is applied once an example, for query and training point, gradients are
      rank one, g ⊗ a, and Σ_kl ĝ_ik ĝ_jk R_kl â_il â_jl with R = 1/(Λ + λ) is, for R ≈ Σ_ρ p ⊗ q, a
      sum of ρ products of two small Gram matrices (theory: §4).
    - *solved*: else the query's H⁻¹∇m as a matrix, and per-example gradients of that one layer.
    """

    chunk_size: int | None = eqx.field(static=True, default=None)

    def for_rows(self, rows):
        return self

    def prepare(self, response, measurement, query):
        rows = _measurement_rows(response, measurement)(query)
        blocks = _kronecker(response).blocks
        return tuple(_prepared(block, row) for block, row in zip(blocks, rows))

    def columns(self, response, prepared, indices):
        blocks = _kronecker(response).blocks
        rows_of = _loss_rows(response)
        data = response.risk.data
        count = response.risk.n if indices is None else indices.shape[0]

        def block(places):
            chosen = places if indices is None else indices[places]
            rows = jax.vmap(rows_of)(take(data, chosen))
            parts = [p.products(b, row) for b, p, row in zip(blocks, prepared, rows)]
            return functools.reduce(jnp.add, parts).T

        scores = map_blocks(block, count, self._chunk(response, rows_of))
        return -scores.T

    def quadratic(self, response, prepared):
        return functools.reduce(jnp.add, [part.size for part in prepared])

    def own(self, response, measurement, power):
        blocks = _kronecker(response).blocks
        of_loss, of_measurement = _loss_rows(response), _measurement_rows(response, measurement)

        def one(example):
            pairs = zip(blocks, of_measurement(example), of_loss(example))
            parts = [_own(block, m, g, power) for block, m, g in pairs]
            return functools.reduce(jnp.add, parts)

        return chunked_map(one, response.risk.data, self._chunk(response, of_loss))

    def _chunk(self, response, rows_of) -> int:
        one = jax.eval_shape(rows_of, take(response.risk.data, 0))
        blocks = _kronecker(response).blocks
        items = sum(4 * (row.left.size + row.right.size) for row in one)
        items += sum(2 * b.layer.size for b in blocks if b.terms is None)
        dtype = blocks[0].values.dtype
        return min(512, chunk_length(items, dtype, self.chunk_size))


def _kronecker(response) -> Kronecker:
    layered = response.factored.layered
    assert layered is not None  # the plan has seen to it
    return layered


def _loss_rows(response):
    """Training example ↦ the rows of its gradient, layer by layer; every `left` has k = 1."""
    return _measurement_rows(response, Loss())


def _measurement_rows(response, measurement):
    """Query ↦ the rows of ∇m, one cotangent a component, for each layer of the curvature."""
    kronecker = _kronecker(response)
    risk, model = ruled(response.risk, kronecker.rules), response.model
    layers = [block.layer for block in kronecker.blocks]

    def rows(query):
        watch = Watched(lambda m, q: measurement(risk, m, q), model, query)
        each = lambda value: jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)
        _, found = watch.rows(query, each)
        by_leaf = {_place(layer): row for layer, row in zip(watch.layers, found)}
        if all(_place(layer) in by_leaf for layer in layers):
            return [by_leaf[_place(layer)] for layer in layers]
        # The measurement uses a layer in a way of its own: its gradient as it is.
        gradient = jnp.atleast_2d(measurement.gradient(risk, model, query))
        whole = jax.vmap(kronecker.split)(gradient)
        return [by_leaf.get(_place(layer), _as_rows(g)) for layer, g in zip(layers, whole)]

    return rows


def _place(layer: Layer):
    return layer.leaves, layer.shape, layer.view, layer.axes


def _as_rows(gradient: Float[Array, "k S l r"]) -> Rows:
    _, S, _, r = gradient.shape
    return Rows(gradient.swapaxes(2, 3), jnp.broadcast_to(jnp.arange(r), (1, S, r)))


def _prepared(block: EigenBlock, rows: Rows) -> Terms | Solved:
    if block.terms is not None and rows.is_rank_one:
        left, right = _rank_one(block.rotate_rows(rows))
        p, q = block.terms
        size = einsum("ksl,slr,sr->k", jnp.square(left), block.inverse, jnp.square(right))
        return Terms(left[:, :, None, :] * p[None], right[:, None, :] * q, size)
    gradient = _gradient(block.layer, rows)
    solved = block.scaled(gradient, block.inverse)
    return Solved(solved, jnp.sum(solved * gradient, axis=(1, 2, 3)))


def _rank_one(rows: Rows) -> tuple[Float[Array, "k S l"], Float[Array, "S r"]]:
    return rows.left[:, :, 0], rows.right[0, :, 0]


def _gradient(layer: Layer, rows: Rows) -> Float[Array, "k S l r"]:
    """Σ_t left ⊗ right."""
    if rows.indexed:
        _, l, r = layer.shape
        at = lambda i, x: jnp.zeros((r, l), x.dtype).at[i].add(x, mode="drop")
        return jax.vmap(lambda x: jax.vmap(at)(rows.right[0], x))(rows.left).swapaxes(2, 3)
    k = rows.left.shape[0]
    right = jnp.broadcast_to(rows.right, (k, *rows.right.shape[1:]))
    return einsum("kstl,kstr->kslr", rows.left, right)


def _table_products(matrix: Float[Array, "k S l r"], rows: Rows) -> Float[Array, "k b"]:
    """Only the columns that a training point looks up, one point at a time."""

    def one(row):
        left, ids = row  # [1, S, T, l], [1, S, T]
        columns = jax.vmap(lambda m, i: jnp.take(m, i, axis=-1, mode="fill", fill_value=0))
        seen = jax.vmap(lambda m: columns(m, ids[0]))(matrix)  # [k, S, l, T]
        return einsum("kslt,stl->k", seen, left[0])

    return jax.lax.map(one, (rows.left, rows.right)).T


def _own(block: EigenBlock, m: Rows, g: Rows, power: int) -> Float[Array, " k"]:
    """∇mᵀ(H + λI)⁻ᵖ∇ℓ of one layer and one example."""
    by = block.inverse**power
    if m.is_rank_one and g.is_rank_one:
        (lm, rm), (lg, rg) = _rank_one(block.rotate_rows(m)), _rank_one(block.rotate_rows(g))
        return einsum("ksl,slr,sr->k", lm * lg, by, rm * rg)
    rotated = [block.rotate(_gradient(block.layer, rows)) for rows in (m, g)]
    return jnp.sum(rotated[0] * rotated[1] * by[None], axis=(1, 2, 3))
