"""Losses ℓ(output, target) of one example, and what Gauss–Newton, Fisher and certificates need to
know of them."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._misc import is_concrete


class AbstractLoss(eqx.Module):
    """A loss ℓ(output, target) of one example. `output` is what `predict(model, x)` returns.

    Its law, which the tests run on every member:

    ```python
    K = output.size
    hessian = jax.hessian(lambda o: loss(o.reshape(output.shape), target))(output.reshape(-1))
    assert loss.output_hessian(output, target) == hessian          # [K, K]
    ```

    `convex`: whether ℓ is known to be convex in its output.
    """

    convex: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(self, output: PyTree[Array], target: PyTree[Array]) -> Float[Array, ""]:
        """ℓ(output, target), a scalar."""

    @abc.abstractmethod
    def output_hessian(self, output: Array, target: PyTree[Array]) -> Float[Array, "K K"]:
        """∇²ℓ in the flattened output: the middle factor of the Gauss–Newton matrix."""

    @abc.abstractmethod
    def output_fisher(self, output: Array) -> Float[Array, "K K"]:
        """E[∇ℓ ∇ℓᵀ] over targets drawn from the model's own distribution, in the flattened output.

        Raises `ValueError` where the loss is not a negative log-likelihood.
        """

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, output: Array) -> Array:
        """A target from the model's own distribution p(· | output): what a sampled Fisher needs.

        Raises `ValueError` where the loss is not a negative log-likelihood.
        """

    @abc.abstractmethod
    def class_logits(self, output: Array) -> Float[Array, " C"]:
        """The output as the logits of C classes; `ValueError` where it is no single classifier."""

    @abc.abstractmethod
    def constants(self, output: jax.ShapeDtypeStruct) -> "LossConstants":
        """Bounds in output space, for outputs of that shape; `ValueError` where none are known."""

    @abc.abstractmethod
    def check(self, output: PyTree[jax.ShapeDtypeStruct], targets: PyTree[Array]) -> None:
        """Raise `ValueError` where the loss cannot take outputs of that shape, or `targets` [n, ...]
        cannot go with them."""


class LossConstants(eqx.Module):
    """Bounds of one loss in output space, valid at every output.

    - `lipschitz`: ‖∇ℓ‖₂; infinite where the loss has no global bound
    - `smoothness`: ‖∇²ℓ‖₂
    - `third`: the least known t with |D³ℓ[u, u, v]| ≤ t ‖u‖²‖v‖
    - `hard`: targets are single classes, so that P3's corollary γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂) holds
    """

    lipschitz: float | Float[Array, ""]
    smoothness: float | Float[Array, ""]
    third: float | Float[Array, ""]
    hard: bool


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
    label_smoothing: float
    reduction: str = eqx.field(static=True)

    def __init__(
        self,
        *,
        class_weights=None,
        label_smoothing: float = 0.0,
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
        self.label_smoothing = label_smoothing
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

    def output_fisher(self, output):
        # Positions draw their targets independently: within a position the second moment of the
        # score, across positions the product of its means (0 for hard, unweighted labels).
        C = output.shape[-1]
        flat = output.reshape(-1, C)
        single = SoftmaxCrossEntropy(
            class_weights=self.class_weights, label_smoothing=self.label_smoothing
        )
        scores = jax.vmap(lambda z: jax.vmap(lambda y: jax.grad(single)(z, y))(jnp.arange(C)))(flat)
        p = jnn.softmax(flat, axis=-1)
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
            hard=float(self.label_smoothing) == 0.0,
        )

    def check(self, output, targets):
        _check_output(output, "SoftmaxCrossEntropy")
        targets = _array_target(targets)
        if len(output.shape) == 0:
            raise ValueError(
                "SoftmaxCrossEntropy needs logits [..., C], got a scalar output. For two classes use "
                "BinaryCrossEntropy, or let the model answer one logit per class."
            )
        _check_shape(
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
        _check_range(targets, 0, C - 1, f"the model has {C} classes: labels run from 0 to {C - 1}")


class BinaryCrossEntropy(AbstractLoss):
    """ℓ = Σ_k log(1 + exp(z_k)) − y_k z_k, with targets y in {0, 1} of the output's shape.

    A scalar output (shape () or (1,)) is a classifier of two classes with logits (0, z); several
    outputs are independent yes/no labels, and their losses are summed.
    """

    @property
    def convex(self):
        return True

    def __call__(self, output, target):
        return jnp.sum(jnn.softplus(output) - target.astype(output.dtype) * output)

    def output_hessian(self, output, target):
        p = jnn.sigmoid(output).reshape(-1)
        return jnp.diag(p * (1 - p))

    def output_fisher(self, output):
        return self.output_hessian(output, None)

    def draw(self, key, output):
        return jr.bernoulli(key, jnn.sigmoid(output)).astype(jnp.int32)

    def class_logits(self, output):
        if output.size != 1:
            raise ValueError(
                "Class probabilities, logits and margins need one binary output per example, got "
                f"outputs of shape {output.shape}. Use `influx.measure(f, fn)`."
            )
        z = output.reshape(())
        return jnp.stack([jnp.zeros_like(z), z])

    def constants(self, output):
        # |σ − y| ≤ 1, σ' ≤ ¼ and |σ''| ≤ 1/(6√3), each per output.
        return LossConstants(
            lipschitz=np.sqrt(float(np.prod(output.shape))),
            smoothness=0.25,
            third=1 / (6 * np.sqrt(3.0)),
            hard=True,
        )

    def check(self, output, targets):
        _check_output(output, "BinaryCrossEntropy")
        targets = _array_target(targets)
        _check_shape(
            targets,
            output.shape,
            "BinaryCrossEntropy takes labels of the output's shape",
            "Add or drop the axis: `y[:, None]`, `y[:, 0]`; for C > 2 classes use SoftmaxCrossEntropy.",
        )
        if is_concrete(targets) and not np.isin(np.asarray(targets), (0, 1)).all():
            bad = np.flatnonzero(np.any(_rows(~np.isin(np.asarray(targets), (0, 1))), axis=1))
            raise ValueError(
                f"BinaryCrossEntropy takes labels 0 and 1, got others at examples {_some(bad)}. "
                "Labels -1 and 1 become such by `(y > 0).astype(int)`; for probabilities use "
                "`CustomLoss`."
            )


class SquaredError(AbstractLoss):
    """ℓ = ½ ‖output − target‖², summed over all outputs.

    The factor ½ makes it the negative log-likelihood of unit-variance Gaussian noise: output
    Hessian and Fisher are the identity.
    """

    @property
    def convex(self):
        return True

    def __call__(self, output, target):
        return 0.5 * jnp.sum(jnp.square(output - target))

    def output_hessian(self, output, target):
        return jnp.eye(output.size, dtype=output.dtype)

    def output_fisher(self, output):
        return jnp.eye(output.size, dtype=output.dtype)

    def draw(self, key, output):
        return output + jr.normal(key, output.shape, output.dtype)

    def class_logits(self, output):
        raise ValueError(
            "SquaredError is no classifier: it has no classes, margins or memorization labels. "
            "Use `influx.measure(f, fn)`, or train with SoftmaxCrossEntropy or BinaryCrossEntropy."
        )

    def constants(self, output):
        return LossConstants(lipschitz=np.inf, smoothness=1.0, third=0.0, hard=False)

    def check(self, output, targets):
        _check_output(output, "SquaredError")
        _check_shape(
            _array_target(targets),
            output.shape,
            "SquaredError takes targets of the output's shape",
            "Add or drop the axis: `y[:, None]`, `y[:, 0]`.",
        )


class CustomLoss(AbstractLoss):
    """Any scalar function of (output, target), as a loss.

    **Arguments:**

    - `fn`: `fn(output, target) -> scalar`, differentiable in `output`.
    - `sample`: `sample(key, output) -> target`, where `fn` is a negative log-likelihood and a
      sampled Fisher is wanted.
    - `logits`: `logits(output) -> [C]`, where the model is a classifier and margins are wanted.

    - `convex`: that `fn` is convex in its output is for you to say. The Gauss–Newton matrix is then
      positive semi-definite, which `restriction_bound` needs to know.

    The output Hessian is `jax.hessian(fn)`.
    """

    fn: Callable[[Any, Any], Array]
    sample: Callable | None = None
    logits: Callable | None = None
    convex: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        wanted = {"fn": "(output, target)", "sample": "(key, output)", "logits": "(output)"}
        for name, arguments in wanted.items():
            given = getattr(self, name)
            if not callable(given) and (given is not None or name == "fn"):
                raise ValueError(
                    f"`{name}` of a CustomLoss must be a function of {arguments}, got {given!r}."
                )

    def __call__(self, output, target):
        return self.fn(output, target)

    def output_hessian(self, output, target):
        at = lambda flat: self.fn(flat.reshape(output.shape), target)
        return jax.hessian(at)(output.reshape(-1))

    def output_fisher(self, output):
        raise ValueError(
            'CustomLoss has no exact Fisher. Use Fisher("sampled") with `sample=`, '
            'Fisher("empirical"), or GaussNewton().'
        )

    def draw(self, key, output):
        if self.sample is None:
            raise ValueError(
                "A sampled Fisher needs labels drawn from the model. Write "
                "`CustomLoss(fn, sample=lambda key, output: ...)`, or use GaussNewton()."
            )
        return self.sample(key, output)

    def class_logits(self, output):
        if self.logits is None:
            raise ValueError(
                "Class probabilities, logits and margins of a CustomLoss need "
                "`CustomLoss(fn, logits=lambda output: ...)`; or use `influx.measure(f, fn)`."
            )
        return self.logits(output)

    def constants(self, output):
        raise ValueError(
            "CustomLoss has no known bounds, so nothing about it can be certified. "
            "Use SoftmaxCrossEntropy or BinaryCrossEntropy."
        )

    def check(self, output, targets):
        pass


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


def _check_output(output, loss: str) -> None:
    dtype = getattr(output, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{loss} takes one floating array as the model's output, got {output}. Pick it with "
            "`predict=lambda model, x: ...`, or use `CustomLoss`."
        )


def _array_target(targets) -> Array:
    leaves = jax.tree_util.tree_leaves(targets)
    if len(leaves) != 1:
        raise ValueError(
            f"This loss takes one array of targets, got a pytree of {len(leaves)} arrays. "
            "Use `CustomLoss` for targets with several parts."
        )
    return leaves[0]


def _check_shape(targets: Array, expected: tuple[int, ...], what: str, remedy: str) -> None:
    if targets.shape[1:] != tuple(expected):
        raise ValueError(
            f"{what}: expected shape [{', '.join(map(str, ('n', *expected)))}] (n examples), "
            f"got {tuple(targets.shape)}. {remedy}"
        )


def _check_range(targets: Array, low: int, high: int, why: str) -> None:
    if not is_concrete(targets):
        return
    values = np.asarray(targets)
    bad = np.flatnonzero(np.any(_rows((values < low) | (values > high)), axis=1))
    if bad.size:
        raise ValueError(
            f"Labels out of range at examples {_some(bad)} (for instance "
            f"{_rows(values)[bad[0]].ravel()[:3].tolist()}): {why}. Renumber them, as "
            "`np.unique(y, return_inverse=True)[1]` does, or give the model more outputs."
        )


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


def _some(indices: np.ndarray, show: int = 5) -> str:
    text = ", ".join(map(str, indices[:show].tolist()))
    return f"[{text}{', …' if indices.size > show else ''}] ({indices.size} in all)"
