"""The Jacobians Aᵢ = ∂outputᵢ/∂θ of the model's outputs, behind their products."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._linalg import dot


class AbstractJacobian(eqx.Module):
    """The Jacobians Aᵢ ∈ R^{K×P} of n outputs (flattened to K numbers), behind their products.

    The law: with `A` the dense array [n, K, P],

    ```python
    jacobian.gram(S)     == einsum("nkp,nkl,nlq->pq", A, S, A)
    jacobian.sandwich(M) == einsum("nkp,pq,nlq->nkl", A, M, A)
    jacobian.pull(u)     == einsum("nkp,nk->np", A, u)
    jacobian.push(v)     == einsum("nkp,p->nk", A, v)
    jacobian.energy(s)(V) >= einsum("n,kp,ncp,ncq,kq->k", s, V, A, A, V)
    ```

    all to rounding; what `energy` exceeds its form by is rounding too.
    """

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """n."""

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """K."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """How many parameters one number of an output can depend on: the most that any row of A holds
        besides zeros."""

    @property
    @abc.abstractmethod
    def summed(self) -> int:
        """How many terms one number of Σᵢ Aᵢᵀuᵢ is a sum of."""

    @property
    @abc.abstractmethod
    def affine(self) -> bool:
        """Whether the outputs are affine in θ, so that A does not depend on it."""

    @property
    @abc.abstractmethod
    def closed_form(self) -> bool:
        """Whether products cost less than forming A."""

    @abc.abstractmethod
    def gram(self, middle: Float[Array, "n K K"]) -> Float[Array, "P P"]:
        """Σᵢ Aᵢᵀ Sᵢ Aᵢ."""

    @abc.abstractmethod
    def sandwich(self, matrix: Float[Array, "P P"]) -> Float[Array, "n K K"]:
        """Aᵢ M Aᵢᵀ."""

    @abc.abstractmethod
    def outer(self) -> Float[Array, "n K K"]:
        """Aᵢ Aᵢᵀ, whose largest eigenvalue is ‖Aᵢ‖₂²."""

    @abc.abstractmethod
    def pull(self, u: Float[Array, "n K"]) -> Float[Array, "n P"]:
        """Aᵢᵀ uᵢ."""

    @abc.abstractmethod
    def push(self, v: Float[Array, " P"]) -> Float[Array, "n K"]:
        """Aᵢ v."""

    @abc.abstractmethod
    def push_each(self, v: Float[Array, "n P"]) -> Float[Array, "n K"]:
        """Aᵢ vᵢ."""

    @abc.abstractmethod
    def energy(self, s: Float[Array, " n"]) -> Callable[[Float[Array, "k P"]], Float[Array, " k"]]:
        """The form v ↦ Σᵢ sᵢ ‖Aᵢv‖², s ≥ 0, on rows v, through its [P, P] (or [d, d]) matrix: not below
        it, whatever rounding does to a form that nearly vanishes at v."""

    @abc.abstractmethod
    def take(self, indices: Int[Array, " k"]) -> "AbstractJacobian":
        """The Jacobians of some of the examples."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "n K P"]:
        """The Jacobians as one array, for few examples."""

    @abc.abstractmethod
    def norms(self) -> Float[Array, " n"]:
        """A bound on ‖Aᵢ‖₂: itself to rounding for a head, else at most K^(1/16) times it."""

    @abc.abstractmethod
    def absolute_norms(self) -> Float[Array, " n"]:
        """A bound on ‖|Aᵢ|‖₂, |A| being A without its signs: what the rounding of Aᵢv and Aᵢᵀu goes by.
        That of |Aᵢ| for a head, else ‖Aᵢ‖_F."""


def form_from_above(
    matrix: Float[Array, "d d"], rows: Float[Array, "k c d"], summed: int
) -> Float[Array, " k"]:
    """Σ_c rows_cᵀ M rows_c from above, M positive semi-definite, each number of it a sum of `summed`
    terms. Where the form vanishes its value is rounding, of size u·tr M·‖rows‖² a term, and of any
    sign."""
    value = jnp.sum(dot(rows, matrix) * rows, axis=(1, 2))
    terms = (summed + 2 * matrix.shape[0] + 16) * jnp.finfo(matrix.dtype).eps / 2
    size = jnp.trace(matrix) * jnp.sum(jnp.square(rows), axis=(1, 2))
    return jnp.maximum(value, 0) + terms * size
