"""A training run forwards, keeping few states, and its derivative backwards."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int

from .._custom_types import Model
from .._linalg import ravel
from .._loop_body import channels_last
from .._risk import EmpiricalRisk
from .._train import SGD
from .._train.sgd import batch_objective


@eqx.filter_jit
def run(trainer: SGD, risk: EmpiricalRisk, model: Model) -> tuple[Model, Any, Int[Array, "s t B"]]:
    """The run of `trainer` from `model`: the trained model, the states at the start of √T segments,
    and the mini-batches of every segment (−1 fills up the last)."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batches = _segments(trainer, risk.n)

    def segment(state, batches):
        end, _ = _forward(trainer, risk, static, state, batches)
        return end, state

    (params, _), states = jax.lax.scan(segment, trainer.start(params), batches)
    return eqx.combine(params, static), states, batches


def pull(
    trainer: SGD,
    risk: EmpiricalRisk,
    model: Model,
    states: Any,
    batches: Int[Array, "s t B"],
    row: Float[Array, " P"],
) -> Float[Array, " n"]:
    r"""row · ∂θ_T/∂w, backwards from θ_T, a segment at a time.

    With states x_t = (θ_t, memory), x_{t+1} = u(g_t, x_t) and g_t = ∇_θ L_t(θ_t, w) the gradient of the
    batch, a cotangent λ of x_{t+1} becomes

        v = (∂u/∂g)ᵀ λ,    λ ← (∂u/∂x)ᵀ λ + (∇²_θ L_t v, 0),    w̄ ← w̄ + ∂_w ⟨∇_θ L_t, v⟩.

    The last two are one directional derivative, along v, of the gradient of L_t in θ and w together:
    forward over reverse, no gradient per example. Only λ, v and w̄ depend on `row`: under `vmap` the
    states are recomputed once for all rows.
    """
    static = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    _, rebuild = ravel(model)
    _, memory = eqx.filter(jtu.tree_map(lambda x: x[0], states), eqx.is_inexact_array)
    of_params = eqx.filter(rebuild(row), eqx.is_inexact_array)
    cotangent = of_params, jtu.tree_map(jnp.zeros_like, memory)

    def segment(carry, part):
        state, batches = part
        _, before = _forward(trainer, risk, static, state, batches)
        back = lambda carry, at: (_back(trainer, risk, static, carry, *at), None)
        return jax.lax.scan(back, carry, (before, batches), reverse=True)

    start = cotangent, jnp.zeros_like(risk.weights)
    (_, weights), _ = jax.lax.scan(segment, start, (states, batches), reverse=True)
    return weights


def _forward(trainer: SGD, risk: EmpiricalRisk, static, state, batches: Int[Array, "t B"]):
    """The state after a segment, and those before each of its steps."""

    def step(state, batch):
        move = lambda state: trainer.step(risk, static, risk.weights, state, batch)
        return jax.lax.cond(batch[0] >= 0, move, lambda state: state, state), state

    return jax.lax.scan(step, state, batches)


def _back(trainer: SGD, risk: EmpiricalRisk, static, carry, state, batch: Int[Array, " B"]):
    """Cotangents of a state and of the weights, from those after the step that it took."""

    def move(carry):
        cotangent, weights = carry
        params, _ = state
        both = jax.grad(batch_objective(risk, static, batch), argnums=(0, 1))
        (gradient, _), along = jax.linearize(lambda p: both(p, risk.weights[batch]), params)
        moving, still = eqx.partition(state, eqx.is_inexact_array)
        update = lambda g, x: eqx.filter(
            trainer.update(g, eqx.combine(x, still)), eqx.is_inexact_array
        )
        _, transpose = jax.vjp(update, gradient, moving)
        v, (direct, memory) = transpose(cotangent)
        through, by_weight = along(v)
        before = jtu.tree_map(jnp.add, direct, through), memory
        return before, weights.at[batch].add(by_weight)

    return jax.lax.cond(batch[0] >= 0, channels_last(move), lambda carry: carry, carry)


def _segments(trainer: SGD, n: int) -> Int[Array, "s t B"]:
    """The mini-batches of all epochs in segments of √T steps, the last filled up with −1."""
    batches = jax.vmap(lambda epoch: trainer.batches(n, epoch))(jnp.arange(trainer.epochs))
    batches = batches.reshape(-1, trainer.batch_size).astype(jnp.int32)
    steps = math.ceil(math.sqrt(batches.shape[0]))
    segments = -(-batches.shape[0] // steps)
    fill = ((0, segments * steps - batches.shape[0]), (0, 0))
    batches = jnp.pad(batches, fill, constant_values=-1)
    return batches.reshape(segments, steps, trainer.batch_size)
