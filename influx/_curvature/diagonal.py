import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .._checks import is_concrete
from .._chunks import chunked_map
from .._linalg import at_once, ravel
from .base import AbstractCurvature, Factored, check_wrapped
from .ggn import GaussNewton


class Diagonal(AbstractCurvature):
    """The diagonal of a curvature: P of its products, O(P) memory. Drops every interaction."""

    curvature: AbstractCurvature = eqx.field(default=GaussNewton(), converter=check_wrapped)

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        diagonal = _diagonal(self.curvature, risk, model)
        return lambda v: diagonal * v

    def factor(self, risk, model):
        diagonal = _diagonal(self.curvature, risk, model)
        diagonal = diagonal + jnp.asarray(self.damping, diagonal.dtype)
        low = jnp.min(diagonal)
        if is_concrete(low) and not float(low) > 0:
            raise ValueError(
                f"The diagonal of the curvature has the entry {float(low):.3g}, which is not "
                "positive. Use a positive damping, or an l2 > 0 on every parameter."
            )
        return Factored(lx.DiagonalLinearOperator(diagonal), lx.Diagonal())

    def lower_end(self, risk, model):
        return self.curvature.lower_end(risk, model)

    def newton_steps(self, risk, model, factored, jacobian):
        return None


@eqx.filter_jit
def _diagonal(curvature, risk, model):
    theta, _ = ravel(model)
    matvec = curvature.matvec(risk, model)

    def entry(i):
        unit = jnp.zeros_like(theta).at[i].set(1)
        return matvec(unit)[i]

    return chunked_map(entry, jnp.arange(theta.size), at_once(matvec, theta))
