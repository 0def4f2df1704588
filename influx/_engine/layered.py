"""Scores layer by layer, for curvatures of one Kronecker-factored block a layer."""

import abc
import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._chunks import Limits, map_blocks, row_struct, take
from .._cost import Cost, cost_of
from .._curvature import EigenBlock, Kronecker
from .._linalg import einsum
from .._measurement import Loss
from .._taps import Layer, Rows, Watched, ruled
from .base import AbstractScoring
from .gradients import forward_columns, forward_piece, has_forward
from .schedule import Alternative, Piece, map_points


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


class Factors(AbstractPrepared):
    """X = (H + λI)⁻¹∇m of a layer as a matrix, in its eigenbasis where `rotated`; a score is
    Σ_t gₜᵀX aₜ, so that no gradient gᵢ = Σ_t gₜaₜᵀ is formed."""

    matrix: Float[Array, "k S l r"]
    size: Float[Array, " k"]
    rotated: bool = eqx.field(static=True)

    def products(self, block, rows):
        rows = jax.vmap(block.rotate_rows)(rows) if self.rotated else rows
        left = rows.left[:, 0]
        if rows.indexed:
            seen = jax.vmap(lambda ids: _columns(self.matrix, ids[0]))(rows.right)
            return einsum("bkslt,bstl->kb", seen, left)
        right = rows.right[:, 0]
        _, l, r = block.layer.shape
        if l <= r:  # the longer side first
            return einsum("kbstl,bstl->kb", einsum("kslr,bstr->kbstl", self.matrix, right), left)
        return einsum("kbstr,bstr->kb", einsum("kslr,bstl->kbstr", self.matrix, left), right)


class Gradients(AbstractPrepared):
    """The same with each training point's gradient of the layer formed, once for all queries."""

    matrix: Float[Array, "k S l r"]
    size: Float[Array, " k"]
    rotated: bool = eqx.field(static=True)

    def products(self, block, rows):
        of = block.gradient if self.rotated else lambda row: row.gradient(block.layer.shape)
        gradients = jax.vmap(lambda row: of(row)[0])(rows)
        return einsum("kslr,bslr->kb", self.matrix, gradients)


class Coordinates(AbstractPrepared):
    """(H + λI)⁻¹∇m of a layer at the coordinates that its block keeps."""

    values: Float[Array, "k c"]
    size: Float[Array, " k"]

    def products(self, block, rows):
        return einsum("kc,bc->kb", self.values, jax.vmap(lambda row: _at_kept(block, row)[0])(rows))


# The ways of a layer whose gradients are not scored by few terms, and what they are called.
_DENSE = {
    "dense per layer, by factors": (Factors, False),
    "dense per layer, by factors in its eigenbasis": (Factors, True),
    "dense per layer, by gradients": (Gradients, False),
    "dense per layer, by gradients in its eigenbasis": (Gradients, True),
}
_FIRST_DENSE = next(iter(_DENSE))
_FORWARD = ("forward mode",)


class Layered(AbstractScoring):
    """Scores as sums over layers of what a layer's structure makes cheapest.

    - *terms*: where the layer is applied once an example, for query and training point, gradients are
      rank one, g ⊗ a, and Σ_kl ĝ_ik ĝ_jk R_kl â_il â_jl with R = 1/(Λ + λ) is, for R ≈ Σ_ρ p ⊗ q, a
      sum of ρ products of two small Gram matrices (P13e).
    - *coordinates*: where only some coordinates of the eigenbasis matter, the query's and the training
      point's gradients there: a product of two short vectors.
    - *dense*: else the query's H⁻¹∇m as a matrix, times the factors of a training point's gradient or
      that gradient itself; in the parameters' basis, where a query is rotated back, or in the
      layer's eigenbasis, where training points are rotated as well.

    - *forward*: the derivative of all training losses in the direction (H + λI)⁻¹∇m, as `ForwardMode`.

    `ways` are those of the layers; `None` takes terms where there are any, else factors; ("forward
    mode",) is that.
    """

    limits: Limits = eqx.field(static=True, default=Limits())
    points: int | None = eqx.field(static=True, default=None)
    ways: tuple[str, ...] | None = eqx.field(static=True, default=None)

    def alternatives(self, response, measurement, query):
        of_query, of_loss = _measurement_rows(response, measurement), _loss_rows(response)
        one = row_struct(response.risk.data)
        m, z = jax.eval_shape(of_query, query), jax.eval_shape(of_loss, one)
        both = cost_of(lambda q, z: (of_query(q), of_loss(z)), query, one)
        rows = "activations and output gradients"
        passes = Piece(("all layers",), rows, both, passing=both.live.query)
        blocks = _kronecker(response).blocks
        choices = tuple(_choices(block, *rows) for block, rows in zip(blocks, zip(m, z)))
        by_layers = Alternative(self.settled, (passes,), choices)
        if not has_forward(_under_rules(response)):
            return (by_layers,)
        forward = self._forward(response, measurement, query, m)
        return by_layers, Alternative(self.settled, (), forward, whole=True)

    def _forward(self, response, measurement, query, rows) -> tuple[tuple[Piece, ...], ...]:
        """The only piece of forward mode: preparing all layers, and the products."""
        k = rows[0].left.shape[0]
        forward = replace(self, ways=_FORWARD)
        prepare = lambda q, _: forward.prepare(response, measurement, q)
        products = forward_piece(_under_rules(response), k)
        return ((replace(products, cost=products.cost.plus(cost_of(prepare, query, None))),),)

    def settled(self, ways, points):
        return replace(self, points=points, ways=ways)

    def prepare(self, response, measurement, query):
        blocks = _kronecker(response).blocks
        rows = _measurement_rows(response, measurement)(query)
        ways = self.ways or [_ways(block, row)[0] for block, row in zip(blocks, rows)]
        ways = [_FIRST_DENSE] * len(blocks) if self.ways == _FORWARD else ways
        return tuple(_prepared(*parts) for parts in zip(blocks, rows, ways))

    def columns(self, response, prepared, indices):
        if self.ways == _FORWARD:
            join = jax.vmap(lambda matrices: _kronecker(response).join(matrices))
            solved = join([part.matrix for part in prepared])
            ruled_response = _under_rules(response)
            return forward_columns(ruled_response, solved, indices, self.points)
        blocks = _kronecker(response).blocks
        rows_of = _loss_rows(response)
        data = response.risk.data
        count = response.risk.n if indices is None else indices.shape[0]

        def block(places):
            chosen = places if indices is None else indices[places]
            rows = jax.vmap(rows_of)(take(data, chosen))
            parts = [p.products(b, row) for b, p, row in zip(blocks, prepared, rows)]
            return functools.reduce(jnp.add, parts).T

        return -map_blocks(block, count, self.points or count).T

    def quadratic(self, response, prepared):
        return functools.reduce(jnp.add, [part.size for part in prepared])

    def own(self, response, measurement, power):
        blocks = _kronecker(response).blocks
        of_loss, of_measurement = _loss_rows(response), _measurement_rows(response, measurement)

        def one(example):
            pairs = zip(blocks, of_measurement(example), of_loss(example))
            parts = [_own(block, m, g, power) for block, m, g in pairs]
            return functools.reduce(jnp.add, parts)

        block = lambda i: jax.vmap(one)(take(response.risk.data, i))
        return map_points(block, response.risk.n, self.limits, blocks[0].values.dtype)


def _ways(block: EigenBlock, rows: Rows) -> list[str]:
    """What a layer may do for a query of such rows: the default first. All of them take the same
    inverse, so that scores do not depend on which it is."""
    if block.terms is not None and rows.is_rank_one:
        return [f"rank one, {block.terms[0].shape[1]} terms", *_DENSE]
    if block.kept is not None:
        return [f"{block.kept.size} of {block.layer.size} coordinates", *_DENSE]
    return list(_DENSE)


def _choices(block: EigenBlock, m: Rows, g: Rows) -> tuple[Piece, ...]:
    """The pieces that a layer may be scored by, m being a query's rows and g a training point's."""
    layer = block.layer
    nameless = replace(block, layer=Layer((), (), layer.shape, "", layer.dense, layer.rank_one))
    return tuple(
        Piece(layer.paths, way, *_cost(way, *_shapes((nameless, m, g)))) for way in _ways(block, m)
    )


def _shapes(tree):
    """What `_cost` may depend on: layers alike cost alike."""
    leaves, structure = jtu.tree_flatten(tree)
    return structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)


@functools.lru_cache(maxsize=4096)
def _cost(way: str, structure, structs) -> tuple[Cost, float, float]:
    """What a layer's scores cost, and the bytes that a query keeps for them and takes in passing."""
    block, m, g = jtu.tree_unflatten(structure, structs)

    def score(m, g, block):
        ready = _prepared(block, m, way)
        return ready.products(block, jtu.tree_map(lambda x: x[None], g))

    ready = jax.eval_shape(lambda m, block: _prepared(block, m, way), m, block)
    held = sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(ready))
    cost = cost_of(score, m, g, block)
    return cost, held, max(0.0, cost.live.query - held)


def _kronecker(response) -> Kronecker:
    layered = response.factored.layered
    assert layered is not None  # the plan has seen to it
    return layered


def _under_rules(response):
    """The response with its layers called through the rules that the curvature was read under."""
    rules = _kronecker(response).rules
    return eqx.tree_at(lambda r: r.risk, response, ruled(response.risk, rules))


def _loss_rows(response):
    """Training example ↦ the rows of its gradient, layer by layer; every `left` has k = 1."""
    return _measurement_rows(response, Loss())


def _measurement_rows(response, measurement):
    """Query ↦ the rows of ∇m, one cotangent a component, for each layer of the curvature."""
    kronecker = _kronecker(response)
    risk, model = _under_rules(response).risk, response.model
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


def _prepared(block: EigenBlock, rows: Rows, way: str) -> AbstractPrepared:
    if way not in _DENSE and block.terms is not None:
        left, right = _rank_one(block.rotate_rows(rows))
        p, q = block.terms
        size = einsum("ksl,slr,sr->k", jnp.square(left), block.inverse, jnp.square(right))
        return Terms(left[:, :, None, :] * p[None], right[:, None, :] * q, size)
    inside = block.gradient(rows)
    size = jnp.sum(jnp.square(inside) * block.inverse[None], axis=(1, 2, 3))
    exact = block.terms is not None and not rows.is_rank_one
    solved = inside * (block.inverse if exact else block.scored_inverse)[None]
    if way not in _DENSE:
        return Coordinates(_at(solved, block.kept), size)
    kind, rotated = _DENSE[way]
    return kind(solved if rotated else block.rotate_back(solved), size, rotated)


def _at_kept(block: EigenBlock, rows: Rows) -> Float[Array, "k c"]:
    """A gradient in the eigenbasis at the coordinates kept; an outer product is not formed for them."""
    if not rows.is_rank_one:
        return _at(block.gradient(rows), block.kept)
    left, right = _rank_one(block.rotate_rows(rows))
    assert block.kept is not None  # `_ways` has seen to it
    s, i, j = jnp.unravel_index(block.kept, block.layer.shape)
    return left[:, s, i] * right[s, j][None]


def _at(matrices: Float[Array, "k S l r"], kept) -> Float[Array, "k c"]:
    return jnp.take(matrices.reshape(matrices.shape[0], -1), kept, axis=1)


def _rank_one(rows: Rows) -> tuple[Float[Array, "k S l"], Float[Array, "S r"]]:
    return rows.left[:, :, 0], rows.right[0, :, 0]


def _columns(matrix: Float[Array, "k S l r"], ids) -> Float[Array, "k S l T"]:
    """Those that a training point looks up, [S, T] of them."""
    pick = jax.vmap(lambda m, i: jnp.take(m, i, axis=-1, mode="fill", fill_value=0))
    return jax.vmap(lambda m: pick(m, ids))(matrix)


def _own(block: EigenBlock, m: Rows, g: Rows, power: int) -> Float[Array, " k"]:
    """∇mᵀ(H + λI)⁻ᵖ∇ℓ of one layer and one example."""
    by = block.inverse**power
    if m.is_rank_one and g.is_rank_one:
        (lm, rm), (lg, rg) = _rank_one(block.rotate_rows(m)), _rank_one(block.rotate_rows(g))
        return einsum("ksl,slr,sr->k", lm * lg, by, rm * rg)
    rotated = [block.gradient(rows) for rows in (m, g)]
    return einsum("kslr,kslr->k", rotated[0] * by[None], rotated[1])
