"""P4. Weighted influences sum to what the regulariser does; without one, to zero.

STATEMENT
    (a) Σᵢ wᵢ I(i; m) = n ∇mᵀH⁻¹∇Ω(θ̂); in particular 0 without a regulariser.
    (b) Corollary. Without a regulariser Σ_{j≠i} wⱼ I(i; ℓⱼ) = wᵢ sᵢ ≥ 0; with unit weights
        Σ_{j≠i} I(i; ℓⱼ) = sᵢ. On the training data *every* point looks harmful to the rest, so its
        value must be read on held-out data.
    Both hold with H + λI in place of H.

ASSUMPTIONS
    ∇J(θ̂, w) = 0 and H + λI invertible. Stationarity is what is used: away from it (a) fails by
    −n∇mᵀH⁻¹∇J, which is a mutant here. In (b) the weights of the *others* enter; unweighted, the
    statement needs wⱼ = 1.

PROOF
    (a) Stationarity reads (1/n) Σᵢ wᵢgᵢ + ∇Ω(θ̂) = 0, so Σᵢ wᵢgᵢ = −n∇Ω(θ̂). By linearity
        Σᵢ wᵢ I(i; m) = −∇mᵀH⁻¹ Σᵢ wᵢgᵢ = n ∇mᵀH⁻¹∇Ω(θ̂).
    (b) I(i; ·) is linear in the measurement, so Σⱼ wⱼ I(i; ℓⱼ) = −(Σⱼ wⱼgⱼ)ᵀH⁻¹gᵢ = n∇ΩᵀH⁻¹gᵢ,
        which is 0 without Ω. Take the term j = i to the other side: Σ_{j≠i} wⱼ I(i; ℓⱼ) = −wᵢ I(i;
        ℓᵢ) = wᵢsᵢ by P3, and wᵢ ≥ 0, sᵢ ≥ 0. ∎

CHECK
    The library's influences, summed, against the NumPy right-hand sides, with and without Ω.

SOURCE
    The balance of scores at a stationary point is classical (Cook & Weisberg 1982); the reading of
    (b) is this project's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import ALL, OVERLAPPING, SQUARED, problems
from ._registry import Proposition, register


@dataclass(frozen=True)
class Subject:
    influence: Callable
    on_training: Callable


SUBJECT = Subject(library.influence, library.on_training)


def check(problem, subject) -> dict[str, float]:
    scores, square = subject.influence(problem), subject.on_training(problem)
    w, H = problem.w, oracle.curvature(problem)
    pull = np.linalg.solve(H, problem.n * problem.penalty * problem.theta)
    want = oracle.measurement_gradient(problem) @ pull
    others = w @ square - w * np.diag(square)
    s = oracle.self_influence_size(problem)
    small = 1e-9 * (np.abs(scores) @ w).max()
    errors = {
        "weighted sum": gap(scores @ w, want, rtol=0.0, atol=small),
        "on the others": gap(
            others,
            w * s + oracle.gradients(problem, problem.theta) @ pull,
            rtol=0.0,
            atol=1e-9 * (w @ np.abs(square)).max(),
        ),
    }
    if not problem.l2.any():
        # Points of weight 0 sum to 0, rounded: the size to compare with is that of the terms.
        errors["every point looks harmful"] = above(
            -others.min(), 0.0, size=(w @ np.abs(square)).max()
        )
        errors["zero"] = gap(scores @ w, 0 * want, atol=small)
    return errors


def both(change):
    return Subject(*(mutants.on(change, part) for part in (library.influence, library.on_training)))


MUTANTS = {
    "sign": replace(SUBJECT, influence=lambda p: -library.influence(p)),
    "not multiplied by n": replace(SUBJECT, influence=lambda p: library.influence(p) / p.n),
    "renormalised": replace(
        SUBJECT,
        influence=lambda p: (lambda s: s - s.mean(1, keepdims=True))(library.influence(p)),
    ),
    "one point dropped": replace(
        SUBJECT, influence=lambda p: library.influence(p) * (np.arange(p.n) != np.argmax(p.w))
    ),
    "signs on training data": replace(SUBJECT, on_training=lambda p: -library.on_training(p)),
    "weights ignored": both(mutants.unweighted),
    "damping dropped": both(mutants.undamped),
    "another point than θ̂": both(mutants.elsewhere),
}

STRATEGY = st.one_of(problems(*ALL), problems(SQUARED, OVERLAPPING, regularised=False))
register(Proposition("P4", "zero sum", STRATEGY, check, SUBJECT, MUTANTS))
