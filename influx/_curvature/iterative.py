"""Curvatures that are never formed: their products, and an iterative solver of lineax."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np

from .._misc import is_concrete, ravel
from .._solver.bounds import lanczos
from .._solver.minres import MINRES as MinresSolver
from .base import AbstractCurvature, AbstractFactored, Factored, check_curvature, flat_structure


class CG(AbstractCurvature):
    """Solves with a curvature by conjugate gradients on its products: O(P) memory.

    **Arguments:**

    - `curvature`: what to solve with, e.g. `GaussNewton(damping=1e-3)`. Its damping is the only one.
    - `rtol`: a solve ends at ‖Hx − v‖ ≤ rtol·‖v‖.
    - `max_steps`: default 10·P.

    A solve that does not meet its tolerance is an error, not a number. A curvature with a negative
    Ritz value on 20 Lanczos steps is refused as indefinite. One step costs one product: 4–8 gradients
    of J for a Hessian, 2.5–4 for a Gauss–Newton matrix. Choose it where P² does not fit.

    **Source:** Koh & Liang, arXiv:1703.04730; Martens, "Deep learning via Hessian-free
    optimization" (2010).
    """

    curvature: AbstractCurvature = eqx.field(converter=check_curvature)
    rtol: float = eqx.field(default=1e-10, kw_only=True)
    max_steps: int | None = eqx.field(static=True, default=None, kw_only=True)

    @property
    def damping(self) -> float:
        return self.curvature.damping

    def matvec(self, risk, model):
        return self.curvature.matvec(risk, model)

    def factor(self, risk, model):
        _check_settings(self.rtol, self.max_steps)
        operator = _operator(self.curvature, risk, model)
        if is_concrete((risk, model)):
            _check_ritz(operator, model)
        steps = 10 * flat_structure(model).size if self.max_steps is None else self.max_steps
        solver = lx.CG(rtol=0.0, atol=self.rtol, max_steps=steps)
        return Normalised(Factored(operator, solver))

    def newton_steps(self, risk, model, factored, jacobian):
        return self.curvature.newton_steps(risk, model, factored, jacobian)


class MINRES(AbstractCurvature):
    """Solves with a curvature by minimal residuals on its products: as `CG`, but for symmetric
    matrices that may be indefinite or singular.

    With an indefinite curvature influence is still the derivative of a *stationary point*, but
    self-influence may have either sign (P3 and P5 need H ≻ 0); `diagnose` says so.

    **Source:** Paige & Saunders, "Solution of sparse indefinite systems of linear equations" (1975).
    """

    curvature: AbstractCurvature = eqx.field(converter=check_curvature)
    rtol: float = eqx.field(default=1e-10, kw_only=True)
    max_steps: int | None = eqx.field(static=True, default=None, kw_only=True)

    @property
    def damping(self) -> float:
        return self.curvature.damping

    def matvec(self, risk, model):
        return self.curvature.matvec(risk, model)

    def factor(self, risk, model):
        _check_settings(self.rtol, self.max_steps)
        steps = 10 * flat_structure(model).size if self.max_steps is None else self.max_steps
        solver = MinresSolver(rtol=0.0, atol=self.rtol, max_steps=steps)
        return Normalised(Factored(_operator(self.curvature, risk, model), solver))

    def newton_steps(self, risk, model, factored, jacobian):
        return self.curvature.newton_steps(risk, model, factored, jacobian)


class Normalised(AbstractFactored):
    """Solves for v scaled to entries of size 1, so that an absolute tolerance is relative to v.

    lineax's own `rtol` is relative to each entry of v by itself, which no step can meet where v has
    zeros.
    """

    factored: Factored

    @property
    def is_matrix(self):
        return self.factored.is_matrix

    def matvec(self, v):
        return self.factored.matvec(v)

    def try_solve(self, v):
        size = jnp.linalg.norm(v) / jnp.sqrt(jnp.asarray(v.size, v.dtype))
        unit = jnp.where(size == 0, 1, size)
        x, converged = self.factored.try_solve(v / unit)
        return x * unit, converged | (size == 0)

    def perturbed(self, matvec):
        return Normalised(self.factored.perturbed(matvec))


def _operator(curvature: AbstractCurvature, risk, model) -> lx.FunctionLinearOperator:
    matvec = curvature.matvec(risk, model)
    damped = lambda v: matvec(v) + jnp.asarray(curvature.damping, v.dtype) * v
    # MINRES reads the first tag only; CG needs the second.
    tags = (lx.symmetric_tag, lx.positive_semidefinite_tag)
    return lx.FunctionLinearOperator(damped, flat_structure(model), tags)


def _check_settings(rtol: float, max_steps: int | None) -> None:
    if not (np.isfinite(rtol) and rtol > 0):
        raise ValueError(f"`rtol` must be a positive number such as 1e-10, got {rtol}.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}. Use None for 10·P.")


@eqx.filter_jit
def _ritz_values(operator, model):
    theta, _ = ravel(model)
    start = jr.normal(jr.key(0), theta.shape, theta.dtype)
    _, alpha, beta = lanczos(operator.mv, start, min(20, theta.size))
    off = jnp.diag(beta[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + off + off.T)


def _check_ritz(operator, model) -> None:
    ritz = _ritz_values(operator, model)
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
