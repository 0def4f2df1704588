import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import Example, Model, Scalar
from .._linalg import ravel
from .._loss import AbstractLoss
from .._risk import EmpiricalRisk
from .._validate import check_queries


class MeasurementConstants(eqx.Module):
    """Bounds of m as a function of the model's output, valid at all outputs.

    - `lipschitz`: ‖∇m‖₂ is at most this
    - `smoothness`: ‖∇²m‖₂ is at most this
    """

    lipschitz: float | Array
    smoothness: float | Array


class AbstractMeasurement(eqx.Module):
    """A measurement m(θ; query): a scalar of the trained model, or a vector of c of them."""

    @abc.abstractmethod
    def __call__(
        self, risk: EmpiricalRisk, model: Model, query: PyTree[Array]
    ) -> Float[Array, "*c"]:
        """m at one query. `model` holds the risk's parameters; `risk.whole(model)` is all of it."""

    @abc.abstractmethod
    def check(self, risk: EmpiricalRisk, model: Model, queries: PyTree[Array]) -> None:
        """Raise `ValueError` where m is not defined for this risk, or the queries do not fit."""

    @abc.abstractmethod
    def constants(self, risk: EmpiricalRisk, model: Model) -> MeasurementConstants:
        """Bounds as a function of the output; `ValueError` where none are known."""

    def gradient(
        self, risk: EmpiricalRisk, model: Model, query: PyTree[Array]
    ) -> Float[Array, "*c P"]:
        """∇m, one row per component."""
        theta, rebuild = ravel(model)
        return jax.jacrev(lambda t: self(risk, rebuild(t), query))(theta)


class AbstractOutputMeasurement(AbstractMeasurement):
    """A measurement that sees the model only through its output on the query (x, y)."""

    @abc.abstractmethod
    def of_output(self, loss: AbstractLoss, output: Array, target: PyTree[Array]) -> Array:
        """m as a function of the output."""

    @abc.abstractmethod
    def bounds(self, loss: AbstractLoss, output: jax.ShapeDtypeStruct) -> MeasurementConstants:
        """Bounds of `of_output` in the output, for outputs of that shape."""

    def __call__(self, risk: EmpiricalRisk, model: Model, query: Example) -> Float[Array, "*c"]:
        x, y = query
        return self.of_output(risk.loss, risk.output(model, x), y)

    def check(self, risk: EmpiricalRisk, model: Model, queries: PyTree[Array]) -> None:
        check_queries(risk, model, queries)

    def constants(self, risk: EmpiricalRisk, model: Model) -> MeasurementConstants:
        return self.bounds(risk.loss, risk.output_struct(model))


def check_class(class_: int | None, logits: Array | jax.ShapeDtypeStruct) -> None:
    """A class is `None` (all of them) or an index of the logits."""
    C = logits.shape[0]
    if class_ is not None and not 0 <= class_ < C:
        raise ValueError(
            f"`class_` must lie in 0…{C - 1}: the model has {C} classes; got {class_}."
        )


def select_class(values: Float[Array, " C"], class_: Int[Scalar, ""] | None) -> Float[Array, "*c"]:
    return values if class_ is None else values[class_]


def softmax_logits(loss: AbstractLoss, output: Array) -> Float[Array, " C"]:
    return jnp.asarray(loss.class_logits(output))
