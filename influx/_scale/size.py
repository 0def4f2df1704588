import jax.numpy as jnp
from jaxtyping import Array, Float

from .._measurement import Loss
from .._response import AbstractResponse
from .base import AbstractScale, nan_ratio


class BySize(AbstractScale):
    """Divides by one size per training point, [n]: √sᵢ, ‖H⁻¹gᵢ‖ or sᵢ, with sᵢ = gᵢᵀH⁻¹gᵢ."""

    size: Float[Array, " n"]

    def divide(self, scores, indices, quadratic, columns):
        size = self.size if indices is None else self.size[indices]
        return nan_ratio(scores, size[None, :])

    def undefined(self, n):
        return self.size == 0

    def check(self, n):
        pass


def sizes(response: AbstractResponse, kind: str) -> Float[Array, " n"]:
    """√sᵢ for "loss", ‖H⁻¹gᵢ‖ for "parameters", sᵢ for "self"."""
    squares = response.own(Loss(), power=2 if kind == "parameters" else 1)[:, 0]
    return squares if kind == "self" else jnp.sqrt(squares)
