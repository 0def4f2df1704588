"""P8. Influences on class probabilities sum to zero; loss and margin are multiples of one of them.

STATEMENT
    For a classifier with probabilities p = softmax(z), a query (x, y) with a hard label y, and
    every i,
        (a) Σ_c I(i; p_c) = 0,
        (b) I(i; CE) = −I(i; p_y)/p_y,
        (c) I(i; γ) = I(i; p_y)/(p_y(1 − p_y)),   γ = z_y − logsumexp_{c≠y} z_c.

ASSUMPTIONS
    z differentiable in θ. Any H: only linearity of I(i; ·) in ∇m is used, so it holds for every
    curvature, damping and network, at any θ. In (b), CE is unweighted and unsmoothed.

PROOF
    I(i; m) = −∇mᵀH⁻¹gᵢ is linear in ∇m, so that any relation of gradients at θ is one of
    influences.
    (a) Σ_c p_c = 1 for every θ; hence Σ_c ∇p_c = 0.
    (b) CE = −log p_y; ∇CE = −∇p_y/p_y.
    (c) p_y = e^{z_y}/Σ_c e^{z_c} and 1 − p_y = Σ_{c≠y} e^{z_c}/Σ_c e^{z_c}, so log p_y − log(1 −
        p_y) = z_y − logsumexp_{c≠y} z_c = γ. The derivative of log p − log(1 − p) is 1/p + 1/(1 −
        p) = 1/(p(1 − p)); chain rule. ∎

CHECK
    The library's three answers against the identities, with p from NumPy; and its influence on
    probabilities against the NumPy formula. Two classes from one binary output included.

SOURCE
    Definitions of classification influence: this project, after M. Kounavis, O. Dia, I. Ramazanli,
    arXiv:2305.16094.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import gap
from ._problems import CLASSIFIERS, problems
from ._registry import Proposition, register


@dataclass(frozen=True)
class Subject:
    """Influence on p [m, C, n], and on loss and margin [m, n]."""

    probability: Callable
    loss: Callable
    margin: Callable


SUBJECT = Subject(
    lambda p: library.classification(p, "probability"),
    library.influence,
    lambda p: library.classification(p, "margin"),
)


def check(problem, subject) -> dict[str, float]:
    scores = subject.probability(problem)
    p = oracle.measurement(problem, "probability", problem.theta)
    rows, y = np.arange(len(p)), problem.yq.reshape(-1)
    own, p_y = scores[rows, y], p[rows, y][:, None]
    total = scores.sum(axis=1)
    return {
        "zero over classes": gap(total, 0 * total, atol=1e-10 * np.abs(scores).max()),
        "probability": gap(scores, oracle.influence(problem, "probability")),
        "loss": gap(subject.loss(problem), -own / p_y),
        "margin": gap(subject.margin(problem), own / (p_y * (1 - p_y))),
    }


def class_dropped(problem):
    scores = SUBJECT.probability(problem).copy()
    scores[:, -1] = 0
    return scores


MUTANTS = {
    "last class dropped": replace(SUBJECT, probability=class_dropped),
    "classes rotated": replace(
        SUBJECT, probability=lambda p: np.roll(SUBJECT.probability(p), 1, axis=1)
    ),
    "logits for probabilities": replace(
        SUBJECT, probability=lambda p: library.classification(p, "logit")
    ),
    "sign of the loss": replace(SUBJECT, loss=lambda p: -library.influence(p)),
    "damping dropped from the loss": replace(
        SUBJECT, loss=mutants.on(mutants.undamped, library.influence)
    ),
    "log p_y for the margin": replace(SUBJECT, margin=lambda p: -library.influence(p)),
    "weights ignored": replace(
        SUBJECT, probability=mutants.on(mutants.unweighted, SUBJECT.probability)
    ),
}

register(Proposition("P8", "classes", problems(*CLASSIFIERS), check, SUBJECT, MUTANTS))
