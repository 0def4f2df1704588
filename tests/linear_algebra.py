"""Matrices with a spectrum that is known, and what a solve answered."""

import lineax as lx
import numpy as np


def symmetric(rng, spectrum):
    """A matrix of these eigenvalues, and its eigenvectors."""
    Q = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))[0]
    A = (Q * spectrum) @ Q.T
    return (A + A.T) / 2, Q


def result_is(result, name):
    return bool(np.all(np.asarray(result == getattr(lx.RESULTS, name))))
