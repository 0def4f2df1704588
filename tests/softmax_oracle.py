"""Softmax regression in NumPy and SciPy: W is [C, D + 1], the bias last."""

import numpy as np
import scipy.optimize
import scipy.special


def ones(X):
    return np.hstack([X, np.ones((len(X), 1))])


def softmax_gradient(W, X, y, weights, l2):
    """∇J."""
    P = scipy.special.softmax(ones(X) @ W.T, axis=1)
    P[np.arange(len(y)), y] -= 1
    return (P * weights[:, None]).T @ ones(X) / len(y) + l2 * W


def root(fn, start):
    """Where fn(W) is 0, to high precision."""
    found = scipy.optimize.root(
        lambda t: fn(t.reshape(start.shape)).ravel(), start.ravel(), tol=1e-14
    )
    W = found.x.reshape(start.shape)
    assert np.linalg.norm(fn(W)) < 1e-11
    return W


def softmax_minimum(X, y, weights, l2, classes):
    """argmin J."""
    start = np.zeros((classes, X.shape[1] + 1))
    return root(lambda W: softmax_gradient(W, X, y, weights, l2), start)
