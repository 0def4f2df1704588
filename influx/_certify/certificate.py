"""Enclosures of what retraining would give, without retraining (P11)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_flag, check_indices, check_whole, require_concrete
from .._chunks import map_blocks, take
from .._influence import Influence, check_influence
from .._jacobian import output_jacobian
from .._linalg import ravel
from .._measurement import Margin
from .._memorization import memorization_label
from .._response import check_refine, implicit_response
from .._scale import Unscaled
from .._validate import class_logits_shape, require_labels
from .affine import affine, affine_jacobian, affine_rows
from .ball import Ball, Reach, ball, mean_ball, reach
from .enclosure import enclosures, loss_constants, settled_radius

# What the points of one block need should stay in cache.
_CACHE_BYTES = 8 * 2**20


class Certificate(eqx.Module):
    """Guaranteed enclosures, `lower` ≤ truth ≤ `upper`.

    - without queries: the truth is γᵢ(θ̂₋ᵢ), each point's margin without it, [k]; `certified` where
      the enclosure decides the memorization label, and `label` is that label (0 generalized upon, 1
      memorized, 2 not fitted; where not certified, the label of the predicted margins)
    - with queries: the truth is the change m(θ̂₋ᵢ) − m(θ̂), shaped like `f(queries)`; `certified` where
      its sign is decided, and `label` is `None`

    `radius` bounds ‖θ̂₋ᵢ − θ̃ᵢ‖₂, the distance of the true retrained parameters from those predicted.
    """

    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]
    certified: Bool[Array, "*shape"]
    radius: Float[Array, " k"]
    label: Int[Array, " k"] | None


def certify(
    f: Influence,
    queries: PyTree[Array] | None = None,
    *,
    indices: Int[Array, " k"] | None = None,
    tier: int = 1,
    mean: bool = False,
    refine: int = 0,
    renormalise: bool = False,
) -> Certificate:
    r"""Enclose the retrained truth of each training point's removal, without retraining.

    With J₋ᵢ μ-strongly convex, for any θ̃: ‖θ̂₋ᵢ − θ̃‖ ≤ r = ‖∇J₋ᵢ(θ̃)‖/μ, so that

        m(θ̂₋ᵢ) ∈ m(θ̃) ± min(L r, ‖∇m(θ̃)‖ r + ½βr²),

    L and β the Lipschitz and smoothness constants of m in θ. θ̃ is one Newton step without the point,
    and μ = min l2. Everything is relative to the exact minimisers: that θ̂ itself is trained only so
    far is part of the enclosure.

    ```python
    influx.certify(f)                              # each point's margin without it, and its label
    influx.certify(f, heldout, mean=True)          # the change of the mean held-out loss
    influx.certify(influx.classification(f, "margin"), queries)
    ```

    **Arguments:**

    - `queries`: what is measured by `f`'s measurement; `None`: each point's own margin.
    - `indices`: the training points concerned; all by default.
    - `tier`: 1 evaluates ∇J₋ᵢ(θ̃ᵢ), n example gradients per point. 2 bounds it through the third
      derivative, ‖∇J₋ᵢ(θ̃)‖ ≤ ‖∇J₋ᵢ(θ̂) + H₋ᵢΔᵢ‖ + ½ Δᵢᵀ [(t/n) Σ wⱼ‖Aⱼ‖AⱼᵀAⱼ] Δᵢ: products with two
      matrices per point in place of a pass over the data, and wider.
    - `mean`: enclose the mean over the queries, as one measurement.
    - `refine`: further chord steps θ̃ ← θ̃ − H⁻¹∇J₋ᵢ(θ̃), one gradient each (tier 1 only). One of
      them decides most signs of a held-out change.
    - `renormalise`: the truth is training where the *other* points take over the weight of the removed
      one, wⱼ·W/(W − wᵢ) with W = Σw, so that equal weights of 1 give the mean over n − 1 points. By
      default the point is erased: 1/n stays. Tier 1 only. It is the removal whose first order is wᵢ/n
      times `value(f, heldout).value_centred`.

    Rounding is enclosed as well: a term for the slope in every radius, and one for m itself. What the
    model's program computes of A and b in its outputs Aθ + b, from data and frozen layers, counts as
    exact. The upper end of a margin is capped by P3:
    γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂) for hard labels, where points are erased.

    **Raises:** `ValueError` unless the outputs are affine in the kept parameters, l2 > 0 on every one
    of them, the arithmetic is float64, the loss and measurement have known bounds, and the curvature
    is a Hessian or Gauss–Newton matrix.

    **Cost:** one Newton step per point. Tier 1: (1 + refine) gradients of J₋ᵢ, none of them through
    frozen layers. Tier 2: H once more, and O(P²) a point; behind `CG` a product with H, which is a pass
    over the data. A and b are held: n·d numbers for a linear head on d features, else n·K·P.

    **Source:** the strong-convexity bound is classical; for certified removal see Guo, Goldstein,
    Hannun & van der Maaten, arXiv:1911.03030. Tiers and constants are this project's (P11).
    """
    check_influence("certify", f)
    refine = check_refine(refine)
    mean, renormalise = check_flag("mean", mean), check_flag("renormalise", renormalise)
    tier = check_whole("tier", tier, most=2)
    _check(f, tier, refine, renormalise)
    indices, chords = check_indices(indices, f.risk.n), jnp.asarray(refine)
    if queries is None:
        if mean:
            raise ValueError("`mean=True` averages over queries: pass them.")
        class_logits_shape(f.risk, f.model)
        require_labels(f.risk)
        loss_constants(f)  # refuses a loss without bounds
        return _own_margins(affine(f), indices, tier, chords, renormalise)
    f.measurement.check(f.risk, f.model, queries)
    f.measurement.constants(f.risk, f.model)  # refuses a measurement without bounds
    arrays = jtu.tree_map(jnp.asarray, queries)
    example = eqx.filter_eval_shape(f.measurement, f.risk, f.model, take(arrays, 0))
    if mean and example.shape:
        raise ValueError(
            f"`mean=True` takes the mean of one number a query, and this measurement has "
            f"{example.shape}. Choose a class: `classification(f, kind, class_=0)`."
        )
    inputs, targets = arrays
    jacobian = output_jacobian(f.risk, f.model, inputs)
    rows, f = affine_rows(f, jacobian, inputs), affine(f)
    within = reach(f, jacobian, rows)
    return _changes(f, (rows, targets), within, indices, tier, chords, renormalise, mean)


def _check(f: Influence, tier: int, refine: int, renormalise: bool) -> None:
    if tier == 2 and refine > 0:
        raise ValueError(
            f"Each of `refine`'s chord steps evaluates a gradient, which tier 2 never does; got "
            f"refine={refine} at tier=2. Use tier=1."
        )
    if tier == 2 and renormalise:
        raise ValueError(
            "Tier 2 bounds the slope without a point where 1/n stays; got renormalise=True at tier=2. "
            "Use tier=1."
        )
    require_concrete("certify", f)
    if renormalise and np.count_nonzero(f.risk.weights) < 2:
        raise ValueError(
            "`renormalise=True` takes the mean over the other points, and only one has a weight above "
            "0. Leave it out: erasing keeps 1/n."
        )
    if not isinstance(f.scale, Unscaled) or f.masks is not None:
        raise ValueError(
            "`certify` encloses removals of single points: use `f` without `relative` or `groups`."
        )
    response = implicit_response(f.response, "certify")
    theta, _ = ravel(f.model)
    if theta.dtype != jnp.float64:
        raise ValueError(
            f"A certificate needs float64, the parameters are {theta.dtype}. Enable it with "
            '`jax.config.update("jax_enable_x64", True)` and convert model and data.'
        )
    if response.jacobian is None or not response.jacobian.affine:
        raise ValueError(
            "A certificate needs outputs that are affine in the parameters, and these are not (a cast "
            "to fewer digits counts as none). Restrict to the last layer: "
            "`risk, model = influx.restrict(risk, model, lambda m: m.layers[-1])`."
        )
    if response.newton is None:
        raise ValueError(
            f"`certify` takes a Newton step without each point, and {type(response.curvature).__name__} "
            "does not say what one point adds to it. Use Hessian() or GaussNewton(), or one of them in "
            "CG(...)."
        )
    low = float(jnp.min(f.risk.l2_vector(f.model)))
    if not low > 0:
        raise ValueError(
            "A certificate needs l2 > 0 on every kept parameter (it is the strong convexity), and some "
            "have 0. Give them a small l2, or freeze them with `influx.restrict`."
        )


def _block(f: Influence, tier: int, items: int = 0) -> int:
    """How many points at a time stay in cache, `items` numbers being kept for each besides its step
    and, at tier 1, its model's outputs on the training data."""
    theta, _ = ravel(f.model)
    outputs = f.risk.n * affine_jacobian(f).outputs if tier == 1 else 0
    return max(1, _CACHE_BYTES // (8 * (4 * theta.size + outputs + items)))


@eqx.filter_jit
def _own_margins(f: Influence, indices, tier: int, refine: Array, renormalise: bool) -> Certificate:
    theta, _ = ravel(f.model)
    enclose, settled = enclosures(f, tier, refine, renormalise), settled_radius(f)
    own = lambda step, z, within: ball(f, Margin(), step, z, within)

    def block(places):
        i = indices[places]
        steps, radius = enclose(i)
        data = take(f.risk.data, i)
        within = reach(f, affine_jacobian(f).take(i), data[0])
        without = jax.vmap(own)(steps, data, within)
        at = jax.vmap(own, (None, 0, 0))(jnp.zeros_like(theta), data, within)
        error, error_at = without.error(radius), at.error(settled)
        lower, upper = without.value - error, without.value + error
        if loss_constants(f).hard and not renormalise:  # P3, for points that were trained on
            cap = jnp.minimum(upper, at.value + error_at)
            upper = jnp.where(f.risk.weights[i] > 0, cap, upper)
        decided = _decides(at.value, error_at, lower, upper)
        label = memorization_label(at.value, jnp.minimum(without.value, upper))
        return Certificate(lower, upper, decided, radius, label)

    return map_blocks(block, indices.size, _block(f, tier))


def _decides(margin, error, lower, upper) -> Bool[Array, " k"]:
    """Whether all margins within `error`, and those without the point in [lower, upper], are of one
    label."""
    fitted, unfitted = margin - error > 0, margin + error <= 0
    return unfitted | (fitted & ((lower > 0) | (upper <= 0)))


@eqx.filter_jit
def _changes(
    f: Influence,
    queries,
    within: Reach,
    indices,
    tier: int,
    refine: Array,
    renormalise: bool,
    mean: bool,
) -> Certificate:
    theta, _ = ravel(f.model)
    enclose = enclosures(f, tier, refine, renormalise)

    def balls(step):
        if mean:
            return mean_ball(f, step, queries, within)
        return jax.vmap(lambda q, w: ball(f, f.measurement, step, q, w))(queries, within)

    before = balls(jnp.zeros_like(theta))
    slack = before.error(settled_radius(f))

    def block(places):
        steps, radius = enclose(indices[places])
        after = jax.vmap(balls)(steps)
        error = jax.vmap(Ball.error)(after, radius) + slack[None]
        change = after.value - before.value[None]
        return change - error, change + error, radius

    rows = _block(f, tier, queries[0].constant.size)
    lower, upper, radius = map_blocks(block, indices.size, rows)
    lower, upper = jnp.moveaxis(lower, 0, -1), jnp.moveaxis(upper, 0, -1)
    return Certificate(lower, upper, (lower > 0) | (upper < 0), radius, None)
