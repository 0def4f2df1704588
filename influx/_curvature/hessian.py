import equinox as eqx
import jax

from .._checks import check_damping
from .._custom_types import Scalar
from .._jacobian import is_affine
from .._linalg import ravel
from .base import AbstractMatrixCurvature, AbstractPerturbable, hvp_matrix, least_penalty
from .ggn import gauss_newton_matrix
from .newton_step import Perturbed, woodbury


class Hessian(AbstractMatrixCurvature):
    """H = ∇²J(θ̂), exactly.

    Positive definite at a strict minimum only: anywhere else it is refused. For outputs affine in the
    parameters it equals the Gauss–Newton matrix and is built as one.

    **Raises:** `ValueError` where H + λI is not positive definite, naming its eigenvalue and a damping
    that would do, and where this machine cannot hold P² numbers.

    **Cost:** P Hessian-vector products, O(P²) memory, O(P³) to factor; choose it for P up to a few
    thousand.
    """

    damping: Scalar = eqx.field(default=0.0, converter=check_damping)

    def matvec(self, risk, model):
        theta, rebuild = ravel(model)
        gradient = jax.grad(lambda t: risk.objective(rebuild(t)))
        return lambda v: jax.jvp(gradient, (theta,), (v,))[1]

    def matrix(self, risk, model):
        if is_affine(risk, model):
            return gauss_newton_matrix(risk, model)
        return _hessian_matrix(self, risk, model)

    def lower_end(self, risk, model):
        if risk.loss.convex and is_affine(risk, model):
            return least_penalty(risk, model, self.damping)
        return None

    def newton_steps(self, risk, model, factored, jacobian):
        if jacobian is not None and jacobian.affine:
            return woodbury(risk, model, factored, jacobian)
        return Perturbed() if isinstance(factored, AbstractPerturbable) else None


@eqx.filter_jit
def _hessian_matrix(hessian, risk, model):
    theta, _ = ravel(model)
    return hvp_matrix(hessian.matvec(risk, model), theta)
