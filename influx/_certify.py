"""Enclosures of what retraining would give, without retraining (theory: P11)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._checks import check_flag, check_indices, check_whole, require_concrete
from ._chunks import map_blocks, take
from ._gradients import risk_gradient
from ._influence import Influence, check_influence
from ._jacobian import AbstractJacobian, output_jacobian
from ._linalg import einsum, ravel
from ._loss import LossConstants
from ._measurement import Margin
from ._memorization import memorization_label
from ._response import implicit_response
from ._scale import Unscaled
from ._validate import require_labels

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
      derivative, ‖∇J₋ᵢ(θ̃)‖ ≤ ‖∇J₋ᵢ(θ̂) + H₋ᵢΔᵢ‖ + ½ Δᵢᵀ [(t/n) Σ wⱼ‖Aⱼ‖AⱼᵀAⱼ] Δᵢ: no pass over the
      data per point, and wider.
    - `mean`: enclose the mean over the queries, as one measurement.
    - `refine`: further chord steps θ̃ ← θ̃ − H⁻¹∇J₋ᵢ(θ̃), one gradient each (tier 1 only). One of
      them decides most signs of a held-out change.
    - `renormalise`: the truth is training on the mean over the *other* points, whose weights grow to
      wⱼ·W/(W − wᵢ), W = Σw (n/(n − 1) for equal ones), where by default the point is erased: 1/n
      stays. Tier 1 only. It is the removal whose first order is `value(f, heldout).value_centred`.

    Rounding is enclosed as well: a term for the slope in every radius, and one for m itself. Data and
    frozen layers count as exact. The upper end of a margin is capped by P3:
    γᵢ(θ̂₋ᵢ) ≤ γᵢ(θ̂) for hard labels, where points are erased.

    **Raises:** `ValueError` unless the outputs are affine in the kept parameters, l2 > 0 on every one
    of them, the arithmetic is float64, the loss and measurement have known bounds, and the curvature
    is a Hessian or Gauss–Newton matrix.

    **Cost:** one Newton step per point, and at tier 1 (1 + refine) gradients of J₋ᵢ.

    **Source:** the strong-convexity bound is classical; for certified removal see Guo, Goldstein,
    Hannun & van der Maaten, arXiv:1911.03030. Tiers and constants are this project's (P11).
    """
    check_influence("certify", f)
    refine = check_whole("refine", refine, least=0, hint=" It counts chord steps.")
    mean, renormalise = check_flag("mean", mean), check_flag("renormalise", renormalise)
    tier = check_whole("tier", tier, most=2)
    _check(f, tier, refine, renormalise)
    indices = check_indices(indices, f.risk.n)
    if queries is None:
        if mean:
            raise ValueError("`mean=True` averages over queries: pass them.")
        eqx.filter_eval_shape(f.risk.loss.class_logits, _output(f))
        require_labels(f.risk)
        _constants(f)
        return _own_margins(f, indices, tier, refine, renormalise)
    f.measurement.check(f.risk, f.model, queries)
    f.measurement.constants(f.risk, f.model)
    arrays = jtu.tree_map(jnp.asarray, queries)
    example = eqx.filter_eval_shape(f.measurement, f.risk, f.model, take(arrays, 0))
    if mean and example.shape:
        raise ValueError(
            f"`mean=True` takes the mean of one number a query, and this measurement has "
            f"{example.shape}. Choose a class: `classification(f, kind, class_=0)`."
        )
    jacobian = output_jacobian(f.risk, f.model, arrays[0])
    return _changes(f, arrays, jacobian, indices, tier, refine, renormalise, mean)


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
    f.response.check_displace()
    theta, _ = ravel(f.model)
    if theta.dtype != jnp.float64:
        raise ValueError(
            f"A certificate needs float64, the parameters are {theta.dtype}. Enable it with "
            '`jax.config.update("jax_enable_x64", True)` and convert model and data.'
        )
    jacobian = implicit_response(f.response, "certify").jacobian
    if jacobian is None or not jacobian.affine:
        raise ValueError(
            "A certificate needs outputs that are affine in the parameters, and these are not (a cast "
            "to fewer digits counts as none). Restrict to the last layer: "
            "`risk, model = influx.restrict(risk, model, lambda m: m.layers[-1])`."
        )
    low = float(jnp.min(f.risk.l2_vector(f.model)))
    if not low > 0:
        raise ValueError(
            "A certificate needs l2 > 0 on every kept parameter (it is the strong convexity), and some "
            "have 0. Give them a small l2, or freeze them with `influx.restrict`."
        )


def _jacobian(f: Influence) -> AbstractJacobian:
    jacobian = implicit_response(f.response, "certify").jacobian
    assert jacobian is not None  # `_check` has seen to it
    return jacobian


def _output(f: Influence) -> jax.ShapeDtypeStruct:
    output = implicit_response(f.response, "certify").output
    assert output is not None  # `_check` has seen to it
    return output


def _constants(f: Influence) -> LossConstants:
    return f.risk.loss.constants(_output(f))


def _enclosures(f: Influence, tier: int, refine: int, renormalise: bool) -> Callable:
    """The map from points i to θ̃ᵢ − θ̂ [k, P] and rᵢ ≥ ‖θ̂₋ᵢ − θ̃ᵢ‖ [k] (P11)."""
    growth = _growth(f.risk.weights) if renormalise else jnp.ones_like(f.risk.weights)
    if tier == 2:
        slopes = _bounded_slopes(f)
    else:
        slopes = _evaluated_slopes(f, refine, growth, _drift(f) if renormalise else None)
    # Twice where the weights grow: their growth is a sum of n terms as well.
    grown = jnp.max(growth) * (2 if renormalise else 1)
    rounding, mu = _rounding(f, grown), jnp.min(f.risk.l2_vector(f.model))

    def enclose(indices):
        steps, slope = slopes(indices)
        return steps, (slope + rounding(steps)) / mu

    return enclose


def _growth(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """W/(W − wᵢ): what the other points' weights grow by where the mean is over them alone. The
    others are summed from both ends, since W − wᵢ cancels."""
    before = lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), jnp.cumsum(w)[:-1]])
    others = before(weights) + before(weights[::-1])[::-1]
    return jnp.where(weights > 0, (others + weights) / others, 1)


def _drift(f: Influence) -> Float[Array, " P"]:
    """H⁻¹∇Ω: where the model moves to first order, as the weights of all points grow.

    J₋ᵢ(θ, s·w) has the minimiser of J₋ᵢ(θ, w) − (1 − 1/s) Ω(θ)."""
    theta, _ = ravel(f.model)
    return f.response.solve((f.risk.l2_vector(f.model) * theta)[None])[0]


def _evaluated_slopes(f: Influence, refine: int, growth: Array, drift: Array | None) -> Callable:
    """θ̃ᵢ − θ̂ after `refine` chord steps, and ‖∇J₋ᵢ(θ̃ᵢ)‖."""
    theta, rebuild = ravel(f.model)

    def gradient(i, step):
        weights = growth[i] * f.risk.weights.at[i].set(0)
        return risk_gradient(f.risk, rebuild(theta + step), weights)

    def slopes(indices):
        steps = f.response.displace(indices)
        if drift is not None:
            steps = steps + (1 - 1 / growth[indices])[:, None] * drift[None]
        for _ in range(refine):
            steps = steps - f.response.solve(jax.vmap(gradient)(indices, steps))
        return steps, jnp.linalg.norm(jax.vmap(gradient)(indices, steps), axis=1)

    return slopes


def _bounded_slopes(f: Influence) -> Callable:
    """θ̃ᵢ − θ̂, and ‖∇J₋ᵢ(θ̂) + H₋ᵢΔᵢ‖ + ½ Δᵢᵀ [(t/n) Σ wⱼ‖Aⱼ‖AⱼᵀAⱼ] Δᵢ ≥ ‖∇J₋ᵢ(θ̃ᵢ)‖: no pass over
    the data per point."""
    jacobian = _jacobian(f)
    share = _constants(f).third * f.risk.weights / f.risk.n
    energy = jacobian.energy(share * jacobian.norms())

    def slopes(indices):
        steps, linear = f.response.newton_steps(indices)
        return steps, linear + 0.5 * energy(steps)

    return slopes


def _rounding(f: Influence, growth: Array | float = 1.0) -> Callable:
    """The map from steps to bounds on the rounding error of a computed ∇J₋ᵢ(θ̃ᵢ), in norm.

    A sum of N terms is wrong by at most N·u times the sum of their sizes, u the unit roundoff. The
    terms are l2·θ and the n example gradients, of sizes at most ‖Aⱼ‖(‖∂ℓⱼ(θ̂)‖ + β‖Aⱼ‖‖θ̃ᵢ − θ̂‖), each
    with K products of its own. The outputs Aⱼθ + bⱼ behind ∂ℓⱼ are inner products as well, and their
    error enters through the loss's smoothness β. Inside the loss there are sums over the K outputs and a
    few roundings more, for which constants stand: 16 for those relative to the outputs, 64 for those
    relative to its steepest slope. `growth` is what the weights have grown by at most.
    """
    theta, _ = ravel(f.model)
    norms, smooth = _jacobian(f).norms(), _constants(f).smoothness
    at_output = lambda z: jnp.linalg.norm(
        jax.grad(lambda o: f.risk.loss(o, z[1]))(f.risk.output(f.model, z[0]))
    )
    slopes = f.risk.mean(norms * jax.vmap(at_output)(f.risk.data))
    curvature = f.risk.mean(smooth * norms**2)
    outputs = jax.vmap(lambda x: f.risk.output(f.model, x).reshape(-1))(f.risk.data[0])
    constant = jnp.linalg.norm(outputs - _jacobian(f).push(theta), axis=1)  # ‖bⱼ‖
    offset = f.risk.mean(smooth * norms * constant)
    # A loss without a steepest slope is a polynomial of its output: its roundings are relative.
    steepest = jnp.asarray(_constants(f).lipschitz, theta.dtype)
    inside = jnp.where(jnp.isfinite(steepest), steepest, 0) * f.risk.mean(norms)
    each = _jacobian(f).outputs
    l2 = jnp.max(f.risk.l2_vector(f.model))
    products, unit = _jacobian(f).length + each + 16, jnp.finfo(theta.dtype).eps / 2

    def bound(steps):
        moved = jnp.linalg.norm(steps, axis=1)
        length = jnp.linalg.norm(theta) + moved
        sizes = curvature * length + offset  # of outputs: ‖A‖‖θ‖ + ‖b‖
        summed = (f.risk.n + products) * (slopes + curvature * moved)
        data_terms = summed + products * sizes + (64 + each) * inside
        return unit * (growth * data_terms + 4 * l2 * length)

    return bound


def _block(f: Influence, tier: int, items: int = 0) -> int:
    """How many points at a time stay in cache, `items` numbers being kept for each besides its step
    and, at tier 1, its model's outputs on the training data."""
    theta, _ = ravel(f.model)
    outputs = f.risk.n * _jacobian(f).outputs if tier == 1 else 0
    return max(1, _CACHE_BYTES // (8 * (4 * theta.size + outputs + items)))


class _Ball(eqx.Module):
    """m on a ball: its value at the centre, up to `rounding`, and how far it can be from it within
    radius r."""

    value: Array
    slope: Array
    lipschitz: Array
    smoothness: Array
    rounding: Array

    def error(self, radius: Array) -> Array:
        local = self.slope * radius + 0.5 * self.smoothness * radius**2
        return jnp.minimum(_product(self.lipschitz, radius), local) + self.rounding


def _product(lipschitz, radius):
    """L·r, infinite for an infinite L even at r = 0."""
    return jnp.where(jnp.isfinite(lipschitz), lipschitz * radius, jnp.inf)


def _ball(f: Influence, measurement, step, query, outer, norm) -> _Ball:
    """One query's measurement at θ̂ + step; `outer` is A Aᵀ of its output, `norm` is ‖A‖₂."""
    theta, rebuild = ravel(f.model)
    x, y = query
    output = f.risk.output(rebuild(theta + step), x)
    of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
    flat = output.reshape(-1)
    rows = jax.jacrev(of_output)(flat)
    slope = jnp.sqrt(jnp.maximum(einsum("...k,kl,...l->...", rows, outer, rows), 0))
    bounds = measurement.constants(f.risk, f.model)
    # The components of a vector measurement share their bounds.
    shared = lambda bound: jnp.broadcast_to(bound, slope.shape)
    value, steepness = of_output(flat), jnp.linalg.norm(rows, axis=-1)
    return _Ball(
        value,
        slope,
        shared(bounds.lipschitz * norm),
        shared(bounds.smoothness * norm**2),
        _value_rounding(value, steepness, bounds.smoothness, flat, norm, theta + step),
    )


def _value_rounding(value, steepness, smoothness, output, norm, theta) -> Array:
    """How far a computed m can be from m: the error of the output, carried on by ∂m, and that of the
    few operations from there on. An output Aθ + b is wrong by P·u·(‖A‖‖θ‖ + ‖b‖), and ‖b‖ is at most
    ‖output‖ + ‖A‖‖θ‖."""
    unit = jnp.finfo(value.dtype).eps / 2
    shift = unit * theta.size * (2 * norm * jnp.linalg.norm(theta) + jnp.linalg.norm(output))
    few = 64 + output.size  # a sum over K outputs, and what is done to it
    return few * unit * (jnp.abs(value) + 1) + steepness * shift + smoothness * shift**2


def _mean_ball(f: Influence, step, queries, norms) -> _Ball:
    """The mean of a scalar measurement over queries at θ̂ + step; `norms` are their ‖A‖."""
    theta, rebuild = ravel(f.model)

    def average(t):
        return jnp.mean(jax.vmap(lambda q: f.measurement(f.risk, rebuild(t), q))(queries))

    value, gradient = jax.value_and_grad(average)(theta + step)
    bounds = f.measurement.constants(f.risk, f.model)

    measurement: Any = f.measurement  # of the output: `constants` has answered

    def rounding(query, norm):
        x, y = query
        output = f.risk.output(rebuild(theta + step), x)
        of_output = lambda o: measurement.of_output(f.risk.loss, o.reshape(output.shape), y)
        at, row = jax.value_and_grad(of_output)(output.reshape(-1))
        steepness, flat = jnp.linalg.norm(row), output.reshape(-1)
        return _value_rounding(at, steepness, bounds.smoothness, flat, norm, theta + step), at

    each, values = jax.vmap(rounding)(queries, norms)
    of_sum = norms.size * jnp.finfo(value.dtype).eps / 2 * jnp.mean(jnp.abs(values))
    return _Ball(
        value,
        jnp.linalg.norm(gradient),
        jnp.mean(bounds.lipschitz * norms),
        jnp.mean(bounds.smoothness * norms**2),
        jnp.mean(each) + of_sum,
    )


def _settled_radius(f: Influence) -> Float[Array, ""]:
    """r₀ ≥ ‖θ̂* − θ̂‖, θ̂* the exact minimiser that the model stands for."""
    theta, _ = ravel(f.model)
    slope = jnp.linalg.norm(risk_gradient(f.risk, f.model))
    rounding = _rounding(f)(jnp.zeros((1, theta.size), theta.dtype))[0]
    return (slope + rounding) / jnp.min(f.risk.l2_vector(f.model))


@eqx.filter_jit
def _own_margins(f: Influence, indices, tier: int, refine: int, renormalise: bool) -> Certificate:
    theta, _ = ravel(f.model)
    enclose, settled = _enclosures(f, tier, refine, renormalise), _settled_radius(f)
    own = lambda step, z, o, norm: _ball(f, Margin(), step, z, o, norm)

    def block(places):
        i = indices[places]
        steps, radius = enclose(i)
        data, jacobian = take(f.risk.data, i), _jacobian(f).take(i)
        outer, norms = jacobian.outer(), jacobian.norms()
        without = jax.vmap(own)(steps, data, outer, norms)
        at = jax.vmap(own, (None, 0, 0, 0))(jnp.zeros_like(theta), data, outer, norms)
        error, error_at = without.error(radius), at.error(settled)
        lower, upper = without.value - error, without.value + error
        if _constants(f).hard and not renormalise:  # P3, for points that were trained on
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
    jacobian: AbstractJacobian,
    indices,
    tier: int,
    refine: int,
    renormalise: bool,
    mean: bool,
) -> Certificate:
    theta, _ = ravel(f.model)
    enclose = _enclosures(f, tier, refine, renormalise)
    outer, norms = jacobian.outer(), jacobian.norms()

    def balls(step):
        if mean:
            return _mean_ball(f, step, queries, norms)
        one = lambda q, o, norm: _ball(f, f.measurement, step, q, o, norm)
        return jax.vmap(one)(queries, outer, norms)

    before = balls(jnp.zeros_like(theta))
    slack = before.error(_settled_radius(f))

    def block(places):
        steps, radius = enclose(indices[places])
        after = jax.vmap(balls)(steps)
        error = jax.vmap(_Ball.error)(after, radius) + slack[None]
        change = after.value - before.value[None]
        return change - error, change + error, radius

    rows = _block(f, tier, norms.size * jacobian.outputs)
    lower, upper, radius = map_blocks(block, indices.size, rows)
    lower, upper = jnp.moveaxis(lower, 0, -1), jnp.moveaxis(upper, 0, -1)
    return Certificate(lower, upper, (lower > 0) | (upper < 0), radius, None)
