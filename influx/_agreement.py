"""How well predicted changes agree with actual ones: the three figures every table quotes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Predicted against actual changes of one measurement.

    - `pearson`: their correlation, NaN where either is constant
    - `slope`: of actual on predicted by least squares (with an intercept); 1 is unbiased in size
    - `largest_error`: max |actual − predicted|, in the measurement's unit
    - `largest_actual`: max |actual|, the scale to read the error against
    """

    pearson: float
    slope: float
    largest_error: float
    largest_actual: float


def agreement(predicted, actual) -> Agreement:
    """Compare two arrays of one shape, all entries pooled.

    **Raises:** `ValueError` where shapes differ, there are fewer than two entries, or one is not
    finite.
    """
    x, y = (np.asarray(a, dtype=float) for a in (predicted, actual))
    if x.shape != y.shape or x.size < 2:
        raise ValueError(
            "`predicted` and `actual` need one shape and at least two entries, got "
            f"{x.shape} and {y.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("`predicted` and `actual` must be finite: drop undefined entries first.")
    dx, dy = x.ravel() - x.mean(), y.ravel() - y.mean()
    xx, yy, xy = dx @ dx, dy @ dy, dx @ dy
    return Agreement(
        pearson=float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan"),
        slope=float(xy / xx) if xx > 0 else float("nan"),
        largest_error=float(np.max(np.abs(y - x))),
        largest_actual=float(np.max(np.abs(y))),
    )
