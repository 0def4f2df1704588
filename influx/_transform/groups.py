from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float

from .._checks import check_whole, is_concrete
from .._data import checked_masks
from .._influence import Influence, check_influence
from .._scale import Unscaled


def groups(
    f: Influence,
    masks: Float[Array, "k n"] | Bool[Array, "k n"],
    *,
    order: Literal[1, 2] = 1,
) -> Influence:
    r"""Influence of groups of training points, one column per group.

    ```python
    classes = y[None, :] == jnp.arange(10)[:, None]
    influx.groups(f, classes)((Xq, yq))                                # [m, 10]
    influx.removal(influx.groups(f, classes, order=2))((Xq, yq))       # the change without a class
    ```

    **order=1** adds up: Σᵢ maskᵢ I(i; m). It leaves out that removing some members moves the curvature,
    and so what the others do: it errs where they are many, or alike.

    **order=2** is the Taylor series of m to second order in the data weights that the group loses. With
    v = mask (under `removal`: w ∘ mask), K = (1/n) Σ vᵢℓᵢ and θ(ε) the minimiser of J(·, w − εv),

        θ′ = H⁻¹∇K,    θ″ = H⁻¹(2∇²K θ′ − ∇³J[θ′, θ′]),
        m(θ(1)) − m(θ̂) ≈ ∇m·θ′ + ½(∇m·θ″ + θ′ᵀ∇²m θ′).

    The score is −n times that, and under `removal` that itself: order 1 is its leading term. A group's
    own curvature, ∇²K, is what Basu et al. correct correlated points by; ∇³J and ∇²m, which they leave
    out, are of the same order, and make the series that of retraining, with an error O(‖v/n‖³). It is a
    quadratic set function: groups A and B score that of A, that of B, and a symmetric cross term. An
    empty group scores 0.

    *It is the series of retraining* where the curvature is H itself: `Hessian()` at a minimum, also in
    `CG` or `MINRES`, and `GaussNewton()` and `Fisher("exact")` where they equal H (outputs affine in the
    parameters). With damping λ, of retraining with ½λ‖θ − θ̂‖² added. Off a minimum, of the path on
    which the slope ∇J stays what it is. *Any other curvature* (Gauss–Newton of a network, K-FAC, …)
    stands for H in both lines, while ∇²K, ∇³J and ∇²m stay exact: the score is then a second-order
    correction of that curvature's first order, and no series of retraining. On networks a damped
    `CG(GaussNewton())` gains a little by it; EK-FAC is further from retraining than at order 1.

    **Arguments:** `masks`: [k, n], 1 (or `True`) for members; other numbers from 0 on are weights.

    **Sign.** As `f`: under `removal(f, "first-order")` the change when the whole group is removed.

    **Raises:** `ValueError` for masks of another shape or with negative entries, another order, an `f`
    under `relative` or `removal(f, "newton")`, which do not add up over points, and for order 2 of an
    unrolled response. Of several `groups` the last counts, as of every kind of transform.

    **Cost:** order 1, that of `f`. Order 2, per group and call: two solves, ∇K, the second derivative of
    ∇J along a line, and that of m for each query. No P × P matrix is formed; `chunk_size` counts groups.

    **Source:** Koh, Ang, Teo & Liang, "On the Accuracy of Influence Functions for Measuring Group
    Effects", arXiv:1905.13289; Basu, You & Feizi, "On Second-Order Group Influence Functions for
    Black-Box Predictions", arXiv:1911.00418.
    """
    check_influence("groups", f)
    masks = checked_masks(masks, f.risk.n, "groups")
    if is_concrete(masks) and not (np.isfinite(masks) & (np.asarray(masks) >= 0)).all():
        raise ValueError("`masks` has NaN, infinite or negative entries. 1 is a member, 0 is none.")
    degree = check_whole(
        "order",
        order,
        most=2,
        hint=" 1 is the sum over members, 2 counts what they do to one another. Beyond the second order "
        "retrain with `leave_subset_out`.",
    )
    if not isinstance(f.scale, Unscaled):
        raise ValueError(
            "Relative influences of points have different units and do not add up. "
            "Use `groups(influence(...), masks)` without `relative`."
        )
    masks = masks.astype(f.risk.weights.dtype)
    f.effect.lost(f, masks)  # refuses effects of single points
    if degree == 2:
        f.response.check_path()
    return replace(f, masks=masks, order=degree)
