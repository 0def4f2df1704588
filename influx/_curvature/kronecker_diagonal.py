"""The diagonal of a layer's curvature in its eigenbasis: what EK-FAC corrects, and what l2 adds."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from .._linalg import einsum
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows
from .fisher import Fisher
from .ggn import GaussNewton
from .kronecker import EigenBlock, Kronecker
from .kronecker_rows import has_unit_weights, sum_over_examples, watched, weighted


@eqx.filter_jit
def with_penalty(risk: EmpiricalRisk, model, blocks, values):
    """The blocks of the whole of H, `values` being the eigenvalues of the data part; and what ∇²Ω adds
    to them."""
    penalties = _penalty_diagonals(risk, model, blocks)
    whole = [replace(b, values=v + p) for b, v, p in zip(blocks, values, penalties)]
    return whole, penalties


def _penalty_diagonals(risk: EmpiricalRisk, model, blocks):
    """The diagonal of ∇²Ω in the eigenbasis: Σ Q_l² l2 Q_r², l2 itself where it is one number."""
    parts = Kronecker.of(model, blocks, ()).split(risk.l2_vector(model))
    square = lambda q: None if q is None else jnp.square(q)
    squared = [replace(b, left=square(b.left), right=square(b.right)) for b in blocks]
    return [b.rotate(part) for b, part in zip(squared, parts)]


def second_moments(fisher: GaussNewton | Fisher, blocks, risk: EmpiricalRisk, model):
    """Λ = (1/n) Σ wᵢ (Q_lᵀ G Q_r)² over gradients G: the diagonal of the matrix that is approximated, in
    the eigenbasis."""
    return _second_moments(fisher, blocks, risk, model, has_unit_weights(risk))


@eqx.filter_jit
def _second_moments(fisher, blocks, risk: EmpiricalRisk, model, unit: bool):
    def squares(parts, weights):
        rows = [jax.vmap(b.layer.rows)(part) for b, part in zip(blocks, parts)]
        return [_squares(b, row, weights) for b, row in zip(blocks, rows)]

    def alive(layer, parts):
        rows = jax.eval_shape(layer.rows, parts)
        joined = 3 * (rows.left.size + rows.right.size) if len(parts) > 1 else 0
        if rows.is_rank_one:
            return joined
        if _is_short(layer, rows):
            return joined + 2 * rows.left.shape[0] * layer.size
        return joined + rows.left.size + rows.right.shape[-2] * rows.right.shape[-1] ** 2

    totals = sum_over_examples(squares, fisher, risk, watched(risk, model), alive, unit=unit)
    return [total / risk.n for total in totals]


def _squares(block: EigenBlock, rows: Rows, weights):
    """Σ wᵢ (Q_lᵀ (Σ_t left ⊗ right) Q_r)² over examples and cotangents, [S, l, r]."""
    if rows.indexed and not _is_short(block.layer, rows):
        return _squares_of_table(block.layer, block.rotate_rows(rows), weights)
    if rows.is_rank_one:
        rows = block.rotate_rows(rows)
        # One product: `loop_body` would make a sum of squares a product with ones, after a copy.
        left = einsum("bksl,bksl->bsl", rows.left[:, :, :, 0], rows.left[:, :, :, 0])
        right = jnp.square(rows.right[:, 0, :, 0])
        return einsum("bsl,bsr->slr", weighted(left, weights), right)
    gradients = jax.vmap(block.gradient)(rows)
    return einsum("bkslr,bkslr->slr", weighted(gradients, weights), gradients)


def _is_short(layer: Layer, rows: Rows) -> bool:
    """Whether gradients are formed: always, but for a table of more rows than a datum looks up."""
    return not rows.indexed or layer.shape[2] <= rows.right.shape[-1]


def _squares_of_table(layer: Layer, rows: Rows, weights):
    """The same for one-hot rows: (Σ_t g_t)² over the places t of a row is Σ_t g_t (Σ_t' g_t')."""
    ids = rows.right[:, 0]  # [b, S, T]
    same = (ids[..., :, None] == ids[..., None, :]).astype(rows.left.dtype)
    together = einsum("bsuv,bksvl->bksul", same, rows.left)
    parts = einsum("bksul,bksul->sbul", weighted(rows.left, weights), together)
    _, l, r = layer.shape
    add = lambda i, x: jnp.zeros((r, l), x.dtype).at[i].add(x, mode="drop")
    return jax.vmap(add)(jnp.moveaxis(ids, 1, 0), parts).swapaxes(1, 2)
