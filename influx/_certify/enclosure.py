"""Enclosures of the parameters that retraining would give (P11)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._curvature import GaussNewton
from .._curvature.ggn import gauss_newton_matrix
from .._curvature.newton_step import output_terms
from .._gradients import risk_gradient
from .._influence import Influence
from .._linalg import dot, ravel
from .._loss import LossConstants
from .._response import Without, implicit_response
from .affine import affine_jacobian, output_sizes, output_struct
from .ball import slope_scale


def loss_constants(f: Influence) -> LossConstants:
    return f.risk.loss.constants(output_struct(f))


def enclosures(f: Influence, tier: int, refine: Array, renormalise: bool) -> Callable:
    """The map from points i to θ̃ᵢ − θ̂ [k, P] and rᵢ ≥ ‖θ̂₋ᵢ − θ̃ᵢ‖ [k] (P11)."""
    without = Without(f.response, refine, renormalise)
    # Twice where the weights grow: their growth is a sum of n terms as well.
    grown = jnp.max(without.growth) * (2 if renormalise else 1)
    rounding, mu = gradient_rounding(f, grown), jnp.min(f.risk.l2_vector(f.model))
    of_norm = _norm_rounding(f)

    def evaluated(indices):
        steps, _ = without.steps(indices, f.response.displace(indices))
        return steps, jnp.linalg.norm(without.slopes(indices, steps), axis=1)

    stepped = evaluated if tier == 1 else _bounded_slopes(f)

    def enclose(indices):
        steps, slope = stepped(indices)
        return steps, (of_norm * slope + rounding(steps)) / mu

    return enclose


def _bounded_slopes(f: Influence) -> Callable:
    """θ̃ᵢ − θ̂, and ‖∇J₋ᵢ(θ̂) + H₋ᵢΔᵢ‖ + ½ Δᵢᵀ [(t/n) Σ wⱼ‖Aⱼ‖AⱼᵀAⱼ] Δᵢ ≥ ‖∇J₋ᵢ(θ̃ᵢ)‖: no pass over
    the data per point, where H fits as a matrix."""
    jacobian = affine_jacobian(f)
    share = loss_constants(f).third * f.risk.weights / f.risk.n
    energy = jacobian.energy(share * jacobian.norms())
    gradient, product = risk_gradient(f.risk, f.model), _hessian_products(f)
    rounding = _product_rounding(f)

    def slopes(indices):
        steps = f.response.displace(indices)
        terms = output_terms(f.risk, f.model, jacobian, indices)
        of_point = terms.jacobian.pull(terms.slope(terms.jacobian.push_each(steps)))
        linear = jnp.linalg.norm(gradient[None] + product(steps) - of_point, axis=1)
        return steps, linear + rounding(steps) + 0.5 * energy(steps)

    return slopes


def _hessian_products(f: Influence) -> Callable:
    """∇²J(θ̂) times rows, of the affine problem: by its matrix where `f` holds one of that size."""
    if implicit_response(f.response, "certify").factored.matrix is None:
        return jax.vmap(GaussNewton().matvec(f.risk, f.model))
    matrix = gauss_newton_matrix(f.risk, f.model, jacobian=affine_jacobian(f))
    return lambda rows: dot(rows, matrix)


def _product_rounding(f: Influence) -> Callable:
    """The map from steps to bounds on the error of computed H₋ᵢΔᵢ, in norm.

    Each number of (1/n) Σ wⱼ AⱼᵀSⱼAⱼ is a sum of terms, as is each of its product with Δ; Sⱼ = ∇²ℓⱼ is
    wrong by the rounding inside it, and by what the third derivative makes of an output's error.
    """
    constants, jacobian = loss_constants(f), affine_jacobian(f)
    theta, _ = ravel(f.model)
    sizes, unit = output_sizes(f, jacobian, f.risk.data[0]), jnp.finfo(theta.dtype).eps / 2
    _, bends = _at_outputs(f)
    error = sizes.error(jnp.zeros_like(unit))
    carried = jnp.where(error > 0, constants.third * error, 0)  # t may be ∞
    inside = (64 + jacobian.outputs) * unit * constants.smoothness + carried
    terms = jacobian.summed + 4 * theta.size + jacobian.outputs + 64
    squares = jnp.square(sizes.norms)
    l2 = jnp.max(f.risk.l2_vector(f.model))
    relative = terms * unit * (f.risk.mean(squares * bends) + l2) + f.risk.mean(squares * inside)
    return lambda steps: relative * jnp.linalg.norm(steps, axis=1)


def gradient_rounding(f: Influence, growth: Array | float = 1.0) -> Callable:
    """The map from steps to bounds on the rounding error of a computed ∇J₋ᵢ(θ̃ᵢ), in norm.

    Outputs are wrong by what `OutputSizes` says, and that enters ∂ℓⱼ through βⱼ, the loss's smoothness
    as far as outputs have moved from those at θ̂: the least of the global bound and ‖∇²ℓⱼ(θ̂)‖ + t·(that
    distance), t bounding the third derivative. It is small for points that are fitted. Then a sum of N
    terms is wrong by at most N·u times the sum of their sizes. The terms are l2·θ and those of the n
    example gradients, of sizes at most ‖|Aⱼ|‖(‖∂ℓⱼ(θ̂)‖ + βⱼ‖Aⱼ‖‖θ̃ᵢ − θ̂‖): n of them for a head, else
    nK, for XLA may sum over examples and outputs in one go.
    Inside the loss there are sums over the K outputs and a few roundings more, for which 64 stands,
    relative to its steepest slope. `growth` is what the weights have grown by at most.
    """
    theta, _ = ravel(f.model)
    constants, jacobian = loss_constants(f), affine_jacobian(f)
    sizes, each = output_sizes(f, jacobian, f.risk.data[0]), jacobian.outputs
    norms = sizes.norms
    unit = jnp.finfo(theta.dtype).eps / 2

    slopes, bends = _at_outputs(f)
    inside = (64 + each) * unit * slope_scale(constants.lipschitz) * f.risk.mean(norms)
    l2 = jnp.max(f.risk.l2_vector(f.model))

    def bound(step):
        moved = jnp.linalg.norm(step)
        length = jnp.linalg.norm(theta) + moved
        error = sizes.error(moved)
        away = norms * moved + 2 * error  # both outputs are computed, here and at θ̂
        rise = jnp.where(away > 0, constants.third * away, 0)  # t may be ∞
        smooth = jnp.minimum(constants.smoothness, bends + rise)
        summed = f.risk.mean(norms * (slopes + smooth * norms * moved))
        of_sum = (jacobian.summed + sizes.terms) * unit * summed
        carried = f.risk.mean(norms * smooth * error)
        return growth * (of_sum + carried + inside) + 4 * unit * l2 * length

    return jax.vmap(bound)


def _at_outputs(f: Influence) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """‖∂ℓⱼ‖ and a bound on ‖∂²ℓⱼ‖ in the outputs, at θ̂."""

    def one(z):
        output = f.risk.output(f.model, z[0])
        slope = jax.grad(lambda o: f.risk.loss(o, z[1]))(output)
        hessian = f.risk.loss.output_hessian(output, z[1])
        return jnp.linalg.norm(slope.reshape(-1)), jnp.linalg.norm(hessian)

    slopes, bends = jax.vmap(one)(f.risk.data)
    rounding = (64 + affine_jacobian(f).outputs) * jnp.finfo(bends.dtype).eps / 2
    return slopes, bends + rounding * loss_constants(f).smoothness


def _norm_rounding(f: Influence) -> float:
    """How much longer than computed a vector of P numbers may be."""
    theta, _ = ravel(f.model)
    return 1 + (theta.size + 16) * float(jnp.finfo(theta.dtype).eps)


def settled_radius(f: Influence) -> Float[Array, ""]:
    """r₀ ≥ ‖θ̂* − θ̂‖, θ̂* the exact minimiser that the model stands for."""
    theta, _ = ravel(f.model)
    slope = _norm_rounding(f) * jnp.linalg.norm(risk_gradient(f.risk, f.model))
    rounding = gradient_rounding(f)(jnp.zeros((1, theta.size), theta.dtype))[0]
    return (slope + rounding) / jnp.min(f.risk.l2_vector(f.model))
