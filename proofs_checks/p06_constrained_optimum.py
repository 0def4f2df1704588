"""P6. Relative influence is the optimum of a constrained problem.

STATEMENT
    For a symmetric M ≻ 0 and a budget δ > 0, moving along the point's own response Δθ = εH⁻¹gᵢ,

        max over ε of |∇mᵀΔθ|  subject to  ΔθᵀMΔθ ≤ δ²   equals   δ |I(i; m)| / ‖H⁻¹gᵢ‖_M.

    M = I: relative influence *by parameters*. M = H: *by loss*, since ‖H⁻¹gᵢ‖²_H = gᵢᵀH⁻¹gᵢ = sᵢ.
    There the budget is twice the increase of J to second order: 2(J(θ̂ + Δθ) − J(θ̂)) = ΔθᵀHΔθ +
    O(‖Δθ‖³). It is a mean squared change of the loss only where H is the exact Fisher matrix.

ASSUMPTIONS
    H ≻ 0, gᵢ ≠ 0; for the reading of M = H, ∇J(θ̂) = 0. With a damping H + λI stands for H, and
    J + (λ/2)‖· − θ̂‖² for J.

PROOF
    Let x = H⁻¹gᵢ ≠ 0. The constraint reads ε²‖x‖²_M ≤ δ², that is |ε| ≤ δ/‖x‖_M. The objective is
    |ε| |∇mᵀx|, nondecreasing in |ε|, so the maximum is at the boundary and equals δ |∇mᵀx|/‖x‖_M;
    and ∇mᵀx = ∇mᵀH⁻¹gᵢ = −I(i; m).
    M = H: xᵀHx = gᵢᵀH⁻¹HH⁻¹gᵢ = sᵢ. Taylor's formula at the stationary point θ̂ is
    J(θ̂ + Δθ) = J(θ̂) + 0 + ½ΔθᵀHΔθ + O(‖Δθ‖³).
    Fisher: F = (1/n) Σⱼ wⱼ E_y[∇ℓ(xⱼ, y) ∇ℓ(xⱼ, y)ᵀ], y drawn from the model, gives
    ΔθᵀFΔθ = (1/n) Σⱼ wⱼ E_y[(∇ℓ(xⱼ, y)ᵀΔθ)²]: the mean squared change of the loss to first order,
    over labels drawn from the model. For H this holds where H = F: a softmax on logits affine in
    θ, or any negative log-likelihood whose Gauss–Newton matrix is H, and no Ω. ∎

CHECK
    The feasible ε are found by root finding on the constraint, the objective evaluated there and
    at random feasible ε; against the library's relative influence. The reading as an increase of J
    by δ → 0; the reading as a mean squared change by the sum over labels, for logits affine in θ.

SOURCE
    E. Barshan, M.-E. Brunet, G. K. Dziugaite, "RelatIF: Identifying Explanatory Training Examples
    via Relative Influence", arXiv:2003.11630 (θ-RelatIF and ℓ-RelatIF).
"""

import numpy as np
from scipy.optimize import brentq

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import ALL, problems
from ._registry import Proposition, register

DELTA = 0.3


def check(problem, subject) -> dict[str, float]:
    H = oracle.curvature(problem)
    directions = np.linalg.solve(H, oracle.gradients(problem, problem.theta).T).T
    v = oracle.measurement_gradient(problem)
    errors = {}
    for kind, M in (("parameters", np.eye(len(H))), ("loss", H)):
        reach = np.array([boundary(x, M) for x in directions])
        best = np.abs(v @ (reach[:, None] * directions).T)
        got = DELTA * np.abs(subject(problem, kind))
        epsilon = np.random.default_rng(problem.seed).uniform(-1, 1, reach.shape) * reach
        inside = np.abs(v @ (epsilon[:, None] * directions).T)
        errors[f"optimum by {kind}"] = gap(got, best)
        errors[f"feasible by {kind}"] = above(inside, got)
    errors["budget"] = gap(increase(problem, directions), DELTA**2, rtol=1e-3)
    if problem.family.loss != "squared" and len(problem.family.sizes) == 2:
        errors["mean square"] = gap(*mean_square(problem, directions[0]))
    return errors


def boundary(x: np.ndarray, M: np.ndarray) -> float:
    """The ε > 0 at which ΔθᵀMΔθ = δ² for Δθ = εx, by root finding."""
    budget = lambda e: (e * x) @ M @ (e * x) - DELTA**2
    high = 1.0
    while budget(high) < 0:
        high *= 2
    return brentq(budget, 0.0, high, xtol=1e-14, rtol=1e-14)


def increase(problem, directions) -> float:
    """Twice the increase of J along the first direction, scaled from a small budget to δ²."""
    x, tiny = directions[0], 1e-5
    step = tiny * x / np.sqrt(x @ oracle.curvature(problem) @ x)
    value = lambda t: (
        oracle.objective(problem, t) + 0.5 * problem.damping * ((t - problem.theta) ** 2).sum()
    )
    # The mean over both signs removes the third-order term.
    rise = 0.5 * (value(problem.theta + step) + value(problem.theta - step)) - value(problem.theta)
    return 2 * rise * (DELTA / tiny) ** 2


def mean_square(problem, x: np.ndarray) -> tuple[float, float]:
    """xᵀ(H − ∇²Ω)x, and (1/n) Σⱼ wⱼ E_y[(∇ℓ(xⱼ, y)ᵀx)²] over the model's own labels."""
    family, theta = problem.family, problem.theta
    p = oracle.measurement(problem, "probability", theta, problem.X, problem.y)
    shape = problem.y.shape
    drawn = [np.full(shape, c) for c in range(p.shape[1])]
    squares = [(oracle.gradients(problem, theta, problem.X, y) @ x) ** 2 for y in drawn]
    expected = sum(p[:, c] * squares[c] for c in range(p.shape[1]))
    data = oracle.hessian(problem, theta) - np.diag(problem.penalty)
    assert len(family.sizes) == 2
    return x @ data @ x, problem.w @ expected / problem.n


def plain(problem, kind):
    return library.influence(problem)


MUTANTS = {
    "kinds exchanged": lambda p, kind: library.relative(
        p, {"loss": "parameters", "parameters": "loss"}[kind]
    ),
    "not divided": plain,
    "root missing": lambda p, kind: library.relative(p, "self" if kind == "loss" else kind),
    "divided by ‖gᵢ‖": lambda p, kind: (
        library.influence(p) / np.linalg.norm(oracle.gradients(p, p.theta), axis=1)
    ),
    "damping dropped": mutants.on(mutants.undamped, library.relative),
    "weights ignored": mutants.on(mutants.unweighted, library.relative),
    "divided by n": lambda p, kind: library.relative(p, kind) / p.n,
}

register(Proposition("P6", "constrained optimum", problems(*ALL), check, library.relative, MUTANTS))
