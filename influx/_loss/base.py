"""Losses ℓ(output, target) of one example, and what Gauss–Newton, Fisher and certificates need to
know of them."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


class AbstractLoss(eqx.Module):
    """A loss ℓ(output, target) of one example. `output` is what `predict(model, x)` returns.

    Its law, which the tests run on every member:

    ```python
    K = output.size
    hessian = jax.hessian(lambda o: loss(o.reshape(output.shape), target))(output.reshape(-1))
    assert loss.output_hessian(output, target) == hessian          # [K, K]
    root = loss.hessian_root(output, target).reshape(-1, K)
    assert root.T @ root == hessian
    ```

    `convex`: whether ℓ is known to be convex in its output.
    """

    convex: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(self, output: PyTree[Array], target: PyTree[Array]) -> Float[Array, ""]:
        """ℓ(output, target), a scalar."""

    @abc.abstractmethod
    def output_hessian(self, output: Array, target: PyTree[Array]) -> Float[Array, "K K"]:
        """∇²ℓ in the flattened output: the middle factor of the Gauss–Newton matrix."""

    @abc.abstractmethod
    def hessian_root(self, output: Array, target: PyTree[Array]) -> Float[Array, "r ..."]:
        """Rows u of the output's shape with Σ u uᵀ = `output_hessian(output, target)`, flattened:
        cotangents whose second moments are the Gauss–Newton matrix's. The fewer, the cheaper: each is
        one backward pass. Where no closed form is known, `eigen_root(hessian).reshape(-1, *shape)`.

        An error where ∇²ℓ has a negative eigenvalue, and so no root.
        """

    @abc.abstractmethod
    def output_fisher(self, output: Array) -> Float[Array, "K K"]:
        """E[∇ℓ ∇ℓᵀ] over targets drawn from the model's own distribution, in the flattened output.

        Raises `ValueError` where the loss is not a negative log-likelihood.
        """

    @abc.abstractmethod
    def fisher_root(self, output: Array) -> Float[Array, "r ..."]:
        """Rows u of the output's shape with Σ u uᵀ = `output_fisher(output)`, flattened: cotangents
        whose second moments are the exact Fisher's.

        Raises `ValueError` where the loss is not a negative log-likelihood.
        """

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, output: Array) -> Array:
        """A target from the model's own distribution p(· | output): what a sampled Fisher needs.

        Raises `ValueError` where the loss is not a negative log-likelihood.
        """

    @abc.abstractmethod
    def residuals(self, output: jax.ShapeDtypeStruct) -> int:
        """Of how many residuals ℓ = ½ Σ r² is made, for an output of that shape, if the size of their
        noise is for the data to say; 0 for a negative log-likelihood as it stands."""

    @abc.abstractmethod
    def class_logits(self, output: Array) -> Float[Array, " C"]:
        """The output as the logits of C classes; `ValueError` where it is no single classifier."""

    @abc.abstractmethod
    def constants(self, output: jax.ShapeDtypeStruct) -> "LossConstants":
        """Bounds in output space, for outputs of that shape; `ValueError` where none are known."""

    @abc.abstractmethod
    def check(self, output: PyTree[jax.ShapeDtypeStruct], targets: PyTree[Array]) -> None:
        """Raise `ValueError` where the loss cannot take outputs of that shape, or `targets` [n, ...]
        cannot go with them."""


def eigen_root(hessian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Rows u with Σ u uᵀ = `hessian`, from its eigenvalues; an error where one of them is negative by
    more than rounding. Cost: O(K³)."""
    values, basis = jnp.linalg.eigh(hessian)
    rounding = 10 * hessian.shape[0] * jnp.finfo(hessian.dtype).eps
    values = eqx.error_if(
        values,
        values < -rounding * jnp.max(jnp.abs(values)),
        "The loss is not convex in its output: its Hessian there has a negative eigenvalue, and so no "
        'root that K-FAC could be made of. Use fisher="sampled" or "empirical", or a matrix with enough '
        "damping: GaussNewton(damping=), Hessian(damping=).",
    )
    return jnp.sqrt(jnp.maximum(values, 0))[:, None] * basis.T


class LossConstants(eqx.Module):
    """Bounds of one loss in output space, valid at every output.

    - `lipschitz`: ‖∇ℓ‖₂; infinite where the loss has no global bound
    - `smoothness`: ‖∇²ℓ‖₂
    - `third`: the least known t with |D³ℓ[u, u, v]| ≤ t ‖u‖²‖v‖
    - `hard`: targets are single classes, so that P3's corollary γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂) holds
    """

    lipschitz: float | Float[Array, ""]
    smoothness: float | Float[Array, ""]
    third: float | Float[Array, ""]
    hard: bool
