"""P1. Influence is n times the derivative of the trained model's measurement in a data weight.

STATEMENT
    (m(θ̂(w + δeᵢ)) − m(θ̂(w − δeᵢ))) / (2δ) = I(i; m)/n + O(δ²),    I(i; m) = −∇mᵀ H⁻¹ gᵢ.

    With a damping λ the same holds with H + λI in place of H, where θ̂(w) is the minimiser of
    J(·, w) + (λ/2)‖· − θ̂‖², θ̂ held fixed: damping is the influence of a model that is retrained
    but kept near where it was.

ASSUMPTIONS
    ℓ and Ω four times continuously differentiable in θ, m three times; θ̂ a strict local minimiser of
    J(·, w) with H = ∇²J(θ̂, w) ≻ 0. No convexity: θ̂(w') is the minimiser near θ̂. w may hold
    zeros.

PROOF
    Let F(θ, v) = ∇_θ J(θ, v) = (1/n) Σⱼ vⱼ ∇ℓ(zⱼ, θ) + ∇Ω(θ).
    1. F(θ̂, w) = 0 since θ̂ is an interior minimiser, and ∂F/∂θ (θ̂, w) = H is invertible. By the
       implicit function theorem there are a neighbourhood of w and one continuous map v ↦ θ̂(v) on
       it with θ̂(w) = θ̂ and F(θ̂(v), v) = 0; it has as many continuous derivatives as F, that is
       three. H depends continuously on (θ, v), so it stays positive definite near (θ̂, w):
       the points θ̂(v) are strict local minimisers, not merely stationary. (F is affine in v, so
       negative weights, as for wᵢ = 0 and −δ, are covered as well.)
    2. Differentiate F(θ̂(v), v) = 0 in vᵢ at v = w:  H ∂θ̂/∂wᵢ + (1/n) gᵢ = 0, so
       ∂θ̂/∂wᵢ = −(1/n) H⁻¹ gᵢ.
    3. Chain rule: ∂m(θ̂(w))/∂wᵢ = ∇mᵀ ∂θ̂/∂wᵢ = −(1/n) ∇mᵀH⁻¹gᵢ = I(i; m)/n.
    4. Let φ(δ) = m(θ̂(w + δeᵢ)), three times continuously differentiable. Taylor's formula at ±δ gives
       φ(±δ) = φ(0) ± δφ'(0) + ½δ²φ''(0) ± (δ³/6) φ'''(ξ±); in the difference the even terms cancel:
       (φ(δ) − φ(−δ))/(2δ) = φ'(0) + O(δ²).
    5. Damping: J_λ(θ, v) = J(θ, v) + (λ/2)‖θ − θ̂‖² has the same gradient at θ̂, hence the
       stationary point θ̂ at v = w, and Hessian H + λI there. Steps 1–4 apply to J_λ. ∎

CHECK
    Own re-minimisation at w ± δeᵢ and w ± (δ/2)eᵢ. The Richardson extrapolation of both differences
    equals I/n to 1e-6, and halving δ divides the error by four.

SOURCE
    P. W. Koh, P. Liang, "Understanding Black-box Predictions via Influence Functions",
    arXiv:1703.04730; R. D. Cook, S. Weisberg, "Residuals and Influence in Regression" (1982).
"""

import numpy as np

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import gap
from ._problems import ALL, problems
from ._registry import Proposition, register

DELTA = 3e-3


def differences(problem, points, delta: float) -> np.ndarray:
    """n (m(θ̂(w + δeᵢ)) − m(θ̂(w − δeᵢ)))/(2δ), every query and some training points."""

    def moved(i, sign):
        weights = problem.w + sign * delta * np.eye(problem.n)[i]
        theta = oracle.minimise(problem, weights, centre=problem.theta)
        return oracle.measurement(problem, "loss", theta)

    columns = [(moved(i, 1) - moved(i, -1)) / (2 * delta) for i in points]
    return problem.n * np.stack(columns, axis=1)


def check(problem, subject) -> dict[str, float]:
    points = [int(np.argmin(problem.w)), *np.argsort(problem.w)[-3:]]
    coarse, fine = (differences(problem, points, d) for d in (DELTA, DELTA / 2))
    got = subject(problem)[:, points]
    ratio = np.linalg.norm(coarse - got) / np.linalg.norm(fine - got)
    return {
        "derivative": gap(got, (4 * fine - coarse) / 3, rtol=1e-6),
        "order two": gap(ratio, 4.0, rtol=0.05),
    }


MUTANTS = {
    "sign": lambda p: -library.influence(p),
    "not multiplied by n": lambda p: library.influence(p) / p.n,
    "n − 1 in place of n": lambda p: library.influence(p) * (p.n - 1) / p.n,
    "renormalised": lambda p: (lambda s: s - s.mean(1, keepdims=True))(library.influence(p)),
    "weights ignored": mutants.on(mutants.unweighted, library.influence),
    "multiplied by the weights": lambda p: library.influence(p) * p.w,
    "damping dropped": mutants.on(mutants.undamped, library.influence),
    "damping added twice": mutants.on(mutants.damped_twice, library.influence),
    "Ω left out of H": mutants.on(mutants.unpenalised_curvature, library.influence),
    "another point than θ̂": mutants.on(mutants.elsewhere, library.influence),
    "empirical Fisher for H": lambda p: library.influence(p, library.empirical_fisher),
    "Gauss–Newton for H": lambda p: library.influence(p, library.ix.GaussNewton),
}

register(Proposition("P1", "first order", problems(*ALL), check, library.influence, MUTANTS))
