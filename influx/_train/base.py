"""What a trainer is: a pure function from data weights to a trained model."""

import abc
import functools
from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_whole, is_real
from .._custom_types import Model
from .._linalg import ravel


class Objective(Protocol):
    """What a trainer minimises: J(θ, w), as `EmpiricalRisk` states it or another of the kind."""

    def objective(self, model: Model, weights: Any = None) -> Float[Array, ""]: ...


class Trained(eqx.Module):
    """How a training ended.

    - `gradient_norm`: ‖∇J(θ, w)‖₂ at the model it returned
    - `steps`: steps taken
    - `converged`: whether the trainer's own rule was met
    """

    gradient_norm: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


class AbstractTrainer(eqx.Module):
    """A training run as a pure function of the data weights.

    Its law, which the tests run on every member:

    ```python
    state = trainer.init(risk, model, weights)
    retrained, trained = trainer.train(state, risk, model, weights)
    again, _ = jax.vmap(lambda w: trainer.train(state, risk, model, w))(stacked_weights)
    assert again[i] == retrained where stacked_weights[i] == weights     # whatever the other rows
    assert trained.gradient_norm == ‖∇J(retrained, weights)‖
    ```
    """

    @abc.abstractmethod
    def init(self, objective: Objective, model: Model, weights: Float[Array, " n"]) -> Any:
        """What all trainings that start at `model` share; `weights` is typical of theirs."""

    @abc.abstractmethod
    def train(
        self, state: Any, objective: Objective, model: Model, weights: Float[Array, " n"]
    ) -> tuple[Model, Trained]:
        """The run that starts at `model`, under data weights `weights`. It never raises: whether it
        converged is in its answer."""

    @abc.abstractmethod
    def attempts(self) -> tuple["AbstractTrainer", ...]:
        """Trainers with the same limit, cheapest first, for many trainings from one model: those
        that an attempt does not finish, the next one starts afresh."""

    @abc.abstractmethod
    def items(self, objective: Objective, model: Model) -> int:
        """About how many numbers one training holds at its peak: what bounds a chunk of them."""

    @abc.abstractmethod
    def examples(self, n: int) -> int:
        """How many of n training points one step reads, for counts of gradients spent."""

    @abc.abstractmethod
    def remedies(self) -> str:
        """What was demanded of a training, and what to change where it was not met."""


def flat(objective: Objective, model: Model, weights: Float[Array, " n"] | None):
    """J(·, w) of the parameter vector, where it starts, and the way back to a model."""
    theta, rebuild = ravel(model)
    return (lambda t: objective.objective(rebuild(t), weights)), theta, rebuild


def gradient_items(objective: Objective, model: Model) -> int:
    """The numbers that one reverse pass through J keeps."""
    fn, theta, _ = flat(objective, model, None)
    residuals = eqx.filter_eval_shape(lambda t: jax.vjp(fn, t)[1], theta)
    shapes = [getattr(leaf, "shape", ()) for leaf in jtu.tree_leaves(residuals)]
    return int(sum(np.prod(shape) for shape in shapes)) + 4 * theta.size


def check_tolerance(tolerance: float) -> float:
    if not is_real(tolerance) or tolerance <= 0:
        raise ValueError(
            f"`tolerance` bounds the gradient norm and must be positive, got {tolerance!r}."
        )
    return float(tolerance)


def check_reachable(tolerance: float, dtype) -> None:
    """Whether a gradient norm can fall below `tolerance` in this arithmetic."""
    unit = float(np.finfo(dtype).eps)
    if tolerance < unit / 100:
        raise ValueError(
            f"The trainer's tolerance, ‖∇J‖ < {tolerance:g}, is out of reach in {np.dtype(dtype)}, "
            f"whose gradients stop near {unit:.0e}. Pass a larger one, such as `tolerance=1e-6`, or "
            "compute in float64 (`jax_enable_x64`)."
        )


def count(name: str) -> Callable[[Any], int]:
    """The converter of a field that counts."""
    return functools.partial(check_whole, name)


def minimising_remedies(tolerance: float, max_steps: int) -> str:
    """What a minimiser to a gradient norm advises."""
    return (
        f"The tolerance is ‖∇J‖ < {tolerance:g} within {max_steps} steps. Allow more with "
        "`max_steps=`, or a looser `tolerance=` (float32 gradients stop near 1e-7: enable x64); "
        "scale the inputs; or give `l2` > 0 where the data do not determine every parameter. A "
        "network with ReLU has kinks at which no gradient vanishes: use a smooth activation such as "
        "jax.nn.gelu, or judge it by `influx.pbrf`."
    )


def check_trainer(trainer) -> None:
    if not isinstance(trainer, AbstractTrainer):
        raise ValueError(
            f"`trainer` must be a trainer such as influx.Newton(), got {trainer!r}. Mind the "
            "parentheses: Newton(), not Newton. An optax optimiser goes into influx.SGD(...)."
        )
