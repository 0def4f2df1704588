"""Kronecker-factored curvature: K-FAC and EK-FAC of every layer that the program shows."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._custom_types import Model, Scalar, ScalarLike
from .._jacobian import require_array_output
from .._misc import check_damping, chunk_length, chunked_sum, dot, einsum, is_concrete, take
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Rules, Uncovered, Watched, checked_rules, ruled
from .auto_damping import auto_damping, least_eigenvalue
from .base import AbstractCurvature, least_penalty
from .fisher import Fisher
from .ggn import GaussNewton
from .kronecker import EigenBlock, Kronecker
from .low_rank import low_rank
from .truncated import truncated

# More examples at a time than this are no faster: their rows no longer fit a processor's cache.
_CHUNK = 512
# To pick coordinates of smaller blocks would save nothing.
_SMALLEST = 1024


class AbstractKroneckerFactored(AbstractCurvature):
    """One block a layer, each diagonal in the eigenbasis of its K-FAC factors. `fisher` says whose
    gradients those are: the matrix that is approximated."""

    fisher: GaussNewton | Fisher
    damping: Any
    tolerance: float = eqx.field(static=True)
    sharing: str = eqx.field(static=True)
    rules: Rules = eqx.field(static=True)

    def __init__(
        self,
        fisher: Literal["ggn", "exact", "sampled", "empirical"] = "ggn",
        *,
        damping: ScalarLike | Literal["auto"] = "auto",
        tolerance: float = 0.0,
        sharing: Literal["expand", "reduce"] = "expand",
        key: PRNGKeyArray | None = None,
        draws: int = 1,
        rules: Mapping[type, Callable] | None = None,
    ):
        if fisher not in ("ggn", "exact", "sampled", "empirical"):
            raise ValueError(
                '`fisher` must be "ggn" (Gauss–Newton), "exact", "sampled" or "empirical", got '
                f"{fisher!r}."
            )
        self.fisher = GaussNewton() if fisher == "ggn" else Fisher(fisher, key=key, draws=draws)
        self.damping = _checked_damping(damping)
        self.tolerance = _checked_tolerance(tolerance)
        if sharing not in ("expand", "reduce"):
            raise ValueError(f'`sharing` must be "expand" or "reduce", got {sharing!r}.')
        self.sharing = sharing
        self.rules = checked_rules(rules)

    @abc.abstractmethod
    def eigenvalues(
        self, risk: EmpiricalRisk, model: Model, blocks: list[EigenBlock]
    ) -> list[Float[Array, "S l r"]]:
        """Those of the data part in the basis of the blocks, whose `values` are K-FAC's."""

    def blocks(self, risk, model) -> tuple[list[EigenBlock], list[Float[Array, "S l r"]]]:
        """The blocks of H, undamped, and the part of their eigenvalues that is ∇²Ω's."""
        risk = ruled(risk, self.rules)
        require_array_output(risk, model)
        factors = _factors(self.fisher, self.sharing, risk, model)
        layers = watched(risk, model).layers
        start = [_eigenblock(layer, *pair) for layer, pair in zip(layers, factors)]
        values = self.eigenvalues(risk, model, start)
        penalties = _penalties(risk, model, start)
        total = [value + penalty for value, penalty in zip(values, penalties)]
        whole = [eqx.tree_at(lambda b: b.values, b, value) for b, value in zip(start, total)]
        return whole, penalties

    def matvec(self, risk, model):
        return _kronecker(model, self.blocks(risk, model)[0], self.rules).matvec

    def factor(self, risk, model):
        blocks, penalties = self.blocks(risk, model)
        if self.damping is None:
            damping = auto_damping(blocks, penalties, risk.weights)
        else:
            damping = jnp.asarray(self.damping, blocks[0].values.dtype)
        blocks = [eqx.tree_at(lambda b: b.damping, block, damping) for block in blocks]
        for block, penalty in zip(blocks, penalties):
            _check_positive(block, penalty)
        if self.tolerance > 0:
            once = applied_once(ruled(risk, self.rules), model)
            blocks = [_near(*parts, self.tolerance) for parts in zip(blocks, penalties, once)]
        return _kronecker(model, blocks, self.rules)

    def lower_end(self, risk, model):
        return least_penalty(risk, model, 0.0 if self.damping is None else self.damping)

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class KFAC(AbstractKroneckerFactored):
    r"""Kronecker-factored approximate curvature: a layer's block of the Gauss–Newton matrix is G ⊗ A.

    A layer z_t = W a_t (the 1 of a bias appended to a), t running over the places where W is shared,
    answers a cotangent u of the model's output by the gradient Σ_t g_t a_tᵀ, g_t = (∂output/∂z_t)ᵀu.
    With w̄ = Σ wᵢ, and as cotangents of example i a root of its loss's Hessian in the output, Σ_u u uᵀ,

        G = (1/n) Σᵢ wᵢ Σ_u Σ_t g_t g_tᵀ,   A = (1/w̄) Σᵢ wᵢ (1/T) Σ_t a_t a_tᵀ,   H = G ⊗ A + diag(l2).

    **Dropped:** all that couples layers, and within a layer what couples activations with output
    gradients. Exact for one datum where W is applied once, and for deep linear networks with squared
    error (P13). l2 that differs within a layer enters by its diagonal in the eigenbasis.

    **Tied with its transpose:** where the program uses W and Wᵀ (an autoencoder, a table that reads and
    writes tokens) each use τ has a pair of its own, and G ⊗ A is the product with the partial traces of
    Σ_τ G_τ ⊗ A_τ: G = Σ tr(A_τ) G_τ, A = Σ tr(G_τ) A_τ / Σ tr(G_τ) tr(A_τ).

    **Arguments:**

    - `fisher`: the cotangents u. `"ggn"`: of the Gauss–Newton matrix, as above. Those of a Fisher matrix
      (see `Fisher`) are gradients of the loss: `"exact"` at all targets of the model's own distribution,
      `"sampled"` at `draws` of them drawn with `key`, `"empirical"` at the given targets. For a plain
      negative log-likelihood, "exact" is the same matrix as "ggn" at the same cost; class weights enter
      it squared, and a mean over T places as 1/T², where the Hessian of such a loss has weights and 1/T.
    - `damping`: λ of H + λI, or `"auto"`: the least λ at which the effective dimension
      tr F(F + diag l2 + λI)⁻¹ is at most n: one direction a point, a rule of thumb (K outputs may
      decide up to nK), held to retraining in `docs/how-to-choose.md`.
    - `tolerance`: relative root mean square error aimed at for a layer's scores, 0 for none: layers
      applied once an example are then scored by few products of small matrices (theory: §4), others by
      the coordinates of their eigenbasis that outweigh l2 and damping. A target, met where coordinates
      of gradients are uncorrelated (P13e), not a bound; `self_influence` and the scales of `relative`
      stay exact.
    - `sharing`: `"expand"` takes places of a shared W as independent; `"reduce"` takes the mean
      activation and the summed gradient instead (cheaper, for features that are averaged later).
    - `rules`: {layer type: fn(layer, *args)} for layers whose program influx cannot read, such as custom
      kernels: fn computes the same with plain products. See `docs/extending.md`.

    Layers are found in the program, not by their names: matrix products, convolutions, look-ups, their
    biases, sharing by `vmap` or `scan`, tied weights. Parameters of at most 1,024 entries that enter in
    any other way get the exact block of their own. `coverage` lists what each parameter gets.

    **Raises:** `ValueError` for a parameter that no rule covers, a singular block, an unknown setting,
    or a loss that is no negative log-likelihood with `"exact"`; `RuntimeError` for one whose Hessian in
    the output is not positive semi-definite with `"ggn"`.

    **Cost:** one pass over the data with as many backward passes as cotangents: C − 1 for C classes, as
    many as outputs for other losses, `draws`, or one; O(l³ + r³) a layer.

    **Source:** Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671; Grosse & Martens (convolutions), arXiv:1602.01407; Eschenhagen et
    al. (weight sharing), arXiv:2311.00636.
    """

    def eigenvalues(self, risk, model, blocks):
        return [block.values for block in blocks]


class EKFAC(AbstractKroneckerFactored):
    r"""K-FAC with its eigenvalues corrected: in the eigenbasis Q_G ⊗ Q_A the true diagonal,

        Λ = (1/n) Σᵢ wᵢ Σ_u (Q_Gᵀ Gᵢ Q_A)²,   Gᵢ = Σ_t g_t a_tᵀ,   H = Q diag(Λ) Qᵀ + diag(l2).

    Of all matrices with these eigenvectors it is the nearest to the layer's block of the Gauss–Newton
    (or Fisher) matrix in Frobenius norm, so never further than K-FAC (P13). Where l2 differs within a
    layer, its diagonal in the eigenbasis stands for it.

    Arguments and errors are those of [`KFAC`][]. **Cost:** a second pass over the data.

    **Source:** George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis", arXiv:1806.03884; Grosse et al. (influence), arXiv:2308.03296.
    """

    def eigenvalues(self, risk, model, blocks):
        return _second_moments(self.fisher, blocks, ruled(risk, self.rules), model)


def watched(risk: EmpiricalRisk, model: Model) -> Watched:
    """The model's output on one training input, its layers watched.

    **Raises:** `ValueError` naming a parameter that no rule covers.
    """
    watch = Watched(lambda m, x: risk.output(m, x), model, take(risk.data[0], 0))
    if watch.uncovered:
        raise ValueError(_uncovered(watch.uncovered))
    return watch


def _uncovered(found: list[Uncovered]) -> str:
    names = ", ".join(f"{u.path} {list(u.shape)} (in `{u.operation}`)" for u in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"No rule says how the model depends on {names}{more}. Three ways out: give a rule, "
        "`EKFAC(rules={MyLayer: fn})`, with fn(layer, x) the same layer in plain matrix products; give "
        "it a curvature of its own, `Mixture({where: Diagonal()}, EKFAC())`; or leave it out, "
        "`influx.restrict(risk, model, where)` with the parameters to keep."
    )


def _checked_damping(damping: Any) -> Scalar | None:
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f'`damping` must be a number at least 0, or "auto"; got {damping!r}.')
        return None
    return check_damping(damping)


def _checked_tolerance(tolerance: float) -> float:
    number = isinstance(tolerance, int | float | np.floating) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < 1:
        raise ValueError(
            f"`tolerance` is a relative error in [0, 1), got {tolerance!r}. 0 is exact, 0.05 fast."
        )
    return float(tolerance)


def _near(block: EigenBlock, penalties, once: bool, tolerance: float) -> EigenBlock:
    """The block with its inverse as few terms, where gradients are outer products and terms are few, or
    else at few coordinates."""
    terms = low_rank(block, tolerance) if once else block
    if terms.terms is not None or block.layer.size < _SMALLEST:
        return terms
    return truncated(block, penalties, tolerance)


def applied_once(risk: EmpiricalRisk, model: Model) -> list[bool]:
    """For each layer whether an example's gradient is one outer product."""
    watch = watched(risk, model)
    one = take(risk.data[0], 0)
    rows = jax.eval_shape(lambda x: watch.rows(x, lambda o: o[None])[1], one)
    return [row.is_rank_one for row in rows]


def _kronecker(model: Model, blocks: list[EigenBlock], rules: Rules) -> Kronecker:
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return Kronecker(tuple(blocks), tuple(leaf.shape for leaf in leaves), rules)


def _fisher_rows(fisher: GaussNewton | Fisher, read: Callable, risk: EmpiricalRisk):
    """(example, its number) ↦ the rows of the gradients, layer by layer, by `read`: the
    `rows` or the `parts` of what is watched."""

    def rows(example, i):
        x, y = example
        cotangents = lambda output: fisher.cotangents(risk.loss, output, y, i)
        return read(x, cotangents)[1]

    return jax.vmap(rows)


def _examples(risk: EmpiricalRisk):
    return risk.data, jnp.arange(risk.n), risk.weights


def _chunk(
    fisher: GaussNewton | Fisher, watch: Watched, risk: EmpiricalRisk, extra=lambda layer, rows: 0
) -> int:
    """How many examples fit the byte budget."""
    rows = _fisher_rows(fisher, watch.rows, risk)
    one = jax.eval_shape(rows, take(risk.data, slice(0, 1)), jnp.arange(1))
    items = sum(
        3 * (row.left.size + row.right.size) + extra(layer, row)
        for layer, row in zip(watch.layers, one)
    )
    return min(risk.n, _CHUNK, chunk_length(items, risk.weights.dtype))


@eqx.filter_jit
def _factors(fisher: GaussNewton | Fisher, sharing: str, risk: EmpiricalRisk, model):
    """The left and the right factor of each layer: the curvature is left ⊗ right."""
    watch = watched(risk, model)
    parts = _fisher_rows(fisher, watch.parts, risk)

    def block(args):
        data, i, weights = args
        return [
            [
                _moments(layer, turn, _shared(rows, sharing), weights)
                for turn, rows in zip(_TURNS, own)
            ]
            for layer, own in zip(watch.layers, parts(data, i))
        ]

    sums = chunked_sum(block, _examples(risk), _chunk(fisher, watch, risk))
    total = jnp.sum(risk.weights)
    pair = lambda turn, left, right: (left / risk.n, right / total)[::turn]
    return [
        _product(layer, [pair(turn, *moments) for turn, moments in zip(_TURNS, own)])
        for layer, own in zip(watch.layers, sums)
    ]


# The parts of a layer's rows: places that see the matrix [S, l, r] as it is, and [S, r, l] transposed.
_TURNS = (1, -1)


def _product(layer: Layer, pairs):
    """One pair (left, right) for the sum of left ⊗ right over `pairs`: the product that has the partial
    traces of the sum,

        left = Σ tr(right_τ) left_τ,   right = Σ tr(left_τ) right_τ / Σ tr(left_τ) tr(right_τ).
    """
    if len(pairs) == 1:
        return pairs[0]
    traces = [tuple(_trace(x, dense) for x, dense in zip(pair, layer.dense)) for pair in pairs]
    total = sum(l * r for l, r in traces)
    scaled = lambda x, c: x * c.reshape(-1, *[1] * (x.ndim - 1))
    left = sum(scaled(left, r) for (left, _), (_, r) in zip(pairs, traces))
    right = sum(scaled(right, l) for (_, right), (l, _) in zip(pairs, traces))
    return left, scaled(right, 1 / jnp.where(total > 0, total, 1))


def _trace(factor, dense: bool) -> Float[Array, " S"]:
    return jnp.trace(factor, axis1=1, axis2=2) if dense else jnp.sum(factor, axis=1)


def _shared(rows: Rows, sharing: str) -> Rows:
    """Places where a matrix is shared: each by itself, or as one (K-FAC-reduce)."""
    if sharing == "expand" or rows.indexed:
        return rows
    left = jnp.sum(rows.left, axis=-2, keepdims=True)
    return Rows(left, jnp.mean(rows.right, axis=-2, keepdims=True))


def _moments(layer: Layer, turn: int, rows: Rows, weights):
    """Σ wᵢ Σ left leftᵀ and the mean over places of right rightᵀ, of a chunk of examples."""
    of_left, of_right = layer.dense[::turn]
    left = _second_moment(rows.left, weights, of_left)
    if rows.indexed:
        counts = _counts(rows.right, weights, layer.shape[1:][::turn][1]) / rows.right.shape[-1]
        return left, jax.vmap(jnp.diag)(counts) if of_right else counts
    terms = rows.right.shape[1] * rows.right.shape[3]
    return left, _second_moment(rows.right, weights, of_right) / terms


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
    """The basis and the eigenvalues of one factor; rounding's negative ones are zeros.

    In float64 whatever the factor's dtype: in float32 eigenvectors of close eigenvalues mix, which moves
    EK-FAC's scores by some thousandths.
    """
    if not dense:
        return None, factor
    if not is_concrete(factor):
        values, basis = jnp.linalg.eigh(factor)
        return basis, jnp.maximum(values, 0)
    values, basis = np.linalg.eigh(np.asarray(factor, np.float64))
    return jnp.asarray(basis, factor.dtype), jnp.asarray(np.maximum(values, 0), factor.dtype)


@eqx.filter_jit
def _penalties(risk: EmpiricalRisk, model, blocks):
    """The diagonal of ∇²Ω in the eigenbasis: Σ Q_l² l2 Q_r², l2 itself where it is one number."""
    parts = _kronecker(model, blocks, ()).split(risk.l2_vector(model))
    square = lambda q: None if q is None else jnp.square(q)
    bases = lambda b: (b.left, b.right)
    return [
        eqx.tree_at(bases, b, (square(b.left), square(b.right)), is_leaf=_is_none).rotate(part)
        for b, part in zip(blocks, parts)
    ]


def _is_none(x) -> bool:
    return x is None


@eqx.filter_jit
def _second_moments(fisher: GaussNewton | Fisher, blocks, risk: EmpiricalRisk, model):
    """Λ = (1/n) Σ wᵢ (Q_lᵀ G Q_r)² over gradients G: the diagonal of the matrix that is approximated, in
    the eigenbasis."""
    watch = watched(risk, model)
    rows = _fisher_rows(fisher, watch.rows, risk)

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
    left = jnp.sqrt(weights)[:, None, None, None, None] * rows.left
    gradients = einsum("bkstl,bkstr->bkslr", left, _repeat(rows.right, rows.left.shape[1]))
    return jnp.sum(jnp.square(gradients), axis=(0, 1))


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


def _check_positive(block: EigenBlock, penalty) -> None:
    low = jnp.min(block.values) + block.damping
    # Eigenvalues of EK-FAC are sums of squares: rounding keeps those that are 0 above it.
    if (
        is_concrete((low, penalty))
        and not float(low) > least_eigenvalue(block.values, penalty) / 32
    ):
        raise ValueError(
            f"The curvature of {' and '.join(block.layer.paths)} is singular: its smallest eigenvalue "
            f"is {float(low):.3g}. Use a positive damping, or an l2 > 0 on every parameter."
        )
