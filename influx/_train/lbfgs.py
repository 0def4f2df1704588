"""Limited-memory BFGS, by optimistix."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.numpy.linalg import norm
from jaxtyping import Array, Bool

from .._linalg import ravel
from .base import (
    AbstractTrainer,
    Trained,
    check_reachable,
    check_tolerance,
    count,
    flat,
    gradient_items,
    minimising_remedies,
)


class LBFGS(AbstractTrainer):
    """L-BFGS (optimistix's), to ‖∇J(θ, w)‖₂ < `tolerance`: O(P) memory, one gradient a step.

    For models too large for `Newton`'s Hessian whose objective is smooth. It converges linearly: on
    logistic regression with l2 = 1e-2, ‖∇J‖ < 1e-12 takes about 130 steps in float64.

    **Arguments:**

    - `tolerance`: on ‖∇J‖₂, the only stopping rule.
    - `max_steps`: evaluations of J, those of the line search included.
    - `history`: how many past steps approximate the curvature.

    **Raises:** `ValueError` for a tolerance that is out of reach in the parameters' arithmetic (what
    calls the trainer raises a `RuntimeError` where it is not reached).

    **Source:** Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their use in
    limited memory methods" (1994).
    """

    tolerance: float = eqx.field(default=1e-10, converter=check_tolerance)
    max_steps: int = eqx.field(default=5000, converter=count("max_steps"), static=True)
    history: int = eqx.field(default=20, converter=count("history"), static=True, kw_only=True)

    def init(self, objective, model, weights):
        check_reachable(self.tolerance, ravel(model)[0].dtype)

    def train(self, state, objective, model, weights):
        fn, theta, rebuild = flat(objective, model, weights)
        # optimistix updates its curvature only where sᵀy exceeds machine epsilon, an absolute number
        # that ends progress at ‖∇J‖ of about 1e-8. In units where θ is `unit` and J `unit²` times
        # larger, a power of two, the iteration is the same and sᵀy clears it.
        unit = 1 / float(jnp.finfo(theta.dtype).eps)
        dtype = jnp.result_type(float)  # in which optimistix keeps its history, whatever θ's is
        scaled = lambda u, _: unit**2 * fn((u / unit).astype(theta.dtype)).astype(dtype)
        inner = _search_past_rounding(self.history)
        solver = _UntilGradient(inner, self.tolerance * unit)  # pyright: ignore[reportCallIssue]
        start = unit * theta.astype(dtype)
        solution = optx.minimise(scaled, solver, start, max_steps=self.max_steps, throw=False)
        theta = (solution.value / unit).astype(theta.dtype)
        size = norm(jax.grad(fn)(theta))
        return rebuild(theta), Trained(size, solution.stats["num_steps"], size < self.tolerance)

    def attempts(self):
        return (self,)

    def items(self, objective, model):
        theta, _ = ravel(model)
        return gradient_items(objective, model) + 2 * self.history * theta.size

    def examples(self, n):
        return n

    def remedies(self):
        return minimising_remedies(self.tolerance, self.max_steps)


def _search_past_rounding(history: int) -> optx.LBFGS:
    solver = optx.LBFGS(rtol=0.0, atol=0.0, history_length=history)
    return eqx.tree_at(lambda s: s.search, solver, _PastRounding(solver.search))


class _PastRounding(optx.AbstractSearch):
    """Accepts what `search` accepts, and steps that change J by no more than its rounding error.

    Armijo's rule compares values of J, which cannot tell points apart whose gradient norm is below
    about 1e-8; gradients still can.
    """

    search: optx.AbstractSearch

    def init(self, y, f_info_struct):
        return self.search.init(y, f_info_struct)

    def step(self, first_step, y, y_eval, f_info, f_eval_info, state):
        size, accept, result, after = self.search.step(
            first_step, y, y_eval, f_info, f_eval_info, state
        )
        before, value = f_info.as_min(), f_eval_info.as_min()
        rounding = 10 * jnp.finfo(value.dtype).eps * jnp.abs(before)
        tied = ~accept & (value <= before + rounding)
        fresh = self.search.init(y, f_info)
        after = jtu.tree_map(lambda new, old: jnp.where(tied, new, old), fresh, after)
        size = jnp.where(tied, jnp.ones_like(size), size)
        return size, accept | tied, result, after


class _UntilGradient(optx.AbstractMinimiser):
    """A quasi-Newton solver that ends when the gradient's 2-norm is below `tolerance`."""

    solver: Any
    tolerance: Any

    @property
    def rtol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.rtol

    @property
    def atol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return self.solver.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(self, fn, y, args, options, state, tags):
        return self.solver.step(fn, y, args, options, state, tags)

    def terminate(self, fn, y, args, options, state, tags) -> tuple[Bool[Array, ""], Any]:
        # Before the first step the state holds no gradient yet.
        small = norm(state.f_info.grad) < self.tolerance
        return small & ~state.first_step, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return self.solver.postprocess(fn, y, aux, args, options, state, tags, result)
