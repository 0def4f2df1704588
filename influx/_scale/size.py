import jax.numpy as jnp
from jaxtyping import Array, Float

from .._response import AbstractResponse
from .base import AbstractScale, nan_ratio

_SIZES = {
    "loss": lambda _, g, x: jnp.sqrt(jnp.vdot(g, x)),
    "parameters": lambda _, g, x: jnp.linalg.norm(x),
    "self": lambda _, g, x: jnp.vdot(g, x),
}


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
    return response.map_solved(_SIZES[kind])
