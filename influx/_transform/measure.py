from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .._influence import Influence, check_influence
from .._measurement import AbstractMeasurement, Custom


def measure(f: Influence, fn: Callable[[Any, Any], Any] | AbstractMeasurement) -> Influence:
    """Influence on any measurement m = fn(model, query) of the whole model.

    ```python
    norm = influx.measure(f, lambda model, x: jnp.sum(model(x) ** 2))
    norm(Xq)                                                     # [m, n]
    ```

    **Arguments:** `fn`: an `extend.AbstractMeasurement`, or any function, differentiable in the model,
    returning a scalar, or a vector of c components ([m, c, n]). It sees the whole model, also where
    the risk is restricted to a part of it. Queries may be any pytree of arrays with a leading axis.

    **Sign.** Positive: training more on point i raises fn. **Cost:** c solves per query.

    **Raises:** `ValueError` where `fn` is not callable; on the first call, where it returns no real
    scalar or vector.
    """
    check_influence("measure", f)
    if isinstance(fn, AbstractMeasurement):
        return replace(f, measurement=fn)
    if not callable(fn):
        raise ValueError(f"`fn` must be a function of (model, query), got {fn!r}.")
    return replace(f, measurement=Custom(fn))
