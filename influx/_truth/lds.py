"""The linear datamodeling score."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._checks import check_chunk, require_concrete
from .._chunks import chunk_length, chunked_map
from .._data import real_array
from .._linalg import dot


class LDS(eqx.Module):
    """What `lds` found.

    - `value`: the mean of `per_query`, in [−1, 1]
    - `per_query`: Spearman's correlation over the k masks, per query
    - `standard_error`: of `value`, over other masks and other queries
    - `interval`: value ± 1.96 standard errors, (lower, upper)
    """

    value: Float[Array, ""]
    per_query: Float[Array, " m"]
    standard_error: Float[Array, ""]
    interval: tuple[Float[Array, ""], Float[Array, ""]]


def lds(
    scores: Float[Array, "m n"],
    masks: Float[Array, "k n"] | Bool[Array, "k n"],
    outcomes: Float[Array, "k m"],
    *,
    chunk_size: int | None = None,
) -> LDS:
    r"""How well influences rank the models that were actually trained on subsets.

    Per query q, Spearman's correlation (average ranks for ties) over the k models of the predicted
    Σᵢ masks[·, i] scores[q, i] with the actual `outcomes[:, q]`; `value` is its mean over queries.

    ```python
    outcomes = influx.leave_subset_out(risk, model, trainer, masks=masks, outcome=measurements)
    influx.lds(f(queries), masks, outcomes)
    ```

    `masks` multiply data weights, and `scores` are per unit of weight: where weights are not all equal,
    pass `f(queries) * risk.weights`.

    **Sign.** `scores` are influences I(i; m): positive where training more on i raises the
    measurement. Removal effects have the opposite sign and would score −LDS.

    **Standard error.** Masks and queries are both samples, and all queries share the masks:
    SE² = V_masks + V_queries, V_masks the jackknife variance of `value` over masks,
    (k−1)/k Σⱼ (value₍₋ⱼ₎ − mean)², V_queries the variance of `per_query` over m. What masks and
    queries contribute jointly is in both, so it errs on the wide side. For one query (m = 1) it is
    V_masks alone: the error for that very query. The interval rests on normality and may reach
    beyond ±1.

    **Raises:** `ValueError` for shapes that do not match, fewer than 4 masks, NaN or infinity, and
    where a correlation is undefined: a query whose outcomes, or predictions, are equal for all
    models, or for all but one (its jackknife is undefined).

    **Cost:** O(m k (n + k)); 6k² numbers a query, `chunk_size` queries at a time.

    **Source:** Park, Georgiev, Ilyas, Leclerc & Madry, "TRAK: Attributing Model Behavior at Scale",
    arXiv:2303.14186; the crossed standard error: Owen, "The pigeonhole bootstrap", arXiv:0712.1111.
    """
    chunk_size = check_chunk(chunk_size)
    require_concrete("lds", scores, masks, outcomes)
    scores, masks, outcomes = _checked(scores, masks, outcomes)
    predicted = dot(scores, masks.T)
    actual = outcomes.T
    _check_varies(predicted, "predictions `scores @ masks.T`")
    _check_varies(actual, "`outcomes`")
    k, m = outcomes.shape
    chunk = chunk_length(6 * k * k, predicted.dtype, chunk_size)
    return _lds(predicted, actual, min(chunk, m))


@eqx.filter_jit
def _lds(predicted: Float[Array, "m k"], actual: Float[Array, "m k"], chunk: int) -> LDS:
    m, k = predicted.shape
    per_query, without = chunked_map(lambda pair: _spearman(*pair), (predicted, actual), chunk)
    jackknife = jnp.mean(without, axis=0)
    variance = (k - 1) * jnp.var(jackknife)
    if m > 1:
        variance = variance + jnp.var(per_query, ddof=1) / m
    value, error = jnp.mean(per_query), jnp.sqrt(variance)
    return LDS(value, per_query, error, (value - 1.96 * error, value + 1.96 * error))


def _spearman(x: Float[Array, " k"], y: Float[Array, " k"]) -> tuple[Array, Array]:
    """Spearman's correlation, and the k that leave one observation out."""
    k = x.shape[0]
    below_x, below_y = _below(x), _below(y)
    ranks_x, ranks_y = jnp.sum(below_x, axis=1), jnp.sum(below_y, axis=1)
    # Without observation j every rank loses what j contributed to it.
    others = 1 - jnp.eye(k, dtype=x.dtype)
    centre = lambda ranks, below: (ranks[:, None] - below - (k - 1) / 2) * others
    without = _cosine(centre(ranks_x, below_x), centre(ranks_y, below_y))
    return _cosine(ranks_x - k / 2, ranks_y - k / 2), without


def _below(x: Float[Array, " k"]) -> Float[Array, "k k"]:
    """What observation j adds to observation i's average rank: 1 below it, ½ tied (itself too).

    Row sums are average ranks less ½, their mean is k/2."""
    order = jnp.sign(x[:, None] - x[None, :])
    return 0.5 * (order + 1)


def _cosine(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=0) / jnp.sqrt(jnp.sum(a * a, axis=0) * jnp.sum(b * b, axis=0))


def _checked(scores, masks, outcomes) -> tuple[Array, Array, Array]:
    named = {"scores": scores, "masks": masks, "outcomes": outcomes}
    advice = "Scores are `f(queries)`, outcomes what `leave_subset_out` answers."
    scores, masks, outcomes = (np.asarray(real_array(x, name, advice)) for name, x in named.items())
    shapes = f"scores {scores.shape}, masks {masks.shape}, outcomes {outcomes.shape}"
    if any(x.ndim != 2 for x in (scores, masks, outcomes)):
        raise ValueError(f"`lds` takes scores [m, n], masks [k, n], outcomes [k, m]; got {shapes}.")
    (m, n), (k, _) = scores.shape, masks.shape
    if masks.shape != (k, n) or outcomes.shape != (k, m):
        raise ValueError(
            f"`lds` takes scores [m, n], masks [k, n] and outcomes [k, m], got {shapes}."
            + (" Transpose `outcomes`." if outcomes.shape == (m, k) else "")
        )
    if k < 4 or m < 1:
        raise ValueError(
            f"`lds` needs at least 4 masks and a query, got {k} masks, {m} queries. Retrain on more "
            "subsets: the standard error falls as one over the root of their number."
        )
    for name, x in (("scores", scores), ("masks", masks), ("outcomes", outcomes)):
        if not np.isfinite(x).all():
            raise ValueError(
                f"`{name}` is NaN or infinite at {np.argwhere(~np.isfinite(x))[0].tolist()}. Leave "
                "that query or mask out (relative influence is NaN where it is undefined)."
            )
    if (masks < 0).any():
        raise ValueError(
            f"`masks` multiply data weights and must be at least 0, got {masks.min()} at "
            f"{np.argwhere(masks < 0)[0].tolist()}. 1 keeps a point, 0 erases it."
        )
    dtype = jnp.result_type(float)
    as_array = lambda x: jnp.asarray(x.astype(dtype))
    return as_array(scores), as_array(masks), as_array(outcomes)


def _check_varies(values: Float[Array, "m k"], what: str) -> None:
    rows = np.sort(np.asarray(values), axis=1)
    undefined = np.flatnonzero((rows[:, 0] == rows[:, -2]) | (rows[:, 1] == rows[:, -1]))
    if undefined.size:
        raise ValueError(
            f"The {what} of {undefined.size} queries (the first is query {undefined[0]}) are equal "
            "for all models, or all but one: their rank correlation, or its error, is undefined. "
            "Leave those queries out, or watch a smoother measurement, such as a margin."
        )
