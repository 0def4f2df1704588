"""The value of a training point to the others: its effect on held-out loss."""

from dataclasses import replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._checks import check_indices, is_concrete
from ._chunks import chunked_sum, leading_length, take
from ._effect import Derivative
from ._engine import map_points
from ._influence import Influence, check_influence, prepared_queries, scheduled
from ._linalg import ravel
from ._measurement import Loss
from ._response import Without, check_removal_step, require_convergence
from ._scale import Unscaled
from ._validate import check_queries

VERDICTS = ("helpful", "harmful", "undecided")


class Value(eqx.Module):
    """What `value` found, per training point asked for.

    - `value`: Gᵢ, positive = helpful; erasing the point changes L_V by about wᵢGᵢ/n
    - `value_centred`: the same where training renormalises (a mean over the points left)
    - `standard_error`: that of Gᵢ, since V is a sample
    - `verdict`: 0 helpful, 1 harmful, 2 undecided (`influx.VERDICTS` names them)
    """

    value: Float[Array, " k"]
    value_centred: Float[Array, " k"]
    standard_error: Float[Array, " k"]
    verdict: Int[Array, " k"]


def value(
    f: Influence,
    heldout: PyTree[Array],
    step: Literal["first-order", "newton"] = "first-order",
    *,
    refine: int = 0,
    indices: Int[Array, " k"] | None = None,
) -> Value:
    """Whether each training point helps or harms the model on held-out data.

    Gᵢ > 0: *helpful*, removing the point raises the mean loss L_V over `heldout` = (inputs, targets);
    Gᵢ < 0: *harmful*. 0, and |Gᵢ| < 2 standard errors, is *undecided*: another held-out sample might say
    otherwise. That is about V, which is a sample; whether the sign is right for this V is what `step`,
    and `certify(f, heldout, mean=True)`, are about.

    **Arguments:**

    - `heldout`: what no choice about the model has seen. On the training data effects cancel: without
      a regulariser they sum to 0, and every point looks harmful to the *other* ones (P4).
    - `step`: `"first-order"`: Gᵢ = −I(i; L_V), a derivative, of any curvature. It can have another
      sign than removing the whole point has: where that changes little, or the point's leverage is
      large. `"newton"`: that change itself, in the same unit, Gᵢ = (n/wᵢ)[L_V(θ̃ᵢ) − L_V(θ̃)], L_V
      evaluated at θ̃ᵢ, one Newton step without the point and `refine` chord steps on; θ̃ is the same with
      every point kept, θ̂ at a minimum.
    - `refine`: chord steps θ̃ᵢ ← θ̃ᵢ − (H + λI)⁻¹∇J₋ᵢ(θ̃ᵢ), towards where retraining ends. An error tells
      where they lead away from it, nothing tells how near they are: `certify(f, heldout, mean=True,
      refine=...)` takes the same and proves signs. Ask for float64: L_V(θ̃ᵢ) − L_V(θ̃) is a small
      difference, of which float32 loses what a derivative keeps.
    - `indices`: the training points concerned; all by default.

    **Returns:** a `Value` of arrays [k], one number for each of `indices`, in the unit of `f(queries)`
    with the sign turned.

    **Two conventions.** `value` erases (1/n and l2 stay); `value_centred` renormalises (the mean over
    n − 1 points, as training with weight decay does): the other points take over the weight of the one
    removed. To first order it is Gᵢ − Ḡ, Ḡ the weighted mean, and the change of L_V about wᵢ(Gᵢ − Ḡ)/n.
    Each is positive where a removal of its own kind raises L_V; verdicts are those of `value`.

    **Raises:** `ValueError` for held-out data that do not look like the training data, fewer than two
    of them, or an `f` under a transform (a value is of single points, and plain); for "newton", where
    the curvature does not know one point's share (`removal` says which do), for points of weight 0, or
    a single one. `RuntimeError` naming the points whose chord steps diverge. NaN, *undecided*, stands
    for a point without which H is not positive definite (see `removal`), and where a trace cannot see
    that a weight is 0.

    **Cost:** |V| solves, and a pass over the training data per block of queries that fits `memory`.
    "newton": a Newton step a point; in both conventions |V| losses, and `refine` + 1 gradients of J and
    solves (none at 0).

    **Source:** Kounavis, Dia & Ramazanli, arXiv:2305.16094 (sign of influence); Koh & Liang,
    arXiv:1703.04730; "newton": see `removal`.
    """
    check_influence("value", f)
    require_plain(f, "value")
    check_queries(f.risk, f.model, heldout, "heldout")
    if leading_length(heldout) < 2:
        raise ValueError(
            "`heldout` needs at least 2 examples, for a standard error; got 1. For a single query read "
            "the sign of `f(queries)`: negative is helpful."
        )
    refine = check_removal_step(f.response, step, refine)
    f, points = replace(f, measurement=Loss()), check_indices(indices, f.risk.n)
    if step == "first-order":
        found = _first_order(f, heldout)
        return found if indices is None else take(found, points)
    _check_removable(f, indices)
    heldout = jtu.tree_map(jnp.asarray, heldout)
    return require_convergence(*_removed(f, heldout, points, refine), points)


def require_plain(f: Influence, verb: str) -> None:
    """Refuse an `f` whose transforms a verb would ignore."""
    plain = isinstance(f.effect, Derivative) and isinstance(f.scale, Unscaled) and f.masks is None
    if not plain or not isinstance(f.measurement, Loss):
        raise ValueError(
            f"`{verb}` reads plain influence on the loss: call it on `influence(...)` itself, before "
            "`classification`, `measure`, `relative`, `removal` or `groups`."
        )


def _check_removable(f: Influence, indices: Int[Array, " k"] | None) -> None:
    present, absent = f.risk.n, 0
    if is_concrete(f.risk.weights):
        weights = np.asarray(f.risk.weights)
        present = int(np.sum(weights > 0))
        absent = int(np.sum(weights[... if indices is None else np.asarray(indices)] == 0))
    if present < 2 or absent:
        raise ValueError(
            'The value of a whole removal, `step="newton"`, is of points that can be removed: of more '
            f"than one, of weights above 0; got {present} such "
            f"points, and asked about {absent} of weight 0. Use "
            '`step="first-order"`, which says what a point would add as well.'
        )


@eqx.filter_jit
def _first_order(f: Influence, heldout: PyTree[Array]) -> Value:
    """−I(i; L_V), and the same less its mean."""
    m, weights = leading_length(heldout), f.risk.weights
    mean, square = _moments(f, heldout)
    centred = jnp.vdot(weights, mean) / jnp.sum(weights) - mean
    return _judged(-mean, centred, jnp.sqrt(square / (m * (m - 1))))


@eqx.filter_jit
def _removed(
    f: Influence, heldout: PyTree[Array], indices: Int[Array, " k"], refine: int
) -> tuple[Value, Bool[Array, ""], Bool[Array, " k"]]:
    """(n/wᵢ)[L_V(θ̃ᵢ) − L_V(θ̃)] in both conventions, a block of points at a time, and whether the
    steps to them converge."""
    theta, rebuild = ravel(f.model)
    m, per_weight = leading_length(heldout), f.risk.n / f.risk.weights
    losses = lambda step: f.risk.losses(rebuild(theta + step), heldout)
    conventions = [Without(f.response, refine, renormalise) for renormalise in (False, True)]
    rest, settles = conventions[0].settled()
    before = losses(rest)

    def block(places):
        points = indices[places]
        displaced, all_converge, found = f.response.displace(points), True, []
        for without in conventions:
            steps, converge = without.steps(points, displaced)
            change = jax.vmap(losses)(steps) - before[None]
            found.append(per_weight[points, None] * change)
            all_converge = all_converge & converge
        erased, rest = found
        spread = jnp.std(erased, axis=1, ddof=1) / jnp.sqrt(m)
        return jnp.mean(erased, axis=1), jnp.mean(rest, axis=1), spread, all_converge

    *found, converge = map_points(block, indices.size, f.response.limits, theta.dtype)
    return _judged(*found), settles, converge


def _moments(f: Influence, heldout: PyTree[Array]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The mean of the scores over `heldout` and the sum of squared deviations from it, a block of
    queries at a time; the first query's scores are taken off before squaring, against cancellation."""
    m = leading_length(heldout)
    f, schedule = scheduled(f, heldout)
    one = lambda prepared: f.effect.columns(f, prepared, None)
    first = one(f.effect.prepare(f, take(heldout, 0)))

    def sums(queries):
        shifted = jax.vmap(one)(prepared_queries(f, schedule, queries)) - first[None]
        return jnp.sum(shifted, axis=0), jnp.sum(jnp.square(shifted), axis=0)

    total, squares = chunked_sum(sums, heldout, schedule.queries)
    return first + total / m, jnp.maximum(squares - jnp.square(total) / m, 0)


def _judged(G, centred, standard_error) -> Value:
    helpful = jnp.where(G > 0, 0, 1)
    decided = (G != 0) & (jnp.abs(G) >= 2 * standard_error)  # not so where G is NaN
    return Value(G, centred, standard_error, jnp.where(decided, helpful, 2))
