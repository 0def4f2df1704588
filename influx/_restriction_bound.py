"""How far a restricted influence can be from the full one, without a solve in the full space (P9)."""

from collections.abc import Callable
from numbers import Integral

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._curvature import AbstractFactored
from ._custom_types import Scores, Where
from ._effect import Derivative
from ._gradients import example_gradient
from ._influence import Influence, influence
from ._misc import chunk_length, chunked_map, dot, ravel
from ._response import implicit_response
from ._restriction import restrict
from ._scale import Unscaled
from ._solver.bounds import Solve, krylov, lanczos


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

    x̃ starts at the restricted solution (0, H_ψψ⁻¹v_ψ), for which the bracket is I_ψ, and takes `steps`
    Krylov steps from its residual; Gauss–Radau quadrature, with min l2 + λ as the known lower end of
    the spectrum, bounds what is left from above. Guaranteed in exact arithmetic; the quadrature adds a
    rounding term.

    **Arguments:**

    - `f`: influence in the full space, with a curvature that is never solved with here: for instance
      `influence(risk, model, CG(GaussNewton()))`, which forms nothing. For networks use GaussNewton.
    - `where`: the kept parameters, as in `restrict`.
    - `steps`: products with H per query and per training point: the dial between cost and width.
      The enclosure narrows fast once they pass about √κ, κ the condition number; for a small network
      with l2 = 1e-2 expect to need 12 to 18.

    **Returns:** a [`RestrictionBound`][]. Unit and sign are those of influence.

    **Raises:** `ValueError` unless min l2 + λ > 0, `steps` ≥ 1, and `f` is plain.

    **Cost:** (m + n)·(steps + 2) products with H, and one small dense factorization.

    **Source:** P9 of this project; the quadrature is Golub & Meurant, "Matrices, Moments and
    Quadrature with Applications" (2010).
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"`steps` must be a whole number, at least 1, got {steps!r}.")
    plain = isinstance(f.scale, Unscaled) and isinstance(f.effect, Derivative) and f.masks is None
    if not plain:
        raise ValueError(
            "`restriction_bound` encloses plain influence: use `f` without `relative`, `removal` or "
            "`groups`."
        )
    low = _lower_end(f)
    if not low > 0:
        raise ValueError(
            "The bound needs a known lower end of the spectrum: l2 > 0 on every parameter, or a "
            f"positive damping; min l2 + damping is {low:.3g}."
        )
    curvature = implicit_response(f.response, "restriction_bound").curvature
    curvature = getattr(curvature, "curvature", curvature)
    f.measurement.check(f.risk, f.model, queries)
    small, part = restrict(f.risk, f.model, where)
    inner = influence(small, part, curvature)
    low = jnp.asarray(low, f.risk.weights.dtype)
    rows, solved = jax.block_until_ready(_query_side(f, inner, where, queries, steps, low))
    return _bound(f, inner, where, rows, solved, steps, low)


def _lower_end(f: Influence) -> float:
    """min l2 + λ, below every eigenvalue of a positive semi-definite curvature + l2 + λI."""
    damping = implicit_response(f.response, "restriction_bound").curvature.damping
    return float(jnp.min(f.risk.l2_vector(f.model))) + float(damping)


def _solver(f: Influence, inner: Influence, where: Where, steps: int, low: Array) -> Callable:
    """v ↦ x̃, Hx̃ and the bound on the leftover form, from the restricted solution on."""
    theta, _ = ravel(f.model)
    kept = _kept(f, where)
    factored = implicit_response(f.response, "restriction_bound").factored
    part = implicit_response(inner.response, "restriction_bound").factored
    scale = _norm(factored, theta)

    def solve(v):
        start = jnp.zeros_like(v).at[kept].set(part.solve(v[kept]))
        return krylov(factored.matvec, start, v, steps, low, scale=scale)

    return solve


def _chunk(f: Influence, steps: int) -> int:
    theta, _ = ravel(f.model)
    return chunk_length((4 * steps + 16) * theta.size, theta.dtype)


# Queries and training points are two programs. In one, XLA runs their batched eigendecompositions at
# the same time, each waits for a free thread, and on a machine of two cores both wait for ever.
@eqx.filter_jit
def _query_side(f: Influence, inner: Influence, where: Where, queries, steps: int, low: Array):
    """The rows v = ∇m [m, c, P] and what `_solver` answers for them."""
    solve = _solver(f, inner, where, steps, low)

    def one(query):
        rows = f.measurement.gradient(f.risk, f.model, query)
        return rows, jax.vmap(solve)(jnp.atleast_2d(rows))

    return chunked_map(one, queries, _chunk(f, steps))


@eqx.filter_jit
def _bound(
    f: Influence, inner: Influence, where: Where, rows, solved: Solve, steps: int, low: Array
):
    theta, _ = ravel(f.model)
    solve = _solver(f, inner, where, steps, low)
    v, x = (a.reshape(-1, theta.size) for a in (rows, solved.x))
    leftover = solved.leftover.reshape(-1)

    def columns(example):
        g = example_gradient(f.risk, f.model, example)
        other = solve(g)
        error = jnp.sqrt(leftover * other.leftover)
        return -(dot(x, g) + dot(v, other.x) - dot(x, other.Hx)), error

    full, error = chunked_map(columns, f.risk.data, _chunk(f, steps))
    restricted = inner.response.pull(v[:, _kept(f, where)])
    shaped = lambda scores: scores.reshape(*rows.shape[:-1], f.risk.n)
    full, error, restricted = shaped(full.T), shaped(error.T), shaped(restricted)
    distance = jnp.abs(full - restricted)
    return RestrictionBound(
        restricted,
        jnp.maximum(distance - error, 0),
        distance + error,
        full - error,
        full + error,
    )


def _norm(factored: AbstractFactored, theta: Float[Array, " P"]) -> Float[Array, ""]:
    """An estimate of ‖H‖₂: the largest Ritz value of ten Lanczos steps."""
    start = jr.normal(jr.key(0), theta.shape, theta.dtype)
    _, alpha, beta = lanczos(factored.matvec, start, min(10, theta.size))
    off = jnp.diag(beta[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + off + off.T)[-1]


def _kept(f: Influence, where: Where) -> Int[Array, " p"]:
    """Where the kept parameters stand in the full flat vector."""
    leaves, structure = jtu.tree_flatten(eqx.filter(f.model, eqx.is_inexact_array))
    ends = np.cumsum([leaf.size for leaf in leaves])
    places = [np.arange(end - leaf.size, end) for end, leaf in zip(ends, leaves)]
    chosen = jtu.tree_leaves(where(jtu.tree_unflatten(structure, places)))
    return jnp.concatenate([jnp.asarray(place) for place in chosen])
