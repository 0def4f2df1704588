"""P14. The derivative of a training run tends to the implicit response.

STATEMENT
    Full-batch gradient descent θ_{t+1} = θ_t − η∇J(θ_t, w) from a θ_0 that does not depend on w.
    Let J(·, w) be μ-strongly convex with ∇J(·, w) Lipschitz, ∇²J L₃-Lipschitz, ∇ℓᵢ Lᵢ-Lipschitz,
    and let η be stable: ρ := sup_θ ‖I − η∇²J(θ)‖ < 1 (for eigenvalues in [μ, L]: η < 2/L and ρ =
    max(|1 − ημ|, |1 − ηL|)). Column i of the unrolled response R_T = ∂θ_T/∂w satisfies, with rᵢ =
    −(1/n)H⁻¹gᵢ the implicit one,
        ‖R_T[:, i] − rᵢ‖ ≤ ρ^T ‖rᵢ‖ + T ρ^{T−1} · η (L₃‖rᵢ‖ + Lᵢ/n) ‖θ_0 − θ̂‖ = O(T ρ^T).
    For a quadratic J, L₃ = 0.

ASSUMPTIONS
    As stated. The derivative is at the risk's own w; θ̂ = argmin J(·, w).

PROOF
    1. Iterates. ∇J(θ̂) = 0, so θ_{t+1} − θ̂ = (I − ηB_t)(θ_t − θ̂), B_t = ∫₀¹ ∇²J(θ̂ + s(θ_t −
    θ̂)) ds an average
        of Hessians; ‖I − ηB_t‖ ≤ ρ, hence e_t := ‖θ_t − θ̂‖ ≤ ρ^t e_0.
    2. Recursion. Differentiate the update in wᵢ: with H_t = ∇²J(θ_t, w) and R_t the i-th column,
            R_{t+1} = (I − ηH_t) R_t − (η/n) ∇ℓᵢ(θ_t),    R_0 = 0.
    3. Fixed point. H rᵢ = −(1/n)gᵢ says rᵢ = (I − ηH) rᵢ − (η/n) gᵢ.
    4. Difference E_t = R_t − rᵢ:
            E_{t+1} = (I − ηH_t) E_t − η(H_t − H) rᵢ − (η/n)(∇ℓᵢ(θ_t) − gᵢ).
        The last two terms have norm at most η(L₃‖rᵢ‖ + Lᵢ/n) e_t ≤ c ρ^t, c := η(L₃‖rᵢ‖ + Lᵢ/n)
        e_0. So ‖E_{t+1}‖ ≤ ρ‖E_t‖ + cρ^t, and by induction ‖E_T‖ ≤ ρ^T‖E_0‖ + c Σ_{t<T}
        ρ^{T−1−t}ρ^t = ρ^T‖E_0‖ + cTρ^{T−1}; E_0 = −rᵢ. ∎
    The factor T is real: for a quadratic and H, ∇²ℓᵢ with a common eigenvector at ρ's eigenvalue
    the sum adds T equal terms.

CHECK
    R_T of every T up to 240 by forward mode through a loop written here, on the library's objective,
    against the library's implicit response and this bound, with so much l2 that it has fallen below
    half of R's size after 60 steps and below 1e-6 of it after 240: quadratic J, and logistic J with
    L₃ and Lᵢ explicit. The library's own `Unrolled`, in reverse mode through its checkpoints, is held
    to that forward mode and to the bound.

SOURCE
    J. Domke, "Generic methods for optimization-based modeling" (2012); A. Shaban, C.-A. Cheng, N.
    Hatch, B. Boots, "Truncated back-propagation for bilevel optimization", arXiv:1810.10667; J.
    Lorraine, P. Vicol, D. Duvenaud, arXiv:1911.02590.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import influx as ix

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, apart, gap
from ._problems import BINARY, SCALAR, SQUARED, problems
from ._registry import Proposition, register

STEPS = 240
RUNS = (3, 60)  # of these lengths
KEY = jr.key(0)  # of the order in a full batch, which does not matter
SMOOTH = {"binary": 0.25, "squared": 1.0}
THIRD = {"binary": 1 / (6 * np.sqrt(3)), "squared": 0.0}


@dataclass(frozen=True)
class Subject:
    """∂θ_t/∂w for t = 1…STEPS, [STEPS, P, n], from a start and with a step size; R, [P, n]; and what
    `influx.Unrolled` makes of a run of T steps, [P, n]."""

    unrolled: Callable
    implicit: Callable
    reverse: Callable


def unrolled(problem, start, step) -> np.ndarray:
    risk, model = library.risk_of(problem), library.model_at(problem.family, start)
    return np.asarray(_unrolled(risk, model, jnp.asarray(step)))


@eqx.filter_jit
def _unrolled(risk, model, step):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    start, rebuild = ravel_pytree(params)

    def run(w):
        objective = lambda t: risk.objective(eqx.combine(rebuild(t), static), w)

        def update(theta, _):
            theta = theta - step * jax.grad(objective)(theta)
            return theta, theta

        return jax.lax.scan(update, start, length=STEPS)[1]

    return jax.jacfwd(run)(risk.weights)


def implicit(problem) -> np.ndarray:
    return library.linear(problem, np.eye(problem.theta.size)) / problem.n


def reverse(problem, start, step, steps) -> np.ndarray:
    risk, model = library.risk_of(problem), library.model_at(problem.family, start)
    # The step size is an array of the optimiser: a new one compiles nothing anew.
    descent = optax.GradientTransformation(_no_memory, jtu.Partial(_descend, jnp.asarray(step)))
    trainer = ix.SGD(descent, batch_size=problem.n, epochs=steps, key=KEY)
    f = ix.measure(ix.influence(risk, model, ix.Unrolled(trainer)), library.project)
    return np.asarray(f(jnp.eye(problem.theta.size))) / problem.n


def _no_memory(params):
    return optax.EmptyState()


def _descend(step, gradient, memory, params=None):
    return jtu.tree_map(lambda g: -step * g, gradient), memory


SUBJECT = Subject(unrolled, implicit, reverse)


def constants(problem):
    """A stable η, ρ, L₃ and the Lᵢ, from bounds that hold at every θ."""
    kind, w, n = problem.family.loss, problem.w, problem.n
    norms = np.sqrt(1 + (problem.X**2).sum(axis=1))
    mu, top = problem.l2.min(), SMOOTH[kind] * (w @ norms**2) / n + problem.l2.max()
    eta = 1.6 / top
    rho = max(1 - eta * mu, eta * top - 1)
    return eta, rho, THIRD[kind] * (w @ norms**3) / n, SMOOTH[kind] * norms**2


def stiff(problem):
    """The same with so much more l2 that the bound has fallen within the steps taken."""
    stiffer = replace(problem, l2=problem.l2 + 0.5)
    return replace(stiffer, theta=oracle.minimise(stiffer))


def check(problem, subject) -> dict[str, float]:
    problem = stiff(problem)
    eta, rho, third, smooth = constants(problem)
    start = problem.theta + np.random.default_rng(problem.seed).normal(size=problem.theta.size)
    got, want = subject.unrolled(problem, start, eta), subject.implicit(problem)
    error = np.linalg.norm(got - want, axis=1)  # [T, n]
    r = np.linalg.norm(want, axis=0)
    T = np.arange(1, STEPS + 1)[:, None]
    far = np.linalg.norm(start - problem.theta)
    bound = rho**T * r + T * rho ** (T - 1) * eta * (third * r + smooth / problem.n) * far
    g = oracle.gradients(problem, problem.theta)
    library_runs = {t: subject.reverse(problem, start, eta, t) for t in RUNS}
    size, late = r.max(), RUNS[-1]
    return {
        "Unrolled is forward mode": max(gap(library_runs[t], got[t - 1]) for t in RUNS),
        "rate of Unrolled": above(
            np.linalg.norm(library_runs[late] - want, axis=0), bound[late - 1], size=size
        ),
        # Late runs agree to rounding, whose size is that of R and not of the bound.
        "rate": max(above(e, b, size=size) for e, b in zip(error, bound)),
        "the bound says something": above(bound[[late - 1, -1]], np.array([[0.5], [1e-6]]) * size),
        "implicit": gap(want, -np.linalg.solve(oracle.curvature(problem), g.T) / problem.n),
        "early runs differ": apart(got[2], want, least=1e-3),
    }


def heavier(problem, start, step):
    """An update with twice the regulariser: another stationary point."""
    return unrolled(replace(problem, l2=2 * problem.l2), start, step)


def last_step(problem, start, step):
    """The derivative of one update, θ_t held fixed: −(η/n) ∇ℓᵢ."""
    g = oracle.gradients(problem, problem.theta)
    return np.broadcast_to(-step / problem.n * g.T, (STEPS, *g.T.shape))


def from_elsewhere(problem, start, step, steps):
    """A run that starts at the minimum."""
    return reverse(problem, problem.theta, step, steps)


MUTANTS = {
    "Unrolled: a step too few": replace(
        SUBJECT, reverse=lambda p, start, step, steps: reverse(p, start, step, steps - 1)
    ),
    "Unrolled: sign": replace(SUBJECT, reverse=lambda *a: -reverse(*a)),
    "Unrolled: not divided by n": replace(SUBJECT, reverse=lambda p, *a: p.n * reverse(p, *a)),
    "Unrolled: other weights": replace(SUBJECT, reverse=mutants.on(mutants.unweighted, reverse)),
    "Unrolled: another start": replace(SUBJECT, reverse=from_elsewhere),
    "Unrolled: Ω twice": replace(
        SUBJECT, reverse=lambda p, *a: reverse(replace(p, l2=2 * p.l2), *a)
    ),
    "sign": replace(SUBJECT, implicit=lambda p: -implicit(p)),
    "not divided by n": replace(SUBJECT, implicit=lambda p: p.n * implicit(p)),
    "weights ignored": replace(SUBJECT, implicit=mutants.on(mutants.unweighted, implicit)),
    "implicit at another point": replace(SUBJECT, implicit=mutants.on(mutants.elsewhere, implicit)),
    "Ω twice in the run": replace(SUBJECT, unrolled=heavier),
    "run under other weights": replace(SUBJECT, unrolled=mutants.on(mutants.unweighted, unrolled)),
    "mean over Σw": replace(
        SUBJECT,
        unrolled=lambda p, start, step: unrolled(replace(p, w=p.w * p.n / p.w.sum()), start, step),
    ),
    "last step alone": replace(SUBJECT, unrolled=last_step),
}

STRATEGY = problems(SQUARED, SCALAR, BINARY, damped=False)
register(Proposition("P14", "unrolled → implicit", STRATEGY, check, SUBJECT, MUTANTS))
