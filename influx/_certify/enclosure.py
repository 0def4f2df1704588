"""Enclosures of the parameters that retraining would give (theory: P11)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._gradients import risk_gradient
from .._influence import Influence
from .._jacobian import AbstractJacobian
from .._linalg import ravel
from .._loss import LossConstants
from .._response import implicit_response


def affine_jacobian(f: Influence) -> AbstractJacobian:
    jacobian = implicit_response(f.response, "certify").jacobian
    assert jacobian is not None  # `certify` has seen to it
    return jacobian


def output_struct(f: Influence) -> jax.ShapeDtypeStruct:
    output = implicit_response(f.response, "certify").output
    assert output is not None  # `certify` has seen to it
    return output


def loss_constants(f: Influence) -> LossConstants:
    return f.risk.loss.constants(output_struct(f))


def enclosures(f: Influence, tier: int, refine: int | Array, renormalise: bool) -> Callable:
    """The map from points i to θ̃ᵢ − θ̂ [k, P] and rᵢ ≥ ‖θ̂₋ᵢ − θ̃ᵢ‖ [k] (P11)."""
    growth = _growth(f.risk.weights) if renormalise else jnp.ones_like(f.risk.weights)
    if tier == 2:
        slopes = _bounded_slopes(f)
    else:
        slopes = _evaluated_slopes(f, refine, growth, _drift(f) if renormalise else None)
    # Twice where the weights grow: their growth is a sum of n terms as well.
    grown = jnp.max(growth) * (2 if renormalise else 1)
    rounding, mu = _rounding(f, grown), jnp.min(f.risk.l2_vector(f.model))

    def enclose(indices):
        steps, slope = slopes(indices)
        return steps, (slope + rounding(steps)) / mu

    return enclose


def _growth(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """W/(W − wᵢ): what the other points' weights grow by where the mean is over them alone. The
    others are summed from both ends, since W − wᵢ cancels."""
    before = lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), jnp.cumsum(w)[:-1]])
    others = before(weights) + before(weights[::-1])[::-1]
    return jnp.where(weights > 0, (others + weights) / others, 1)


def _drift(f: Influence) -> Float[Array, " P"]:
    """H⁻¹∇Ω: where the model moves to first order, as the weights of all points grow.

    J₋ᵢ(θ, s·w) has the minimiser of J₋ᵢ(θ, w) − (1 − 1/s) Ω(θ)."""
    theta, _ = ravel(f.model)
    return f.response.solve((f.risk.l2_vector(f.model) * theta)[None])[0]


def _evaluated_slopes(
    f: Influence, refine: int | Array, growth: Array, drift: Array | None
) -> Callable:
    """θ̃ᵢ − θ̂ after `refine` chord steps, and ‖∇J₋ᵢ(θ̃ᵢ)‖."""
    theta, rebuild = ravel(f.model)

    def gradient(i, step):
        weights = growth[i] * f.risk.weights.at[i].set(0)
        return risk_gradient(f.risk, rebuild(theta + step), weights)

    def slopes(indices):
        steps = f.response.displace(indices)
        if drift is not None:
            steps = steps + (1 - 1 / growth[indices])[:, None] * drift[None]
        chord = lambda _, s: s - f.response.solve(jax.vmap(gradient)(indices, s))
        steps = jax.lax.fori_loop(0, refine, chord, steps)
        return steps, jnp.linalg.norm(jax.vmap(gradient)(indices, steps), axis=1)

    return slopes


def _bounded_slopes(f: Influence) -> Callable:
    """θ̃ᵢ − θ̂, and ‖∇J₋ᵢ(θ̂) + H₋ᵢΔᵢ‖ + ½ Δᵢᵀ [(t/n) Σ wⱼ‖Aⱼ‖AⱼᵀAⱼ] Δᵢ ≥ ‖∇J₋ᵢ(θ̃ᵢ)‖: no pass over
    the data per point."""
    jacobian = affine_jacobian(f)
    share = loss_constants(f).third * f.risk.weights / f.risk.n
    energy = jacobian.energy(share * jacobian.norms())

    def slopes(indices):
        steps, linear = f.response.newton_steps(indices)
        return steps, linear + 0.5 * energy(steps)

    return slopes


def _rounding(f: Influence, growth: Array | float = 1.0) -> Callable:
    """The map from steps to bounds on the rounding error of a computed ∇J₋ᵢ(θ̃ᵢ), in norm.

    A sum of N terms is wrong by at most N·u times the sum of their sizes, u the unit roundoff. The
    terms are l2·θ and the n example gradients, of sizes at most ‖Aⱼ‖(‖∂ℓⱼ(θ̂)‖ + βⱼ‖Aⱼ‖‖θ̃ᵢ − θ̂‖), each
    with K products of its own. The outputs Aⱼθ + bⱼ behind ∂ℓⱼ are inner products as well, and their
    error enters through βⱼ, the loss's smoothness as far as they have moved from those at θ̂: the least
    of the global bound and ‖∇²ℓⱼ(θ̂)‖ + t·(that distance), t bounding the third derivative. It is small
    for points that are fitted. Inside the loss there are sums over the K outputs and a few roundings
    more, for which constants stand: 16 for those relative to the outputs, 64 for those relative to its
    steepest slope. `growth` is what the weights have grown by at most.
    """
    theta, _ = ravel(f.model)
    jacobian, constants = affine_jacobian(f), loss_constants(f)
    norms, each = jacobian.norms(), jacobian.outputs
    products, unit = jacobian.length + each + 16, jnp.finfo(theta.dtype).eps / 2

    def at_output(z):
        output = f.risk.output(f.model, z[0])
        slope = jax.grad(lambda o: f.risk.loss(o, z[1]))(output)
        hessian = f.risk.loss.output_hessian(output, z[1])
        return output.reshape(-1), jnp.linalg.norm(slope.reshape(-1)), jnp.linalg.norm(hessian)

    outputs, slopes, bends = jax.vmap(at_output)(f.risk.data)
    bends = bends + (64 + each) * unit * constants.smoothness
    constant = jnp.linalg.norm(outputs - jacobian.push(theta), axis=1)  # ‖bⱼ‖
    # A loss without a steepest slope is a polynomial of its output: its roundings are relative.
    steepest = jnp.asarray(constants.lipschitz, theta.dtype)
    inside = jnp.where(jnp.isfinite(steepest), steepest, 0) * f.risk.mean(norms)
    l2 = jnp.max(f.risk.l2_vector(f.model))

    def bound(step):
        moved = jnp.linalg.norm(step)
        length = jnp.linalg.norm(theta) + moved
        sizes = norms * length + constant  # of outputs
        away = norms * moved + 2 * products * unit * sizes  # both are computed, here and at θ̂
        rise = jnp.where(away > 0, constants.third * away, 0)  # t may be ∞
        smooth = jnp.minimum(constants.smoothness, bends + rise)
        summed = (f.risk.n + products) * f.risk.mean(norms * (slopes + smooth * norms * moved))
        carried = products * f.risk.mean(norms * smooth * sizes)
        return unit * (growth * (summed + carried + (64 + each) * inside) + 4 * l2 * length)

    return jax.vmap(bound)


def settled_radius(f: Influence) -> Float[Array, ""]:
    """r₀ ≥ ‖θ̂* − θ̂‖, θ̂* the exact minimiser that the model stands for."""
    theta, _ = ravel(f.model)
    slope = jnp.linalg.norm(risk_gradient(f.risk, f.model))
    rounding = _rounding(f)(jnp.zeros((1, theta.size), theta.dtype))[0]
    return (slope + rounding) / jnp.min(f.risk.l2_vector(f.model))
