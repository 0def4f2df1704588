"""Cross-entropy of a softmax."""

from typing import Literal

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import is_concrete
from .._linalg import einsum
from .base import AbstractLoss, LossConstants
from .checks import array_target, check_output, check_range, check_shape


def _scaled(values: Array, reduction: str) -> Array:
    return jnp.sum(values) if reduction == "sum" else jnp.mean(values)


class SoftmaxCrossEntropy(AbstractLoss):
    """ℓ = −Σ_c q_c log softmax(z)_c · weight_y, with integer targets y.

    `q` is one-hot, or (1 − s)·onehot + s/C under `label_smoothing=s`. Outputs [..., C] go with
    targets [...]: the terms of a sequence are summed, or averaged with `reduction="mean"`.

    **Arguments:**

    - `class_weights`: [C], one factor per class (of the *target*), or `None`.
    - `label_smoothing`: s in [0, 1).
    - `reduction`: `"sum"` or `"mean"` over the positions of a sequence.

    With hard labels this is a negative log-likelihood: output Hessian and exact Fisher are both
    diag p − ppᵀ. Class weights, smoothing and the mean keep the Hessian's form, times the weight and
    1/T; the Fisher is that of the weighted, smoothed, averaged score: weights squared, 1/T².
    """

    class_weights: Float[Array, " C"] | None
    label_smoothing: float | Array
    reduction: str = eqx.field(static=True)

    def __init__(
        self,
        *,
        class_weights=None,
        label_smoothing: float | Array = 0.0,
        reduction: Literal["sum", "mean"] = "sum",
    ):
        if reduction not in ("sum", "mean"):
            raise ValueError(f'`reduction` must be "sum" or "mean", got {reduction!r}.')
        if is_concrete(label_smoothing) and not (
            np.isreal(label_smoothing) and 0 <= label_smoothing < 1
        ):
            raise ValueError(
                f"`label_smoothing` must lie in [0, 1), got {label_smoothing!r}. 0 is hard labels."
            )
        self.class_weights = (
            None if class_weights is None else _checked_class_weights(class_weights)
        )
        self.label_smoothing = (
            float(label_smoothing) if is_concrete(label_smoothing) else label_smoothing
        )
        self.reduction = reduction

    @property
    def convex(self):
        return True

    def _weight(self, output, target: Int[Array, "..."]) -> Array:
        """The class weight of each target; NaN where it is no class, which a trace cannot refuse."""
        dtype, C = output.dtype, output.shape[-1]
        if self.class_weights is None:
            weight = jnp.ones(target.shape, dtype)
        else:
            weight = self.class_weights.astype(dtype)[target]
        return jnp.where((target >= 0) & (target < C), weight, jnp.nan)

    def __call__(self, output, target):
        logp = jnn.log_softmax(output, axis=-1)
        hit = jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
        smoothed = (1 - self.label_smoothing) * hit + self.label_smoothing * jnp.mean(logp, axis=-1)
        return _scaled(-smoothed * self._weight(output, target), self.reduction)

    def output_hessian(self, output, target):
        return self._blocks(output, self._weight(output, target))

    def _blocks(self, output, weight):
        """Block diagonal over positions: weight · (diag p − ppᵀ)."""
        p = jnn.softmax(output, axis=-1).reshape(-1, output.shape[-1])
        blocks = jax.vmap(lambda q, w: w * (jnp.diag(q) - jnp.outer(q, q)))(p, weight.reshape(-1))
        scale = 1.0 if self.reduction == "sum" else 1.0 / p.shape[0]
        return _block_diagonal(scale * blocks)

    def _class_scores(self, flat):
        """∇ℓ of each position for each class, [T, C, C], and p, [T, C]."""
        C = flat.shape[-1]
        single = SoftmaxCrossEntropy(
            class_weights=self.class_weights, label_smoothing=self.label_smoothing
        )
        scores = jax.vmap(lambda z: jax.vmap(lambda y: jax.grad(single)(z, y))(jnp.arange(C)))(flat)
        return scores, jnn.softmax(flat, axis=-1)

    def hessian_root(self, output, target):
        flat = output.reshape(-1, output.shape[-1])
        weight = self._weight(output, target).reshape(-1)
        scale = weight if self.reduction == "sum" else weight / flat.shape[0]
        rows = jnp.sqrt(scale)[:, None, None] * _covariance_root(jnn.softmax(flat, axis=-1))
        return _one_position_each(rows).reshape(-1, *output.shape)

    def fisher_root(self, output):
        # With S the scores of a position's classes and LᵀL = diag p − ppᵀ their covariance is that of
        # the rows LS. The means of all positions together, 0 for hard and unweighted labels, are one
        # row more.
        flat = output.reshape(-1, output.shape[-1])
        scores, p = self._class_scores(flat)
        rows = _one_position_each(einsum("tkc,tcd->tkd", _covariance_root(p), scores))
        if self.class_weights is not None or not self._is_hard:
            mean = jnp.einsum("tc,tck->tk", p, scores)
            rows = jnp.concatenate([rows, mean[None]])
        scale = 1.0 if self.reduction == "sum" else 1.0 / flat.shape[0]
        return scale * rows.reshape(-1, *output.shape)

    @property
    def _is_hard(self) -> bool:
        return isinstance(self.label_smoothing, float) and self.label_smoothing == 0.0

    def output_fisher(self, output):
        # Positions draw their targets independently: within a position the second moment of the
        # score, across positions the product of its means (0 for hard, unweighted labels).
        flat = output.reshape(-1, output.shape[-1])
        scores, p = self._class_scores(flat)
        mean = jnp.einsum("tc,tck->tk", p, scores)
        second = jnp.einsum("tc,tck,tcl->tkl", p, scores, scores)
        covariance = second - jnp.einsum("tk,tl->tkl", mean, mean)
        scale = 1.0 if self.reduction == "sum" else 1.0 / flat.shape[0] ** 2
        return scale * (_block_diagonal(covariance) + jnp.outer(mean.ravel(), mean.ravel()))

    def draw(self, key, output):
        return jr.categorical(key, output, axis=-1)

    def residuals(self, output):
        return 0

    def class_logits(self, output):
        if output.ndim != 1:
            raise ValueError(
                "Class probabilities, logits and margins need one vector of logits an example, got "
                f"outputs of shape {output.shape}. Use `influx.measure(f, fn)` with a function of "
                "(model, query) that picks the position you mean."
            )
        return output

    def constants(self, output):
        # ‖p − q‖ ≤ √2 per position; λ_max(diag p − ppᵀ) ≤ ½; |D³[u, u, u]| is a third central moment
        # of values at most √2‖u‖ apart, so t = √2³/(6√3) (P11).
        if self.reduction == "mean":
            raise ValueError("No certificate for a loss averaged over a sequence.")
        top = 1.0 if self.class_weights is None else jnp.max(self.class_weights)
        positions = int(np.prod(output.shape[:-1]))
        return LossConstants(
            lipschitz=top * float(np.sqrt(2.0 * positions)),
            smoothness=0.5 * top,
            third=top * float(np.sqrt(2.0 / 27.0)),
            hard=self._is_hard,
        )

    def check(self, output, targets):
        check_output(output, "SoftmaxCrossEntropy")
        targets = array_target(targets)
        if len(output.shape) == 0:
            raise ValueError(
                "SoftmaxCrossEntropy needs logits [..., C], got a scalar output. For two classes use "
                "BinaryCrossEntropy, or let the model answer one logit per class."
            )
        check_shape(
            targets,
            output.shape[:-1],
            "SoftmaxCrossEntropy takes integer labels",
            "One-hot labels become integers by `y.argmax(-1)`, a column by `y[:, 0]`.",
        )
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"SoftmaxCrossEntropy takes integer labels, got dtype {targets.dtype}. "
                "Convert them: `y.astype(int)`; for soft labels use `CustomLoss`."
            )
        C = output.shape[-1]
        if C < 2:
            raise ValueError(
                f"SoftmaxCrossEntropy needs a logit for each of at least two classes, got outputs of "
                f"shape {output.shape}. For one logit, of yes or no, use BinaryCrossEntropy."
            )
        if self.class_weights is not None and self.class_weights.shape != (C,):
            raise ValueError(
                f"`class_weights` needs shape ({C},), one factor per class of the model; got "
                f"{self.class_weights.shape}."
            )
        check_range(targets, 0, C - 1, f"the model has {C} classes: labels run from 0 to {C - 1}")


def _block_diagonal(blocks: Float[Array, "T C C"]) -> Float[Array, "TC TC"]:
    T, C, _ = blocks.shape
    if T == 1:
        return blocks[0]
    return jnp.einsum("tcd,ts->tcsd", blocks, jnp.eye(T, dtype=blocks.dtype)).reshape(T * C, T * C)


def _covariance_root(p: Float[Array, "T C"]) -> Float[Array, "T r C"]:
    """Rows l_j with Σ l_j l_jᵀ = diag p − ppᵀ, one fewer than classes: its Cholesky factor's columns.

    With the tails q_j = Σ_{k>j} p_k, l_jj = √(p_j q_j / q_{j−1}) and l_ji = −l_jj p_i / q_j for i > j.
    Products and sums of numbers of one sign lose no digits, however certain the model is. Where a tail
    underflows, its row is 0.

    **Source:** Tanabe & Sagae, "An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution, with applications" (1992).
    """
    C = p.shape[1]
    tails = jnp.flip(jnp.cumsum(jnp.flip(p, axis=1), axis=1), axis=1)  # q_{j−1} at j
    after = jnp.concatenate([tails[:, 1:], jnp.zeros_like(p[:, :1])], axis=1)
    positive = lambda q: jnp.where(q >= jnp.finfo(p.dtype).tiny, q, 1)
    diagonal = jnp.sqrt(p * (after / positive(tails)))
    later = jnp.triu(jnp.ones((1, C, C), p.dtype), 1)
    shares = p[:, None, :] / positive(after)[:, :, None]
    factors = jnp.eye(C, dtype=p.dtype)[None] - later * shares
    return (diagonal[:, :, None] * factors)[:, : max(1, C - 1)]


def _one_position_each(rows: Float[Array, "T r C"]) -> Float[Array, "Tr T C"]:
    """Each row at its position, with 0 at the others."""
    T, r, C = rows.shape
    return jnp.einsum("trc,ts->trsc", rows, jnp.eye(T, dtype=rows.dtype)).reshape(T * r, T, C)


def _checked_class_weights(class_weights) -> Float[Array, " C"]:
    values = class_weights if isinstance(class_weights, jax.Array) else np.asarray(class_weights)
    number = jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)
    positive = lambda: bool(
        np.all(np.isfinite(values) & (np.asarray(values) >= 0)) and np.asarray(values).any()
    )
    if not number or values.ndim != 1 or (is_concrete(values) and not positive()):
        raise ValueError(
            f"`class_weights` must be finite numbers ≥ 0, one per class [C] and not all 0, got "
            f"{class_weights!r}. To balance the classes: `n / (C * np.bincount(y))`."
        )
    return jnp.asarray(values)
