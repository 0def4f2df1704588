"""Curvatures that are never formed: their products, and an iterative solver of lineax."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array

from .._custom_types import Model
from .._misc import is_concrete, ravel
from .._risk import EmpiricalRisk
from .._solver.bounds import lanczos
from .._solver.minres import MINRES as MinresSolver
from .base import AbstractCurvature, AbstractFactored, check_wrapped

# lineax's CG takes a matrix for singular where a direction's eigenvalue is below 100·eps·P, an absolute
# number: 0.007 in float32 with 600 parameters. In units of 2⁻³⁰ (no rounding) it means eigenvalues that
# are below any damping or l2 in use.
_CG_UNIT = 2.0**30


class AbstractIterative(AbstractCurvature):
    """A curvature solved with by its products alone, in the way that `factor` chooses."""

    curvature: AbstractCurvature
    rtol: float | None
    max_steps: int | None = eqx.field(static=True)

    def __init__(
        self,
        curvature: AbstractCurvature,
        *,
        rtol: float | None = None,
        max_steps: int | None = None,
    ):
        self.curvature = check_wrapped(curvature)
        self.rtol, self.max_steps = _checked_settings(rtol, max_steps)

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        return self.curvature.matvec(risk, model)

    def lower_end(self, risk, model):
        return self.curvature.lower_end(risk, model)

    def newton_steps(self, risk, model, factored, jacobian):
        return self.curvature.newton_steps(risk, model, factored, jacobian)

    def limits(self, model: Model) -> tuple[float, int]:
        """The relative residual and the number of steps at which a solve ends."""
        theta, _ = ravel(model)
        reachable = 1e-10 if theta.dtype == jnp.float64 else 1e-4
        steps = min(10 * theta.size, 2000) if self.max_steps is None else self.max_steps
        return reachable if self.rtol is None else self.rtol, steps


class CG(AbstractIterative):
    """Solves with a curvature by conjugate gradients on its products: O(P) memory.

    **Arguments:**

    - `curvature`: what to solve with, e.g. `GaussNewton(damping=1e-3)`. Its damping is the only one.
    - `rtol`: a solve ends at ‖Hx − v‖ ≤ rtol·‖v‖; by default at 1e-10, and in float32, where that is
      out of reach, at 1e-4.
    - `max_steps`: default 10·P, but at most 2,000.

    A solve that does not meet its tolerance is an error, not a number. A curvature with a negative
    Ritz value on 20 Lanczos steps is refused as indefinite. One step costs one product: 4–8 gradients
    of J for a Hessian, 2.5–4 for a Gauss–Newton matrix. Choose it where P² does not fit.

    **Source:** Koh & Liang, arXiv:1703.04730; Martens, "Deep learning via Hessian-free
    optimization" (2010).
    """

    def factor(self, risk, model):
        rtol, steps = self.limits(model)
        solver = lx.CG(rtol=0.0, atol=rtol, max_steps=steps)
        factored = Iterative(risk, model, self.curvature, solver, _CG_UNIT)
        if is_concrete((risk, model)):
            _check_ritz(factored)
        return factored


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
        return Iterative(risk, model, self.curvature, solver, 1.0)


class Iterative(AbstractFactored):
    """H + λI behind its products, and a lineax solver, which sees it `unit` times larger. `added` is a
    matrix on top of it, if any.

    The solver sees v scaled to entries of size 1, so that its absolute tolerance is relative to v.
    lineax's own `rtol` is relative to each entry of v by itself, which no step can meet where v has
    zeros.
    """

    risk: EmpiricalRisk
    model: Model
    curvature: AbstractCurvature
    solver: lx.AbstractLinearSolver
    unit: float
    added: Callable[[Array], Array] | None = None

    @property
    def matrix(self):
        return None

    @property
    def matvec(self):
        product = self.curvature.matvec(self.risk, self.model)
        damped = lambda v: product(v) + jnp.asarray(self.curvature.damping, v.dtype) * v
        added = self.added
        return damped if added is None else lambda v: damped(v) + added(v)

    def try_solve(self, v):
        size = jnp.linalg.norm(v) / jnp.sqrt(jnp.asarray(v.size, v.dtype))
        size = jnp.where(size == 0, 1, size)
        matvec = self.matvec
        # MINRES reads the first tag only; CG needs the second.
        tags = lx.symmetric_tag, lx.positive_semidefinite_tag
        larger = lambda p: self.unit * matvec(p)
        operator = lx.FunctionLinearOperator(larger, jax.eval_shape(lambda: v), tags)
        with jax.default_matmul_precision("highest"):
            solution = lx.linear_solve(operator, v / size, self.solver, throw=False)
        return solution.value * (self.unit * size), solution.result == lx.RESULTS.successful

    def perturbed(self, matvec):
        parts = self.risk, self.model, self.curvature, self.solver, self.unit
        return Iterative(*parts, added=matvec)


def _checked_settings(rtol: Any, max_steps: Any) -> tuple[Any, Any]:
    positive = isinstance(rtol, int | float | np.number) and np.isfinite(rtol) and rtol > 0
    if rtol is not None and not positive:
        raise ValueError(
            f"`rtol` must be a positive number such as 1e-10, got {rtol!r}. None chooses one."
        )
    if max_steps is not None and not (isinstance(max_steps, int) and max_steps >= 1):
        raise ValueError(
            f"`max_steps` must be a whole number, at least 1, got {max_steps!r}. None chooses one."
        )
    return rtol, max_steps


@eqx.filter_jit
def _ritz_values(factored: Iterative):
    theta, _ = ravel(factored.model)
    start = jr.normal(jr.key(0), theta.shape, theta.dtype)
    _, alpha, beta = lanczos(factored.matvec, start, min(20, theta.size))
    off = jnp.diag(beta[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + off + off.T)


def _check_ritz(factored: Iterative) -> None:
    ritz = _ritz_values(factored)
    low, high = float(ritz[0]), float(ritz[-1])
    if not jnp.isfinite(ritz).all():
        raise ValueError(
            "A product with the curvature is NaN or infinite: a second derivative of the loss "
            "overflows at this model. Check the loss for log(0), 0/0 or sqrt(0)."
        )
    if low < -1e3 * float(jnp.finfo(ritz.dtype).eps) * abs(high):
        raise ValueError(
            f"The curvature is indefinite: it has an eigenvalue of at most {low:.3g} (largest "
            f"{high:.3g}), and CG needs a positive definite one. Use damping > {-low:.2g}, "
            "CG(GaussNewton()), MINRES(...) for a saddle point, or train to a minimum."
        )
