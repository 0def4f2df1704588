from dataclasses import replace
from typing import Literal

from .._effect import Derivative
from .._influence import Influence, check_influence
from .._scale import AbstractScale, BySize, Cosine, Reference, sizes


def relative(
    f: Influence,
    kind: Literal["loss", "parameters", "self", "cosine"] | Reference = "loss",
) -> Influence:
    """Influence divided by a size of the training point, so that outliers no longer win everywhere.

    With sᵢ = gᵢᵀH⁻¹gᵢ:

    | kind | divides by | answers |
    |---|---|---|
    | `"loss"` | √sᵢ | most effect per change of the training loss (to second order in J) |
    | `"parameters"` | ‖H⁻¹gᵢ‖ | most effect per length of the step in parameters; not invariant (P7b) |
    | `"self"` | sᵢ | effect as a share of the point's effect on itself |
    | `"cosine"` | √(sᵢ ∇mᵀH⁻¹∇m) | the cosine in the metric H⁻¹, in [−1, 1] (P5) |
    | `Reference(r)` | I(r; m) | multiples of another point's influence, with its sign |

    The first two are optima of constrained problems (P6). The train-side sizes are computed here, once:
    n solves. The sign is that of influence, except under a `Reference` of negative influence.

    **Undefined** (0/0: gᵢ = 0, or I(r; m) = 0) stands as NaN; `relative(f, kind).undefined` lists the
    training points concerned.

    **Raises:** `ValueError` for an unknown kind, a reference out of range, or an `f` under `removal`
    or `groups`, whose scores are not influences of single points.

    **Source:** Barshan, Brunet & Dziugaite, "RelatIF: Identifying Explanatory Training Examples via
    Relative Influence", arXiv:2003.11630, for "loss" and "parameters".
    """
    check_influence("relative", f)
    if not isinstance(f.effect, Derivative):
        raise ValueError(
            "Relative influence divides a derivative; a predicted change on removal has a unit of its "
            "own. Use `relative(f, kind)` without `removal`, or `removal(f, kind)` without `relative`."
        )
    if f.masks is not None:
        raise ValueError(
            "A group has no size of its own to divide by. Use `relative(f, kind)` without `groups`, "
            "and add its scores over the members if their sum is what you mean."
        )
    scale = _scale(f, kind)
    scale.check(f.risk.n)
    return replace(f, scale=scale)


def _scale(f: Influence, kind) -> AbstractScale:
    if isinstance(kind, AbstractScale):
        return kind
    if kind in ("loss", "parameters", "self"):
        return BySize(sizes(f.response, kind))
    if kind == "cosine":
        return Cosine(sizes(f.response, "loss"))
    raise ValueError(
        '`kind` must be "loss", "parameters", "self", "cosine" or influx.Reference(i), '
        f"got {kind!r}."
    )


def self_influence(f: Influence):
    """I(i; ℓᵢ) = −sᵢ = −gᵢᵀH⁻¹gᵢ ≤ 0 of every training point on its own loss, [n] (P3).

    Large in size: the point bends the model towards itself (memorized, mislabelled or rare). It is a
    property of the response alone: measurement, scale and effect of `f` play no part.

    **Sign.** Never positive: training more on a point lowers its own loss. **Cost:** n solves.

    **Source:** Koh & Liang, arXiv:1703.04730; Feldman & Zhang, arXiv:2008.03703.
    """
    check_influence("self_influence", f)
    return -sizes(f.response, "self")
