"""The Kronecker factors of each layer's curvature: one pass over activations and output gradients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import is_concrete
from .._chunks import chunk_length, chunked_sum, take
from .._custom_types import Model
from .._linalg import einsum
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Uncovered, Watched
from .fisher import Fisher
from .ggn import GaussNewton
from .kronecker import EigenBlock

# More examples at a time than this are no faster: their rows no longer fit a processor's cache.
_CHUNK = 512


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


def applied_once(risk: EmpiricalRisk, model: Model) -> list[bool]:
    """For each layer whether an example's gradient is one outer product."""
    watch = watched(risk, model)
    one = take(risk.data[0], 0)
    rows = jax.eval_shape(lambda x: watch.rows(x, lambda o: o[None])[1], one)
    return [row.is_rank_one for row in rows]


def fisher_rows(fisher: GaussNewton | Fisher, read: Callable, risk: EmpiricalRisk):
    """(example, its number) ↦ the rows of the gradients, layer by layer, by `read`: the
    `rows` or the `parts` of what is watched."""

    def rows(example, i):
        x, y = example
        cotangents = lambda output: fisher.cotangents(risk.loss, output, y, i)
        return read(x, cotangents)[1]

    return jax.vmap(rows)


def examples(risk: EmpiricalRisk):
    return risk.data, jnp.arange(risk.n), risk.weights


def chunk_of(
    fisher: GaussNewton | Fisher, watch: Watched, risk: EmpiricalRisk, extra=lambda layer, rows: 0
) -> int:
    """How many examples fit the byte budget."""
    rows = fisher_rows(fisher, watch.rows, risk)
    one = jax.eval_shape(rows, take(risk.data, slice(0, 1)), jnp.arange(1))
    items = sum(
        3 * (row.left.size + row.right.size) + extra(layer, row)
        for layer, row in zip(watch.layers, one)
    )
    return min(risk.n, _CHUNK, chunk_length(items, risk.weights.dtype))


@eqx.filter_jit
def factors(fisher: GaussNewton | Fisher, sharing: str, risk: EmpiricalRisk, model):
    """The left and the right factor of each layer: the curvature is left ⊗ right."""
    watch = watched(risk, model)
    parts = fisher_rows(fisher, watch.parts, risk)

    def block(args):
        data, i, weights = args
        return [
            [
                _moments(layer, turn, _shared(rows, sharing), weights)
                for turn, rows in zip(_TURNS, own)
            ]
            for layer, own in zip(watch.layers, parts(data, i))
        ]

    sums = chunked_sum(block, examples(risk), chunk_of(fisher, watch, risk))
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
    w = jnp.repeat(weights, k * T)[None, :, None]
    if not dense:
        return jnp.sum(w * jnp.square(rows), axis=1)
    return einsum("snd,sne->sde", w * rows, rows)


def _counts(places, weights, width: int):
    """How often each one-hot row is used, [S, width]."""
    ids = jnp.moveaxis(places[:, 0], 1, 0)  # [S, b, T]
    w = jnp.broadcast_to(weights[:, None], ids.shape[1:])
    count = lambda i: jnp.zeros((width,), weights.dtype).at[i].add(w, mode="drop")
    return jax.vmap(count)(ids)


def eigenblock(layer: Layer, left, right) -> EigenBlock:
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
