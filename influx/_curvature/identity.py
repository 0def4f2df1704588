import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .._checks import check_damping
from .._custom_types import Scalar
from .._linalg import ravel
from .base import AbstractCurvature, Factored


class Identity(AbstractCurvature):
    """H = I: influence becomes −∇mᵀgᵢ/(1 + λ), the gradient dot product (Pruthi et al.,
    "Estimating Training Data Influence by Tracing Gradient Descent", arXiv:2002.08484). A baseline:
    it does not contain l2, and its unit is not that of a removal."""

    damping: Scalar = eqx.field(default=0.0, converter=check_damping)

    def matvec(self, risk, model):
        return lambda v: v

    def factor(self, risk, model):
        theta, _ = ravel(model)
        diagonal = jnp.ones_like(theta) * (1 + jnp.asarray(self.damping, theta.dtype))
        return Factored(lx.DiagonalLinearOperator(diagonal), lx.Diagonal())

    def lower_end(self, risk, model):
        return 1.0 + float(self.damping)

    def newton_steps(self, risk, model, factored, jacobian):
        return None
