"""Deliberate errors that several propositions share: changes of the problem before the subject sees
it."""

from dataclasses import replace

import numpy as np

from ._oracle import Problem


def on(change, subject):
    """The subject, asked about a changed problem."""
    return lambda problem, *args: subject(change(problem), *args)


def unweighted(problem: Problem) -> Problem:
    return replace(problem, w=np.ones(problem.n))


def undamped(problem: Problem) -> Problem:
    return replace(problem, damping=0.0)


def damped_twice(problem: Problem) -> Problem:
    return replace(problem, damping=2 * problem.damping)


def unpenalised_curvature(problem: Problem) -> Problem:
    """Ω left out of H (a little damping keeps H regular)."""
    return replace(problem, l2=0 * problem.l2, damping=problem.damping + 1e-2)


def elsewhere(problem: Problem) -> Problem:
    """Everything taken at another point than θ̂."""
    shift = np.random.default_rng(problem.seed).normal(size=problem.theta.size)
    return replace(problem, theta=problem.theta + 0.02 * shift)
