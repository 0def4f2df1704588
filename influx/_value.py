"""The value of a training point to the others: its effect on held-out loss."""

from dataclasses import replace
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._checks import is_concrete
from ._chunks import chunked_sum, leading_length, take
from ._effect import Derivative
from ._influence import Influence, check_influence, prepared_queries, scheduled
from ._linalg import ravel
from ._measurement import Loss
from ._memorization import check_step
from ._response import Without
from ._scale import Unscaled
from ._validate import check_queries

VERDICTS = ("helpful", "harmful", "undecided")


class Value(eqx.Module):
    """What `value` found, per training point.

    - `value`: Gᵢ = −I(i; L_V), positive = helpful; erasing the point changes L_V by about wᵢGᵢ/n
    - `value_centred`: Gᵢ − Ḡ, the same where training renormalises (a mean over the points left)
    - `standard_error`: that of Gᵢ, since V is a sample
    - `verdict`: 0 helpful, 1 harmful, 2 undecided (`influx.VERDICTS` names them)
    """

    value: Float[Array, " n"]
    value_centred: Float[Array, " n"]
    standard_error: Float[Array, " n"]
    verdict: Int[Array, " n"]


def value(
    f: Influence,
    heldout: PyTree[Array],
    step: Literal["first-order", "newton"] = "first-order",
    *,
    refine: int = 0,
) -> Value:
    """Whether each training point helps or harms the model on held-out data.

    Gᵢ = −I(i; L_V) with L_V the mean loss over `heldout` = (inputs, targets). Gᵢ > 0: *helpful*,
    removing the point raises the held-out loss; Gᵢ ≤ 0: *harmful*. |Gᵢ| < 2 standard errors is
    *undecided*: another held-out sample might say otherwise.

    **Two conventions.** `value` erases (1/n and l2 stay); `value_centred` renormalises (the mean over
    n − 1 points, as training with weight decay does): removing then changes L_V by about
    wᵢ(Gᵢ − Ḡ)/n, Ḡ the weighted mean. Each is positive where a removal of its own kind raises L_V;
    verdicts are those of `value`.

    **The sign of a removal.** A derivative can have another sign than the change that removing the whole
    point makes: where the change is minute, or the point's leverage large. `step="newton"` takes that
    change itself, in the same unit: (n/wᵢ)[L_V(θ̃ᵢ) − L_V(θ̂)], L_V evaluated at θ̃ᵢ, one Newton step
    without the point and `refine` chord steps on (as in `certify`, which proves such signs). In
    `value_centred` the others then take over the point's weight; its first order is Gᵢ − Ḡ. Off a
    minimum, θ̂ too is refined, with every point kept.

    Read it on held-out data only. On the training data effects cancel: without a regulariser they sum
    to 0 over all points, and every point looks harmful to the *other* ones (P4).

    **Raises:** `ValueError` for held-out data that do not look like the training data, fewer than two
    of them, or an `f` under a transform (a value is of single points, and plain); for "newton", where
    the curvature does not know one point's share (`removal` says which do), points of weight 0 or a
    single point. An error at run time where chord steps do not converge.

    **Cost:** |V| solves, and a pass over the training data per block of queries that fits `memory`.
    "newton": for each point and convention a Newton step, |V| losses, and `refine` gradients of J and
    solves.

    **Source:** Kounavis, Dia & Ramazanli, arXiv:2305.16094 (sign of influence); Koh & Liang,
    arXiv:1703.04730; "newton": see `removal`.
    """
    check_influence("value", f)
    refine = check_step(f, step, refine)
    require_plain(f, "value")
    check_queries(f.risk, f.model, heldout, "heldout")
    if leading_length(heldout) < 2:
        raise ValueError(
            "`heldout` needs at least 2 examples, for a standard error; got 1. For a single query read "
            "the sign of `f(queries)`: negative is helpful."
        )
    f = replace(f, measurement=Loss())
    if step == "first-order":
        return _value(_first_order(f, heldout))
    _check_removable(f)
    return _value(_removed(f, jtu.tree_map(jnp.asarray, heldout), jnp.asarray(refine)))


def require_plain(f: Influence, verb: str) -> None:
    """Refuse an `f` whose transforms a verb would ignore."""
    plain = isinstance(f.effect, Derivative) and isinstance(f.scale, Unscaled) and f.masks is None
    if not plain or not isinstance(f.measurement, Loss):
        raise ValueError(
            f"`{verb}` reads plain influence on the loss: call it on `influence(...)` itself, before "
            "`classification`, `measure`, `relative`, `removal` or `groups`."
        )


def _check_removable(f: Influence) -> None:
    weights = f.risk.weights
    if is_concrete(weights) and (f.risk.n < 2 or not bool(jnp.all(weights > 0))):
        raise ValueError(
            'The value of a whole removal, `step="newton"`, is of points that can be removed: of more '
            f"than one, of weights above 0; got {f.risk.n} points, {int(jnp.sum(weights == 0))} of "
            'weight 0. Use `step="first-order"`, which says what a point would add as well.'
        )


class _Found(NamedTuple):
    """What is said of each point where it is erased, where the rest take over, and the first's
    standard error."""

    value: Float[Array, " n"]
    centred: Float[Array, " n"]
    standard_error: Float[Array, " n"]


@eqx.filter_jit
def _first_order(f: Influence, heldout: PyTree[Array]) -> _Found:
    """−I(i; L_V), and the same less its mean."""
    m, weights = leading_length(heldout), f.risk.weights
    mean, square = _moments(f, heldout)
    centred = jnp.vdot(weights, mean) / jnp.sum(weights) - mean
    return _Found(-mean, centred, jnp.sqrt(square / (m * (m - 1))))


@eqx.filter_jit
def _removed(f: Influence, heldout: PyTree[Array], refine: Array) -> _Found:
    """(n/wᵢ)[L_V(θ̃ᵢ) − L_V(θ̂)] in both conventions, a block of points at a time."""
    theta, rebuild = ravel(f.model)
    m, per_weight = leading_length(heldout), f.risk.n / f.risk.weights
    losses = lambda step: f.risk.losses(rebuild(theta + step), heldout)
    erased, renormalised = Without(f.response), Without(f.response, renormalise=True)
    before = losses(erased.settled(refine))

    def changes(without: Without, points) -> Float[Array, "b m"]:
        steps = without.converged(points, refine)
        return per_weight[points, None] * (jax.vmap(losses)(steps) - before[None])

    def block(points):
        found = changes(erased, points)
        spread = jnp.std(found, axis=1, ddof=1) / jnp.sqrt(m)
        centred = jnp.mean(changes(renormalised, points), axis=1)
        return _Found(jnp.mean(found, axis=1), centred, spread)

    return erased.mapped(block)


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


@eqx.filter_jit
def _value(found: _Found) -> Value:
    G, centred, standard_error = found
    verdict = jnp.where(jnp.abs(G) < 2 * standard_error, 2, jnp.where(G > 0, 0, 1))
    return Value(G, centred, standard_error, verdict)
