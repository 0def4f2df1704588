import jax.numpy as jnp

from .._checks import is_concrete
from .._solver.neumann import Neumann as NeumannSolver
from .._solver.neumann import safe_step
from .base import Damped
from .iterative import AbstractIterative, Iterative, extreme_ritz_values
from .subspace import check_finite, is_negative


class Neumann(AbstractIterative):
    r"""Solves with a curvature by its Neumann series, as LiSSA does:

        x_{k+1} = x_k + s (v − (H + λI) x_k),   x₀ = 0,   s = 1/(1.1 θ).

    θ is the largest Ritz value of 20 Lanczos steps with H + λI: measured, so that there is no scale to
    guess, and λ is λ (in most implementations of LiSSA it is multiplied by the scale). A Ritz value lies
    below the norm; with the factor 1.1 the iteration converges as long as it is above 1/2.2 of it, which
    fails with a chance of at most 2·10⁻⁸ up to a billion parameters.

    **Arguments:**

    - `curvature`: what to solve with, e.g. `GaussNewton(damping=1e-3)`. Its damping is the only one.
    - `rtol`: a solve ends at ‖(H + λI)x − v‖ ≤ rtol·‖v‖; by default at 1e-10, in float32 at 1e-4.
    - `max_steps`: LiSSA's depth; default 10,000.

    The limit is the direct solve. **Dropped:** nothing; a solve that does not meet its tolerance is an
    error, not a number. Products are of the whole data: LiSSA's mini-batches save passes when a solve
    may err by some percent, but its noise has to be averaged over repetitions, and they add a batch size
    and a number of repetitions to guess.

    **Cost:** 20 products once, and about 1.1 κ log(1/rtol) a solve, κ the condition number of H + λI.
    `CG` needs about √κ/2 log(2/rtol), and after as many steps its error is the smaller one in the norm
    √(xᵀHx): choose `Neumann` to compare with LiSSA.

    **Raises:** `ValueError` for a curvature with a Ritz value that is not positive, where the series
    diverges.

    **Source:** Agarwal, Bullins & Hazan, "Second-Order Stochastic Optimization for Machine Learning in
    Linear Time", arXiv:1602.03943; Koh & Liang, arXiv:1703.04730.
    """

    def factor(self, risk, model):
        rtol, _ = self.limits(model)
        damped = Damped(risk, model, self.curvature)
        unmeasured = Iterative(damped, NeumannSolver(0.0, rtol, self.max_steps))
        low, high = extreme_ritz_values(unmeasured, model)
        if is_concrete((low, high)):
            _check_positive(low, high)
        solver = NeumannSolver(0.0, rtol, self.max_steps, safe_step(high))
        return Iterative(damped, solver)


def _check_positive(least, largest) -> None:
    check_finite(jnp.stack([least, largest]))
    low, high = float(least), float(largest)
    if is_negative(least, largest) or high <= 0:
        raise ValueError(
            f"The curvature is not positive definite: it has an eigenvalue of at most {low:.3g} "
            f"(largest {high:.3g}), and there the Neumann series diverges. Use damping > "
            f"{max(-low, 0):.2g}, "
            "Neumann(GaussNewton()), MINRES(...) for a saddle point, or train to a minimum."
        )
