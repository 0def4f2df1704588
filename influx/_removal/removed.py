"""Which points were removed, what their labels are and might be, and why: a table to act on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import Model
from .._risk import EmpiricalRisk


class Removed(eqx.Module):
    """The removed points, a row each; `str(removed)` is a plain table. Nothing is relabelled.

    - `index`: where the point stands in the training data
    - `given`: its label, or for a loss without classes its target
    - `suggested`: the class (or the output) that the returned model answers; `prune` trained it without
      the point, `train_with_removal` may have trained on it before its removal
    - `reason`: why it was removed
    - `score`: the number behind the reason, named in it
    """

    index: Int[Array, " r"]
    given: Array
    suggested: Array
    score: Float[Array, " r"]
    reason: str = eqx.field(static=True)

    def __str__(self) -> str:
        head = f"{'index':>8} {'given':>10} {'suggested':>10}  reason"
        columns = (np.asarray(x) for x in (self.index, self.given, self.suggested, self.score))
        cell = lambda x: f"{x:>10.3g}" if np.ndim(x) == 0 else f"{'…':>10}"
        rows = [
            f"{i:>8} {cell(given)} {cell(suggested)}  {self.reason} {score:+.3g}"
            for i, given, suggested, score in zip(*columns)
        ]
        return "\n".join([head, *rows])


def removed_table(
    risk: EmpiricalRisk,
    model: Model,
    removed: Bool[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    reason: str,
) -> Removed:
    """The rows of the points where the mask `removed` is true, by ascending score."""
    chosen = np.flatnonzero(removed)
    index = jnp.asarray(chosen[np.argsort(score[chosen], kind="stable")], int)
    inputs, targets = jtu.tree_map(lambda x: x[index], risk.data)
    outputs = jax.vmap(lambda x: risk.output(model, x))(inputs)
    return Removed(index, targets, suggestion(risk, outputs), jnp.asarray(score)[index], reason)


def suggestion(risk: EmpiricalRisk, outputs):
    """The classes of outputs [r, ...], or for a loss without classes the outputs themselves."""
    try:
        logits = jax.vmap(risk.loss.class_logits)(outputs)
    except ValueError:
        return outputs
    return jnp.argmax(logits, axis=-1)
