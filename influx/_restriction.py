"""Fewer parameters: a map from a risk to a risk (P9)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Int

from ._custom_types import Model, Where
from ._risk import EmpiricalRisk, l2_tree
from ._validate import validate


class Whole(eqx.Module):
    """Puts a part back into the model it was taken from, whose other leaves stay frozen.

    The part's leaves are those of `model` at `places`, counted in its flat order (`None` included).
    """

    model: Model
    places: tuple[int, ...] = eqx.field(static=True)
    outer: Callable[[Any], Any]

    def __call__(self, part: Model) -> Model:
        leaves, structure = jtu.tree_flatten(self.model, is_leaf=_is_none)
        own = jtu.tree_leaves(part, is_leaf=_is_none)
        if len(own) != len(self.places):
            raise ValueError(
                f"This risk is restricted to a part of its model with {len(self.places)} leaves, and "
                f"got something with {len(own)}. Pass the part: `small, part = influx.restrict(...)`. "
                "For the whole model (a measurement's, or the outcome of a retraining) use the risk "
                "before `restrict`."
            )
        for place, leaf in zip(self.places, own):
            leaves[place] = leaf
        return self.outer(jtu.tree_unflatten(structure, leaves))


def _is_none(x) -> bool:
    return x is None


class _Place(int):
    """The number of a leaf, which no other number in a tree is mistaken for."""


def _places(tree, where: Where, is_leaf=None) -> tuple[int, ...]:
    """Which leaves of `tree`, in flat order, `where` selects."""
    leaves, structure = jtu.tree_flatten(tree, is_leaf=is_leaf)
    chosen = jtu.tree_leaves(where(jtu.tree_unflatten(structure, map(_Place, range(len(leaves))))))
    if not all(isinstance(place, _Place) for place in chosen):
        raise ValueError("it must select leaves of the model, not compute others")
    return tuple(map(int, chosen))


def selected(model: Model, where: Where) -> Int[np.ndarray, " p"]:
    """Where the parameters that `where` selects stand in `ravel(model)`."""
    params = eqx.filter(model, eqx.is_inexact_array)
    ends = np.cumsum([0] + [leaf.size for leaf in jtu.tree_leaves(params)])
    return np.concatenate([np.arange(ends[i], ends[i + 1]) for i in _parameters(params, where)])


def _parameters(params, where: Where) -> tuple[int, ...]:
    """Which leaves of a model's parameters `where` selects: at least one, and each once."""
    try:
        chosen = _places(params, where)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`where` must select a part of the model, as in `lambda m: m.layers[-1]`: {error}"
        ) from error
    if not chosen:
        raise ValueError(
            "`where` selects nothing that holds parameters. Select a layer or an array, "
            "e.g. `lambda m: m.layers[-1]` or `lambda m: m.layers[-1].weight`."
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError("`where` selects a parameter twice. Name each layer or array once.")
    return chosen


def restrict(risk: EmpiricalRisk, model: Model, where: Where) -> tuple[EmpiricalRisk, Model]:
    """The same problem in the parameters that `where` selects; the others are frozen.

    ```python
    small, small_model = influx.restrict(risk, model, lambda m: m.layers[-1])
    f = influx.influence(small, small_model, influx.GaussNewton())
    ```

    With θ = (φ, ψ) and ψ kept, its influence is I_ψ = −m_ψᵀ H_ψψ⁻¹ g_ψ: exactly the influence in a
    model whose φ is frozen (P9a). How far it is from the full one, `restriction_bound` encloses.

    **Arguments:** `where` selects a part of `model`, as in `equinox.tree_at`; a tuple of parts too.

    **Returns:** `(small, small_model)`: the restricted risk, and the selected part. Measurements
    still see the rebuilt whole model.

    **Raises:** `ValueError` where `where` selects nothing that holds parameters.

    **Cost:** none by itself; every example gradient still passes through the whole model.

    **Source:** Koh & Liang, "Understanding Black-box Predictions via Influence Functions",
    arXiv:1703.04730, for the last layer; the bound is this project's (P9).
    """
    risk = validate(risk, model)
    if isinstance(where, eqx.Module) or not callable(where):
        raise ValueError(
            f"`where` must be a function that selects a part of the model, as in "
            f"`lambda m: m.layers[-1]`, got a {type(where).__name__}."
        )
    params = eqx.filter(model, eqx.is_inexact_array)
    _parameters(params, where)
    part, small_l2 = where(model), where(l2_tree(risk.l2, params))
    places = _places(model, where, is_leaf=_is_none)
    # Data, loss and weights are as they were, and were looked at when the risk was made.
    whole = Whole(model, places, risk.whole)
    return eqx.tree_at(lambda r: (r.l2, r.whole), risk, (small_l2, whole)), part
