"""Errors relative to their tolerance: a check holds where none exceeds 1."""

import numpy as np


def gap(got, want, *, rtol: float = 1e-8, atol: float = 0.0) -> float:
    """max |got − want| over atol + rtol · max |want|; infinite for NaN or another shape."""
    got, want = np.asarray(got, float), np.asarray(want, float)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf
    return _ratio(np.abs(got - want).max(initial=0.0), atol + rtol * np.abs(want).max(initial=0.0))


def above(values, bound, *, slack: float = 1e-10, size: float = 1e-300) -> float:
    """How far `values ≤ bound` is violated, over `slack` times the largest size (at least `size`)."""
    values, bound = np.asarray(values, float), np.asarray(bound, float)
    if not (np.isfinite(values).all() and np.isfinite(bound).all()):
        return np.inf
    size = max(np.abs(values).max(initial=0.0), np.abs(bound).max(initial=0.0), size)
    return max(0.0, (values - bound).max(initial=-np.inf)) / (slack * size)


def apart(a, b, *, least: float) -> float:
    """≤ 1 where a and b differ by at least `least` relative to b: for what must *not* be equal."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    difference = np.abs(a - b).max() / np.abs(b).max()
    return np.inf if not difference > 0 else least / difference


def _ratio(error: float, tolerance: float) -> float:
    if error == 0:
        return 0.0
    return error / tolerance if tolerance > 0 else np.inf
