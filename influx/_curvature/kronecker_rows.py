"""The rows of every layer's gradients, over the training data, a block of examples at a time."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._checks import is_concrete
from .._chunks import chunk_length, chunked_sum, row_struct
from .._custom_types import Model
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Uncovered, Watched
from .fisher import Fisher
from .ggn import GaussNewton

# One layer's rows: of the places that see its matrix as it is, and, where there are such, transposed.
Parts = tuple[Rows, ...]
Total = TypeVar("Total")

# On a CPU more examples at a time than these, or than have rows of so many bytes, are no faster: what is
# made of them leaves its cache.
_MOST, _CACHED = 1024, 10 * 2**20


def watched(risk: EmpiricalRisk, model: Model) -> Watched:
    """The model's output on one training input, its layers watched.

    **Raises:** `ValueError` naming a parameter that no rule covers.
    """
    watch = Watched(lambda m, x: risk.output(m, x), model, row_struct(risk.data[0]))
    if watch.uncovered:
        raise ValueError(_uncovered(watch.uncovered))
    return watch


def _uncovered(found: list[Uncovered]) -> str:
    names = ", ".join(f"{u.path} {list(u.shape)} (in `{u.operation}`)" for u in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"No rule says how the model depends on {names}{more}. Three ways out: give a rule, "
        "`EKFAC(rules={MyLayer: fn})`, with fn(layer, x) the same layer in plain matrix products; give "
        "it a curvature of its own, `Mixture({where: Diagonal()}, EKFAC())`; or leave it out, "
        "`influx.restrict(risk, model, where)` with the parameters to keep."
    )


def has_unit_weights(risk: EmpiricalRisk) -> bool:
    """Whether all data weights are known to be 1, so that nothing is multiplied by them."""
    return is_concrete(risk.weights) and bool(np.all(np.asarray(risk.weights) == 1))


def weighted(x: Float[Array, "b ..."], weights: Float[Array, " b"] | None) -> Float[Array, "b ..."]:
    """wᵢ xᵢ; `None` are weights of 1."""
    return x if weights is None else weights.reshape(-1, *[1] * (x.ndim - 1)) * x


def sum_over_examples(
    of_block: Callable[[list[Parts], Float[Array, " b"] | None], Total],
    fisher: GaussNewton | Fisher,
    risk: EmpiricalRisk,
    watch: Watched,
    alive: Callable[[Layer, Parts], int] = lambda layer, parts: 0,
    *,
    unit: bool,
    compensated: bool = False,
) -> Total:
    """Σ `of_block(parts, weights)` over blocks of examples, `parts` the rows of their gradients for the
    Fisher's cotangents, layer by layer; `weights` is `None` where they are all 1, which is `unit`.

    `alive`: how many numbers of an example `of_block` holds for a layer, beside three times its parts.
    """

    def parts(example, i) -> list[Parts]:
        x, y = example
        return watch.parts(x, lambda output: fisher.cotangents(risk.loss, output, y, i))[1]

    def block(args):
        data, i, weights = args
        return of_block(jax.vmap(parts)(data, i), None if unit else weights)

    one = jax.eval_shape(parts, row_struct(risk.data), 0)
    items = sum(x.size for x in jtu.tree_leaves(one))
    others = sum(alive(layer, own) for layer, own in zip(watch.layers, one))
    dtype = risk.weights.dtype
    cached = max(1, _CACHED // (items * dtype.itemsize))
    chunk = min(_MOST, cached, chunk_length(3 * items + others, dtype))
    examples = risk.data, jnp.arange(risk.n), risk.weights
    return chunked_sum(block, examples, chunk, compensated=compensated)
