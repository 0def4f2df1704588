from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from .._chunks import Limits
from .._measurement import AbstractMeasurement
from .schedule import Alternative

if TYPE_CHECKING:
    from .._response import Implicit


class AbstractScoring(eqx.Module):
    """A way to take the products −∇mᵀ(H + λI)⁻¹gᵢ of one query with all training points.

    Whatever the way, the law is the same:

    ```python
    way.columns(response, way.prepare(response, m, query), None) == -V @ (H + λI)⁻¹ @ G.T
    ```

    with V [k, P] the gradients of the components of m and G [n, P] those of the training losses. It
    holds to rounding, but for what a `tolerance` of K-FAC or EK-FAC leaves out. Training points are
    taken `points` at a time, which a schedule settles.
    """

    limits: eqx.AbstractVar[Limits]
    points: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def alternatives(
        self, response: Implicit, measurement: AbstractMeasurement, query: PyTree[Array]
    ) -> tuple[Alternative, ...]:
        """The ways there are, with their costs, for queries of these shapes."""

    @abc.abstractmethod
    def settled(self, ways: tuple[str, ...], points: int) -> AbstractScoring:
        """The same with the way of each layer, and the chunk, as chosen."""

    @abc.abstractmethod
    def prepare(
        self, response: Implicit, measurement: AbstractMeasurement, query: PyTree[Array]
    ) -> Any:
        """What one query needs once, whatever the training points."""

    @abc.abstractmethod
    def columns(
        self, response: Implicit, prepared: Any, indices: Int[Array, " b"] | None
    ) -> Float[Array, "k b"]:
        """I(i; m) at some training points (`None`: all)."""

    @abc.abstractmethod
    def quadratic(self, response: Implicit, prepared: Any) -> Float[Array, " k"]:
        """∇mᵀ(H + λI)⁻¹∇m of each component."""

    @abc.abstractmethod
    def own(
        self, response: Implicit, measurement: AbstractMeasurement, power: int
    ) -> Float[Array, "n k"]:
        """∇mᵢᵀ(H + λI)⁻ᵖgᵢ of every training point with the measurement at the point itself."""
