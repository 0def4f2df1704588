import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from .._chunks import Limits
from .._custom_types import Model
from .._engine import Schedule
from .._measurement import AbstractMeasurement
from .._risk import EmpiricalRisk


class AbstractResponse(eqx.Module):
    """R = ∂θ̂/∂w, how the trained parameters move when data weights move, behind its products.

    Influence is n times a product with it, so that its unit does not shrink as data grows. Products
    are taken in two steps, so that the columns (training points) may be asked for in chunks: with V the
    gradients of the components of m at a query,

    ```python
    response.columns(response.prepare(m, query), indices) == (n * V @ R)[:, indices]
    ```
    """

    risk: eqx.AbstractVar[EmpiricalRisk]
    model: eqx.AbstractVar[Model]
    limits: eqx.AbstractVar[Limits]

    @abc.abstractmethod
    def scheduled(
        self,
        measurement: AbstractMeasurement,
        query: PyTree[Array],
        queries: int,
        kept: int,
        limits: Limits,
    ) -> tuple["AbstractResponse", Schedule]:
        """The same response, its products taken in the way that is cheapest for that many queries like
        this one, within the limits. `kept` is how many numbers are kept of a component's scores."""

    @abc.abstractmethod
    def prepare(self, measurement: AbstractMeasurement, query: PyTree[Array]) -> Any:
        """What one query needs once, whatever the columns (for an implicit response, H⁻¹∇m)."""

    @abc.abstractmethod
    def columns(self, prepared: Any, indices: Int[Array, " b"] | None) -> Float[Array, "k b"]:
        """n · ∇mᵀR at some training points (`None`: all): the influences I(i; m)."""

    @abc.abstractmethod
    def quadratic(self, prepared: Any) -> Float[Array, " k"]:
        """∇mᵀH⁻¹∇m of each component; `ValueError` where the response has no curvature."""

    @abc.abstractmethod
    def own(self, measurement: AbstractMeasurement, *, power: int = 1) -> Float[Array, "n k"]:
        """∇mᵢᵀH⁻ᵖgᵢ of every training point, m measured at the point itself."""

    @abc.abstractmethod
    def solve(self, vectors: Float[Array, "k P"]) -> Float[Array, "k P"]:
        """H⁻¹v for each row v; `ValueError` where the response has no curvature."""

    @abc.abstractmethod
    def check_displace(self) -> None:
        """Raise `ValueError` where `displace` is not defined."""

    @abc.abstractmethod
    def displace(self, indices: Int[Array, " b"]) -> Float[Array, "b P"]:
        """Δθᵢ = −H₋ᵢ⁻¹∇J₋ᵢ(θ̂): one Newton step without point i, from θ̂ (P10)."""

    @abc.abstractmethod
    def check_path(self) -> None:
        """Raise `ValueError` where `path` is not defined."""

    @abc.abstractmethod
    def path(self, lost: Float[Array, " n"]) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """θ′ and θ″ at ε = 0 of θ(ε), the minimiser under the data weights w − ε·lost."""

    @abc.abstractmethod
    def settle(self) -> Float[Array, " P"]:
        """δ₀ = −H⁻¹∇J(θ̂): the Newton step with every point kept; 0 at a stationary point."""
