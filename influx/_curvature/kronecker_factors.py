"""The Kronecker factors of each layer's curvature: one pass over activations and output gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._checks import is_concrete
from .._custom_types import Model
from .._linalg import einsum, from_strips, gram_strips
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows
from .fisher import Fisher
from .ggn import GaussNewton
from .kronecker import EigenBlock
from .kronecker_rows import has_unit_weights, sum_over_examples, watched, weighted

# The parts of a layer's rows: places that see the matrix [S, l, r] as it is, and [S, r, l] transposed.
_TURNS = (1, -1)


def factors(fisher: GaussNewton | Fisher, sharing: str, risk: EmpiricalRisk, model: Model):
    """Each layer, its left and its right factor: the curvature is left ⊗ right."""
    return _factors(fisher, sharing, risk, model, has_unit_weights(risk))


@eqx.filter_jit
def _factors(fisher, sharing: str, risk: EmpiricalRisk, model: Model, unit: bool):
    watch = watched(risk, model)

    def of_block(parts, weights):
        return [
            [
                _moments(layer, turn, _shared(rows, sharing), weights)
                for turn, rows in zip(_TURNS, own)
            ]
            for layer, own in zip(watch.layers, parts)
        ]

    # Compensated: eigenvectors of small eigenvalues turn with the factors' last digits.
    sums = sum_over_examples(of_block, fisher, risk, watch, unit=unit, compensated=True)
    total = jnp.sum(risk.weights)
    pair = lambda turn, left, right: (_whole(left) / risk.n, _whole(right) / total)[::turn]
    return [
        (layer, *_product(layer, [pair(turn, *moments) for turn, moments in zip(_TURNS, own)]))
        for layer, own in zip(watch.layers, sums)
    ]


def _whole(moment: list[Array] | Array) -> Array:
    """A factor that was summed in strips, or one that was not."""
    return from_strips(moment) if isinstance(moment, list) else moment


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
    """Places where a matrix is shared: each by itself, or as one (K-FAC-reduce). Look-ups are each by
    itself either way: a mean of one-hot rows is none, and would have a factor as large as the table."""
    if sharing == "expand" or rows.indexed:
        return rows
    left = jnp.sum(rows.left, axis=-2, keepdims=True)
    return Rows(left, jnp.mean(rows.right, axis=-2, keepdims=True))


def _moments(layer: Layer, turn: int, rows: Rows, weights):
    """Σ wᵢ Σ left leftᵀ and Σ wᵢ of the mean over places of right rightᵀ, of a chunk of examples."""
    of_left, of_right = layer.dense[::turn]
    left = _second_moment(rows.left, weights, of_left)
    if rows.indexed:
        width = layer.shape[1:][::turn][1]
        counts = _counts(rows.right, weights, width, rows.left.dtype) / rows.right.shape[-1]
        return left, jax.vmap(jnp.diag)(counts) if of_right else counts
    terms = rows.right.shape[1] * rows.right.shape[3]
    right = _second_moment(rows.right, weights, of_right)
    return left, jtu.tree_map(lambda total: total / terms, right)


def _second_moment(x: Float[Array, "b k S T d"], weights, dense: bool):
    """Σ wᵢ x xᵀ over examples, cotangents and places, in strips of [S, d, d], or its diagonal
    [S, d]."""
    b, k, S, T, d = x.shape
    rows = lambda x: jnp.moveaxis(x, 2, 0).reshape(S, b * k * T, d)
    both = rows(weighted(x, weights)), rows(x)
    return gram_strips(*both) if dense else einsum("snd,snd->sd", *both)


def _counts(places, weights, width: int, dtype):
    """How often each one-hot row is used, [S, width]."""
    ids = jnp.moveaxis(places[:, 0], 1, 0)  # [S, b, T]
    w = weighted(jnp.ones(ids.shape[1:], dtype), weights)
    count = lambda i: jnp.zeros((width,), dtype).at[i].add(w, mode="drop")
    return jax.vmap(count)(ids)


def eigenblock(layer: Layer, left, right) -> EigenBlock:
    if is_concrete((left, right)) and not all(np.isfinite(x).all() for x in (left, right)):
        raise ValueError(
            f"The Kronecker factors of {' and '.join(layer.paths)} have NaN or infinite entries: an "
            "output, or a derivative of the loss, is NaN or overflows at this model. Check `predict` "
            "and the loss for log(0), 0/0 or sqrt(0)."
        )
    (ql, vl), (qr, vr) = (_eigen(x, dense) for x, dense in zip((left, right), layer.dense))
    values = vl[:, :, None] * vr[:, None, :]
    parts = ql, qr, values, np.zeros((), values.dtype), (vl, vr)
    return EigenBlock(layer, *jax.device_put(parts))  # `jnp.asarray` compiles for each shape


def _eigen(factor, dense: bool):
    """The basis and the eigenvalues of one factor; rounding's negative ones are zeros.

    In float64 whatever the factor's dtype, but under a trace: in float32 eigenvectors of close
    eigenvalues mix, which moves EK-FAC's scores by some thousandths.
    """
    if not dense:
        return None, factor
    if not is_concrete(factor):
        values, basis = jnp.linalg.eigh(factor)
        return basis, jnp.maximum(values, 0)
    values, basis = np.linalg.eigh(np.asarray(factor, np.float64))
    return basis.astype(factor.dtype), np.maximum(values, 0).astype(factor.dtype)
