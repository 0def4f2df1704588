"""The value of a training point to the others: its effect on held-out loss."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._chunks import chunked_sum, leading_length, take
from ._effect import Derivative
from ._influence import Influence, check_influence, prepared_queries, scheduled
from ._measurement import Loss
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


def value(f: Influence, heldout: PyTree[Array]) -> Value:
    """Whether each training point helps or harms the model on held-out data.

    Gᵢ = −I(i; L_V) with L_V the mean loss over `heldout` = (inputs, targets). Gᵢ > 0: *helpful*,
    removing the point raises the held-out loss; Gᵢ ≤ 0: *harmful*. |Gᵢ| < 2 standard errors is
    *undecided*: another held-out sample might say otherwise.

    **Two conventions.** `value` erases (1/n and l2 stay); `value_centred` renormalises (the mean over
    n − 1 points, as training with weight decay does): removing then changes L_V by about
    wᵢ(Gᵢ − Ḡ)/n, Ḡ the weighted mean. Each is positive where a removal of its own kind raises L_V;
    verdicts are those of `value`.

    Read it on held-out data only. On the training data effects cancel: without a regulariser they sum
    to 0 over all points, and every point looks harmful to the *other* ones (P4).

    **Raises:** `ValueError` for held-out data that do not look like the training data, fewer than two
    of them, or an `f` under a transform (a value is of single points, and plain).

    **Cost:** |V| solves, and a pass over the training data per block of queries that fits `memory`.

    **Source:** Kounavis, Dia & Ramazanli, arXiv:2305.16094 (sign of influence); Koh & Liang,
    arXiv:1703.04730.
    """
    check_influence("value", f)
    require_plain(f, "value")
    check_queries(f.risk, f.model, heldout, "heldout")
    if leading_length(heldout) < 2:
        raise ValueError(
            "`heldout` needs at least 2 examples, for a standard error; got 1. For a single query read "
            "the sign of `f(queries)`: negative is helpful."
        )
    return _value(replace(f, measurement=Loss()), heldout)


def require_plain(f: Influence, verb: str) -> None:
    """Refuse an `f` whose transforms a verb would ignore."""
    plain = isinstance(f.effect, Derivative) and isinstance(f.scale, Unscaled) and f.masks is None
    if not plain or not isinstance(f.measurement, Loss):
        raise ValueError(
            f"`{verb}` reads plain influence on the loss: call it on `influence(...)` itself, before "
            "`classification`, `measure`, `relative`, `removal` or `groups`."
        )


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
def _value(f: Influence, heldout: PyTree[Array]) -> Value:
    m = leading_length(heldout)
    mean, square = _moments(f, heldout)
    G = -mean
    standard_error = jnp.sqrt(square / (m * (m - 1)))
    weights = f.risk.weights
    centred = G - jnp.vdot(weights, G) / jnp.sum(weights)
    verdict = jnp.where(jnp.abs(G) < 2 * standard_error, 2, jnp.where(G > 0, 0, 1))
    return Value(G, centred, standard_error, verdict)
