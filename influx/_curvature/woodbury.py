"""One Newton step without a point (theory: P10)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._custom_types import Model
from .._gradients import example_gradient, risk_gradient
from .._jacobian import AbstractJacobian
from .._misc import chunk_length, chunked_map, dot, einsum, ravel, take
from .._risk import EmpiricalRisk
from .base import AbstractFactored


class OutputTerms(eqx.Module):
    """What k points contribute to J through their outputs: (wᵢ/n) Aᵢᵀ rᵢ to ∇J and (wᵢ/n) AᵢᵀSᵢAᵢ
    to its Gauss–Newton matrix."""

    jacobian: AbstractJacobian
    residual: Float[Array, "k K"]
    hessian: Float[Array, "k K K"]
    share: Float[Array, " k"]


@eqx.filter_jit
def output_terms(
    risk: EmpiricalRisk, model: Model, jacobian: AbstractJacobian, indices: Int[Array, " k"]
) -> OutputTerms:
    """rᵢ = ∇ℓᵢ and Sᵢ = ∇²ℓᵢ in the flattened output, Aᵢ, and wᵢ/n, of some training points."""

    def at_output(example):
        x, y = example
        output = risk.output(model, x)
        flat = lambda o: risk.loss(o.reshape(output.shape), y)
        return jax.grad(flat)(output.reshape(-1)), risk.loss.output_hessian(output, y)

    residual, hessian = jax.vmap(at_output)(take(risk.data, indices))
    share = risk.weights[indices] / risk.n
    return OutputTerms(jacobian.take(indices), residual, hessian, share)


def woodbury_steps(
    terms: OutputTerms, factored: AbstractFactored, gradient: Float[Array, " P"]
) -> Float[Array, "k P"]:
    r"""−H₋ᵢ⁻¹∇J₋ᵢ(θ̂) for each point, with H₋ᵢ = H − (wᵢ/n) AᵢᵀSᵢAᵢ and ∇J₋ᵢ = ∇J − (wᵢ/n) Aᵢᵀrᵢ.

    By Woodbury's identity, with δ₀ = −H⁻¹∇J and Kᵢ = AᵢH⁻¹Aᵢᵀ,

        Δθᵢ = δ₀ + (wᵢ/n) H⁻¹Aᵢᵀ (I − (wᵢ/n) SᵢKᵢ)⁻¹ (rᵢ + SᵢAᵢδ₀).

    For scalar squared loss (S = 1) the middle factor is 1/(1 − hᵢ), hᵢ = (wᵢ/n)Kᵢ the leverage.
    """
    k, K = terms.residual.shape
    delta = -factored.solve(gradient)
    pushed = terms.residual + einsum("kab,kb->ka", terms.hessian, terms.jacobian.push(delta))

    def middle(inner: Float[Array, "k K K"]) -> Float[Array, "k K"]:
        curved = terms.share[:, None, None] * einsum("kab,kbc->kac", terms.hessian, inner)
        matrix = jnp.eye(K, dtype=gradient.dtype)[None] - curved
        return terms.share[:, None] * jnp.linalg.solve(matrix, pushed[..., None])[..., 0]

    if gradient.size <= k * K:  # H⁻¹ itself costs fewer solves than the rows of all Aᵢ
        inverse = jax.vmap(factored.solve)(jnp.eye(gradient.size, dtype=gradient.dtype))
        u = middle(terms.jacobian.sandwich(inverse))
        return delta[None] + dot(terms.jacobian.pull(u), inverse)
    rows = terms.jacobian.dense()  # [k, K, P]
    solved = jax.lax.map(jax.vmap(factored.solve), rows)
    u = middle(einsum("kap,kbp->kab", rows, solved))
    return delta[None] + einsum("ka,kap->kp", u, solved)


@eqx.filter_jit
def steps_without(
    risk: EmpiricalRisk, model: Model, factored: AbstractFactored, terms: OutputTerms
) -> Float[Array, "k P"]:
    """`woodbury_steps` at the risk's own gradient."""
    return woodbury_steps(terms, factored, risk_gradient(risk, model))


@eqx.filter_jit
def hessian_steps_without(
    risk: EmpiricalRisk, model: Model, factored: AbstractFactored, indices: Int[Array, " k"]
) -> Float[Array, "k P"]:
    """−H₋ᵢ⁻¹∇J₋ᵢ(θ̂) where ∇²ℓᵢ has no low rank: one solve with H₋ᵢ = H − (wᵢ/n)∇²ℓᵢ per point."""
    theta, rebuild = ravel(model)
    gradient = risk_gradient(risk, model)

    def one(i):
        example, share = take(risk.data, i), risk.weights[i] / risk.n
        grad = lambda t: example_gradient(risk, rebuild(t), example)
        lost = lambda v: -share * jax.jvp(grad, (theta,), (v,))[1]
        return -factored.perturbed(lost).solve(gradient - share * grad(theta))

    return chunked_map(one, indices, chunk_length(3 * theta.size**2, theta.dtype))
