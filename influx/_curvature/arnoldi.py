from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_whole
from .._linalg import dot, ravel
from .base import AbstractCurvature, check_wrapped
from .subspace import (
    check_fits,
    data_product,
    diagonal_plus_low_rank,
    factor_low_rank,
    galerkin,
    required_key,
)

# Multiples of the machine epsilon, of the norm, that a product may err by.
_BREAKDOWN = 32


class Arnoldi(AbstractCurvature):
    r"""The leading eigenvectors of a curvature by Arnoldi's iteration, and a mean for all others:

        H ≈ V diag(φ) Vᵀ + c (I − VVᵀ) + diag(l2),

    V the `rank` Ritz vectors of largest |φ| that `steps` steps find for the data part F = H − diag(l2).
    With one l2 for all parameters, θ = φ + l2 and κ = c + l2, the inverse is

        V diag(1/(θ + λ)) Vᵀ + (I − VVᵀ)/(κ + λ).

    **The complement.** c is the mean of the other eigenvalues weighted by their own size, Σφ²/Σ|φ|,
    as the Ritz values that were not kept tell it. Gradients of a model that fits have F for their second
    moment, and a score's mean squared error is then Σ φ²(1/(φ+δ) − 1/(c+δ))², δ = l2 + λ; for δ ≪ φ this
    c is its minimiser. (On scores of small classifiers it was within 20 % of the best c; c = 0, or the
    plain mean, is several times further off, and overstates influence.) `complement=False` is the
    published method: Vᵀ(VᵀHV + λI)⁻¹V, which **drops** what gradients have outside V, and with it all
    influence through smaller eigenvalues.

    **Dropped:** how the eigenvalues outside V differ from each other. Exact where rank = P, or all
    eigenvalues of F but `rank` are equal and not negative (0, say) and `steps` exceeds `rank`. Without
    complement exact where rank = P only.

    **Arguments:**

    - `curvature`: what to approximate; only its products are used, and its damping is the only one.
    - `rank`: the number of Ritz vectors kept, at most P.
    - `key`: a random key for the starting vector.
    - `steps`: products with the curvature, by default 2·rank + 20, and at most P.
    - `complement`: whether what lies outside V is kept. Without it `matvec`, `lower_end` and Newton
      steps are those of `Projected`, with V in place of random directions.

    **Raises:** `ValueError` where the approximation is indefinite or singular, naming the eigenvalue;
    `rank` exceeds P; `steps` is below `rank` or exceeds P; or there is no key.

    **Cost:** `steps` products and O(P steps²) once (full reorthogonalisation), P·steps numbers; then
    O(P rank) memory and a solve.

    **Source:** Schioppa, Zablotskaia, Vilar & Sokolov, "Scaling Up Influence Functions",
    arXiv:2112.03052; Arnoldi, "The principle of minimized iterations in the solution of the matrix
    eigenvalue problem" (1951).
    """

    curvature: AbstractCurvature
    rank: int = eqx.field(static=True)
    key: PRNGKeyArray
    steps: int | None = eqx.field(static=True)
    complement: bool = eqx.field(static=True)

    def __init__(
        self,
        curvature: AbstractCurvature,
        rank: int,
        *,
        key: PRNGKeyArray | None = None,
        steps: int | None = None,
        complement: bool = True,
    ):
        self.curvature = check_wrapped(curvature)
        self.rank, self.key = check_whole("rank", rank), required_key("Arnoldi", key)
        self.steps = None if steps is None else check_whole("steps", steps)
        if steps is not None and steps < rank:
            raise ValueError(
                f"`steps` must be at least the rank, {rank}, got {steps}. About twice as many find the "
                "leading eigenvectors; None chooses 2·rank + 20."
            )
        if not isinstance(complement, bool):
            raise ValueError(f"`complement` must be True, or False to drop it, got {complement!r}.")
        self.complement = complement

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        if not self.complement:
            return self.curvature.matvec(risk, model)
        found = self._leading(risk, model)
        diagonal = risk.l2_vector(model) + found.rest
        return diagonal_plus_low_rank(diagonal, found.basis, found.values - found.rest)

    def lower_end(self, risk, model):
        if not self.complement:
            return self.curvature.lower_end(risk, model)
        found = self._leading(risk, model)
        least = jnp.minimum(jnp.min(found.values), found.rest)
        return float(least + jnp.min(risk.l2_vector(model))) + float(self.damping)

    def factor(self, risk, model):
        found = self._leading(risk, model)
        if not self.complement:
            return galerkin(self.curvature, risk, model, found.basis)
        damping = jnp.asarray(self.damping, found.basis.dtype)
        diagonal = risk.l2_vector(model) + found.rest + damping
        return factor_low_rank(diagonal, found.basis, found.values - found.rest)

    def newton_steps(self, risk, model, factored, jacobian):
        if self.complement:
            return None  # what one point adds to the approximation is not what it adds to H
        return self.curvature.newton_steps(risk, model, factored, jacobian)

    def _leading(self, risk, model) -> "_Leading":
        check_fits("rank", self.rank, model)
        default = min(2 * self.rank + 20, ravel(model)[0].size)
        steps = default if self.steps is None else self.steps
        check_fits("steps", steps, model)
        return _leading(self.curvature, self.rank, steps, self.key, risk, model)


class _Leading(NamedTuple):
    basis: Float[Array, "k P"]
    values: Float[Array, " k"]
    rest: Float[Array, ""]


@eqx.filter_jit
def _leading(curvature, rank, steps, key, risk, model) -> _Leading:
    """The leading Ritz pairs of F, and what stands for its other eigenvalues."""
    theta, _ = ravel(model)
    product = data_product(curvature, risk, model)
    start = jr.normal(key, theta.shape, theta.dtype)
    basis, matrix = _arnoldi(product, start, steps, key)
    values, vectors = jnp.linalg.eigh(matrix)
    order = jnp.argsort(-jnp.abs(values))
    values, vectors = values[order], vectors[:, order]
    # A Ritz value's share of the spectrum is the square of its part in the random start.
    size, share = jnp.abs(values[rank:]), jnp.square(vectors[0, rank:])
    total = jnp.sum(share * size)
    mean = jnp.sum(share * jnp.square(size)) / jnp.where(total > 0, total, 1)
    # Where no Ritz value is left, the least one that was kept stands for the rest.
    rest = mean if steps > rank else jnp.abs(values[rank - 1])
    return _Leading(dot(vectors[:, :rank].T, basis), values[:rank], rest)


def _arnoldi(
    matvec: Callable[[Array], Array], start: Float[Array, " P"], steps: int, key: PRNGKeyArray
) -> tuple[Float[Array, "steps P"], Float[Array, "steps steps"]]:
    """An orthonormal basis Q of Krylov spaces of a symmetric matrix F, and QFQᵀ.

    Where a Krylov space ends, as it does where F has an eigenvalue twice, the next one starts from a
    random vector, so that P steps always span everything.
    """
    across = lambda basis, v: v - dot(dot(basis, v), basis)
    unit = lambda v: v / jnp.linalg.norm(v)

    def step(carry, i):
        basis, scale = carry
        product = matvec(basis[i])
        scale = jnp.maximum(scale, jnp.linalg.norm(product))
        # Classical Gram–Schmidt twice is orthogonal to rounding (Giraud, Langou & Rozložník 2005).
        once = across(basis, product)
        twice = across(basis, once)
        left = jnp.linalg.norm(twice)
        # A second pass that removes much of what the first left was given only rounding.
        ended = (left < 0.5 * jnp.linalg.norm(once)) | (
            left <= _BREAKDOWN * jnp.finfo(start.dtype).eps * scale
        )

        def fresh():
            v = jr.normal(jr.fold_in(key, i), start.shape, start.dtype)
            return across(basis, across(basis, v))

        following = unit(jax.lax.cond(ended, fresh, lambda: twice))
        basis = basis.at[i + 1].set(following, mode="drop")
        return (basis, scale), dot(basis, product)

    basis = jnp.zeros((steps, start.size), start.dtype).at[0].set(unit(start))
    carry = basis, jnp.zeros((), start.dtype)
    (basis, _), rows = jax.lax.scan(step, carry, jnp.arange(steps))
    lower = jnp.tril(rows)  # above the diagonal a row is 0 or what the next one repeats
    return basis, lower + jnp.tril(lower, -1).T
