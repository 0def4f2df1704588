from dataclasses import replace

import numpy as np
from jaxtyping import Array, Bool, Float

from .._data import checked_masks
from .._effect import Newton
from .._influence import Influence
from .._misc import is_concrete
from .._scale import Unscaled


def groups(f: Influence, masks: Float[Array, "k n"] | Bool[Array, "k n"]) -> Influence:
    """Influence of groups of training points: Σᵢ mask_i I(i; m), one column per group.

    ```python
    influx.groups(f, y[None, :] == jnp.arange(10)[:, None])((Xq, yq))       # [m, 10]
    ```

    To first order influence adds up; removing a large or coherent group moves the curvature as well,
    which this sum leaves out (compare with `leave_subset_out`).

    **Arguments:** `masks`: [k, n], 1 (or `True`) for members; fractional memberships are weights.

    **Sign.** As `f`: under `removal(f, "first-order")` the change when the whole group is removed.

    **Raises:** `ValueError` for masks of another shape, and for an `f` under `relative` or
    `removal(f, "newton")`, which do not add up over points.

    **Source:** Koh, Ang, Teo & Liang, "On the Accuracy of Influence Functions for Measuring Group
    Effects", arXiv:1905.13289.
    """
    masks = checked_masks(masks, f.risk.n, "groups")
    if is_concrete(masks) and not np.isfinite(np.asarray(masks)).all():
        raise ValueError("`masks` has NaN or infinite entries. 1 is a member, 0 is none.")
    if not isinstance(f.scale, Unscaled):
        raise ValueError(
            "Relative influences of points have different units and do not add up. "
            "Use `groups(influence(...), masks)` without `relative`."
        )
    if isinstance(f.effect, Newton):
        raise ValueError(
            "Newton removals of single points do not add up to that of a group. "
            'Use `removal(groups(f, masks), "first-order")`, or retrain with `leave_subset_out`.'
        )
    return replace(f, masks=masks.astype(f.risk.weights.dtype))
