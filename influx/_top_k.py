"""The largest and smallest scores of each query, without the matrix of all of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_chunk, check_whole
from ._chunks import Limits, leading_length, map_blocks, take
from ._engine import MOST_POINTS
from ._influence import Influence, check_influence, prepared_queries, scheduled


class Extremes(eqx.Module):
    """Scores [m, *c, k] and the training points they belong to, from the most extreme inwards."""

    values: Float[Array, "*mc k"]
    indices: Int[Array, "*mc k"]


class TopK(eqx.Module):
    """`highest`: the k largest scores of each query, descending; `lowest`: the k smallest, ascending."""

    highest: Extremes
    lowest: Extremes


def top_k(f: Influence, queries: PyTree[Array], k: int, *, chunk_size: int | None = None) -> TopK:
    """The k highest and the k lowest of `f(queries)` per query (and component).

    For a query's loss under `influence` the lowest are the most *helpful* training points, the highest
    the most *harmful*; under `removal`, and for margins or probabilities, the other way round.

    **Arguments:** `k` ≤ n; `chunk_size`: training points at a time.

    **Returns:** `.highest` and `.lowest`, each with `.values` and `.indices` [m, k] or [m, c, k].
    Undefined relative influences (NaN) are passed over; where fewer than k are defined, the rest has
    value NaN and index −1.

    **Raises:** `ValueError` for k outside 1…n, or an `f` under `groups`.

    **Cost:** that of `f(queries)`, with O(m·(k + chunk)) numbers kept in place of O(m·n).
    """
    check_influence("top_k", f)
    if f.masks is not None:
        raise ValueError(
            "`top_k` ranks training points: use an `f` without `groups`, or `jnp.argsort(f(queries))` "
            "to rank the groups."
        )
    k = check_whole("k", k, most=f.risk.n, hint=f" k={f.risk.n} sorts all training points.")
    chunk_size = check_chunk(chunk_size)
    f.measurement.check(f.risk, f.model, queries)
    return _top_k(f, queries, k, chunk_size)


@eqx.filter_jit
def _top_k(f: Influence, queries: PyTree[Array], k: int, chunk_size: int | None) -> TopK:
    n = f.risk.n
    dtype = f.risk.weights.dtype
    limits = f.response.limits
    if chunk_size is not None:
        limits = Limits(chunk_size, limits.memory)
    f, schedule = scheduled(f, queries, 4 * k + min(n, MOST_POINTS), limits)
    b = schedule.points
    starts = jnp.arange(0, n, b)

    def one(prepared):
        c = jax.eval_shape(lambda p: f.effect.columns(f, p, jnp.arange(b)), prepared).shape[:-1]
        empty = jnp.full((*c, k), -jnp.inf, dtype), jnp.full((*c, k), -1)

        def step(best, start):
            # The last block reaches back over points already seen; those are masked out.
            indices = jnp.minimum(start, n - b) + jnp.arange(b)
            scores = f.effect.columns(f, prepared, indices)
            fresh = jnp.broadcast_to(indices >= start, scores.shape)
            use = fresh & ~jnp.isnan(scores)
            highest, lowest = best
            return (
                _merge(highest, jnp.where(use, scores, -jnp.inf), indices, k),
                _merge(lowest, jnp.where(use, -scores, -jnp.inf), indices, k),
            ), None

        (highest, lowest), _ = jax.lax.scan(step, (empty, empty), starts)
        return TopK(_extremes(*highest, 1), _extremes(*lowest, -1))

    answers = lambda block: jax.vmap(one)(prepared_queries(f, schedule, block))
    rows = lambda indices: answers(take(queries, indices))
    return map_blocks(rows, leading_length(queries), schedule.queries)


def _merge(best, scores, indices, k):
    values = jnp.concatenate([best[0], scores], axis=-1)
    places = jnp.concatenate([best[1], jnp.broadcast_to(indices, scores.shape)], axis=-1)
    values, chosen = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(places, chosen, axis=-1)


def _extremes(values, indices, sign):
    missing = jnp.isneginf(values)
    return Extremes(jnp.where(missing, jnp.nan, sign * values), jnp.where(missing, -1, indices))
