import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractScale, nan_ratio


class Cosine(AbstractScale):
    """Divides by √(sᵢ · ∇mᵀH⁻¹∇m): the cosine of −∇m and gᵢ in the metric H⁻¹, in [−1, 1] (P5)."""

    root: Float[Array, " n"]

    def divide(self, scores, indices, quadratic, columns):
        root = self.root if indices is None else self.root[indices]
        return nan_ratio(scores, jnp.sqrt(quadratic())[:, None] * root[None, :])

    def undefined(self, n):
        return self.root == 0

    def check(self, n):
        pass
