"""P2. Influence between training points is symmetric.

STATEMENT
    I(i; ℓⱼ) = I(j; ℓᵢ), for all training points i, j, whatever their weights, and at any damping.

ASSUMPTIONS
    ℓ and Ω twice continuously differentiable at θ̂, H + λI invertible. θ̂ need not be a minimiser
    for this identity of the formula; to *mean* a derivative (P1) it must be.

PROOF
    I(i; ℓⱼ) = −gⱼᵀ(H + λI)⁻¹gᵢ: the gradient of the measurement ℓⱼ is the training gradient gⱼ,
    taken at the same θ̂. A number equals its transpose: −gⱼᵀ(H + λI)⁻¹gᵢ = −gᵢᵀ(H + λI)⁻ᵀgⱼ. By
    Schwarz's theorem H, a matrix of continuous second derivatives, is symmetric, and so are H + λI
    and its inverse. The right-hand side is therefore −gᵢᵀ(H + λI)⁻¹gⱼ = I(j; ℓᵢ). ∎

    The *removal effect* −wᵢI(i; ℓⱼ)/n is symmetric only where wᵢ = wⱼ, and relative influence by
    loss or parameters is not symmetric at all: both are mutants here.

CHECK
    The matrix [I(i; ℓⱼ)]ⱼᵢ of the library equals its transpose, and the NumPy formula.

SOURCE
    F. R. Hampel, "The influence curve and its role in robust estimation" (1974), for the form;
    P. W. Koh, P. Liang, arXiv:1703.04730.
"""

import jax.numpy as jnp
import numpy as np

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import gap
from ._problems import ALL, problems
from ._registry import Proposition, register


def check(problem, subject) -> dict[str, float]:
    scores = subject(problem)
    g = oracle.gradients(problem, problem.theta)
    want = -g @ np.linalg.solve(oracle.curvature(problem), g.T)
    return {"symmetry": gap(scores, scores.T), "formula": gap(scores, want)}


def relative_by_loss(problem):
    f = library.ix.relative(library.handle(problem), "loss")
    return np.asarray(f(library.training(problem)))


def queries_elsewhere(problem):
    """The measurement's gradient at another point than the training gradients."""
    moved = mutants.elsewhere(problem)
    vectors = oracle.gradients(moved, moved.theta)
    return np.asarray(
        library.ix.measure(library.handle(problem), library.project)(jnp.asarray(vectors))
    )


MUTANTS = {
    "sign": lambda p: -library.on_training(p),
    "removal effect": lambda p: -library.on_training(p) * p.w / p.n,
    "multiplied by the weights": lambda p: library.on_training(p) * p.w,
    "relative by loss": relative_by_loss,
    "measurement at another point": queries_elsewhere,
    "weights ignored": mutants.on(mutants.unweighted, library.on_training),
    "damping dropped": mutants.on(mutants.undamped, library.on_training),
}

register(Proposition("P2", "symmetry", problems(*ALL), check, library.on_training, MUTANTS))
