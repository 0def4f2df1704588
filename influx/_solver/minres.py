"""Minimal residuals: solves with symmetric matrices that may be indefinite or singular."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._linalg import dot
from .checks import check_limits, check_symmetric, refuse_options

# A residual is a null vector of A where ‖Ar‖ is at most this power of the machine epsilon, in units of
# ‖A‖‖r‖: lost orthogonality leaves 1e-9 or so of it in float64.
_NULL = 0.5
# Multiples of the machine epsilon that Ax may lose in a recurrence: well above one rounding, since
# the errors of its search directions grow with the condition number.
_LOST = 1e4


class MINRES(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    """Solves Ax = b for symmetric A, which may be indefinite, or singular with b in its range.

    The k-th iterate minimises ‖b − Ax‖₂ over the Krylov space of A and b, by Lanczos
    tridiagonalisation and one Givens rotation a step: one product with A and O(P) memory. The
    residual of the recurrence drifts from the true one, so it is computed anew where the recurrence
    ends, and the solve is continued from there until the true one meets the tolerance or no longer
    halves. For singular A the solution is the one of least norm. Rounding grows with the square of the
    condition number (of the nonzero spectrum): above about 1e8 in float64 expect `stagnation`.

    **Arguments:**

    - `rtol`, `atol`: a solve ends at rms(b − Ax) ≤ atol + rtol·rms(b) (root mean squares).
    - `max_steps`: products with A inside the recurrence; default 10·P.

    **Results:** `breakdown` where Ax = b has no solution (b leaves the range of A, to working
    precision: the residual is then a null vector of A); `stagnation` where rounding keeps the true
    residual above the tolerance; `max_steps_reached`; `stats["num_steps"]` counts the steps. There are
    no options. Derivatives through a solve are those of a nonsingular A, as under `lineax.CG`.

    **Raises:** `ValueError` for an operator that is not square, symmetric and real, and for options.

    **Source:** Paige & Saunders, "Solution of sparse indefinite systems of linear equations", SIAM
    J. Numer. Anal. 12 (1975).
    """

    rtol: float
    atol: float
    max_steps: int | None = None

    def __check_init__(self):
        check_limits(self.rtol, self.atol, self.max_steps)

    def init(self, operator, options):
        refuse_options("MINRES", options)
        leaves, structure = jtu.tree_flatten(operator.in_structure())
        others, other_structure = jtu.tree_flatten(operator.out_structure())
        shapes = lambda parts: [(x.shape, x.dtype) for x in parts]
        if structure != other_structure or shapes(leaves) != shapes(others):
            raise ValueError("MINRES solves with square operators. Use `lx.LSMR` for others.")
        check_symmetric("MINRES", operator)
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        refuse_options("MINRES", options)
        b, unravel = ravel_pytree(vector)
        matvec = lambda x: ravel_pytree(state.mv(unravel(x)))[0]
        budget = 10 * b.size if self.max_steps is None else self.max_steps
        norm = jnp.linalg.norm(b)
        tolerance = self.atol * b.size**0.5 + self.rtol * norm

        def unfinished(solve: _Solve):
            return (solve.residual_norm > tolerance) & (solve.steps < budget) & solve.halved

        def refine(solve: _Solve):
            # Half the tolerance: a run that ends well then halves the residual, or rounding is to blame.
            end = _recurrence(matvec, solve.residual, tolerance / 2, budget - solve.steps)
            x = solve.x + end.x
            residual = b - matvec(x)
            size = jnp.linalg.norm(residual)
            halved = 2 * size <= solve.residual_norm
            # A later run that gains little walks along null vectors.
            reject = jnp.where(solve.steps == 0, size > solve.residual_norm, ~halved)
            keep = lambda new, old: jnp.where(reject, old, new)
            return _Solve(
                keep(x, solve.x),
                keep(residual, solve.residual),
                keep(size, solve.residual_norm),
                solve.steps + end.step,
                halved,
                jnp.maximum(solve.scale, end.scale),
            )

        none = jnp.zeros((), b.dtype)
        first = _Solve(jnp.zeros_like(b), b, norm, jnp.array(0), jnp.array(True), none)
        last = jax.lax.while_loop(unfinished, refine, first)
        slope = jnp.linalg.norm(matvec(last.residual))
        is_null = slope <= jnp.finfo(b.dtype).eps ** _NULL * last.scale * last.residual_norm
        stats = {"num_steps": last.steps, "max_steps": self.max_steps}
        return unravel(last.x), _result(last, is_null, tolerance, budget), stats

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return lx.conj(state), options

    def assume_full_rank(self):
        return True


class _Solve(NamedTuple):
    """Between two runs of the recurrence: the iterate and its true residual."""

    x: Float[Array, " P"]
    residual: Float[Array, " P"]
    residual_norm: Float[Array, ""]
    steps: Int[Array, ""]
    halved: Bool[Array, ""]
    scale: Float[Array, ""]


class _Step(NamedTuple):
    """Lanczos vectors v, search directions w, and the last Givens rotation (c, s) of the recurrence.

    `delta` and `epsilon` are the entries above the diagonal which the last rotation left for the next
    column of the triangular factor; `phi` is the norm of the recurrence's residual, `scale` a norm of A
    as far as seen. `stuck`: the last step was not taken, since rounding would have undone it. The
    iterate whose residual is nearest to a null vector of A is kept beside, with its ‖Ar‖/‖r‖ (`slope`).
    """

    step: Int[Array, ""]
    x: Float[Array, " P"]
    v_old: Float[Array, " P"]
    v: Float[Array, " P"]
    w_old: Float[Array, " P"]
    w: Float[Array, " P"]
    beta: Float[Array, ""]
    c: Float[Array, ""]
    s: Float[Array, ""]
    delta: Float[Array, ""]
    epsilon: Float[Array, ""]
    phi: Float[Array, ""]
    scale: Float[Array, ""]
    stuck: Bool[Array, ""]
    null_x: Float[Array, " P"]
    null_slope: Float[Array, ""]
    null_phi: Float[Array, ""]


def _recurrence(matvec, b: Float[Array, " P"], tolerance, budget) -> _Step:
    """MINRES on Ax = b from zero, until its own residual is at most `tolerance`."""
    zero, none = jnp.zeros_like(b), jnp.zeros((), b.dtype)
    norm = jnp.linalg.norm(b)
    start = _Step(
        step=jnp.array(0),
        x=zero,
        v_old=zero,
        v=_divide(b, norm),
        w_old=zero,
        w=zero,
        beta=none,
        c=none - 1,
        s=none,
        delta=none,
        epsilon=none,
        phi=norm,
        scale=none,
        stuck=jnp.array(False),
        null_x=zero,
        null_slope=none + jnp.inf,
        null_phi=norm,
    )
    going = lambda at: (at.phi > tolerance) & (at.step < budget) & ~at.stuck
    end = jax.lax.while_loop(going, lambda at: _advance(matvec, at), start)
    # A null vector that later steps could not shrink: b leaves A's range, and they only grew x.
    null = end.null_slope <= jnp.finfo(b.dtype).eps ** _NULL * end.scale
    null = null & (2 * end.phi > end.null_phi)
    return end._replace(x=jnp.where(null, end.null_x, end.x))


def _advance(matvec, at: _Step) -> _Step:
    product = matvec(at.v) - at.beta * at.v_old
    alpha = dot(at.v, product)
    product = product - alpha * at.v
    beta = jnp.linalg.norm(product)
    above = at.c * at.delta + at.s * alpha
    diagonal = at.s * at.delta - at.c * alpha
    delta, epsilon = -at.c * beta, at.s * beta
    gamma = jnp.hypot(diagonal, beta)
    scale = jnp.maximum(at.scale, jnp.hypot(jnp.hypot(alpha, beta), at.beta))
    c, s = _divide(diagonal, gamma), _divide(beta, gamma)
    w = _divide(at.v - at.epsilon * at.w_old - above * at.w, gamma)
    x, phi = at.x + c * at.phi * w, s * at.phi
    # ‖Ar‖ = ‖r‖·hypot(diagonal, delta) for the residual r before this step: near 0, r is a null vector
    # of A, no step can shrink it, and dividing by gamma only blows x up. Nor does a step help that
    # makes x so large that rounding outgrows the residual: a fresh run from the true one does.
    eps = jnp.finfo(scale.dtype).eps
    slope = jnp.hypot(diagonal, delta)
    nearer = slope < at.null_slope
    kept = (
        jnp.where(nearer, at.x, at.null_x),
        jnp.where(nearer, slope, at.null_slope),
        jnp.where(nearer, at.phi, at.null_phi),
    )
    stuck = (slope <= _LOST * eps * scale) | (_LOST * eps * scale * jnp.linalg.norm(x) > at.phi)
    x, phi = jnp.where(stuck, at.x, x), jnp.where(stuck, at.phi, phi)
    v = _divide(product, beta)
    return _Step(
        at.step + 1, x, at.v, v, at.w, w, beta, c, s, delta, epsilon, phi, scale, stuck, *kept
    )


def _divide(numerator: Array, denominator: Float[Array, ""]) -> Array:
    """0 where the denominator is 0."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def _result(solve: _Solve, is_null, tolerance, budget) -> lx.RESULTS:
    result = lx.RESULTS.where(
        is_null,
        lx.RESULTS.breakdown,
        lx.RESULTS.where(
            solve.steps >= budget, lx.RESULTS.max_steps_reached, lx.RESULTS.stagnation
        ),
    )
    result = lx.RESULTS.where(solve.residual_norm <= tolerance, lx.RESULTS.successful, result)
    # lineax itself tells a NaN in b from one that the operator made.
    finite = jnp.isfinite(solve.residual_norm)
    return lx.RESULTS.where(finite, result, lx.RESULTS.singular)
