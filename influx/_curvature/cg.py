import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx

from .._checks import is_concrete
from .._custom_types import Model, Scalar
from .._risk import EmpiricalRisk
from .base import AbstractCurvature, AbstractFactored, Damped
from .iterative import AbstractIterative, Iterative, extreme_ritz_values
from .kfac import AbstractKroneckerFactored
from .subspace import check_finite, is_negative

# lineax's CG takes a matrix for singular where a direction's eigenvalue is below 100·eps·P, an absolute
# number: 0.007 in float32 with 600 parameters. In units of 2⁻³⁰ (no rounding) it means eigenvalues that
# are below any damping or l2 in use. With a preconditioner the eigenvalues are those of M⁻¹(H + λI):
# M keeps its own unit, so that they are as much larger.
_UNIT = 2.0**30
_ALTERNATIVES = (
    "EKFAC(), KFAC(), BlockDiagonal(...), Diagonal(...), Nystrom(...) or a Mixture of them"
)


def _checked_preconditioner(preconditioner) -> AbstractCurvature | None:
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, AbstractCurvature):
        raise ValueError(
            "`preconditioner` must be a curvature such as influx.EKFAC(), or None for none; got "
            f"{preconditioner!r}. Mind the parentheses: EKFAC(), not EKFAC."
        )
    is_iterative = lambda x: isinstance(x, AbstractIterative)
    for part in jtu.tree_leaves(preconditioner, is_leaf=is_iterative):
        if is_iterative(part):
            raise ValueError(
                f"`preconditioner` must be a fixed linear map, and a solve by {type(part).__name__} "
                "takes other steps for other vectors: CG around it would not converge. Use "
                f"{_ALTERNATIVES}."
            )
    return preconditioner


class CG(AbstractIterative):
    r"""Solves with a curvature by conjugate gradients on its products: O(P) memory.

    ```python
    gauss_newton = influx.GaussNewton(damping=1e-3)
    influx.CG(gauss_newton, preconditioner=influx.Nystrom(gauss_newton, 100, key=key))
    ```

    With A = H + λI and a preconditioner M, step k minimises (x − A⁻¹v)ᵀA(x − A⁻¹v) over the span of
    (M⁻¹A)ʲM⁻¹v, j < k, so that

        ‖x_k − A⁻¹v‖_A ≤ 2 ((√κ − 1)/(√κ + 1))ᵏ ‖A⁻¹v‖_A,   κ the condition number of M⁻¹A.

    Without one M is the identity. The limit is A⁻¹v whatever M is: what M gets wrong costs steps, not
    accuracy. `Nystrom` removes the large eigenvalues, on which plain CG spends its steps. `EKFAC` is
    cheaper to have, and helped where inputs differ in scale and `rtol` was tight; where most
    eigenvalues are l2 + λ, it spreads them and may take *more* steps than none.

    **Arguments:**

    - `curvature`: what to solve with, e.g. `GaussNewton(damping=1e-3)`. Its damping is the only one.
    - `preconditioner`: a curvature M whose solves are cheap: `EKFAC()`, `KFAC()`, `Diagonal(...)`,
      `BlockDiagonal(...)`, `Nystrom(...)` or a `Mixture`. Factored once. M stands for the same A, so
      that `damping="auto"` is λ here; a number given to it stays what it is.
    - `rtol`: a solve ends at ‖Ax − v‖ ≤ rtol·‖v‖, with a preconditioner as without; by default at
      1e-10, and in float32, where that is out of reach, at 1e-4. One more product confirms it, for the
      steps go by a recurrence.
    - `max_steps`: default 10·P, but at most 2,000.

    **Raises:** `ValueError` for a curvature or a preconditioner with a negative Ritz value on 20 Lanczos
    steps, and for a preconditioner that is no fixed linear map (`CG`, `MINRES`, `Neumann`) or inverts on
    a subspace only (`Projected`). A solve that does not meet its tolerance is an error, not a number.

    **Cost:** 1.1 products a step and three more: 4–8 gradients of J each for a Hessian, 2.5–4 for a
    Gauss–Newton matrix; with a preconditioner, its factorization once and a solve of it a step. Choose
    it where P² does not fit; `diagnose` counts the steps, with and without the preconditioner.

    **Source:** Hestenes & Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952);
    Koh & Liang, arXiv:1703.04730; Martens, "Deep learning via Hessian-free optimization" (2010), for
    preconditioning; Martens & Grosse, arXiv:1503.05671, for K-FAC.
    """

    preconditioner: AbstractCurvature | None = eqx.field(
        default=None, converter=_checked_preconditioner, kw_only=True
    )

    def factor(self, risk, model):
        rtol, steps = self.limits(model)
        # Half the tolerance by the recurrence, so that the true residual meets the whole of it.
        solver = lx.CG(rtol=0.0, atol=rtol / 2, norm=optx.rms_norm, max_steps=steps)
        factored = Iterative(Damped(risk, model, self.curvature), solver, _UNIT, tolerance=rtol)
        if is_concrete((risk, model)):
            _check_definite(factored)
        if self.preconditioner is None:
            return factored
        ready = factor_preconditioner(self.preconditioner, self.damping, risk, model)
        return eqx.tree_at(lambda f: f.preconditioner, factored, ready, is_leaf=lambda x: x is None)


def factor_preconditioner(
    preconditioner: AbstractCurvature, damping: Scalar, risk: EmpiricalRisk, model: Model
) -> AbstractFactored:
    """M, ready for its solves; where its damping was to be found from the data, it is `damping`."""
    is_automatic = lambda x: isinstance(x, AbstractKroneckerFactored) and x.damping is None
    is_none = lambda x: x is None
    fill = lambda x: eqx.tree_at(lambda k: k.damping, x, damping, is_leaf=is_none)
    filled = jtu.tree_map(
        lambda x: fill(x) if is_automatic(x) else x, preconditioner, is_leaf=is_automatic
    )
    try:
        factored = filled.factor(risk, model)
    except ValueError as error:
        raise ValueError(f"The preconditioner of CG cannot be used. {error}") from error
    if not factored.inverts:
        raise ValueError(
            f"{type(preconditioner).__name__} answers 0 outside a subspace, and CG with it as a "
            f"preconditioner would never leave that. Use {_ALTERNATIVES}."
        )
    if is_concrete((risk, model)):
        _check_positive(preconditioner, *extreme_ritz_values(factored, model, inverse=True))
    return factored


def _check_positive(preconditioner: AbstractCurvature, least, largest) -> None:
    check_finite(jnp.stack([least, largest]))
    if is_negative(least, largest):
        raise ValueError(
            f"The preconditioner {type(preconditioner).__name__} is not positive definite: its inverse "
            f"has an eigenvalue of at most {float(least):.3g} (largest {float(largest):.3g}). Give it "
            f"more `damping=`, or use one that is positive definite: {_ALTERNATIVES}."
        )


def _check_definite(factored: Iterative) -> None:
    least, largest = extreme_ritz_values(factored, factored.damped.model)
    check_finite(jnp.stack([least, largest]))
    low, high = float(least), float(largest)
    if is_negative(least, largest):
        raise ValueError(
            f"The curvature is indefinite: it has an eigenvalue of at most {low:.3g} (largest "
            f"{high:.3g}), and CG needs a positive definite one. Use damping > {-low:.2g}, "
            "CG(GaussNewton()), MINRES(...) for a saddle point, or train to a minimum."
        )
