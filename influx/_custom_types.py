"""Shape vocabulary used in every annotation.

n training points, m queries, k vectors or retrained models, c components of a vector
measurement, C classes, K outputs of a model on one input, P parameters.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree

Model = PyTree[Any]
"""Any Equinox model: its inexact array leaves are parameters, every other leaf is a constant."""

Example = PyTree[Array]
"""One (input, target) pair: the data with the leading axis indexed away."""

Scores = Float[Array, "..."]
"""Influence values: [m, n], or [m, c, n] for vector measurements."""

Scalar = Array | np.ndarray
"""One number held as an array, so that programs are compiled for any value of it."""

ScalarLike = float | Scalar
"""One number, as a user writes it."""

Where = Callable[[Any], Any]
"""Selects part of a model, as in `equinox.tree_at`."""
