"""Many retrainings as one program: vmapped over data weights, a chunk at a time."""

from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import check_chunk
from .._chunks import chunk_length, chunked_map, leading_length, take
from .._custom_types import Model
from .._linalg import ravel
from .._loop_body import has_kernel_of
from .._train import AbstractTrainer, Trained, check_trainer
from .._train.base import Objective, flat

# Beyond this many at once nothing is gained: the matrix products are large enough.
_MOST_LANES = 25


class Retrainable(Objective, Protocol):
    @property
    def weights(self) -> Float[Array, " n"]: ...

    @property
    def whole(self) -> Callable[[Any], Any]: ...


def parameters(model: Model) -> Float[Array, " P"]:
    """The default outcome: all parameters of the retrained model as one vector, leaf after leaf."""
    return ravel(model)[0]


def erase(weights: Float[Array, " n"], index: Array) -> Float[Array, " n"]:
    """Data weights without one point."""
    return weights.at[index].set(0)


def multiply(weights: Float[Array, " n"], mask: Float[Array, " n"]) -> Float[Array, " n"]:
    """Data weights under a mask."""
    return weights * mask


def retrain(
    risk: Retrainable,
    model: Model,
    trainer: AbstractTrainer,
    *,
    weigh: Callable[[Array, Array], Array],
    lanes: Array,
    typical: Float[Array, " n"],
    outcome: Callable[[Any], PyTree[Array]] | None,
    chunk_size: int | None,
    remedies: str = "",
) -> PyTree[Array]:
    """`outcome` of the model retrained at weights `weigh(risk.weights, lane)`, for every lane.

    Each of the trainer's attempts is one program; the lanes that it does not finish go to the next.
    **Raises** `RuntimeError` naming the lanes that no attempt finished, with `remedies`, the trainer's
    own by default.
    """
    check_settings(trainer, outcome, chunk_size)
    chunk_size = check_chunk(chunk_size)
    outcome = parameters if outcome is None else outcome
    outcomes, pending = None, np.arange(leading_length(lanes))
    most = most_lanes(risk, model) if chunk_size is None else chunk_size
    trained = None
    for attempt in trainer.attempts():
        theta, _ = ravel(model)
        chunk = min(most, chunk_length(attempt.items(risk, model), theta.dtype, chunk_size))
        part = take(lanes, pending)
        answers, trained = _program(attempt, risk, model, weigh, part, typical, outcome, chunk)
        put = lambda old, new, rows=pending: old.at[rows].set(new)
        outcomes = answers if outcomes is None else jtu.tree_map(put, outcomes, answers)
        unfinished = ~np.asarray(trained.converged)
        if not unfinished.any():
            return outcomes
        pending, trained = pending[unfinished], take(trained, unfinished)
    assert trained is not None
    _fail(pending, leading_length(lanes), trained, remedies or trainer.remedies())


def most_lanes(objective: Retrainable, model: Model) -> int:
    """One where each lane would have kernels of its own: on a CPU, convolutions with them are slower at
    once than one after another."""
    fn, theta, _ = flat(objective, model, None)
    slow = jax.default_backend() == "cpu" and has_kernel_of(fn, theta)
    return 1 if slow else _MOST_LANES


def _fail(rows: np.ndarray, total: int, trained: Trained, remedies: str):
    norms = np.asarray(trained.gradient_norm)
    shown = ", ".join(map(str, rows[:5].tolist())) + (", …" if rows.size > 5 else "")
    raise RuntimeError(
        f"{rows.size} of {total} retrainings did not converge (rows {shown}): ‖∇J‖ up to "
        f"{norms.max():.3g} after at most {int(np.max(trained.steps))} steps. {remedies}"
    )


@eqx.filter_jit
def _program(trainer, risk, model, weigh, lanes, typical, outcome, chunk):
    state = trainer.init(risk, model, typical)

    def one(lane):
        weights = weigh(risk.weights, lane)
        retrained, trained = trainer.train(state, risk, model, weights)
        return outcome(risk.whole(retrained)), trained

    return jtu.tree_map(jnp.asarray, chunked_map(one, lanes, chunk))


def check_settings(trainer, outcome, chunk_size: int | None) -> None:
    """What every retraining verb takes besides its points."""
    check_chunk(chunk_size)
    check_trainer(trainer)
    if outcome is not None and not callable(outcome):
        raise ValueError(
            f"`outcome` must be a function of the retrained model, got {outcome!r}. "
            "None answers its parameters."
        )
