import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check_damping
from .._chunks import chunk_length, chunked_sum
from .._custom_types import Scalar
from .._jacobian import output_jacobian, require_array_output
from .._linalg import ravel
from .._loss import AbstractLoss
from .base import AbstractMatrixCurvature, least_penalty
from .newton_step import woodbury


class GaussNewton(AbstractMatrixCurvature):
    """(1/n) Σ wᵢ AᵢᵀSᵢAᵢ + diag(l2), with Aᵢ = ∂outputᵢ/∂θ and Sᵢ = ∇²ℓᵢ in the output.

    Positive semi-definite for a loss convex in its output, wherever the model is; equal to the
    Hessian for outputs affine in θ, and where the residuals vanish. Never the empirical Fisher.

    **Raises:** `ValueError` where the matrix is singular (give a damping, or l2 > 0), and where this
    machine cannot hold P² numbers.

    **Cost:** O(nKP²) to build, O(P²) memory, O(P³) to factor.

    **Source:** Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent" (2002); Martens, "New insights and perspectives on the natural gradient method",
    arXiv:1412.1193.
    """

    damping: Scalar = eqx.field(default=0.0, converter=check_damping)

    def matvec(self, risk, model):
        return gauss_newton_matvec(
            risk, model, lambda o, y, t: _hessian_product(risk.loss, o, y, t)
        )

    def matrix(self, risk, model):
        return gauss_newton_matrix(risk, model)

    def cotangents(self, loss: AbstractLoss, output, target, i):
        """Rows u of the output's shape with Σ u uᵀ = Sᵢ, whatever the number i of the example."""
        return loss.hessian_root(output, target)

    def lower_end(self, risk, model):
        return least_penalty(risk, model, self.damping) if risk.loss.convex else None

    def newton_steps(self, risk, model, factored, jacobian):
        if jacobian is None:
            return None
        return woodbury(risk, model, factored, jacobian)


def _hessian_product(loss: AbstractLoss, output, target, moved):
    """∇²ℓ · moved in the output, without the matrix."""
    return jax.jvp(jax.grad(lambda o: loss(o, target)), (output,), (moved,))[1]


def gauss_newton_matvec(risk, model, middle):
    """v ↦ (1/n) Σ wᵢ Aᵢᵀ Sᵢ Aᵢ v + l2 v, by one forward and one reverse product; `middle(output,
    target, t)` is Sᵢ t."""
    require_array_output(risk, model)
    theta, rebuild = ravel(model)
    outputs = lambda t: jax.vmap(lambda x: risk.output(rebuild(t), x))(risk.data[0])
    out, push = jax.linearize(outputs, theta)

    def matvec(v):
        curved = jax.vmap(middle)(out, risk.data[1], push(v))
        weights = (risk.weights / risk.n).reshape(-1, *[1] * (curved.ndim - 1))
        (pulled,) = jax.linear_transpose(push, theta)(weights * curved)
        return pulled + risk.l2_vector(model) * v

    return matvec


def gauss_newton_matrix(risk, model, middle=None, jacobian=None):
    """The dense matrix, `middle(output, target) -> [K, K]` standing for Sᵢ (∇²ℓᵢ by default), and
    `jacobian` that of the outputs."""
    jacobian = output_jacobian(risk, model) if jacobian is None else jacobian
    return _assemble(risk, model, jacobian, middle or risk.loss.output_hessian)


@eqx.filter_jit
def _assemble(risk, model, jacobian, middle):
    def block(args):
        (x, y), share, places = args
        hessians = jax.vmap(lambda x, y: middle(risk.output(model, x), y))(x, y)
        return jacobian.take(places).gram(share[:, None, None] * hessians)

    examples = risk.data, risk.weights / risk.n, jnp.arange(risk.n)
    chunk = chunk_length(4 * jacobian.outputs**2, risk.weights.dtype)
    return chunked_sum(block, examples, chunk) + jnp.diag(risk.l2_vector(model))
