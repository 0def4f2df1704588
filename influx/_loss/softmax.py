"""Cross-entropy of a softmax."""

from typing import Literal

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from .._misc import is_concrete
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
    diag p − ppᵀ. Class weights and smoothing keep the Hessian's form; the Fisher is that of the
    weighted, smoothed score.
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

    def _weight(self, target: Int[Array, "..."], dtype) -> Array:
        if self.class_weights is None:
            return jnp.ones(target.shape, dtype)
        return self.class_weights.astype(dtype)[target]

    def __call__(self, output, target):
        logp = jnn.log_softmax(output, axis=-1)
        hit = jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
        smoothed = (1 - self.label_smoothing) * hit + self.label_smoothing * jnp.mean(logp, axis=-1)
        return _scaled(-smoothed * self._weight(target, output.dtype), self.reduction)

    def output_hessian(self, output, target):
        return self._blocks(output, self._weight(target, output.dtype))

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

    def fisher_root(self, output):
        # √p_c (score_c − mean) at one position and 0 at the others; the means of all positions
        # together, which are 0 for hard and unweighted labels, are one row more.
        flat = output.reshape(-1, output.shape[-1])
        (T, C), dtype = flat.shape, flat.dtype
        scores, p = self._class_scores(flat)
        mean = jnp.einsum("tc,tck->tk", p, scores)
        rows = jnp.sqrt(p)[:, :, None] * (scores - mean[:, None, :])
        rows = rows if T == 1 else jnp.einsum("tck,ts->tcsk", rows, jnp.eye(T, dtype=dtype))
        rows = rows.reshape(T * C, *output.shape)
        if self.class_weights is not None or not self._is_hard:
            rows = jnp.concatenate([rows, mean.reshape(1, *output.shape)])
        return rows * (1.0 if self.reduction == "sum" else 1.0 / T)

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


def _checked_class_weights(class_weights) -> Float[Array, " C"]:
    values = class_weights if isinstance(class_weights, jax.Array) else np.asarray(class_weights)
    number = jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)
    positive = lambda: bool(np.all(np.isfinite(values) & (np.asarray(values) >= 0)))
    if not number or values.ndim != 1 or (is_concrete(values) and not positive()):
        raise ValueError(
            f"`class_weights` must be finite numbers ≥ 0, one per class [C], got {class_weights!r}. "
            "To balance the classes: `n / (C * np.bincount(y))`."
        )
    return jnp.asarray(values)
