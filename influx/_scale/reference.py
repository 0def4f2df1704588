import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .base import AbstractScale, nan_ratio


class Reference(AbstractScale):
    """Divides by I(r; m), with its sign, of a reference point r or of a group of them (their sum).

    A score of 1 is "as much as the reference, in the same direction". Where I(r; m) = 0 the whole row
    of that measurement is undefined and stands as NaN.
    """

    points: Int[np.ndarray, " r"]

    def __init__(self, points):
        chosen = np.atleast_1d(np.asarray(points))
        if chosen.ndim != 1 or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(
                "`Reference` takes the index of a training point, or several, got "
                f"{points!r}. For instance `Reference(3)` or `Reference([3, 7])`."
            )
        self.points = chosen

    def divide(self, scores, indices, quadratic, columns):
        reference = jnp.sum(columns(jnp.asarray(self.points)), axis=1, keepdims=True)
        return nan_ratio(scores, reference)

    def undefined(self, n):
        return jnp.zeros((n,), bool)

    def check(self, n):
        if self.points.min() < 0 or self.points.max() >= n:
            raise ValueError(
                f"`Reference` points run from 0 to {n - 1}, got {self.points.tolist()}."
            )
