"""The inverse eigenvalues of a layer as a sum of few products, so that scores are as well."""

from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float

from .kronecker import EigenBlock

_STEP = 4


def low_rank(block: EigenBlock, tolerance: float) -> EigenBlock:
    r"""The block with the fewest `terms` p, q such that Σ_ρ p ⊗ q is near enough to the inverse
    eigenvalues R = 1/(values + λ).

    A score of rank-one gradients is Σ_kl u_k v_l R_kl with u = ĝᵢ∘ĝⱼ and v = âᵢ∘âⱼ. If coordinates are
    uncorrelated, independent between ĝ and â, and have the curvature's second moments, its mean square
    is Σ_kl s_k² t_l² R_kl², s and t the mean squares of ĝ and â: the eigenvalues of the two factors. So
    the truncated SVD of diag(s) R diag(t) leaves out the least possible part of the scores, and the
    share of its tail is their relative root mean square error, which is kept below `tolerance`. Their
    number is rounded up to a multiple of 4 where that still saves, so that a refit seldom means another
    program.
    """
    _, l, r = block.layer.shape
    s, t = (_away_from_zero(np.asarray(x, np.float64)) for x in block.factor_values)
    R = 1 / (np.asarray(block.values, np.float64) + float(block.damping))
    weighted = s[:, :, None] * R * t[:, None, :]
    left, sigma, right = np.linalg.svd(weighted, full_matrices=False)
    least = _rank(sigma, tolerance)
    saving = [k for k in (-(-least // _STEP) * _STEP, least) if k * (l + r) < l * r]
    if not saving:  # the layer's gradients as they are cost no more
        return block
    rank = saving[0]
    p = (left[..., :rank] * sigma[:, None, :rank]).swapaxes(1, 2) / s[:, None, :]
    q = right[:, :rank] / t[:, None, :]
    terms = jax.device_put(tuple(x.astype(block.values.dtype) for x in (p, q)))
    return replace(block, terms=terms)


def _rank(sigma: Float[np.ndarray, "S k"], tolerance: float) -> int:
    left = np.cumsum(np.square(sigma)[:, ::-1], axis=1)[:, ::-1]  # left[k]: what stands from k on
    enough = np.all(left <= tolerance**2 * left[:, :1], axis=0)
    return max(1, int(np.argmax(enough))) if enough.any() else sigma.shape[1]


def _away_from_zero(scale: np.ndarray) -> np.ndarray:
    """Directions that no training point has still get weights of a moderate size, all the same where
    there is none that one has."""
    largest = np.max(scale, axis=1, keepdims=True)
    return scale + np.where(largest > 0, 1e-6 * largest, 1)
