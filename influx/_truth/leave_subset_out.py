from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import require_concrete
from .._custom_types import Model
from .._data import checked_masks
from .._risk import EmpiricalRisk
from .._train import AbstractTrainer
from .._validate import validate
from .retrain import multiply, retrain


def leave_subset_out(
    risk: EmpiricalRisk,
    model0: Model,
    trainer: AbstractTrainer,
    *,
    masks: Float[Array, "k n"] | Bool[Array, "k n"],
    outcome: Callable[[Any], PyTree[Array]] | None = None,
    chunk_size: int | None = None,
) -> PyTree[Array]:
    """Ground truth: the models trained on k subsets of the data, or a function of them.

    Row r minimises J(·, w ∘ masks[r]): masks **multiply** the risk's own weights, 1 keeps a point and
    0 erases it; 1/n and Ω stay. Every training starts at `model0`: a fitted model where the risk is
    convex, the initial one where a run such as `SGD`'s is to be repeated (with the same batches).

    **Arguments:** `masks`: [k, n], finite and ≥ 0; `outcome`, `chunk_size`: as in `leave_one_out`.

    **Returns:** the outcomes, stacked: leaves [k, ...]; what `lds` takes.

    **Raises:** `ValueError` for masks of another shape or below 0; `RuntimeError` naming the
    trainings that did not converge.

    **Cost:** k trainings, as many at a time in one program as memory holds.
    """
    require_concrete("leave_subset_out", risk, model0)
    risk = validate(risk, model0)
    masks = check_subsets(masks, risk)
    return retrain(
        risk,
        model0,
        trainer,
        weigh=multiply,
        lanes=masks,
        typical=risk.weights * jnp.mean(masks, axis=0),
        outcome=outcome,
        chunk_size=chunk_size,
    )


def check_subsets(masks, risk: EmpiricalRisk) -> Float[Array, "k n"]:
    """Masks [k, n] that multiply data weights."""
    masks = checked_masks(masks, risk.n, "subsets")
    bad = np.argwhere(~(np.isfinite(masks) & (np.asarray(masks) >= 0)))
    if bad.size:
        raise ValueError(
            f"`masks` must be finite and at least 0, got {masks[tuple(bad[0])]} at {bad[0].tolist()}. "
            "1 keeps a point, 0 erases it."
        )
    empty = np.flatnonzero(
        ~np.any((np.asarray(masks) > 0) & (np.asarray(risk.weights) > 0), axis=1)
    )
    if empty.size:
        raise ValueError(
            f"`masks` keep no point of a weight above 0 in rows {empty[:5].tolist()}: there is nothing "
            "to train on. Keep at least one."
        )
    return masks.astype(risk.weights.dtype)
