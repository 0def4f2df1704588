"""What the curvatures have in common that look at few directions only."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key, is_concrete
from .._custom_types import Model
from .._linalg import dot, products, ravel
from .base import (
    AbstractCurvature,
    AbstractFactored,
    AbstractPerturbable,
    Damped,
    factor_matrix,
)

# Multiples of the machine epsilon, of the largest eigenvalue, below which one may be rounding.
_ROUNDING = 32


class DiagonalPlusLowRank(AbstractFactored):
    r"""D + V diag(ω) Vᵀ, D diagonal and positive, solved with by Woodbury's identity.

    With D^{-1/2} V diag(ω) Vᵀ D^{-1/2} = U diag(μ) Uᵀ, the inverse is
    D^{-1/2} (I − U diag(μ/(1 + μ)) Uᵀ) D^{-1/2}.
    """

    diagonal: Float[Array, " P"]
    basis: Float[Array, "k P"]
    weights: Float[Array, " k"]
    modes: Float[Array, "k P"]
    shrinkage: Float[Array, " k"]

    @property
    def matrix(self):
        return None

    @property
    def matvec(self):
        return diagonal_plus_low_rank(self.diagonal, self.basis, self.weights)

    @property
    def solve_flops(self):
        return 4.0 * self.modes.size

    def try_solve(self, v):
        root = jnp.sqrt(self.diagonal)
        scaled = v / root
        rest = scaled - dot(self.shrinkage * dot(self.modes, scaled), self.modes)
        return rest / root, jnp.asarray(True)


def diagonal_plus_low_rank(diagonal, basis, weights) -> Callable[[Array], Array]:
    return lambda v: diagonal * v + dot(weights * dot(basis, v), basis)


def factor_low_rank(
    diagonal: Float[Array, " P"], basis: Float[Array, "k P"], weights: Float[Array, " k"]
) -> DiagonalPlusLowRank:
    """D + V diag(ω) Vᵀ, the rows of `basis` being V's columns.

    **Raises:** `ValueError` where D has an entry that is not positive, or the sum is indefinite.
    """
    if is_concrete((diagonal, weights)):
        _check_positive(diagonal, weights)
    modes, mu, low = _modes(diagonal, basis, weights)
    if is_concrete(mu) and float(jnp.min(weights)) < 0:
        _check_definite(mu, low)
    return DiagonalPlusLowRank(diagonal, basis, weights, modes, mu / (1 + mu))


@eqx.filter_jit
def _modes(diagonal, basis, weights):
    """U, μ, and xᵀ(D + VωVᵀ)x/xᵀx at the x in which 1 + μ is least."""
    root = jnp.sqrt(diagonal)
    columns, upper = jnp.linalg.qr((basis / root[None]).T)
    mu, rotation = jnp.linalg.eigh(dot(upper * weights[None], upper.T))
    modes = dot(columns, rotation).T
    return modes, mu, (1 + mu[0]) / jnp.sum(jnp.square(modes[0] / root))


def _check_positive(diagonal: Float[Array, " P"], weights: Float[Array, " k"]) -> None:
    check_finite(weights)
    low = float(jnp.min(diagonal))
    if not low > _ROUNDING * float(jnp.finfo(weights.dtype).eps) * float(jnp.max(jnp.abs(weights))):
        raise ValueError(
            f"The curvature is singular: outside the directions that were found it is l2 + damping, and "
            f"that is {low:.3g} for some parameters. Use a positive damping, or an l2 > 0 on every "
            "parameter."
        )


def _check_definite(mu: Float[Array, " k"], low: Array) -> None:
    floor = _ROUNDING * float(jnp.finfo(mu.dtype).eps) * (1 + max(float(mu[-1]), 0.0))
    if not 1 + float(mu[0]) > floor:
        raise ValueError(
            f"The curvature is indefinite or singular: it has an eigenvalue of at most "
            f"{float(low):.3g}. Its inverse is no influence. Use damping > {max(-float(low), 0):.2g}, "
            "a positive semi-definite curvature such as GaussNewton(), or train to a minimum."
        )


class Galerkin(AbstractPerturbable):
    """H + λI, solved with on the span of few directions: Qᵀ(Q(H + λI)Qᵀ)⁻¹Q, Q with orthonormal rows.

    `matvec` is the whole H + λI, so that residuals are true ones. The law holds on the span of the rows:
    `solve(matvec(v)) == v` for v in it, `Q @ matvec(solve(v)) == Q @ v` for all v. What of v lies
    outside is dropped.
    """

    damped: Damped
    basis: Float[Array, "k P"]
    inner: AbstractPerturbable

    @property
    def matrix(self):
        return None

    @property
    def inverts(self):
        return self.basis.shape[0] == self.basis.shape[1]

    @property
    def matvec(self):
        return self.damped.matvec

    @property
    def solve_flops(self):
        return 4.0 * self.basis.size + 2.0 * self.basis.shape[0] ** 2

    def try_solve(self, v):
        x, done = self.inner.try_solve(dot(self.basis, v))
        return dot(x, self.basis), done

    def perturbed(self, matvec):
        inside = self.inner.perturbed(lambda u: dot(self.basis, matvec(dot(u, self.basis))))
        return Galerkin(self.damped.plus(matvec), self.basis, inside)


def galerkin(curvature: AbstractCurvature, risk, model, basis: Float[Array, "k P"]) -> Galerkin:
    """The solve on the span of orthonormal rows.

    **Raises:** `ValueError` where Q(H + λI)Qᵀ is indefinite or singular, naming the eigenvalue.
    """
    matrix = _restricted(curvature, risk, model, basis)
    inner = factor_matrix(matrix, curvature.damping)
    return Galerkin(Damped(risk, model, curvature), basis, inner)


@eqx.filter_jit
def _restricted(curvature, risk, model, basis):
    return dot(basis, products(curvature.matvec(risk, model), basis).T)


def data_product(curvature: AbstractCurvature, risk, model) -> Callable[[Array], Array]:
    """The map v ↦ (H − diag(l2)) v."""
    product, l2 = curvature.matvec(risk, model), risk.l2_vector(model)
    return lambda v: product(v) - l2 * v


def random_subspace(key: PRNGKeyArray, count: int, model: Model) -> Float[Array, "k P"]:
    """Orthonormal rows of a uniformly random subspace, which larger ones of the same key contain."""
    theta, _ = ravel(model)
    row = lambda i: jr.normal(jr.fold_in(key, i), theta.shape, theta.dtype)
    columns, _ = jnp.linalg.qr(jax.vmap(row)(jnp.arange(count)).T)
    return columns.T


def check_fits(name: str, count: int, model: Model) -> None:
    P = ravel(model)[0].size
    if count > P:
        raise ValueError(
            f"`{name}` is {count}, and there are {P} parameters. Use {name}={P} at most, or the wrapped "
            "curvature by itself, which is then the cheaper one."
        )


def required_key(owner: str, key: Any) -> PRNGKeyArray:
    if key is None:
        raise ValueError(f"{owner} draws random directions: give it `key=jax.random.key(0)`.")
    return check_key("key", key)


def is_negative(low: Array, high: Array) -> bool:
    """Whether an eigenvalue is below 0 by more than rounding, which is relative to the largest."""
    return bool(low < -1e3 * jnp.finfo(low.dtype).eps * jnp.abs(high))


def check_finite(values: Array) -> None:
    if not bool(jnp.all(jnp.isfinite(values))):
        raise ValueError(
            "A product with the curvature is NaN or infinite: a second derivative of the loss "
            "overflows at this model. Check the loss for log(0), 0/0 or sqrt(0)."
        )
