"""P3. Training more on a point lowers its own loss; training without it never does.

STATEMENT
    (a) I(i; ℓᵢ) = −sᵢ = −gᵢᵀH⁻¹gᵢ ≤ 0, with equality iff gᵢ = 0.
    (b) Finite form. Let θ̂ and θ̂₋ᵢ be *global* minimisers of J(·, w) and of J(·, w − wᵢeᵢ), wᵢ >
        0. Then ℓ(zᵢ, θ̂₋ᵢ) ≥ ℓ(zᵢ, θ̂).
    (c) Corollary. For cross-entropy with hard labels γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂): the memorization score
        p_y(xᵢ; θ̂) − p_y(xᵢ; θ̂₋ᵢ) lies in [0, 1), and a point that is not fitted (γᵢ(θ̂) ≤ 0) is
        not fitted without itself either.

ASSUMPTIONS
    (a) H ≻ 0 (with a damping, H + λI ≻ 0). (b) None besides that both minimisers exist: no
    convexity, no smoothness, no uniqueness. It holds for *erasing* (1/n and Ω stay); where removal
    renormalises the mean to n − 1 points, Ω weighs less than before and (b) fails, which is a
    mutant here.

PROOF
    (a) P1 with m = ℓᵢ, so ∇m = gᵢ. H⁻¹ ≻ 0, hence gᵢᵀH⁻¹gᵢ > 0 unless gᵢ = 0.
    (b) Write J₋ᵢ = J − (wᵢ/n)ℓᵢ, the objective without the point. Two optimality inequalities,
            J(θ̂) ≤ J(θ̂₋ᵢ), that is  J₋ᵢ(θ̂) + (wᵢ/n)ℓᵢ(θ̂) ≤ J₋ᵢ(θ̂₋ᵢ) + (wᵢ/n)ℓᵢ(θ̂₋ᵢ),
            J₋ᵢ(θ̂₋ᵢ) ≤ J₋ᵢ(θ̂).
        Add them; the J₋ᵢ terms cancel: (wᵢ/n)ℓᵢ(θ̂) ≤ (wᵢ/n)ℓᵢ(θ̂₋ᵢ). Divide by wᵢ/n > 0.
    (c) With hard labels ℓᵢ = −log p_y, and γ = log p_y − log(1 − p_y) is an increasing function of
        p_y, hence a decreasing function of ℓᵢ. So (b) gives γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂) and p_y(θ̂₋ᵢ) ≤
        p_y(θ̂); both probabilities lie in (0, 1), so the score lies in [0, 1). If γᵢ(θ̂) ≤ 0, then
        γᵢ(θ̂₋ᵢ) ≤ 0. ∎

CHECK
    (a) against the NumPy formula, networks included. (b), (c) by own retraining of convex problems,
    every point of positive weight; (b) also for outputs sin(θx + b), non-convex in their one
    parameter, minimised globally: Ω ≤ J(0) confines θ to an interval, which is searched.

SOURCE
    The exchange argument is that of comparative statics (P. Milgrom, C. Shannon, "Monotone
    comparative statics", 1994). V. Feldman, C. Zhang, arXiv:2008.03703, for the score.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import ALL, problems
from ._registry import Proposition, register


def erased(w: np.ndarray, i: int) -> np.ndarray:
    return np.where(np.arange(len(w)) == i, 0.0, w)


@dataclass(frozen=True)
class Subject:
    """The library's self-influence, and what it means to train without a point."""

    self_influence: Callable
    influence: Callable
    without: Callable


SUBJECT = Subject(library.self_influence, library.on_training, erased)


def check(problem, subject) -> dict[str, float]:
    s = oracle.self_influence_size(problem)
    got = subject.self_influence(problem)
    errors = {
        "formula": gap(got, -s),
        "is the diagonal": gap(got, np.diag(subject.influence(problem))),
        "sign": above(got, 0.0, slack=1e-12),
        "non-convex": above(*wave(problem.seed, subject.without), slack=1e-9),
    }
    if len(problem.family.sizes) == 2:
        errors |= finite(problem, subject.without)
    return errors


def finite(problem, without) -> dict[str, float]:
    """(b) and (c) where J is convex, so that minimisers are global."""
    before, after, margin, margin_without = [], [], [], []
    classifier = problem.family.loss != "squared"
    for i in np.flatnonzero(problem.w > 0)[:5]:
        theta = oracle.minimise(problem, without(problem.w, i))
        z = (problem.X[i : i + 1], problem.y[i : i + 1])
        before.append(oracle.losses(problem, problem.theta, *z))
        after.append(oracle.losses(problem, theta, *z))
        if classifier:
            margin.append(oracle.measurement(problem, "margin", problem.theta, *z))
            margin_without.append(oracle.measurement(problem, "margin", theta, *z))
    errors = {"finite": above(before, after, slack=1e-11)}
    if classifier:
        score = oracle.sigmoid(np.array(margin)) - oracle.sigmoid(np.array(margin_without))
        errors["margin"] = above(margin_without, margin, slack=1e-11)
        errors["score"] = max(above(-score, 0.0, slack=1e-9), above(score, 1.0))
    return errors


def wave(seed: int, without) -> tuple[np.ndarray, np.ndarray]:
    """ℓᵢ(θ̂) and ℓᵢ(θ̂₋ᵢ) for ℓ = ½(sin(θx + b) − y)², every point, by global minimisation."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 8)) + 0.2
    b, w, l2 = 0.4, rng.uniform(0.5, 2.0, 8), 0.03

    def losses(t):
        return 0.5 * (np.sin(np.multiply.outer(t, x) + b) - y) ** 2

    def best(weights):
        value = lambda t: losses(t) @ weights / x.size + 0.5 * l2 * t**2
        reach = np.sqrt(2 * value(0.0) / l2)
        grid = np.linspace(-reach, reach, 20001)
        t = grid[np.argmin(value(grid))]
        for _ in range(8):  # Newton's method from the best grid point
            s, c = np.sin(t * x + b), np.cos(t * x + b)
            slope = weights @ ((s - y) * c * x) / x.size + l2 * t
            t = t - slope / (weights @ ((c**2 - (s - y) * s) * x**2) / x.size + l2)
        return t

    full = losses(best(w))
    return full, np.array([losses(best(without(w, i)))[i] for i in range(x.size)])


def renormalised(w: np.ndarray, i: int) -> np.ndarray:
    return erased(w, i) * len(w) / (len(w) - 1)


MUTANTS = {
    "sign": replace(SUBJECT, self_influence=lambda p: -library.self_influence(p)),
    "divided by n": replace(SUBJECT, self_influence=lambda p: library.self_influence(p) / p.n),
    "weights ignored": replace(
        SUBJECT, self_influence=mutants.on(mutants.unweighted, library.self_influence)
    ),
    "damping added twice": replace(
        SUBJECT, self_influence=mutants.on(mutants.damped_twice, library.self_influence)
    ),
    "root of sᵢ": replace(SUBJECT, self_influence=lambda p: -np.sqrt(-library.self_influence(p))),
    "doubled, not erased": replace(SUBJECT, without=lambda w, i: 2 * w - erased(w, i)),
    "another point erased": replace(SUBJECT, without=lambda w, i: erased(w, (i + 1) % len(w))),
    "mean over n − 1, Ω kept": replace(SUBJECT, without=renormalised),
}

register(Proposition("P3", "self-influence", problems(*ALL), check, SUBJECT, MUTANTS))
