import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Columns = Callable[[Int[Array, " r"]], Float[Array, "k r"]]


class AbstractScale(eqx.Module):
    """What relative influence divides by. NaN stands where it is 0/0, and `undefined` says where."""

    @abc.abstractmethod
    def divide(
        self,
        scores: Float[Array, "k b"],
        indices: Int[Array, " b"] | None,
        quadratic: Callable[[], Float[Array, " k"]],
        columns: Columns,
    ) -> Float[Array, "k b"]:
        """Plain scores, at the training points `indices` (`None`: all), divided by the scale.

        `quadratic()` is ∇mᵀH⁻¹∇m of each row; `columns(r)` the plain scores of other points.
        """

    @abc.abstractmethod
    def undefined(self, n: int) -> Bool[Array, " n"]:
        """Training points for which the relative influence on every measurement is 0/0."""

    @abc.abstractmethod
    def check(self, n: int) -> None:
        """Raise `ValueError` where the scale does not fit n training points."""


class Unscaled(AbstractScale):
    """Divides by nothing."""

    def divide(self, scores, indices, quadratic, columns):
        return scores

    def undefined(self, n):
        return jnp.zeros((n,), bool)

    def check(self, n):
        pass


def nan_ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN (never infinity) where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, jnp.nan, numerator / jnp.where(zero, 1, denominator))
