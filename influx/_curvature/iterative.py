"""Curvatures that are never formed: their products, and an iterative solver of lineax."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from .._checks import check_whole, is_real
from .._custom_types import Model
from .._linalg import ravel
from .._solver.bounds import ritz_values
from .._solver.minres import MINRES as MinresSolver
from .base import AbstractFactored, AbstractPerturbable, AbstractWrapped, Damped


def _checked_rtol(rtol: Any) -> float | None:
    if rtol is not None and not (is_real(rtol) and 0 < rtol < 1):
        raise ValueError(
            f"`rtol` must be a positive number such as 1e-10, and below 1; got {rtol!r}. None chooses "
            "one."
        )
    return None if rtol is None else float(rtol)


def _checked_steps(max_steps: Any) -> int | None:
    if max_steps is None:
        return None
    return check_whole("max_steps", max_steps, hint=" None chooses one.")


class AbstractIterative(AbstractWrapped):
    """A curvature solved with by its products alone, in the way that `factor` chooses."""

    rtol: float | None = eqx.field(default=None, converter=_checked_rtol, kw_only=True)
    max_steps: int | None = eqx.field(
        default=None, converter=_checked_steps, kw_only=True, static=True
    )

    def limits(self, model: Model) -> tuple[float, int]:
        """The relative residual and the number of steps at which a solve ends."""
        theta, _ = ravel(model)
        reachable = 1e-10 if theta.dtype == jnp.float64 else 1e-4
        steps = min(10 * theta.size, 2000) if self.max_steps is None else self.max_steps
        return reachable if self.rtol is None else self.rtol, steps


class MINRES(AbstractIterative):
    """Solves with a curvature by minimal residuals on its products: as `CG`, but for symmetric
    matrices that may be indefinite or singular.

    With an indefinite curvature influence is still the derivative of a *stationary point*, but
    self-influence may have either sign (P3 and P5 need H ≻ 0); `diagnose` says so. Rounding grows with
    the square of the condition number: above about 1e8 in float64 a solve is refused.

    **Source:** Paige & Saunders, "Solution of sparse indefinite systems of linear equations" (1975).
    """

    def factor(self, risk, model):
        rtol, steps = self.limits(model)
        solver = MinresSolver(rtol=0.0, atol=rtol, max_steps=steps)
        return Iterative(Damped(risk, model, self.curvature), solver)


class Iterative(AbstractPerturbable):
    """H + λI behind its products, and a lineax solver, which sees it `unit` times larger.

    The solver sees v scaled to entries of size 1, so that its absolute tolerance is relative to v.
    lineax's own `rtol` is relative to each entry of v by itself, which no step can meet where v has
    zeros. Where the solver goes by a recurrence, `tolerance` is the relative residual that one more
    product has to confirm.
    """

    damped: Damped
    solver: lx.AbstractLinearSolver
    unit: float = 1.0
    tolerance: float | None = None
    preconditioner: AbstractFactored | None = None

    @property
    def matrix(self):
        return None

    @property
    def matvec(self):
        return self.damped.matvec

    def try_solve(self, v):
        x, converged, _ = self.counted_solve(v)
        return x, converged

    def counted_solve(self, v):
        size = jnp.linalg.norm(v) / jnp.sqrt(jnp.asarray(v.size, v.dtype))
        scaled = v / jnp.where(size == 0, 1, size)
        matvec = self.matvec
        operator = _definite(lambda p: self.unit * matvec(p), v)
        options = {}
        if self.preconditioner is not None:
            # The answer does not depend on it, and neither do derivatives.
            fixed = jax.lax.stop_gradient(eqx.filter(self.preconditioner, eqx.is_array))
            fixed = eqx.combine(fixed, self.preconditioner)
            options["preconditioner"] = _definite(lambda r: fixed.try_solve(r)[0], v)
        with jax.default_matmul_precision("highest"):
            solution = lx.linear_solve(operator, scaled, self.solver, options=options, throw=False)
            x = self.unit * solution.value
            converged = solution.result == lx.RESULTS.successful
            if self.tolerance is not None:
                left = jnp.linalg.norm(scaled - matvec(x))
                converged &= left <= self.tolerance * jnp.linalg.norm(scaled)
        return x * size, converged, solution.stats["num_steps"]

    def unaided(self, max_steps: Array) -> "Iterative":
        """The same without its preconditioner, and with another end."""
        where = lambda f: (f.preconditioner, f.solver.max_steps)
        return eqx.tree_at(where, self, (None, max_steps), is_leaf=lambda x: x is None)

    def perturbed(self, matvec):
        return replace(self, damped=self.damped.plus(matvec))


def _definite(matvec: Callable[[Array], Array], like: Array) -> lx.AbstractLinearOperator:
    # MINRES reads the first tag only; CG needs the second.
    tags = lx.symmetric_tag, lx.positive_semidefinite_tag
    return lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: like), tags)


@eqx.filter_jit
def extreme_ritz_values(
    factored: AbstractFactored, model: Model, *, inverse: bool = False
) -> tuple[Array, Array]:
    """The least and the largest Ritz value of 20 Lanczos steps with H + λI, or with its inverse."""
    theta, _ = ravel(model)
    product = (lambda v: factored.try_solve(v)[0]) if inverse else factored.matvec
    ritz = ritz_values(product, theta, 20)
    return ritz[0], ritz[-1]
