"""Mini-batch training by any optax optimiser."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._custom_types import Model
from .._misc import ravel, take
from .base import AbstractTrainer, Trained, check_count, flat, gradient_items, norm


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

    A run has no tolerance: it counts as converged where its parameters are finite. Reverse-mode
    derivatives of a run keep the parameters of E + n/B steps, not of all E·n/B, and compute the
    gradients twice more.

    **Raises:** `ValueError` where `batch_size` exceeds n.
    """

    optimiser: optax.GradientTransformation
    batch_size: int = eqx.field(converter=check_count, static=True, kw_only=True)
    epochs: int = eqx.field(converter=check_count, static=True, kw_only=True)
    key: PRNGKeyArray = eqx.field(kw_only=True)

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

    def train(self, state, objective, model, weights):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, batch):
            params, optimiser_state = carry
            loss = lambda p: batch_objective(objective, eqx.combine(p, static), weights, batch)
            gradient = jax.grad(loss)(params)
            # optax's bias corrections mix integers and floats, which strict promotion forbids.
            with jax.numpy_dtype_promotion("standard"):
                updates, optimiser_state = self.optimiser.update(gradient, optimiser_state, params)
                params = optax.apply_updates(params, updates)
            return (params, optimiser_state), None

        def epoch(carry, index):
            batches = self.batches(weights.shape[0], index)
            return jax.lax.scan(jax.checkpoint(step), carry, batches)

        start = (params, self.optimiser.init(params))
        (params, _), _ = jax.lax.scan(jax.checkpoint(epoch), start, jnp.arange(self.epochs))
        trained = eqx.combine(params, static)
        fn, theta, _ = flat(objective, trained, weights)
        steps = jnp.asarray(self.epochs * (weights.shape[0] // self.batch_size))
        return trained, Trained(norm(jax.grad(fn)(theta)), steps, jnp.all(jnp.isfinite(theta)))

    def attempts(self):
        return (self,)

    def items(self, objective, model):
        theta, _ = ravel(model)
        return gradient_items(objective, model) + 4 * theta.size

    def remedies(self):
        return (
            f"The run of {self.epochs} epochs at batch size {self.batch_size} diverged: its "
            "parameters are NaN or infinite. Use a smaller step, or clip: "
            "`optax.chain(optax.clip_by_global_norm(1.0), ...)`."
        )


def batch_objective(
    risk: Any, model: Model, weights: Float[Array, " n"], batch: Int[Array, " B"]
) -> Float[Array, ""]:
    """(1/B) Σ wᵢ ℓᵢ + Ω over one mini-batch."""
    losses = risk.losses(model, take(risk.data, batch))
    data_term = jnp.vdot(weights[batch], losses, precision=jax.lax.Precision.HIGHEST)
    return data_term / batch.shape[0] + risk.regulariser(model)
