r"""Guaranteed bounds on vᵀH⁻¹v from a few products with H, whose spectrum starts at a known number.

**Why.** Lanczos from v gives Q (orthonormal rows) and the tridiagonal T = QHQᵀ. With H = Σ λᵢuᵢuᵢᵀ,

    vᵀH⁻¹v = ‖v‖² ∫ 1/x dμ(x),   μ = Σ (uᵢᵀv/‖v‖)² at λᵢ,

and T holds the recurrence of μ's orthogonal polynomials. Gauss quadrature, ‖v‖² e₁ᵀT⁻¹e₁, has nodes
t₁ … t_k, T's eigenvalues, and the remainder

    f⁽²ᵏ⁾(ξ)/(2k)! ∫ Π(x − tⱼ)² dμ.

Gauss–Radau adds one node at a prescribed a ≤ λ_min, by one more row of T, and its remainder is

    f⁽²ᵏ⁺¹⁾(ξ)/(2k+1)! ∫ (x − a) Π(x − tⱼ)² dμ,   tⱼ the nodes other than a.

For f = 1/x and x > 0 the even derivatives are positive and the odd ones negative, and x − a ≥ 0 on the
spectrum: Gauss lies below the integral and Gauss–Radau above, whatever H and v are.

**Without cancellation.** The difference of the two rules is ‖v‖² βₖ² (T⁻¹)₁ₖ²/s, where

    s = a + βₖ² eₖᵀ[(T − a)⁻¹ − T⁻¹]eₖ = a (1 + βₖ² Σⱼ uⱼₖ²/(θⱼ(θⱼ − a))),   T = Σ θⱼuⱼuⱼᵀ,

a sum of positive terms. The conjugate-gradient residual after k steps is ±‖v‖ βₖ (T⁻¹)₁ₖ q_{k+1}, so
the same line reads q_{k+1}ᵀH⁻¹q_{k+1} ≤ 1/s ≤ 1/a.

**In floating point.** With full reorthogonalisation the computed T and Q belong to a matrix H + E with
‖E‖ ≤ η, η a small multiple of eps‖H‖. From H + E − η ≼ H ≼ H + E + η follow bounds for H itself: Gauss
with T + η below, Gauss–Radau with T − η and the node a = lower − 2η above. η is at least 64 eps times
the largest ‖Hq‖ seen, or the `scale` given.

**Source:** Golub & Meurant, *Matrices, Moments and Quadrature with Applications* (2010); Meurant &
Tichý, "On computing quadrature-based bounds for the A-norm of the error in conjugate gradients",
Numer. Algorithms 62 (2013).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from .._linalg import dot

# Multiples of the machine epsilon, of the scale of H, which one product and one Lanczos step may err by.
_PRODUCT = 64
_BREAKDOWN = 32


class Solve(NamedTuple):
    """An approximate solution of Hx = v: `x`, the product `Hx`, `leftover`, an upper bound of
    (v − Hx)ᵀH⁻¹(v − Hx), and `eta`: a computed product errs by at most eta‖x‖."""

    x: Float[Array, " P"]
    Hx: Float[Array, " P"]
    leftover: Float[Array, ""]
    eta: Float[Array, ""]


def lanczos(
    matvec: Callable, v: Float[Array, " P"], steps: int
) -> tuple[Float[Array, "steps P"], Float[Array, " steps"], Float[Array, " steps"]]:
    """`steps` Lanczos steps with H from v, reorthogonalised in full.

    HQᵀ = QᵀT + β_k q_{k+1}e_kᵀ, T symmetric and tridiagonal.

    **Returns:** `(Q, alpha, beta)`: Q [steps, P] with orthonormal rows, the first v/‖v‖; T's diagonal;
    β₁ … β_k, of which `beta[:-1]` lies beside T's diagonal and the last is the residual coefficient.
    Where the Krylov space ends early, β is 0 there, further rows of Q are 0 and further entries of
    alpha repeat the first, so that T's eigenvalues stay within H's range. v = 0 gives zeros.

    **Cost:** `steps` products, 4·steps²·P for the reorthogonalisation, (steps + 1)·P numbers.
    """
    run = _lanczos(matvec, v, steps)
    return run.basis[:-1], run.alpha, run.beta


def ritz_values(matvec: Callable, like: Float[Array, " P"], steps: int) -> Float[Array, " k"]:
    """T's eigenvalues after min(`steps`, P) Lanczos steps from a random vector of `like`'s shape, in
    increasing order: within H's spectrum, the first and the last soon near its ends."""
    start = jr.normal(jr.key(0), like.shape, like.dtype)
    _, alpha, beta = lanczos(matvec, start, min(steps, like.size))
    return jnp.linalg.eigvalsh(_tridiagonal(alpha, beta))


def quadrature(
    alpha: Float[Array, " k"],
    beta: Float[Array, " k"],
    norm: Float[Array, ""],
    lower,
    *,
    scale: float | Array = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Bounds (Gauss, Gauss–Radau) with Gauss ≤ vᵀH⁻¹v ≤ Gauss–Radau, H symmetric positive definite.

    `alpha`, `beta` from `lanczos(matvec, v, k)`, `norm` = ‖v‖, `lower` a number 0 < lower ≤ λ_min(H):
    the upper bound is as true as that. Equal, to rounding, where the Krylov space ended. The upper bound
    never exceeds ‖v‖²/lower; it is infinite, and the lower one 0, where T itself has an eigenvalue
    below `lower` and so refutes it.

    `scale`: ‖H‖₂, or an estimate, where T may not show it (v in an invariant subspace of small
    eigenvalues, say, whose products still carry the rounding of the whole H). The larger of it and
    T's largest eigenvalue sets the rounding margin, which is all that it affects.
    """
    theta, u = _spectrum(alpha, beta, norm)
    eta = _PRODUCT * jnp.finfo(alpha.dtype).eps * jnp.maximum(jnp.max(jnp.abs(theta)), scale)
    below = jnp.sum(jnp.square(u[0]) / (theta + eta))
    radau = jnp.sum(jnp.square(u[0]) / (theta - eta)) + (
        jnp.square(beta[-1] * jnp.sum(u[0] * u[-1] / (theta - eta)))
        / _schur(theta, u, beta[-1], lower, eta)
    )
    # Below 2η the prescribed node would not be positive: only the crude bound is left.
    above = jnp.where(lower <= 2 * eta, 1 / lower, jnp.minimum(radau, 1 / lower))
    refuted = theta[0] - lower + eta <= 0
    square = jnp.square(norm)
    return (
        jnp.where(refuted, 0, square * below),
        jnp.where(refuted & (norm > 0), jnp.inf, square * above * _round_up(alpha.dtype)),
    )


def krylov(
    matvec: Callable,
    start: Float[Array, " P"],
    v: Float[Array, " P"],
    steps: int,
    lower,
    *,
    scale: float | Array = 0.0,
) -> Solve:
    """`start`, an approximate solution of Hx = v, improved by k conjugate-gradient steps, with a bound.

    With ρ₀ = v − H·start and `steps` Lanczos steps from it, x = start + QᵀT⁻¹e₁‖ρ₀‖, which minimises
    (v − Hx)ᵀH⁻¹(v − Hx) over start + span Q. Hx is one product with the final x, not read off the
    recurrence: the recurrence's residual goes on shrinking where the true one stalls. That residual r
    is split along q_{k+1}, r = cq_{k+1} + δ (exact arithmetic: δ = 0), and

        √leftover = |c|/√s + (‖δ‖ + rounding)/√lower,   at most (‖r‖ + rounding)/√lower,

    with s of this module's head, is the Gauss–Radau minus the Gauss rule of ρ₀ᵀH⁻¹ρ₀ plus rounding.
    It holds for the `Hx` returned and for the true product alike, given 0 < lower ≤ λ_min(H) and
    products that err by less than 64 eps times the largest ‖Hq‖ seen on the basis or `scale`, as in
    `quadrature`, whichever is larger. It is infinite where T refutes `lower`.

    **Cost:** steps + 2 products.
    """
    rest = v - matvec(start)
    norm = jnp.linalg.norm(rest)
    run = _lanczos(matvec, rest, steps)
    theta, u = _spectrum(run.alpha, run.beta, norm)
    coefficients = norm * dot(u, u[0] / theta)
    x = start + dot(coefficients, run.basis[:-1])
    product = matvec(x)
    residual = v - product

    eps = jnp.finfo(v.dtype).eps
    eta = _PRODUCT * eps * jnp.maximum(run.scale, scale) + 2 * run.asymmetry
    s = jnp.where(lower <= 2 * eta, lower, _schur(theta, u, run.beta[-1], lower, eta))
    along = dot(run.basis[-1], residual)
    across = jnp.linalg.norm(residual - along * run.basis[-1])
    length = jnp.linalg.norm
    rounding = eta * length(x) + _PRODUCT * eps * (length(product) + length(v))
    split = jnp.abs(along) / jnp.sqrt(s) + (across + rounding) / jnp.sqrt(lower)
    root = jnp.minimum(split, (length(residual) + rounding) / jnp.sqrt(lower))
    refuted = (theta[0] - lower + eta <= 0) & (norm > 0)
    leftover = jnp.where(refuted, jnp.inf, jnp.square(root) * _round_up(v.dtype))
    return Solve(x, product, leftover, eta)


class _Run(NamedTuple):
    """`lanczos` with q_{k+1} as the last row of `basis`, the largest ‖Hq‖, and the Frobenius norm of
    what QHQᵀ has outside T (zero but for rounding, if H is symmetric)."""

    basis: Float[Array, "steps+1 P"]
    alpha: Float[Array, " steps"]
    beta: Float[Array, " steps"]
    scale: Float[Array, ""]
    asymmetry: Float[Array, ""]


def _lanczos(matvec: Callable, v: Float[Array, " P"], steps: int) -> _Run:
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    basis = jnp.zeros((steps + 1, v.size), v.dtype).at[0].set(_unit(v, jnp.linalg.norm(v)))
    zero = jnp.zeros((), v.dtype)

    def step(carry, i):
        basis, beta_old, scale, asymmetry = carry
        q = basis[i]
        product = matvec(q)
        scale = jnp.maximum(scale, jnp.linalg.norm(product))
        # Classical Gram–Schmidt twice is orthogonal to rounding (Giraud, Langou & Rozložník 2005).
        parts = dot(basis, product)
        once = product - dot(parts, basis)
        twice = once - dot(dot(basis, once), basis)
        beta = jnp.linalg.norm(twice)
        # A second pass that removes much of what the first left was given only rounding: the space is
        # exhausted. So it is where the rest is smaller than the error of a product.
        exhausted = beta < 0.5 * jnp.linalg.norm(once)
        exhausted = exhausted | (beta <= _BREAKDOWN * jnp.finfo(v.dtype).eps * scale)
        beta = jnp.where(exhausted, 0, beta)
        expected = jnp.where(jnp.arange(steps + 1) == i - 1, beta_old, 0)
        stray = jnp.where(jnp.arange(steps + 1) < i, parts - expected, 0)
        basis = basis.at[i + 1].set(jnp.where(exhausted, 0, _unit(twice, beta)))
        alive = jnp.any(q != 0)
        carry = basis, beta, scale, jnp.hypot(asymmetry, jnp.linalg.norm(stray))
        return carry, (parts[i], beta, alive)

    carry, (alpha, beta, alive) = jax.lax.scan(step, (basis, zero, zero, zero), jnp.arange(steps))
    basis, _, scale, asymmetry = carry
    return _Run(basis, jnp.where(alive, alpha, alpha[0]), beta, scale, asymmetry)


def _spectrum(alpha, beta, norm) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """T's eigenvalues and eigenvectors (columns); those of the identity for v = 0."""
    return jnp.linalg.eigh(_tridiagonal(jnp.where(norm == 0, 1, alpha), beta))


def _tridiagonal(alpha, beta) -> Float[Array, "k k"]:
    off = jnp.diag(beta[:-1], 1)
    return jnp.diag(alpha) + off + off.T


def _schur(theta, u, beta, lower, eta) -> Float[Array, ""]:
    """s of the module's head for T − η and the node lower − 2η: q_{k+1}ᵀH⁻¹q_{k+1} ≤ 1/s."""
    node = lower - 2 * eta
    # (θ − η) − (lower − 2η), kept positive by η where a Ritz value is λ_min = lower.
    weights = jnp.square(u[-1]) / ((theta - eta) * (theta - lower + eta))
    return node * (1 + jnp.square(beta) * jnp.sum(weights))


def _unit(v: Float[Array, " P"], norm: Float[Array, ""]) -> Float[Array, " P"]:
    return jnp.where(norm == 0, 0, v / jnp.where(norm == 0, 1, norm))


def _round_up(dtype) -> float:
    return 1 + _PRODUCT * float(jnp.finfo(dtype).eps)
