"""The Neumann series: solves with symmetric positive definite matrices by their products alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .bounds import ritz_values
from .checks import check_limits, check_symmetric, refuse_options

# A Ritz value lies below the norm. Steps are this much shorter than the largest one allows, see
# `safe_step`.
_MARGIN = 1.1
_LANCZOS = 20


class Neumann(lx.AbstractLinearSolver[Any]):
    r"""Solves Ax = b for symmetric positive definite A by its Neumann series (Richardson's iteration):

        x₀ = 0,   x_{k+1} = x_k + s (b − A x_k),   so   x_k = s Σ_{j<k} (I − sA)ʲ b.

    One product with A a step, and the residual is the true one. It shrinks by 1 − sλ_min a step, so
    that about 1.1 κ log(1/rtol) of them are needed, κ the condition number; conjugate gradients need
    about √κ log(2/rtol)/2.

    **Arguments:**

    - `rtol`, `atol`: a solve ends at rms(b − Ax) ≤ atol + rtol·rms(b) (root mean squares).
    - `max_steps`: products with A; default 10,000.
    - `step`: s < 2/‖A‖; by default `safe_step` of the largest Ritz value of 20 Lanczos steps, which
      `init` takes.

    **Results:** `breakdown` where the residual grows, which proves that A is not positive definite or
    the step too long; `stagnation` where an update is lost in the rounding of x; `max_steps_reached`;
    `stats["num_steps"]` counts the steps. There are no options. Derivatives through a solve are those
    of a nonsingular A, as under `lineax.CG`.

    **Raises:** `ValueError` for an operator that is not symmetric and real, and for options.

    **Source:** Agarwal, Bullins & Hazan, "Second-Order Stochastic Optimization for Machine Learning in
    Linear Time", arXiv:1602.03943.
    """

    rtol: float
    atol: float
    max_steps: int | None = None
    step: Float[Array, ""] | float | None = None

    def __check_init__(self):
        check_limits(self.rtol, self.atol, self.max_steps)

    def init(self, operator, options):
        refuse_options("Neumann", options)
        check_symmetric("Neumann", operator)
        operator = lx.linearise(operator)
        if self.step is not None:
            leaves = jtu.tree_leaves(operator.in_structure())
            return operator, jnp.asarray(self.step, jnp.result_type(*leaves))
        return operator, safe_step(_largest_ritz(operator))

    def compute(self, state, vector, options):
        refuse_options("Neumann", options)
        operator, step = state
        b, unravel = ravel_pytree(vector)
        matvec = lambda x: ravel_pytree(operator.mv(unravel(x)))[0]
        budget = 10_000 if self.max_steps is None else self.max_steps
        size = jnp.linalg.norm(b)
        tolerance = self.atol * b.size**0.5 + self.rtol * size

        def unfinished(at: _At):
            grows, stuck = _failures(at, size, step)
            return (at.norm > tolerance) & (at.steps < budget) & ~grows & ~stuck

        def advance(at: _At):
            x = at.x + step * at.residual
            residual = b - matvec(x)
            return _At(x, residual, jnp.linalg.norm(residual), at.steps + 1)

        start = _At(jnp.zeros_like(b), b, size, jnp.array(0))
        last = jax.lax.while_loop(unfinished, advance, start)
        stats = {"num_steps": last.steps, "max_steps": self.max_steps}
        return unravel(last.x), _result(last, tolerance, *_failures(last, size, step)), stats

    def transpose(self, state, options):
        operator, step = state
        return (operator.transpose(), step), options

    def conj(self, state, options):
        operator, step = state
        return (lx.conj(operator), step), options

    def assume_full_rank(self):
        return True


def safe_step(largest: Float[Array, ""]) -> Float[Array, ""]:
    """s = 1/(1.1 θ), θ the largest Ritz value of 20 Lanczos steps from a random vector.

    The iteration converges for s < 2/‖A‖, that is, where θ > ‖A‖/2.2. θ ≤ ‖A‖ always, and with P
    dimensions it lies below (1 − ε)‖A‖ with probability at most 1.648 √P exp(−39 √ε): below 2·10⁻⁸ at
    that ε for a billion of them. Most often θ > 0.91 ‖A‖, and then s ≤ 1/‖A‖: every term of the series
    is positive semi-definite, so that xₖᵀb only grows towards bᵀA⁻¹b.

    **Source:** Kuczyński & Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start", SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    return 1 / (_MARGIN * largest)


def _largest_ritz(operator: lx.AbstractLinearOperator) -> Float[Array, ""]:
    zero, unravel = ravel_pytree(
        jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), operator.in_structure())
    )
    matvec = lambda x: ravel_pytree(operator.mv(unravel(x)))[0]
    return ritz_values(matvec, zero, _LANCZOS)[-1]


class _At(NamedTuple):
    x: Float[Array, " P"]
    residual: Float[Array, " P"]
    norm: Float[Array, ""]
    steps: Int[Array, ""]


def _failures(at: _At, size, step) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the residual has grown, and whether the next update is lost in rounding.

    For a positive definite A and s < 2/‖A‖ the residual shrinks at every step, so that one twice as
    long as b cannot be rounding's.
    """
    lost = jnp.finfo(at.x.dtype).eps * jnp.linalg.norm(at.x)
    return at.norm > 2 * size, (step * at.norm <= lost) & (at.steps > 0)


def _result(at: _At, tolerance, grows, stuck) -> lx.RESULTS:
    result = lx.RESULTS.where(stuck, lx.RESULTS.stagnation, lx.RESULTS.max_steps_reached)
    result = lx.RESULTS.where(grows, lx.RESULTS.breakdown, result)
    result = lx.RESULTS.where(at.norm <= tolerance, lx.RESULTS.successful, result)
    # lineax itself tells a NaN in b from one that the operator made.
    return lx.RESULTS.where(jnp.isnan(at.norm), lx.RESULTS.singular, result)
