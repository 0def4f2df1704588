"""Held-out data in two halves: what chooses the points to remove never decides when to stop."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import is_real
from .._chunks import leading_length, take
from .._custom_types import Model
from .._risk import EmpiricalRisk
from .._validate import check_queries


def halves(risk: EmpiricalRisk, model: Model, heldout) -> tuple[PyTree[Array], PyTree[Array]]:
    """Its rows 0, 2, 4, …, which choose, and its rows 1, 3, 5, …, which decide.

    Removing the points that raise the loss on V and then reading the loss on V overfits V: of many
    candidates some look harmful there by chance, and the fall that is read is the one that was sought.
    """
    if heldout is None:
        raise ValueError(
            "`heldout` is missing: which points harm, and when to stop, is read on (inputs, targets) "
            "that training never sees. Set some training data apart; never pass the test set."
        )
    check_queries(risk, model, heldout, "heldout")
    m = leading_length(heldout)
    if m < 4:
        raise ValueError(
            f"`heldout` needs at least 4 examples, got {m}: half of them choose, the other half "
            "decide, and each needs two for a standard error."
        )
    return take(heldout, jnp.arange(0, m, 2)), take(heldout, jnp.arange(1, m, 2))


def change(
    before: Float[Array, " m"], after: Float[Array, " m"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean change of held-out losses, and the standard error of that paired difference."""
    difference = after - before
    m = difference.shape[0]
    return jnp.mean(difference), jnp.std(difference, ddof=1) / jnp.sqrt(jnp.asarray(m, float))


def check_share(value: float, name: str, meaning: str) -> float:
    """A number in the open interval (0, 1)."""
    if not is_real(value) or not 0 < value < 1:
        raise ValueError(f"`{name}` is {meaning} and must lie between 0 and 1, got {value!r}.")
    return float(value)
