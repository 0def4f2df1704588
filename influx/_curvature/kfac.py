"""Kronecker-factored curvature: K-FAC and EK-FAC of every layer that the program shows."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._misc import check_damping, chunk_length, chunked_sum, dot, einsum, is_concrete, take
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Watched
from .auto_damping import auto_damping
from .base import AbstractCurvature
from .fisher import Fisher
from .kronecker import EigenBlock, Kronecker
from .low_rank import low_rank


class AbstractKroneckerFactored(AbstractCurvature):
    """A Fisher matrix of one block a layer, each diagonal in the eigenbasis of its K-FAC factors."""

    fisher: eqx.AbstractVar[Fisher]
    sharing: eqx.AbstractVar[str]
    tolerance: eqx.AbstractVar[float]

    @abc.abstractmethod
    def eigenvalues(
        self, risk: EmpiricalRisk, model, blocks: list[EigenBlock]
    ) -> list[Float[Array, "S l r"]]:
        """Those of the data part in the basis of the blocks, whose `values` are K-FAC's."""

    def blocks(self, risk, model) -> tuple[list[EigenBlock], list[Float[Array, "S l r"]]]:
        """The blocks of H, undamped, and the part of their eigenvalues that is ∇²Ω's."""
        factors = _factors(self.fisher, self.sharing, risk, model)
        layers = watched(risk, model).layers
        start = [_eigenblock(layer, *pair) for layer, pair in zip(layers, factors)]
        values = self.eigenvalues(risk, model, start)
        penalties = _penalties(risk, model, start)
        total = [value + penalty for value, penalty in zip(values, penalties)]
        whole = [eqx.tree_at(lambda b: b.values, b, value) for b, value in zip(start, total)]
        return whole, penalties

    def matvec(self, risk, model):
        return _kronecker(model, self.blocks(risk, model)[0]).matvec

    def factor(self, risk, model):
        blocks, penalties = self.blocks(risk, model)
        if self.damping is None:
            points = float(jnp.sum(risk.weights > 0))
            damping = auto_damping(blocks, penalties, points)
        else:
            damping = jnp.asarray(self.damping, blocks[0].values.dtype)
        blocks = [eqx.tree_at(lambda b: b.damping, block, damping) for block in blocks]
        for block in blocks:
            _check_positive(block)
        if self.tolerance > 0:
            once = applied_once(risk, model)
            blocks = [low_rank(b, self.tolerance) if o else b for b, o in zip(blocks, once)]
        return _kronecker(model, blocks)

    def lower_end(self, risk, model):
        return float(jnp.min(risk.l2_vector(model)))

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class KFAC(AbstractKroneckerFactored):
    fisher: Fisher
    damping: Scalar | None
    sharing: str = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)

    def __init__(
        self, fisher="exact", *, damping=0.0, tolerance=0.0, key=None, draws=1, sharing="expand"
    ):
        self.fisher = Fisher(fisher, key=key, draws=draws)
        self.damping = None if damping == "auto" else check_damping(damping)
        self.sharing, self.tolerance = sharing, tolerance

    def eigenvalues(self, risk, model, blocks):
        return [block.values for block in blocks]


class EKFAC(AbstractKroneckerFactored):
    fisher: Fisher
    damping: Scalar | None
    sharing: str = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)

    def __init__(
        self, fisher="exact", *, damping=0.0, tolerance=0.0, key=None, draws=1, sharing="expand"
    ):
        self.fisher = Fisher(fisher, key=key, draws=draws)
        self.damping = None if damping == "auto" else check_damping(damping)
        self.sharing, self.tolerance = sharing, tolerance

    def eigenvalues(self, risk, model, blocks):
        return _second_moments(self.fisher, blocks, risk, model)


def watched(risk: EmpiricalRisk, model) -> Watched:
    """The model's output on one training input, its layers watched."""
    return Watched(lambda m, x: risk.output(m, x), model, take(risk.data[0], 0))


def applied_once(risk: EmpiricalRisk, model) -> list[bool]:
    """For each layer whether an example's gradient is one outer product."""
    watch = watched(risk, model)
    one = take(risk.data[0], 0)
    rows = jax.eval_shape(lambda x: watch.rows(x, lambda o: o[None])[1], one)
    return [not row.indexed and row.left.shape[2] == 1 and row.right.shape[0] == 1 for row in rows]


def _kronecker(model, blocks) -> Kronecker:
    leaves = jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return Kronecker(tuple(blocks), tuple(leaf.shape for leaf in leaves))


def _fisher_rows(fisher: Fisher, watch: Watched, risk: EmpiricalRisk):
    """(example, its number) ↦ the rows of the Fisher's gradients, layer by layer."""

    def rows(example, i):
        x, y = example
        cotangents = lambda output: fisher.cotangents(risk.loss, output, y, i)
        return watch.rows(x, cotangents)[1]

    return jax.vmap(rows)


def _examples(risk: EmpiricalRisk):
    return risk.data, jnp.arange(risk.n), risk.weights


def _chunk(fisher: Fisher, watch: Watched, risk: EmpiricalRisk, extra=lambda layer, rows: 0) -> int:
    """How many examples fit the byte budget."""
    rows = _fisher_rows(fisher, watch, risk)
    one = jax.eval_shape(rows, take(risk.data, slice(0, 1)), jnp.arange(1))
    items = sum(
        3 * (row.left.size + row.right.size) + extra(layer, row)
        for layer, row in zip(watch.layers, one)
    )
    return min(risk.n, chunk_length(items, risk.weights.dtype))


@eqx.filter_jit
def _factors(fisher: Fisher, sharing: str, risk: EmpiricalRisk, model):
    """The left and the right factor of each layer: the curvature is left ⊗ right."""
    watch = watched(risk, model)
    rows = _fisher_rows(fisher, watch, risk)

    def block(args):
        data, i, weights = args
        return [
            _moments(layer, _shared(row, sharing), weights)
            for layer, row in zip(watch.layers, rows(data, i))
        ]

    sums = chunked_sum(block, _examples(risk), _chunk(fisher, watch, risk))
    total = jnp.sum(risk.weights)
    return [(left / risk.n, right / total) for left, right in sums]


def _shared(rows: Rows, sharing: str) -> Rows:
    """Places where a matrix is shared: each by itself, or as one (K-FAC-reduce)."""
    if sharing == "expand" or rows.right.shape[-1] == 1 or rows.indexed:
        return rows
    left = jnp.sum(rows.left, axis=-2, keepdims=True)
    return Rows(left, jnp.mean(rows.right, axis=-2, keepdims=True))


def _moments(layer: Layer, rows: Rows, weights):
    """Σ wᵢ Σ left leftᵀ and the mean over places of right rightᵀ, of a chunk of examples."""
    left = _second_moment(rows.left, weights, layer.dense[0])
    if rows.indexed:
        return left, _counts(rows.right, weights, layer.shape[2]) / rows.right.shape[-1]
    terms = rows.right.shape[1] * rows.right.shape[3]
    return left, _second_moment(rows.right, weights, layer.dense[1]) / terms


def _second_moment(x: Float[Array, "b k S T d"], weights, dense: bool):
    """Σ wᵢ x xᵀ over examples, cotangents and places, [S, d, d], or its diagonal [S, d]."""
    b, k, S, T, d = x.shape
    rows = jnp.moveaxis(x, 2, 0).reshape(S, b * k * T, d)
    w = jnp.broadcast_to(jnp.repeat(weights, k * T)[None, :, None], rows.shape)
    if not dense:
        return jnp.sum(w * jnp.square(rows), axis=1)
    return dot((w * rows).swapaxes(1, 2), rows)


def _counts(places, weights, width: int):
    """How often each one-hot row is used, [S, width]."""
    ids = jnp.moveaxis(places[:, 0], 1, 0)  # [S, b, T]
    w = jnp.broadcast_to(weights[:, None], ids.shape[1:])
    count = lambda i: jnp.zeros((width,), weights.dtype).at[i].add(w, mode="drop")
    return jax.vmap(count)(ids)


def _eigenblock(layer: Layer, left, right) -> EigenBlock:
    (ql, vl), (qr, vr) = (_eigen(x, dense) for x, dense in zip((left, right), layer.dense))
    values = vl[:, :, None] * vr[:, None, :]
    return EigenBlock(layer, ql, qr, values, jnp.zeros((), values.dtype), (vl, vr))


def _eigen(factor, dense: bool):
    """The basis and the eigenvalues of one factor; rounding's negative ones are zeros."""
    if not dense:
        return None, factor
    values, basis = jnp.linalg.eigh(factor)
    return basis, jnp.maximum(values, 0)


@eqx.filter_jit
def _penalties(risk: EmpiricalRisk, model, blocks):
    """The diagonal of ∇²Ω in the eigenbasis: Σ Q_l² l2 Q_r², l2 itself where it is one number."""
    parts = _kronecker(model, blocks).split(risk.l2_vector(model))
    square = lambda q: None if q is None else jnp.square(q)
    bases = lambda b: (b.left, b.right)
    return [
        eqx.tree_at(bases, b, (square(b.left), square(b.right)), is_leaf=_is_none).rotate(part)
        for b, part in zip(blocks, parts)
    ]


def _is_none(x) -> bool:
    return x is None


@eqx.filter_jit
def _second_moments(fisher: Fisher, blocks, risk: EmpiricalRisk, model):
    """Λ = (1/n) Σ wᵢ (Q_lᵀ G Q_r)² over the Fisher's gradients G: the diagonal of the Fisher matrix in
    the eigenbasis."""
    watch = watched(risk, model)
    rows = _fisher_rows(fisher, watch, risk)

    def block(args):
        data, i, weights = args
        pairs = zip(blocks, rows(data, i))
        return [_squares(b.layer, b.rotate_rows(row), weights) for b, row in pairs]

    def gradient_size(layer, row):
        return 0 if row.right.shape[-2] == 1 else 2 * row.left.shape[1] * layer.size

    chunk = _chunk(fisher, watch, risk, gradient_size)
    return [total / risk.n for total in chunked_sum(block, _examples(risk), chunk)]


def _squares(layer: Layer, rows: Rows, weights):
    """Σ wᵢ (Σ_t left ⊗ right)² over examples and cotangents, [S, l, r]."""
    if rows.indexed:
        return _squares_of_table(layer, rows, weights)
    if rows.left.shape[-2] == 1 and rows.right.shape[1] == 1:
        left = jnp.sum(jnp.square(rows.left[:, :, :, 0]), axis=1)  # [b, S, l]
        right = jnp.square(rows.right[:, 0, :, 0])
        return einsum("b,bsl,bsr->slr", weights, left, right)
    gradients = einsum("bkstl,bkstr->bkslr", rows.left, _repeat(rows.right, rows.left.shape[1]))
    return einsum("b,bkslr->slr", weights, jnp.square(gradients))


def _repeat(right, k: int):
    return jnp.broadcast_to(right, (right.shape[0], k, *right.shape[2:]))


def _squares_of_table(layer: Layer, rows: Rows, weights):
    """The same for one-hot rows: (Σ_t g_t)² over the places t of a row is Σ_t g_t (Σ_t' g_t')."""
    ids = rows.right[:, 0]  # [b, S, T]
    same = (ids[..., :, None] == ids[..., None, :]).astype(rows.left.dtype)
    together = einsum("bsuv,bksvl->bksul", same, rows.left)
    parts = einsum("b,bksul,bksul->sbul", weights, rows.left, together)
    _, l, r = layer.shape
    add = lambda i, x: jnp.zeros((r, l), x.dtype).at[i].add(x, mode="drop")
    return jax.vmap(add)(jnp.moveaxis(ids, 1, 0), parts).swapaxes(1, 2)


def _check_positive(block: EigenBlock) -> None:
    low = jnp.min(block.values) + block.damping
    if is_concrete(low) and not float(low) > 0:
        raise ValueError(
            f"The curvature of {' and '.join(block.layer.paths)} is singular: its smallest eigenvalue "
            f"is {float(low):.3g}. Use a positive damping, or an l2 > 0 on every parameter."
        )
