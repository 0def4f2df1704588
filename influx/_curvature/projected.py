import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._checks import check_whole
from .base import AbstractCurvature, AbstractWrapped, check_wrapped
from .subspace import check_fits, galerkin, random_subspace, required_key


class Projected(AbstractWrapped):
    r"""A curvature solved with in a random subspace of `dim` directions, the rows of R:

        I = −(R∇m)ᵀ (R(H + λI)Rᵀ)⁻¹ (Rgᵢ),   that is,   H⁻¹ ≈ Rᵀ(R(H + λI)Rᵀ)⁻¹R.

    It depends on R through the span of its rows alone: Gaussian, Rademacher or orthonormal rows of the
    same span give the same scores. R is Gaussian, made orthonormal, so that λ is that of every other
    curvature (TRAK's is added to RHRᵀ for an R of its own scale) and no digits are lost in RRᵀ.

    **Dropped:** what gradients have outside the subspace: its influence is taken to be 0. So
    self-influence is never larger than the full one (P9d), and grows with `dim` for the same key: to
    about dim/P of it for a curvature without structure. Exact for dim = P. In `diagnose` the residual of
    a solve is what was dropped.

    The inverse has a null space. `matvec`, also of the factored curvature, is the wrapped curvature's,
    so that residuals, certificates and bounds are against the full H: `solve(matvec(v)) == v` holds for
    v in the span of R's rows, and `R @ matvec(solve(v)) == R @ v` for all v. Newton steps without a
    point are those within the subspace: R(H − AᵀSA)Rᵀ = RHRᵀ − (ARᵀ)ᵀS(ARᵀ), Woodbury's identity again.

    **Arguments:**

    - `curvature`: what to project; only its products are used, and its damping is the only one.
    - `dim`: the dimension of the subspace, at most P.
    - `key`: a random key for R.

    **Raises:** `ValueError` where R(H + λI)Rᵀ is indefinite or singular, `dim` exceeds P or there is no
    key.

    **Cost:** `dim` products and O(P dim²) once, O(P dim) memory and a solve. `BlockDiagonal` around it
    projects layer by layer.

    **Source:** Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186; Choe et al.,
    "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions" (LoGra),
    arXiv:2405.13954.
    """

    dim: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, curvature: AbstractCurvature, dim: int, *, key: PRNGKeyArray | None = None):
        self.curvature = check_wrapped(curvature)
        self.dim, self.key = check_whole("dim", dim), required_key("Projected", key)

    def factor(self, risk, model):
        check_fits("dim", self.dim, model)
        rows = random_subspace(self.key, self.dim, model)
        return galerkin(self.curvature, risk, model, rows)
