"""Whether an influence computation can be trusted: measured findings, each with a remedy."""

from .._checks import require_concrete
from .._influence import Influence, check_influence
from .._response import TrainingRun
from .base import Diagnosis, finite
from .curvature import of_curvature
from .run import of_run


def diagnose(f: Influence) -> Diagnosis:
    """Measure whether the numbers of `f` can be trusted.

    Under a curvature:

    | finding | figure | good when |
    |---|---|---|
    | `finite` | losses and gradients that are NaN or infinite | none |
    | `stationarity` | ‖∇J(θ̂)‖ over rms wᵢ‖gᵢ‖/n of the points with wᵢ > 0, the slope of one | < 0.01 |
    | `spectrum` | extreme eigenvalues of H + λI, condition number κ | κ·u < 1e-8 |
    | `effective dimension` | tr (H − l2)(H + λ)⁻¹: directions the data decide | ≥ 1 |
    | `solve` | steps, relative residual ‖v − Hx‖/‖v‖, error of a score it implies | bound < 1e-3 |
    | `precision` | worst relative asymmetry of uᵀH⁻¹v, measured | < 1e-3 |
    | `self-influence` | largest wᵢsᵢ/n, the first-order rise of a point's own loss on removal | < 0.2 |
    | `undefined` | training points of undefined relative influence | none |

    Under `Unrolled`, whose derivative exists wherever the run went:

    | finding | figure | good when |
    |---|---|---|
    | `finite` | as above, at the trained model | none |
    | `metasmoothness` | cosine of predicted and actual change on erasing 5 % of the points | > 0.9 |

    u is the unit roundoff of the parameters' dtype. Measurement and effect of `f` play no part.

    **The solve.** For x ≈ H⁻¹gⱼ with the residual ρⱼ = gⱼ − Hx a score is off by |gᵢᵀH⁻¹ρⱼ| ≤
    √sᵢ ‖ρⱼ‖/√λ_min (P9 with x̃ = 0 on the other side), that is by at most ‖ρⱼ‖/√(λ_min s̄ⱼ) of √(s̄ᵢs̄ⱼ),
    s̄ⱼ the larger of sⱼ and the mean self-influence: scores of points that are fitted beyond doubt are 0
    beside the others'. The figure is the worst. It is proven where λ_min is an eigenvalue or a known
    lower end of the spectrum (min l2 + λ of a positive semi-definite curvature), and called an estimate
    where λ_min is the least Ritz value. Under a `tolerance` few terms R̃ stand for the eigenvalues R of
    the inverse, and the largest gⱼᵀ|R̃ − R|gⱼ / s̄ⱼ is added, which bounds |gᵢᵀ(R̃ − R)gⱼ| / √(s̄ᵢs̄ⱼ); with
    a query's gradient in place of gᵢ, the root of that number times max |R̃/R − 1| does. For `CG` with a
    preconditioner the steps of one solve are counted without it as well, up to ten times as many.

    **Raises:** `ValueError` for what is no `Influence`, or inside a trace. What is wrong with the
    numbers is a finding, not an error.

    **Cost:** n solves, and for a dense curvature its eigenvalues, O(P³); for any other 32 points and 32
    directions stand for all, and the figures say so. A preconditioner adds the plain solve, at most that
    of ten others. Under `Unrolled`, 5 to 6 training runs, and n example gradients.
    """
    check_influence("diagnose", f)
    require_concrete("diagnose", f)
    first = finite(f)
    if first.verdict == "bad":
        return Diagnosis((first,))
    others = of_run(f) if isinstance(f.response, TrainingRun) else of_curvature(f)
    return Diagnosis((first, *others))
