import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._checks import check_whole, is_concrete
from .._linalg import dot, products
from .base import AbstractCurvature, check_wrapped, least_penalty
from .subspace import (
    check_finite,
    check_fits,
    data_product,
    diagonal_plus_low_rank,
    factor_low_rank,
    is_negative,
    random_subspace,
    required_key,
)

_SHIFT = 10


class Nystrom(AbstractCurvature):
    r"""The data part F = H − diag(l2) of a curvature by its randomized Nyström approximation:

        F̂ = (FΩ)(ΩᵀFΩ)⁺(FΩ)ᵀ,   H ≈ F̂ + diag(l2),   Ω a random basis of `rank` directions,

    solved with by Woodbury's identity, which takes an l2 that differs between parameters.

    **Dropped:** F − F̂, which is positive semi-definite: directions that Ω missed keep l2 + λ alone. So
    the inverse is never too small, and self-influence never understated: far too large where `rank` is
    below the number of eigenvalues of F above l2 + λ (at most twice the effective dimension that
    `diagnose` prints). It then takes more damping, or `Arnoldi`, which puts a curvature in place of
    what it leaves out. Exact where F has rank ≤ `rank`; a larger rank with the same key only adds to F̂.

    **Arguments:**

    - `curvature`: what to approximate; only its products are used, and its damping is the only one.
    - `rank`: the number of directions, at most P.
    - `key`: a random key for Ω.

    **Raises:** `ValueError` where F has a negative eigenvalue (as a Hessian's away from affine outputs),
    l2 + λ is 0 for a parameter, `rank` exceeds P or there is no key.

    **Cost:** `rank` products and O(P rank²) once, O(P rank) memory and a solve.

    **Source:** Frangella, Tropp & Udell, "Randomized Nyström Preconditioning", arXiv:2110.02820; Hataya
    & Yamada, "Nyström Method for Accurate and Scalable Implicit Differentiation", arXiv:2302.09726.
    """

    curvature: AbstractCurvature
    rank: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, curvature: AbstractCurvature, rank: int, *, key: PRNGKeyArray | None = None):
        self.curvature = check_wrapped(curvature)
        self.rank, self.key = check_whole("rank", rank), required_key("Nystrom", key)

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        basis, weights = self._parts(risk, model)
        return diagonal_plus_low_rank(risk.l2_vector(model), basis, weights)

    def lower_end(self, risk, model):
        return least_penalty(risk, model, self.damping)

    def factor(self, risk, model):
        basis, weights = self._parts(risk, model)
        diagonal = risk.l2_vector(model) + jnp.asarray(self.damping, basis.dtype)
        return factor_low_rank(diagonal, basis, weights)

    def newton_steps(self, risk, model, factored, jacobian):
        return None  # what one point adds to F̂ is not of the form that it adds to F

    def _parts(self, risk, model):
        """Eigenvectors (rows) and eigenvalues of F̂."""
        check_fits("rank", self.rank, model)
        basis, weights, seen = _nystrom(self.curvature, self.rank, self.key, risk, model)
        if is_concrete(seen):
            _check_semidefinite(seen)
        return basis, weights


@eqx.filter_jit
def _nystrom(curvature, rank, key, risk, model):
    """F̂ = B Bᵀ − ν with B = (F + ν)Ω (Ωᵀ(F + ν)Ω)^{-1/2}: the shift ν keeps the digits of the small
    eigenvalues. The root is that of an eigendecomposition, which a Cholesky factor cannot replace where
    rounding exceeds ν, and which shows negative eigenvalues."""
    omega = random_subspace(key, rank, model)
    sketch = products(data_product(curvature, risk, model), omega)
    shift = _SHIFT * jnp.finfo(sketch.dtype).eps * jnp.linalg.norm(sketch)
    core = dot(omega, sketch.T)
    seen, rotation = jnp.linalg.eigh(0.5 * (core + core.T))
    inverse_root = 1 / jnp.sqrt(jnp.maximum(seen + shift, jnp.where(shift == 0, 1, shift)))
    rows = inverse_root[:, None] * dot(rotation.T, sketch + shift * omega)
    _, sigma, basis = jnp.linalg.svd(rows, full_matrices=False)
    return basis, jnp.maximum(jnp.square(sigma) - shift, 0), seen


def _check_semidefinite(seen) -> None:
    check_finite(seen)
    if is_negative(seen[0], jnp.max(jnp.abs(seen))):
        raise ValueError(
            f"Without l2 the curvature has an eigenvalue of at most {float(seen[0]):.3g}, and the "
            "Nyström approximation is of positive semi-definite matrices. Use Nystrom(GaussNewton(), "
            "...) with a convex loss, Nystrom(Fisher(), ...), or Arnoldi(...), which takes either sign."
        )
