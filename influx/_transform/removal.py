from dataclasses import replace
from typing import Literal

from .._effect import FirstOrder, Newton
from .._influence import Influence, check_influence
from .._response import check_removal_step
from .._scale import Unscaled


def removal(
    f: Influence, kind: Literal["first-order", "newton"] = "first-order", *, refine: int = 0
) -> Influence:
    """The predicted change of the measurement when a training point is erased, m(θ̂₋ᵢ) − m(θ̂).

    - `"first-order"`: −wᵢ I(i; m)/n. Any curvature. Error O(1/n²).
    - `"newton"`: m(θ̂ + Δθᵢ) − m(θ̂ + δ₀), with Δθᵢ one Newton step of the risk without point i
      (Woodbury, so that a point's leverage is exact) and m evaluated there, not linearised. Error
      O(1/n²) too, but of ∇³J alone: exact where J is quadratic, λ = 0 and H₋ᵢ ≻ 0. NaN where H₋ᵢ is
      not positive definite, to rounding: a point of leverage 1, or a loss not convex in the
      parameters (there iterative solvers see it only where the step leads uphill). Hessian and
      GaussNewton, also inside CG, MINRES, Neumann, Projected or Arnoldi(complement=False). `refine`
      chord steps θ̃ᵢ ← θ̃ᵢ − (H + λI)⁻¹∇J₋ᵢ(θ̃ᵢ) lead on towards where retraining ends, at n example
      gradients a point each and as many to judge the last.

    **Sign and unit.** Positive: removing the point *raises* m; opposite in sign to influence, and
    smaller by n. Removal erases: 1/n and l2 stay what they were. "first-order" of `groups(f, masks,
    order=2)` is their change to second order.

    **Raises:** `ValueError` for an unknown kind, for a relative or grouped `f` (a scale has no meaning
    for a removal, and a group is no single Newton step), for "newton" with a curvature that does not
    say what one point adds to it, and for `refine` without "newton". A call raises where chord steps
    diverge.

    **Source:** Koh & Liang, arXiv:1703.04730 (first order); Pregibon, "Logistic regression
    diagnostics" (1981) and Beirami et al., arXiv:1711.05323 (one Newton step).
    """
    check_influence("removal", f)
    refine = check_removal_step(f.response, kind, refine, name="kind")
    if not isinstance(f.scale, Unscaled):
        raise ValueError(
            "The predicted change on removal has a unit of its own and no relative form. Use "
            "`removal(influence(...), kind)`, or `relative(f, kind)` without `removal`."
        )
    if kind == "first-order":
        return replace(f, effect=FirstOrder())
    if f.masks is not None:
        raise ValueError(
            "A Newton step removes single points. For groups use "
            '`removal(groups(f, masks, order=2))`, which is "first-order", or retrain with '
            "`leave_subset_out`."
        )
    return replace(f, effect=Newton(refine))
