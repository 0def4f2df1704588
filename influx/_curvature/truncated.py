"""The inverse eigenvalues of a layer at few coordinates, so that scores are sums over those."""

from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array, Float

from .kronecker import EigenBlock


def truncated(block: EigenBlock, penalties: Float[Array, "S l r"], tolerance: float) -> EigenBlock:
    r"""The block with only those coordinates `kept` of its eigenbasis that scores need.

    A score is Σ_c ĝ_ic ĝ_jc R_c over coordinates c, with R = 1/(values + λ). If these are
    uncorrelated its mean square is Σ_c Λ_c² R_c², Λ = values − penalties the mean squares of ĝ_c.
    Where damping or penalty outweighs Λ_c a coordinate hardly counts. Those that count least are left
    out: their share is the squared relative root mean square error of scores, kept below `tolerance`².
    A gradient need not be an outer product: W may be shared between places. Their number is rounded up
    to a half, a third, a sixth, a twelfth … of all, so that a refit seldom means another program.
    """
    values, l2 = (np.asarray(x, np.float64) for x in (block.values, penalties))
    curved = np.maximum(values - l2, 0)
    weights = np.square(curved / (values + float(block.damping))).ravel()
    order = np.argsort(-weights, kind="stable")
    # left[c] is what c coordinates leave out.
    left = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    count = max(1, int(np.argmax(left <= tolerance**2 * left[0])))
    enough = [size for size in _sizes(weights.size) if size >= count]
    if not enough:  # to pick more than half of them would cost more than they save
        return block
    kept = jax.device_put(np.sort(order[: enough[-1]]).astype(np.int32))
    return replace(block, kept=kept)


def _sizes(size: int) -> list[int]:
    """A half of `size`, beyond which nothing is saved, a third, a sixth, a twelfth …: down to 1, the
    largest first."""
    parts = (2, *(3 * 2**k for k in range(size.bit_length())))
    return [-(-size // part) for part in parts]
