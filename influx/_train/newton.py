"""Newton's method, and the chord iteration that shares one inverse between many trainings."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.numpy.linalg import norm
from jaxtyping import Array, Bool, Float, Int

from .._chunks import chunk_length
from .._linalg import dot, products, ravel
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

# The least Levenberg shift, relative to ‖∇J‖ and to the curvature along ∇J: too small to spoil
# quadratic convergence, large enough to keep the factorisation alive where the data leave a direction
# undetermined.
_LEAST_SHIFT = 1e-3
_CURVED = (lx.symmetric_tag, lx.positive_semidefinite_tag)


class _Iterate(eqx.Module):
    theta: Float[Array, " P"]
    value: Float[Array, ""]
    gradient: Float[Array, " P"]
    shift: Float[Array, ""]
    steps: Int[Array, ""]


class Newton(AbstractTrainer):
    """Newton's method, to ‖∇J(θ, w)‖₂ < `tolerance`: the trainer for ground truth.

    Each step is θ ← θ − (∇²J + μI)⁻¹∇J. A step that neither decreases J as Armijo asks nor, where J is
    flat to rounding, shrinks its gradient is taken back and μ grows tenfold; otherwise it falls, down
    to 1e-3 min(‖∇J‖, curvature along ∇J). So it converges from any start where J is convex,
    quadratically near the minimum, also where that is not unique; elsewhere it descends to a
    stationary point.

    **Arguments:**

    - `tolerance`: on ‖∇J‖₂, the only stopping rule.
    - `max_steps`: steps, those taken back included.
    - `solver`: `None` forms the P × P Hessian and factors it (Cholesky): P Hessian products and
      O(P³) a step. `lineax.CG(rtol=, atol=)` never forms it: Newton–CG on Hessian products.

    Retrainings from a fitted model (`leave_one_out`) first share *one* inverse Hessian; only those
    that this does not finish take steps with their own.

    **Raises:** `ValueError` for a tolerance that is out of reach in the parameters' arithmetic (what
    calls the trainer raises a `RuntimeError` where it is not reached).

    **Source:** Li, Fukushima, Qi & Yamashita, "Regularized Newton Methods for Convex Minimization
    Problems with Singular Solutions" (2004).
    """

    tolerance: float = eqx.field(default=1e-10, converter=check_tolerance)
    max_steps: int = eqx.field(default=200, converter=count("max_steps"), static=True)
    solver: lx.AbstractLinearSolver | None = None

    def __check_init__(self):
        if self.solver is not None and not isinstance(self.solver, lx.AbstractLinearSolver):
            raise ValueError(
                "`solver` must be a solver of lineax such as lineax.CG(rtol=1e-8, atol=1e-12), or None "
                f"for a Cholesky factor; got {self.solver!r}."
            )

    def init(self, objective, model, weights):
        check_reachable(self.tolerance, ravel(model)[0].dtype)

    def train(self, state, objective, model, weights):
        fn, theta, rebuild = flat(objective, model, weights)
        value_and_grad = jax.value_and_grad(fn)
        eps = float(jnp.finfo(theta.dtype).eps)
        start = _Iterate(theta, *value_and_grad(theta), jnp.zeros((), theta.dtype), jnp.asarray(0))

        def step(now: _Iterate) -> _Iterate:
            operator = self._curvature(fn, now.theta)
            size = norm(now.gradient)
            along = jnp.abs(jnp.vdot(now.gradient, operator.mv(now.gradient))) / size**2
            shift = jnp.maximum(now.shift, _LEAST_SHIFT * jnp.minimum(size, along))
            direction = -self._solve(operator, shift, now.gradient)
            trial = now.theta + direction
            value, gradient = value_and_grad(trial)
            accept = _is_better(now, direction, value, gradient)
            keep = lambda new, old: jnp.where(accept, new, old)
            return _Iterate(
                keep(trial, now.theta),
                keep(value, now.value),
                keep(gradient, now.gradient),
                keep(shift / 4, jnp.maximum(10 * shift, eps * size)),
                now.steps + 1,
            )

        # A shift that makes steps shorter than θ's rounding ends what cannot progress any more.
        unfinished = lambda now: (
            (norm(now.gradient) >= self.tolerance)
            & (now.steps < self.max_steps)
            & (now.shift * eps * norm(now.theta) <= norm(now.gradient))
        )
        end = jax.lax.while_loop(unfinished, step, start)
        size = norm(end.gradient)
        return rebuild(end.theta), Trained(size, end.steps, size < self.tolerance)

    def _curvature(self, fn, theta) -> lx.AbstractLinearOperator:
        """∇²fn as a matrix, or by its products, whichever the solver takes."""
        if self.solver is None:
            return lx.MatrixLinearOperator(hessian(fn, theta), _CURVED)
        structure = jax.ShapeDtypeStruct(theta.shape, theta.dtype)
        product = jax.linearize(jax.grad(fn), theta)[1]
        return lx.FunctionLinearOperator(product, structure, _CURVED)

    def _solve(self, operator, shift, vector) -> Float[Array, " P"]:
        identity = lx.IdentityLinearOperator(operator.in_structure())
        shifted = lx.TaggedLinearOperator(operator + shift * identity, _CURVED)
        solver = lx.Cholesky() if self.solver is None else self.solver
        return lx.linear_solve(shifted, vector, solver, throw=False).value

    def attempts(self):
        return (Chord(self.tolerance), self) if self.solver is None else (self,)

    def items(self, objective, model):
        theta, _ = ravel(model)
        reverse = gradient_items(objective, model)
        if self.solver is not None:
            return 2 * reverse
        return 4 * theta.size**2 + min(theta.size, chunk_length(reverse, theta.dtype)) * reverse

    def examples(self, n):
        return n

    def remedies(self):
        return minimising_remedies(self.tolerance, self.max_steps)


def _is_better(now: _Iterate, direction, value, gradient) -> Bool[Array, ""]:
    """Armijo's rule; or, where J cannot resolve the step any more, a smaller gradient."""
    slope = jnp.vdot(now.gradient, direction)
    rounding = 10 * jnp.finfo(value.dtype).eps * jnp.abs(now.value)
    armijo = (slope < 0) & (value <= now.value + 1e-4 * slope)
    flat_but_smaller = (value <= now.value + rounding) & (norm(gradient) < 0.9 * norm(now.gradient))
    return (armijo | flat_but_smaller) & jnp.all(jnp.isfinite(gradient))


class Chord(AbstractTrainer):
    """θ ← θ − M∇J(θ, w), M = ∇²J(θ₀, w̄)⁻¹ of the shared start θ₀ and typical weights w̄.

    The limit is the minimiser whatever M is: M only sets the rate, about the spectral radius of
    I − M∇²J. A training whose gradient norm does not fall at some step is given up.

    **Source:** the chord (simplified Newton) method: Kelley, "Iterative Methods for Linear and
    Nonlinear Equations" (1995), §5.4.
    """

    tolerance: float
    max_steps: int = eqx.field(default=100, static=True)

    def init(self, objective, model, weights):
        # The explicit inverse: under vmap it is one matrix product for all trainings, where two
        # triangular solves take several times as long. Its rounding errors do not reach the limit.
        fn, theta, _ = flat(objective, model, weights)
        check_reachable(self.tolerance, theta.dtype)
        operator = lx.MatrixLinearOperator(hessian(fn, theta), _CURVED)
        solver = lx.Cholesky()
        state = solver.init(operator, {})
        solve = lambda v: lx.linear_solve(operator, v, solver, state=state, throw=False).value
        return jax.vmap(solve)(jnp.eye(theta.size, dtype=theta.dtype))

    def train(self, state, objective, model, weights):
        fn, theta, rebuild = flat(objective, model, weights)
        gradient_at = jax.grad(fn)

        def step(carry: Any) -> Any:
            theta, gradient, size, _, steps = carry
            theta = theta - dot(state, gradient)
            gradient = gradient_at(theta)
            return theta, gradient, norm(gradient), size, steps + 1

        def unfinished(carry: Any) -> Bool[Array, ""]:
            _, _, size, before, steps = carry
            return (size >= self.tolerance) & (size < before) & (steps < self.max_steps)

        gradient = gradient_at(theta)
        infinite = jnp.full((), jnp.inf, theta.dtype)
        start = (theta, gradient, norm(gradient), infinite, jnp.asarray(0))
        theta, _, size, _, steps = jax.lax.while_loop(unfinished, step, start)
        return rebuild(theta), Trained(size, steps, size < self.tolerance)

    def attempts(self):
        return (self,)

    def items(self, objective, model):
        return gradient_items(objective, model)

    def examples(self, n):
        return n

    def remedies(self):
        return minimising_remedies(self.tolerance, self.max_steps)


def hessian(fn, theta: Float[Array, " P"]) -> Float[Array, "P P"]:
    """∇²fn by P forward-over-reverse products, a chunk of columns at a time."""
    _, product = jax.linearize(jax.grad(fn), theta)
    matrix = products(product, jnp.eye(theta.size, dtype=theta.dtype))
    return 0.5 * (matrix + matrix.T)
