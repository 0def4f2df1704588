"""Memorization labels: does a point's margin survive its own removal?"""

from typing import Literal

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._chunks import take
from ._custom_types import Model
from ._engine import map_points
from ._influence import Influence, check_influence
from ._linalg import ravel
from ._measurement import Margin
from ._response import Without, check_removal_step, require_convergence, require_steps
from ._risk import EmpiricalRisk
from ._validate import class_labels, class_logits_shape, require_labels

LABELS = ("generalized upon", "memorized", "not fitted")


class Memorization(eqx.Module):
    """What `memorization` found, per training point.

    - `margin`: γᵢ(θ̂), the log-odds of the point's own label
    - `margin_without`: γᵢ(θ̂₋ᵢ) as predicted, the same without the point
    - `score`: p_y(θ̂) − p_y(θ̂₋ᵢ), the memorization score; in [0, 1] in truth for hard
      labels (P3)
    - `correct`: whether argmax p is the given label
    - `label`: 0 generalized upon, 1 memorized, 2 not fitted (`influx.LABELS` names them)
    """

    margin: Float[Array, " n"]
    margin_without: Float[Array, " n"]
    score: Float[Array, " n"]
    correct: Bool[Array, " n"]
    label: Int[Array, " n"]


def memorization(
    f: Influence, step: Literal["first-order", "newton"] = "newton", *, refine: int = 0
) -> Memorization:
    """Which training points are memorized, and which are generalized upon.

    With γᵢ = z_y − logsumexp_{c≠y} z_c the point's own log-odds margin:

    - *generalized upon*: γᵢ(θ̂) > 0 and γᵢ(θ̂₋ᵢ) > 0, the others explain it;
    - *memorized*: γᵢ(θ̂) > 0 ≥ γᵢ(θ̂₋ᵢ), explained only because it was trained on;
    - *not fitted*: γᵢ(θ̂) ≤ 0, that is p_y ≤ ½.

    A label is about the point, given the others; whether the point helps the others is its `value`.

    **Arguments:**

    - `step`: how γᵢ(θ̂₋ᵢ) is predicted. `"newton"`: evaluated after one Newton step without the point,
      γᵢ(θ̂) + γᵢ(θ̂ + Δθᵢ) − γᵢ(θ̂ + δ₀), δ₀ being 0 at a minimum (Hessian or GaussNewton).
      `"first-order"`: γᵢ(θ̂) − wᵢ I(i; γᵢ)/n, any curvature.
    - `refine`: chord steps after the Newton step, θ̃ ← θ̃ − (H + λI)⁻¹∇J₋ᵢ(θ̃), and after δ₀ with ∇J.

    **Raises:** `ValueError` for an unknown step, a loss without classes, "newton" with a curvature
    that does not know one point's share, or `refine` without "newton"; `RuntimeError` naming the points
    whose chord steps diverge, or without which H is not positive definite. Measurement, scale and
    effect of `f` play no part.

    **Cost:** n solves and n gradients, whichever step; `refine` chord steps another refine + 1
    times n gradients of J and n solves.

    **Source:** the definitions are this project's own, after Kounavis, Dia & Ramazanli,
    arXiv:2305.16094; the score is the soft form of Feldman & Zhang, arXiv:2008.03703. `certify` turns
    the predictions into enclosures.
    """
    check_influence("memorization", f)
    class_logits_shape(f.risk, f.model)
    require_labels(f.risk)
    refine = check_removal_step(f.response, step, refine)
    if step == "first-order":
        return _memorization(f, _first_order_change(f))
    change = require_convergence(*_newton_change(f, refine), jnp.arange(f.risk.n))
    return _memorization(f, require_steps(change))


@eqx.filter_jit
def _memorization(f: Influence, change: Float[Array, " n"]) -> Memorization:
    margin, correct = own_margins(f.risk, f.model)
    without = margin + change
    return Memorization(
        margin, without, jnn.sigmoid(margin) - jnn.sigmoid(without), correct,
        memorization_label(margin, without),
    )  # fmt: skip


def memorization_label(
    margin: Float[Array, " n"], margin_without: Float[Array, " n"]
) -> Int[Array, " n"]:
    """0 generalized upon, 1 memorized, 2 not fitted: a partition of all pairs of margins."""
    return jnp.where(margin <= 0, 2, jnp.where(margin_without <= 0, 1, 0))


@eqx.filter_jit
def own_margins(risk: EmpiricalRisk, model: Model) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """γᵢ(θ̂) of each training point, and whether argmax p is its label."""

    def one(example):
        x, y = example
        output = risk.output(model, x)
        logits = risk.loss.class_logits(output)
        return Margin().of_output(risk.loss, output, y), jnp.argmax(logits) == class_labels(y)[0]

    return jax.vmap(one)(risk.data)


@eqx.filter_jit
def _newton_change(
    f: Influence, refine: int
) -> tuple[Float[Array, " n"], Bool[Array, ""], Bool[Array, " n"]]:
    """γᵢ(θ̂ + Δθᵢ) − γᵢ(θ̂ + δ₀), both refined, a block of points at a time; and whether these and those
    converge, δ₀ first."""
    theta, rebuild = ravel(f.model)
    without = Without(f.response, refine)
    rest, settles = without.settled()
    before = jax.vmap(lambda z: Margin()(f.risk, rebuild(theta + rest), z))(f.risk.data)

    def after(indices):
        steps, converge = without.steps(indices, f.response.displace(indices))
        own = lambda step, z: Margin()(f.risk, rebuild(theta + step), z)
        return jax.vmap(own)(steps, take(f.risk.data, indices)), converge

    margins, converge = map_points(after, f.risk.n, f.response.limits, theta.dtype)
    return margins - before, settles, converge


@eqx.filter_jit
def _first_order_change(f: Influence) -> Float[Array, " n"]:
    """−wᵢ I(i; γᵢ)/n = (wᵢ/n) ∇γᵢᵀH⁻¹gᵢ, each point on its own margin."""
    return f.risk.weights / f.risk.n * f.response.own(Margin())[:, 0]
