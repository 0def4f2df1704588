"""Drawn problems: a few fixed shapes, seeds as integers, never at a symmetric point."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from hypothesis import strategies as st

from . import _oracle as oracle
from ._oracle import Family, Problem

SOFTMAX = Family("softmax", "softmax", (2, 3))
BINARY = Family("binary", "binary", (3, 1))
OVERLAPPING = Family("overlapping", "binary", (1, 1))
SCALAR = Family("scalar", "squared", (2, 1))
TWO_CLASSES = Family("two classes", "softmax", (2, 2))
SQUARED = Family("squared", "squared", (2, 2))
NETWORK = Family("network", "softmax", (2, 2, 3))
SQUARED_NETWORK = Family("squared network", "squared", (2, 2, 1))

LINEAR = (SOFTMAX, BINARY, SQUARED)
ALL = (*LINEAR, NETWORK, SQUARED_NETWORK)
CLASSIFIERS = (SOFTMAX, BINARY, NETWORK)
QUERIES = 3


def problems(*families: Family, damped: bool = True, regularised: bool = True):
    """Problems at their minimiser, with data weights that include 0, and an l2 per leaf.

    `damped`: whether λ > 0 is drawn too. `regularised=False`: without Ω, for families whose
    minimiser is then still unique.
    """
    draws = st.builds(
        draw,
        st.sampled_from(families),
        st.integers(0, 2**32 - 1),
        st.sampled_from((0.0, 0.02, 0.3)) if damped else st.just(0.0),
        st.just(regularised),
    )
    return draws.filter(well_posed)


@lru_cache(maxsize=4096)
def draw(family: Family, seed: int, damping: float, regularised: bool) -> Problem:
    rng = np.random.default_rng(seed)
    leaves = len(family.leaves)
    X, y = _examples(rng, family, family.n)
    Xq, yq = _examples(rng, family, QUERIES)
    l2 = np.exp(rng.uniform(np.log(0.02), np.log(0.4), leaves)) * regularised
    weights = rng.choice([0.4, 1.0, 1.0, 1.5, 2.0], family.n)
    weights[rng.integers(family.n)] = 0.0
    start = 0.5 * rng.normal(size=family.P)
    problem = Problem(family, seed, X, y, weights, l2, damping, Xq, yq, start)
    return replace(problem, theta=oracle.minimise(problem))


def _examples(rng: np.random.Generator, family: Family, n: int):
    """Inputs off centre, targets that depend on them with noise, unequal classes."""
    X = rng.normal(size=(n, family.sizes[0])) + 0.3
    K = family.sizes[-1]
    z = 0.7 * X @ rng.normal(size=(X.shape[1], K)) + np.linspace(0.5, -0.3, K)
    if family.loss == "softmax":
        return X, np.argmax(z + rng.gumbel(size=z.shape), axis=1)
    if family.loss == "binary":
        return X, (z + rng.logistic(size=z.shape) > 0).astype(int)
    return X, np.sin(z) + 0.5 * rng.normal(size=z.shape)


def well_posed(problem: Problem) -> bool:
    """Whether θ is a strict minimiser, far enough from a degenerate one for 1e-6 to be told."""
    if np.linalg.norm(oracle.gradient(problem, problem.theta)) > 1e-11:
        return False
    low = np.linalg.eigvalsh(oracle.hessian(problem, problem.theta))[0]
    return low > 1e-2 and np.linalg.norm(problem.theta) < 30
