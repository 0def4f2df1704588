"""One Newton step without a point (P10)."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._chunks import chunk_length, chunked_map, map_blocks, take
from .._custom_types import Model
from .._gradients import example_gradient, risk_gradient
from .._jacobian import AbstractJacobian
from .._linalg import dot, einsum, ravel
from .._risk import EmpiricalRisk
from .._solver.bounds import ritz_values
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


# Rounding units of ‖H‖ below which a curvature is taken for 0.
_ROUNDING = 30
_LANCZOS_STEPS = 10


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

    def middle(
        self,
        leverage: Float[Array, "k K K"],
        moved: Float[Array, "k K"],
        definite: Bool[Array, " k"],
    ) -> Float[Array, "k K"]:
        """uᵢ = (I − (wᵢ/n) SᵢKᵢ)⁻¹ (wᵢ/n)(rᵢ + SᵢAᵢδ₀), `leverage` being Kᵢ and `moved` Aᵢδ₀; NaN where
        not `definite`."""
        product = self.share[:, None, None] * einsum("kab,kbc->kac", self.hessian, leverage)
        # The solve has to wait for the eigenvalues behind `definite`: two batched LAPACK calls at once
        # can deadlock XLA's threads (jaxlib 0.10.2).
        product = jnp.where(definite[:, None, None], product, jnp.nan)
        matrix = jnp.eye(moved.shape[1], dtype=moved.dtype)[None] - product
        return jnp.linalg.solve(matrix, self.slope(moved)[..., None])[..., 0]

    def definite(
        self,
        leverage: Float[Array, "k K K"],
        pull: Callable[[Float[Array, "k K"]], Float[Array, "k P"]],
        curvature: "Measured",
    ) -> Bool[Array, " k"]:
        """Whether H₋ᵢ ≻ 0 beyond the rounding of H, given H ≻ 0; `pull` is x ↦ H⁻¹Aᵢᵀxᵢ.

        With (wᵢ/n) SᵢKᵢx = λx, λ the largest, z = H⁻¹Aᵢᵀx is where least of H's curvature is left:
        zᵀH₋ᵢz = (1 − λ) zᵀHz. It is measured by a product with H, as rounding, or an iterative solve's
        tolerance, may hide behind 1 − λ. Where ‖(wᵢ/n) Sᵢ‖‖Kᵢ‖ ≤ ½ bounds every λ it need not be.
        """
        own, leverage = jax.lax.stop_gradient((self.share[:, None, None] * self.hessian, leverage))
        size = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=(1, 2)))

        def judged():
            most, x = _largest(own, leverage)
            z = pull(x)
            seen = self.jacobian.push_each(z)
            taken = einsum("ka,kab,kb->k", seen, own, seen)
            left = jnp.sum(z * curvature.products(z), axis=1) - taken
            above = left >= curvature.noise * jnp.sum(jnp.square(z), axis=1)
            return clear | ((most < 1) & above)

        clear = size(own) * size(leverage) <= 0.5
        return jax.lax.cond(jnp.all(clear), lambda: clear, judged)


def _largest(own: Float[Array, "k K K"], leverage: Float[Array, "k K K"]):
    """The largest eigenvalue of each (wᵢ/n) SᵢKᵢ, and its eigenvector."""
    values, basis = jnp.linalg.eigh(0.5 * (leverage + leverage.swapaxes(1, 2)))
    root = basis * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]  # K = root rootᵀ
    values, basis = jnp.linalg.eigh(einsum("kba,kbc,kcd->kad", root, own, root))
    return values[:, -1], einsum("kab,kbc,kc->ka", own, root, basis[:, :, -1])


class Measured(eqx.Module):
    """Products with H + λI, and the curvature that is lost in their rounding: 30 eps‖H + λI‖."""

    factored: AbstractFactored
    noise: Float[Array, ""]

    def __init__(self, factored: AbstractFactored, like: Float[Array, " P"]):
        norm = jnp.max(jnp.abs(ritz_values(factored.matvec, like, _LANCZOS_STEPS)))
        self.factored, self.noise = factored, _ROUNDING * jnp.finfo(like.dtype).eps * norm

    def products(self, z: Float[Array, "k P"]) -> Float[Array, "k P"]:
        matrix = self.factored.matrix
        return jax.lax.map(self.factored.matvec, z) if matrix is None else dot(z, matrix)


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
        solve, curvature = jax.vmap(factored.solve), Measured(factored, gradient)

        def block(places):
            terms = output_terms(risk, model, jacobian, indices[places])
            rows = terms.jacobian.dense()  # [b, K, P]
            solved = jax.lax.map(solve, rows)
            leverage = einsum("kap,kbp->kab", rows, solved)
            pull = lambda x: einsum("ka,kap->kp", x, solved)
            definite = terms.definite(leverage, pull, curvature)
            return delta[None] + pull(terms.middle(leverage, terms.jacobian.push(delta), definite))

        items = (2 * jacobian.outputs + 2) * gradient.size
        return map_blocks(block, indices.size, chunk_length(items, gradient.dtype))


class HeldWoodbury(AbstractNewtonSteps):
    r"""As `Woodbury`, with M = (H + λI)⁻¹ held as a matrix, and with it the leverages Kᵢ of a linear
    head: all steps are then one matrix product. `columns[i]` is Meᵢ, as solved for.
    """

    columns: Float[Array, "P P"]
    leverage: Float[Array, "n K K"] | None
    delta: Float[Array, " P"]
    curvature: Measured

    def steps(self, risk, model, factored, jacobian, indices):
        terms = output_terms(risk, model, jacobian, indices)
        if self.leverage is None:
            leverage = terms.jacobian.sandwich(self.columns.T)
        else:
            leverage = self.leverage[indices]
        # A barrier, or XLA repeats the product in every kernel that it fuses the sum into.
        held = jax.lax.optimization_barrier
        pull = lambda u: held(dot(terms.jacobian.pull(u), self.columns))
        definite = terms.definite(leverage, pull, self.curvature)
        return self.delta[None] + pull(
            terms.middle(leverage, terms.jacobian.push(self.delta), definite)
        )


class Perturbed(AbstractNewtonSteps):
    """Steps where ∇²ℓᵢ has no low rank: one solve with H₋ᵢ = H − (wᵢ/n)∇²ℓᵢ a point. NaN where it does
    not succeed, as Cholesky factors see that H₋ᵢ ≻ 0 fails, or takes J₋ᵢ uphill, as iterative solvers
    may where it fails; they need not."""

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
            downhill = done & jnp.all(jnp.isfinite(solved)) & (jnp.vdot(slope, solved) >= 0)
            return jnp.where(downhill, -solved, jnp.nan)

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
    delta = -factored.solve(gradient)
    return HeldWoodbury(columns, leverage, delta, Measured(factored, gradient))
