from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

if TYPE_CHECKING:
    from .._chunks import Limits
    from .._engine import Schedule
    from .._influence import Influence


class AbstractEffect(eqx.Module):
    """What a score says: the derivative I(i; m), or the predicted change of m when i is removed."""

    @abc.abstractmethod
    def scheduled(
        self, f: Influence, query: PyTree[Array], queries: int, kept: int, limits: Limits
    ) -> tuple[Influence, Schedule]:
        """f with its response scheduled for that many queries like this one (see there)."""

    @abc.abstractmethod
    def lost(self, f: Influence, masks: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """The data weights that groups lose; `ValueError` where an effect is of single points."""

    @abc.abstractmethod
    def of_change(self, f: Influence, change: Float[Array, "*a"]) -> Float[Array, "*a"]:
        """The score of a group whose loss of weight changes m by that much."""

    @abc.abstractmethod
    def prepare(self, f: Influence, query: PyTree[Array]) -> Any:
        """What one query needs once, whatever the training points."""

    @abc.abstractmethod
    def columns(
        self, f: Influence, prepared: Any, indices: Int[Array, " b"] | None
    ) -> Float[Array, "*c b"]:
        """One query's scores at some training points (`None`: all)."""
