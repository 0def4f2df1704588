"""Mini-batch training by any optax optimiser."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.numpy.linalg import norm
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_key
from .._chunks import take
from .._linalg import ravel
from .._loop_body import channels_last
from .base import AbstractTrainer, Trained, count, flat, gradient_items


class SGD(AbstractTrainer):
    r"""Mini-batch training: `epochs` passes over the data, by any optax optimiser.

    ```python
    trainer = influx.SGD(optax.sgd(0.1, momentum=0.9), batch_size=32, epochs=20, key=jr.key(0))
    ```

    A step follows ∇[(1/B) Σ_{i in batch} wᵢ ℓ(zᵢ, θ) + Ω(θ)], B fixed: a weight of 0 erases a point
    from its batch and changes nothing else. With B = n this is ∇J(θ, w). l2 is part of the gradient
    (coupled), so a momentum or Adam sees it too.

    The order of the data is drawn from `key` once per epoch and does not depend on the weights: every
    retraining sees the same batches, and weights are the only difference. The n mod B points at the
    end of an epoch's order are left out of that epoch.

    **Arguments:** `optimiser`: an optax gradient transformation, for the model's parameters as a
    pytree; `batch_size`: B ≤ n.

    A run has no tolerance: it counts as converged where its parameters are finite.

    **Cost:** E epochs take ⌊n/B⌋·B example gradients each. Reverse-mode
    derivatives of a run keep the parameters of E + n/B steps, not of all E·n/B, and compute the
    gradients twice more.

    **Raises:** `ValueError` where `batch_size` exceeds n.
    """

    optimiser: optax.GradientTransformation
    batch_size: int = eqx.field(converter=count("batch_size"), static=True, kw_only=True)
    epochs: int = eqx.field(converter=count("epochs"), static=True, kw_only=True)
    key: PRNGKeyArray = eqx.field(converter=functools.partial(check_key, "key"), kw_only=True)

    def __check_init__(self):
        if not isinstance(self.optimiser, optax.GradientTransformation):
            raise ValueError(
                "`optimiser` must be an optax gradient transformation such as optax.sgd(0.1), got "
                f"{self.optimiser!r}."
            )

    def init(self, objective, model, weights):
        return None

    def batches(self, n: int, epoch: Int[Array, ""]) -> Int[Array, "steps B"]:
        """The indices of one epoch's mini-batches, in order."""
        if self.batch_size > n:
            raise ValueError(
                f"`batch_size` is {self.batch_size} but there are {n} training points. "
                f"Use batch_size={n} for full batches."
            )
        steps = n // self.batch_size
        order = jr.permutation(jr.fold_in(self.key, epoch), n)
        return order[: steps * self.batch_size].reshape(steps, self.batch_size)

    def start(self, params: PyTree[Array]) -> Any:
        """The state of a run before its first step: parameters and the optimiser's memory."""
        return params, self.optimiser.init(params)

    def update(self, gradient: PyTree[Array], state: Any) -> Any:
        """The state after a step with that gradient: what the optimiser makes of it."""
        params, memory = state
        # optax's bias corrections mix integers and floats, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = self.optimiser.update(gradient, memory, params)
            return optax.apply_updates(params, updates), memory

    def step(self, objective, static, weights: Float[Array, " n"], state, batch: Int[Array, " B"]):
        """The state after a step on one mini-batch."""
        params, _ = state
        gradient = channels_last(jax.grad(batch_objective(objective, static, batch)))
        return self.update(gradient(params, weights[batch]), state)

    def train(self, state, objective, model, weights):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        step = lambda run, batch: (self.step(objective, static, weights, run, batch), None)

        def epoch(run, index):
            return jax.lax.scan(jax.checkpoint(step), run, self.batches(weights.shape[0], index))

        run = self.start(params)
        (params, _), _ = jax.lax.scan(jax.checkpoint(epoch), run, jnp.arange(self.epochs))
        trained = eqx.combine(params, static)
        fn, theta, _ = flat(objective, trained, weights)
        steps = jnp.asarray(self.epochs * (weights.shape[0] // self.batch_size))
        return trained, Trained(norm(jax.grad(fn)(theta)), steps, jnp.all(jnp.isfinite(theta)))

    def attempts(self):
        return (self,)

    def items(self, objective, model):
        theta, _ = ravel(model)
        return gradient_items(objective, model) + 4 * theta.size

    def examples(self, n):
        return self.batch_size

    def remedies(self):
        return (
            f"The run of {self.epochs} epochs at batch size {self.batch_size} diverged: its "
            "parameters are NaN or infinite. Use a smaller step, or clip: "
            "`optax.chain(optax.clip_by_global_norm(1.0), ...)`."
        )


def batch_objective(objective: Any, static: Any, batch: Int[Array, " B"]) -> Callable:
    """(1/B) Σ wᵢ ℓᵢ + Ω over one mini-batch, a function of the parameters and the batch's wᵢ."""
    data = take(objective.data, batch)

    def value(params: PyTree[Array], weights: Float[Array, " B"]) -> Float[Array, ""]:
        model = eqx.combine(params, static)
        losses = objective.losses(model, data)
        data_term = jnp.vdot(weights, losses, precision=jax.lax.Precision.HIGHEST)
        return data_term / batch.shape[0] + objective.regulariser(model)

    return value
