"""P5. Influence is bounded by two self-influences, and relative influence can be a cosine.

STATEMENT
    |I(i; m)| ≤ √sᵢ · √(∇mᵀH⁻¹∇m), with equality iff gᵢ and ∇m are parallel (or one is 0). So
    I(i; m)/√(sᵢ ∇mᵀH⁻¹∇m) lies in [−1, 1]: it is −cos of the angle of gᵢ and ∇m in the metric H⁻¹.
    On a training point's own loss it is −1.

ASSUMPTIONS
    H ≻ 0; with a damping, H + λI ≻ 0, the *same* matrix in all three terms.

PROOF
    H⁻¹ ≻ 0 has a Cholesky factor, H⁻¹ = LLᵀ with L invertible. Put a = Lᵀ∇m, b = Lᵀgᵢ. Then
    I(i; m) = −aᵀb, sᵢ = ‖b‖², ∇mᵀH⁻¹∇m = ‖a‖², and the statement is the Cauchy–Schwarz inequality
    |aᵀb| ≤ ‖a‖‖b‖, whose equality case is a ∥ b. Lᵀ is invertible, so a ∥ b iff ∇m ∥ gᵢ. For m =
    ℓᵢ, a = b and the quotient is −‖b‖²/‖b‖² = −1. ∎

CHECK
    The library's cosine and influence on the loss of queries, on training losses, and on linear
    measurements m = vᵀθ with v = cos(t)·gᵢ/√sᵢ + sin(t)·u, u of unit length and orthogonal to gᵢ
    in the metric H⁻¹: there the answer must be −cos t, which reaches ±1 at t = 0 and t = π only.

SOURCE
    E. Barshan, M.-E. Brunet, G. K. Dziugaite, "RelatIF", arXiv:2003.11630, for relative influence.
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

ANGLES = np.array([0.0, 0.6, 1.4, np.pi / 2, 2.5, np.pi])


@dataclass(frozen=True)
class Subject:
    """Cosines of queries [m, n], and of linear measurements [k, n]; plain influence."""

    cosine: Callable
    linear: Callable
    influence: Callable


SUBJECT = Subject(
    lambda p: library.relative(p, "cosine"),
    lambda p, v: library.linear(p, v, "cosine"),
    library.influence,
)


def fan(problem, i: int) -> np.ndarray:
    """Vectors at the angles ANGLES to gᵢ in the metric (H + λI)⁻¹."""
    inverse = np.linalg.inv(oracle.curvature(problem))
    unit = lambda v: v / np.sqrt(v @ inverse @ v)
    a = unit(oracle.gradients(problem, problem.theta)[i])
    u = np.random.default_rng(problem.seed).normal(size=a.size)
    u = unit(u - (u @ inverse @ a) * a)
    return np.cos(ANGLES)[:, None] * a + np.sin(ANGLES)[:, None] * u


def check(problem, subject) -> dict[str, float]:
    v = oracle.measurement_gradient(problem)
    own = np.einsum("mp,pm->m", v, np.linalg.solve(oracle.curvature(problem), v.T))
    bound = np.sqrt(np.outer(own, oracle.self_influence_size(problem)))
    i = problem.seed % problem.n
    cosine = subject.cosine(problem)
    return {
        "bound": above(np.abs(subject.influence(problem)), bound),
        "range": above(np.abs(cosine), 1.0),
        "formula": gap(cosine, oracle.influence(problem) / bound),
        "equality iff parallel": gap(
            subject.linear(problem, fan(problem, i))[:, i], -np.cos(ANGLES)
        ),
    }


MUTANTS = {
    "sign": replace(SUBJECT, cosine=lambda p: -library.relative(p, "cosine")),
    "root of sᵢ missing": replace(
        SUBJECT,
        cosine=lambda p: library.relative(p, "cosine") / np.sqrt(oracle.self_influence_size(p)),
    ),
    "scale of the point alone": replace(
        SUBJECT,
        cosine=lambda p: library.relative(p, "loss"),
        linear=lambda p, v: library.linear(p, v, "loss"),
    ),
    "plain cosine, metric I": replace(
        SUBJECT,
        linear=lambda p, v: (
            -(v / np.linalg.norm(v, axis=1, keepdims=True))
            @ unit_rows(oracle.gradients(p, p.theta)).T
        ),
    ),
    "damping dropped": Subject(
        mutants.on(mutants.undamped, SUBJECT.cosine),
        mutants.on(mutants.undamped, SUBJECT.linear),
        mutants.on(mutants.undamped, SUBJECT.influence),
    ),
    "multiplied by n": replace(SUBJECT, influence=lambda p: p.n * library.influence(p)),
    "weights ignored": replace(SUBJECT, linear=mutants.on(mutants.unweighted, SUBJECT.linear)),
}


def unit_rows(g: np.ndarray) -> np.ndarray:
    return g / np.linalg.norm(g, axis=1, keepdims=True)


register(Proposition("P5", "bound", problems(*ALL), check, SUBJECT, MUTANTS))
