from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._chunks import take
from .._data import check_axes
from .._validate import traced
from .base import AbstractMeasurement


class Custom(AbstractMeasurement):
    """m = fn(model, query), any differentiable function of the *whole* model and one query."""

    fn: Callable[[Any, Any], Any]

    def __call__(self, risk, model, query):
        return self.fn(risk.whole(model), query)

    def check(self, risk, model, queries):
        check_axes(queries, "queries")
        shape = traced(
            lambda m, q: self(risk, m, q),
            model,
            take(queries, 0),
            what="`fn(model, query)` cannot be called on the query",
            remedy="It sees one row of exactly what `f(queries)` is given, without the leading axis: of "
            "(X, y) a pair.",
        )
        if not isinstance(shape, jax.ShapeDtypeStruct) or len(shape.shape) > 1:
            raise ValueError(
                "A measurement is a scalar or a vector per query, got "
                f"{shape}. Return `jnp.ravel(...)` of what you measure."
            )
        if shape.size == 0:
            raise ValueError(f"The measurement is an empty vector, {shape}: nothing is measured.")
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(
                f"A measurement must be a real number, got dtype {shape.dtype}: a decision has no "
                "derivative. Measure a logit, a probability or a margin instead."
            )

    def constants(self, risk, model):
        raise ValueError(
            "A custom measurement has no known bounds, so nothing about it can be certified. "
            'Use the loss, or `influx.classification(f, "margin" | "probability" | "logit")`.'
        )
