"""A linear head refitted by least squares: margins without each point, and values, in closed form."""

from typing import NamedTuple

import jax.nn as jnn
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, Int

from .._linalg import dot, einsum

RIDGE = 0.03  # μ as a share of the features' mean square; fixed on other data than the benchmarks'


class RidgeHead(NamedTuple):
    r"""W minimising (1/n) Σ wᵢ ½‖yᵢ − Wh̃ᵢ‖² + ½μ‖W‖², y the centred one-hot labels, h̃ the features.

    J is quadratic and H = I ⊗ A, A = (1/n) Σ wᵢ h̃ᵢh̃ᵢᵀ + μI, so that one d × d inverse answers
    everything exactly (P10, P12), wherever the network's own head is in its training:

    - `without`: W₋ᵢh̃ᵢ = yᵢ − (yᵢ − Wh̃ᵢ)/(1 − (wᵢ/n) h̃ᵢᵀA⁻¹h̃ᵢ)
    - `value`: Gᵢ = n ∂m/∂wᵢ = ⟨yᵢ − Wh̃ᵢ, Σ_t y_t h̃_tᵀA⁻¹h̃ᵢ⟩/|V|, m the mean score that held-out
      points give to their labels: label agreement × feature similarity. Positive = helpful.

    m is linear in the scores. Under label noise that is the same for all wrong classes, fewer than
    1 − 1/C of the labels, its expectation is then an increasing function of the clean one's (van Rooyen,
    Menon & Williamson, arXiv:1505.07634): a noisy held-out set values points as a clean one does. A
    proper loss has no such property: it rewards scores as unsure as the labels are.
    """

    without: Float[Array, "n C"]
    value: Float[Array, " n"]


def ridge_head(
    features: Float[Array, "n d"],
    labels: Int[Array, " n"],
    weights: Float[Array, " n"],
    heldout: tuple[Float[Array, "m d"], Int[Array, " m"]],
    classes: int,
) -> RidgeHead:
    n, d = features.shape
    centred = lambda y: jnn.one_hot(y, classes, dtype=features.dtype) - 1 / classes
    Y, share = centred(labels), weights / n
    weighted = (features * share[:, None]).T
    second = dot(weighted, features)
    mu = RIDGE * jnp.trace(second) / d
    eye = jnp.eye(d, dtype=features.dtype)
    inverse = jsl.cho_solve(jsl.cho_factor(second + mu * eye), eye)
    solved = dot(features, inverse)
    residual = Y - dot(solved, dot(weighted, Y))
    leverage = share * jnp.sum(solved * features, axis=1)
    votes = dot(centred(heldout[1]).T, heldout[0]) / heldout[1].shape[0]  # [C, d]
    value = einsum("nc,cd,nd->n", residual, votes, solved)
    without = Y - residual / (1 - leverage)[:, None]
    return RidgeHead(without, value)
