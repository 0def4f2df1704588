"""One Newton step without a point (P10)."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._chunks import chunk_length, chunked_map, map_blocks, take
from .._custom_types import Model
from .._gradients import example_gradient, risk_gradient
from .._jacobian import AbstractJacobian
from .._linalg import dot, einsum, ravel
from .._risk import EmpiricalRisk
from .base import AbstractFactored, AbstractPerturbable


class AbstractNewtonSteps(eqx.Module):
    """The Newton steps without single points, what they share made ready once."""

    @abc.abstractmethod
    def steps(
        self,
        risk: EmpiricalRisk,
        model: Model,
        factored: AbstractFactored,
        jacobian: AbstractJacobian | None,
        indices: Int[Array, " k"],
    ) -> Float[Array, "k P"]:
        """Δθᵢ = −(H₋ᵢ + λI)⁻¹∇J₋ᵢ(θ̂)."""


# A leverage that is 1 to so many units of rounding is 1.
_ROUNDING = 1000


class OutputTerms(eqx.Module):
    """What k points contribute to J through their outputs: (wᵢ/n) Aᵢᵀ rᵢ to ∇J and (wᵢ/n) AᵢᵀSᵢAᵢ
    to its Gauss–Newton matrix."""

    jacobian: AbstractJacobian
    residual: Float[Array, "k K"]
    hessian: Float[Array, "k K K"]
    share: Float[Array, " k"]

    def slope(self, moved: Float[Array, "k K"]) -> Float[Array, "k K"]:
        """(wᵢ/n)(rᵢ + Sᵢ movedᵢ): the linearised slope in the output that has moved."""
        product = einsum("kab,kb->ka", self.hessian, moved)
        return self.share[:, None] * (self.residual + product)

    def middle(self, leverage: Float[Array, "k K K"], moved: Float[Array, "k K"]):
        """uᵢ = (I − (wᵢ/n) SᵢKᵢ)⁻¹ (wᵢ/n)(rᵢ + SᵢAᵢδ₀), `leverage` being Kᵢ and `moved` Aᵢδ₀."""
        product = self.share[:, None, None] * einsum("kab,kbc->kac", self.hessian, leverage)
        left = 1 - jax.lax.stop_gradient(self.most(leverage))
        # What is left of the curvature may be rounding, or none. Said before the solve, so that it waits
        # for the eigenvalues: of two batched LAPACK calls at once, each may hold the last of XLA's
        # threads while it waits for another, and neither ever returns (jaxlib 0.10.2).
        positive = left > _ROUNDING * jnp.finfo(left.dtype).eps
        product = jnp.where(positive[:, None, None], product, jnp.nan)
        matrix = jnp.eye(moved.shape[1], dtype=moved.dtype)[None] - product
        return jnp.linalg.solve(matrix, self.slope(moved)[..., None])[..., 0]

    def most(self, leverage: Float[Array, "k K K"]) -> Float[Array, " k"]:
        """The largest eigenvalue of (wᵢ/n) SᵢKᵢ: H₋ᵢ ≻ 0, given H ≻ 0, where it is below 1."""
        values, basis = jnp.linalg.eigh(0.5 * (leverage + leverage.swapaxes(1, 2)))
        root = basis * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]  # K = root rootᵀ
        inner = einsum("kba,kbc,kcd->kad", root, self.hessian, root)
        return jnp.max(jnp.linalg.eigvalsh(self.share[:, None, None] * inner), axis=1)


def output_terms(
    risk: EmpiricalRisk, model: Model, jacobian: AbstractJacobian | None, indices: Int[Array, " k"]
) -> OutputTerms:
    """rᵢ = ∇ℓᵢ and Sᵢ = ∇²ℓᵢ in the flattened output, Aᵢ, and wᵢ/n, of some training points."""
    assert jacobian is not None  # `woodbury` is built with one

    def at_output(example):
        x, y = example
        output = risk.output(model, x)
        flat = lambda o: risk.loss(o.reshape(output.shape), y)
        return jax.grad(flat)(output.reshape(-1)), risk.loss.output_hessian(output, y)

    residual, hessian = jax.vmap(at_output)(take(risk.data, indices))
    share = risk.weights[indices] / risk.n
    return OutputTerms(jacobian.take(indices), residual, hessian, share)


class Woodbury(AbstractNewtonSteps):
    r"""Steps through the output's low rank: H₋ᵢ = H − (wᵢ/n) AᵢᵀSᵢAᵢ and ∇J₋ᵢ = ∇J − (wᵢ/n) Aᵢᵀrᵢ.

    By Woodbury's identity, with δ₀ = −H⁻¹∇J and the leverage Kᵢ = AᵢH⁻¹Aᵢᵀ,

        Δθᵢ = δ₀ + H⁻¹Aᵢᵀuᵢ,    uᵢ = (I − (wᵢ/n) SᵢKᵢ)⁻¹ (wᵢ/n)(rᵢ + SᵢAᵢδ₀).

    For scalar squared loss (S = 1) the middle factor is 1/(1 − hᵢ), hᵢ = (wᵢ/n)Kᵢ. Where H₋ᵢ is not
    positive definite, or singular to rounding (hᵢ = 1), there is no step: NaN. K solves a point.
    """

    def steps(self, risk, model, factored, jacobian, indices):
        assert jacobian is not None  # `woodbury` is built with one
        gradient = risk_gradient(risk, model)
        delta = -factored.solve(gradient)
        solve = jax.vmap(factored.solve)

        def block(places):
            terms = output_terms(risk, model, jacobian, indices[places])
            rows = terms.jacobian.dense()  # [b, K, P]
            solved = jax.lax.map(solve, rows)
            leverage = einsum("kap,kbp->kab", rows, solved)
            u = terms.middle(leverage, terms.jacobian.push(delta))
            return delta[None] + einsum("ka,kap->kp", u, solved)

        items = (2 * jacobian.outputs + 2) * gradient.size
        return map_blocks(block, indices.size, chunk_length(items, gradient.dtype))


class HeldWoodbury(AbstractNewtonSteps):
    r"""As `Woodbury`, with M = (H + λI)⁻¹ held as a matrix, and with it the leverages Kᵢ of a linear
    head: all steps are then one matrix product. `columns[i]` is Meᵢ, as solved for.
    """

    columns: Float[Array, "P P"]
    leverage: Float[Array, "n K K"] | None
    delta: Float[Array, " P"]

    def steps(self, risk, model, factored, jacobian, indices):
        terms = output_terms(risk, model, jacobian, indices)
        if self.leverage is None:
            leverage = terms.jacobian.sandwich(self.columns.T)
        else:
            leverage = self.leverage[indices]
        u = terms.middle(leverage, terms.jacobian.push(self.delta))
        # A barrier, or XLA repeats the product in every kernel that it fuses the sum into.
        moved = jax.lax.optimization_barrier(dot(terms.jacobian.pull(u), self.columns))
        return self.delta[None] + moved


class Perturbed(AbstractNewtonSteps):
    """Steps where ∇²ℓᵢ has no low rank: one solve with H₋ᵢ = H − (wᵢ/n)∇²ℓᵢ a point. That H₋ᵢ ≻ 0 is
    seen by Cholesky factors; iterative solvers that need it may not notice."""

    def steps(self, risk, model, factored, jacobian, indices):
        assert isinstance(factored, AbstractPerturbable)  # `Hessian.newton_steps` has seen to it
        theta, rebuild = ravel(model)
        gradient = risk_gradient(risk, model)

        def one(i):
            example, share = take(risk.data, i), risk.weights[i] / risk.n
            grad = lambda t: example_gradient(risk, rebuild(t), example)
            lost = lambda v: -share * jax.jvp(grad, (theta,), (v,))[1]
            slope = gradient - share * grad(theta)
            solved, done = factored.perturbed(lost).try_solve(slope)
            return -eqx.error_if(
                solved,
                ~done | ~jnp.all(jnp.isfinite(solved)),
                "Without one of the training points the Hessian is not positive definite, or the solve "
                "with it did not converge: there is no Newton step to take. Use GaussNewton(), which "
                'stays positive definite, more `damping=`, or `removal(f, "first-order")`.',
            )

        return chunked_map(one, indices, chunk_length(3 * theta.size**2, theta.dtype))


def woodbury(
    risk: EmpiricalRisk,
    model: Model,
    factored: AbstractFactored,
    jacobian: AbstractJacobian,
) -> AbstractNewtonSteps:
    """`HeldWoodbury` where the curvature is a matrix and P solves are fewer than all rows Aᵢ need."""
    theta, _ = ravel(model)
    rows = jacobian.examples * jacobian.outputs
    if factored.matrix is None or theta.size > rows:
        return Woodbury()
    return _hold(risk, model, factored, jacobian)


@eqx.filter_jit
def _hold(risk, model, factored, jacobian) -> HeldWoodbury:
    gradient = risk_gradient(risk, model)
    eye = jnp.eye(gradient.size, dtype=gradient.dtype)
    columns = jax.vmap(factored.solve)(eye)
    fits = chunk_length(jacobian.outputs**2, eye.dtype) >= jacobian.examples
    leverage = jacobian.sandwich(columns.T) if jacobian.closed_form and fits else None
    return HeldWoodbury(columns, leverage, -factored.solve(gradient))
