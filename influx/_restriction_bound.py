"""How far a restricted influence can be from the full one, without a solve in the full space (P9)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._checks import check_whole, require_concrete
from ._chunks import chunk_length, chunked_map
from ._curvature import EKFAC, KFAC, AbstractCurvature, AbstractFactored, Mixture
from ._curvature.base import factor_matrix, hvp_matrix
from ._custom_types import Model, Scores, Where
from ._effect import Derivative
from ._gradients import example_gradient
from ._influence import Influence, check_influence
from ._linalg import dot, ravel
from ._response import Implicit, implicit_response
from ._restriction import restrict, selected
from ._risk import EmpiricalRisk
from ._scale import Unscaled
from ._solver.bounds import Solve, krylov, ritz_values


class RestrictionBound(eqx.Module):
    """`lower` ≤ |I − I_ψ| ≤ `upper` for every pair, and where the full influence lies.

    - `restricted`: I_ψ, the influence in the kept parameters, shaped like `f(queries)`
    - `lower`, `upper`: the enclosure of |I − I_ψ|
    - `full_lower`, `full_upper`: the enclosure of I itself
    """

    restricted: Scores
    lower: Scores
    upper: Scores
    full_lower: Scores
    full_upper: Scores


def restriction_bound(
    f: Influence, where: Where, queries: PyTree[Array], *, steps: int = 6
) -> RestrictionBound:
    r"""Enclose the difference between influence on all parameters and on those `where` selects.

    For any x̃_m ≈ H⁻¹∇m and x̃_g ≈ H⁻¹g with residuals ρ = v − Hx̃,

        I = −(x̃_mᵀg + ∇mᵀx̃_g − x̃_mᵀHx̃_g) − ρ_mᵀH⁻¹ρ_g,   |ρ_mᵀH⁻¹ρ_g| ≤ √(ρ_mᵀH⁻¹ρ_m · ρ_gᵀH⁻¹ρ_g).

    x̃ starts at the restricted solution (0, H_ψψ⁻¹v_ψ), for which the bracket is −I_ψ, and takes `steps`
    Krylov steps from its residual; Gauss–Radau quadrature bounds what is left from above, given a
    number below the spectrum: min l2 + λ for a positive semi-definite curvature, 1 + λ for
    `Identity`. Guaranteed in exact arithmetic; the quadrature adds a rounding term.

    **Arguments:**

    - `f`: influence in the full space, with a curvature that is never solved with here: for instance
      `influence(risk, model, CG(GaussNewton()))`, which forms nothing. For networks use GaussNewton.
    - `where`: the kept parameters, as in `restrict`.
    - `steps`: products with H per query and per training point: the dial between cost and width.
      The enclosure narrows fast once they pass about √κ, κ the condition number; for a small network
      with l2 = 1e-2 expect to need 12 to 18.

    **Returns:** a `RestrictionBound`. Unit and sign are those of influence.

    **Raises:** `ValueError` unless the curvature knows a positive lower end of its spectrum (min l2 + λ
    > 0, and a loss convex in its output), `steps` ≥ 1, and `f` is plain.

    **Cost:** (m + n)·(steps + 2) products with H, and one small dense factorization.

    **Source:** P9 of this project; the quadrature is Golub & Meurant, "Matrices, Moments and
    Quadrature with Applications" (2010).
    """
    check_influence("restriction_bound", f)
    steps = check_whole("steps", steps)
    plain = isinstance(f.scale, Unscaled) and isinstance(f.effect, Derivative) and f.masks is None
    if not plain:
        raise ValueError(
            "`restriction_bound` encloses plain influence: use `f` without `relative`, `removal` or "
            "`groups`."
        )
    response = implicit_response(f.response, "restriction_bound")
    require_concrete("restriction_bound", f)
    _check_parts(response.curvature)
    low = response.curvature.lower_end(f.risk, f.model)
    if low is None or not low > 0:
        raise ValueError(
            "The bound needs a known positive lower end of the spectrum, and that of "
            f"{type(response.curvature).__name__} here is {'not known' if low is None else low}. Use "
            "l2 > 0 on every parameter or a positive damping, and a curvature that is positive "
            "semi-definite wherever the model is: GaussNewton() with a convex loss, or Fisher()."
        )
    f.measurement.check(f.risk, f.model, queries)
    part = _factored_part(response, where)
    kept = selected(f.model, where)
    low = jnp.asarray(low, f.risk.weights.dtype)
    rows, solved = jax.block_until_ready(_query_side(f, part, kept, queries, steps, low))
    return _bound(f, part, kept, rows, solved, steps, low)


def _check_parts(curvature: AbstractCurvature) -> None:
    """The bound needs H_ψψ, which for curvatures built layer by layer is not that of the part."""
    while isinstance(inner := getattr(curvature, "curvature", None), AbstractCurvature):
        curvature = inner
    if isinstance(curvature, KFAC | EKFAC | Mixture):
        raise ValueError(
            f"`restriction_bound` compares a part of a curvature with the whole, and {curvature!r} of a "
            "part of a layer is another approximation, not a part. Use GaussNewton() or Fisher()."
        )


def _factored_part(response: Implicit, where: Where) -> AbstractFactored:
    """H_ψψ + λI, factored densely: the kept parameters are few."""
    small, part = restrict(response.risk, response.model, where)
    matrix = _matrix(response.curvature, small, part)
    return factor_matrix(matrix, response.curvature.damping)


@eqx.filter_jit
def _matrix(curvature: AbstractCurvature, risk: EmpiricalRisk, model: Model):
    return hvp_matrix(curvature.matvec(risk, model), ravel(model)[0])


def _solver(f: Influence, part: AbstractFactored, kept, steps: int, low: Array) -> Callable:
    """v ↦ x̃, Hx̃ and the bound on the leftover form, from the restricted solution on."""
    theta, _ = ravel(f.model)
    matvec = implicit_response(f.response, "restriction_bound").factored.matvec
    scale = ritz_values(matvec, theta, 10)[-1]  # about ‖H‖₂

    def solve(v):
        start = jnp.zeros_like(v).at[kept].set(part.solve(v[kept]))
        return krylov(matvec, start, v, steps, low, scale=scale)

    return solve


def _chunk(f: Influence, steps: int) -> int:
    theta, _ = ravel(f.model)
    return chunk_length((4 * steps + 16) * theta.size, theta.dtype)


# Queries and training points are two programs. In one, XLA runs their batched eigendecompositions at
# the same time, each waits for a free thread, and on a machine of two cores both wait for ever.
@eqx.filter_jit
def _query_side(f: Influence, part: AbstractFactored, kept, queries, steps: int, low: Array):
    """The rows v = ∇m [m, c, P] and what `_solver` answers for them."""
    solve = _solver(f, part, kept, steps, low)

    def one(query):
        rows = f.measurement.gradient(f.risk, f.model, query)
        return rows, jax.vmap(solve)(jnp.atleast_2d(rows))

    return chunked_map(one, queries, _chunk(f, steps))


@eqx.filter_jit
def _bound(f: Influence, part: AbstractFactored, kept, rows, solved: Solve, steps: int, low: Array):
    theta, _ = ravel(f.model)
    solve = _solver(f, part, kept, steps, low)
    v, x = (a.reshape(-1, theta.size) for a in (rows, solved.x))
    norm, eps = lambda a: jnp.linalg.norm(a, axis=-1), jnp.finfo(theta.dtype).eps
    scale = jnp.max(solved.eta) / eps
    leftover = solved.leftover.reshape(-1)

    def columns(example):
        g = example_gradient(f.risk, f.model, example)
        other = solve(g)
        full = -(dot(x, g) + dot(v, other.x) - dot(x, other.Hx))
        small = part.solve(g[kept])
        restricted = -dot(v[:, kept], small)
        lengths = norm(x) * (norm(g) + norm(other.Hx)) + norm(v) * norm(other.x)
        rounding = other.eta * norm(x) * norm(other.x) + theta.size * eps * lengths
        # Cholesky errs by a multiple of eps times the condition number.
        of_restricted = kept.size * eps * scale / low * norm(v[:, kept]) * norm(small)
        return full, restricted, jnp.sqrt(leftover * other.leftover) + rounding, of_restricted

    parts = chunked_map(columns, f.risk.data, _chunk(f, steps))
    full, restricted, error, extra = (a.T.reshape(*rows.shape[:-1], f.risk.n) for a in parts)
    distance = jnp.abs(full - restricted)
    return RestrictionBound(
        restricted,
        jnp.maximum(distance - error - extra, 0),
        distance + error + extra,
        full - error,
        full + error,
    )
