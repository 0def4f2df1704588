"""Memorization and influence as Feldman and Zhang estimate them: by training on random subsets."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_key, check_whole, is_real, require_concrete
from .._chunks import take
from .._custom_types import Example, Model
from .._linalg import einsum
from .._loss import AbstractLoss
from .._risk import EmpiricalRisk
from .._train import AbstractTrainer
from .._validate import check_queries, class_logits_shape, require_labels, validate
from .leave_subset_out import check_subsets, leave_subset_out

SHARE, TRIALS = 0.7, 200


class SubsampledMemorization(eqx.Module):
    """What `subsampled_memorization` found.

    - `memorization`: of every training point, [n]; `standard_error`: of each
    - `influence`: of the training points (columns) on the queries (rows), [m, n], and its
      `influence_standard_error`; `None` without queries
    - `inside`, `outside`: how many of the trainings each point was in, and out of

    For an outcome of c numbers they are [c, n] and [m, c, n].
    """

    memorization: Float[Array, "*c n"]
    standard_error: Float[Array, "*c n"]
    influence: Float[Array, "m *c n"] | None
    influence_standard_error: Float[Array, "m *c n"] | None
    inside: Int[Array, " n"]
    outside: Int[Array, " n"]


def subsampled_memorization(
    risk: EmpiricalRisk,
    model0: Model,
    trainer: AbstractTrainer,
    *,
    masks: Float[Array, "k n"] | Bool[Array, "k n"] | None = None,
    key: PRNGKeyArray | None = None,
    share: float | None = None,
    trials: int | None = None,
    queries: PyTree[Array] | None = None,
    outcome: Literal["correct", "probability", "margin"] | Callable[[Any, Example], Array] = (
        "correct"
    ),
    chunk_size: int | None = None,
) -> SubsampledMemorization:
    r"""Ground truth: memorization and influence by training on k random subsets of the data.

    With a(j; S) the outcome on example j of the model trained on the subset S,

        memorization of i    = mean of a(i; S) over the S with i  −  mean over the S without i
        influence of i on j  = mean of a(j; S) over the S with i  −  mean over the S without i.

    One training serves all points at once, so that k trainings stand for n retrainings. The subsets
    that `key` draws all hold round(`share`·n) points, so that one with i holds it in place of one of
    the others: given how often i is in and out, each is an unbiased estimate of what a subset gains
    from i *over a random other point*. For `masks` with independent entries it is the gain from i.

    ```python
    found = influx.subsampled_memorization(risk, model0, trainer, key=jr.key(0), trials=200)
    memorized = found.memorization > 0.25                                      # their threshold
    ```

    **Sign.** Positive: training on i raises the outcome. For all three named outcomes more is better,
    so positive influence is *helpful*: the opposite of `influence` on a query's loss.

    **What it is not.** Subsets hold fewer points than the data: what is measured is how far *some* of
    the others explain a point, as a rule less well than all of them do. Every training starts at
    `model0` under the trainer's own key: subsets are all that is averaged over.

    **Arguments:**

    - `model0`, `trainer`, `chunk_size`: as in `leave_subset_out`.
    - `key`: draws `trials` subsets (200) of round(`share`·n) points each (0.7), independently.
    - `masks`: in place of the three, subsets of your own, [k, n]: data weights that multiply the
      risk's, 0 where a point is out. A point in them is *erased*: 1/n and Ω stay. For a mean over the
      points that are left, divide the masks by the share.
    - `queries`: examples to estimate influence on, like the training data.
    - `outcome`: `"correct"`, whether argmax is the label (theirs); `"probability"`, p_y, whose
      memorization is the counterpart of `memorization(f).score`; `"margin"`, the log-odds of p_y; or
      any function of (model, example) that answers a number, or a vector of c: the same trainings then
      serve c outcomes. Probability and margin vary where correctness is constant.

    **Standard errors** are those of a difference of two means over independent trainings,
    √(s²_in/k_in + s²_out/k_out). Where an outcome never varies, they are 0.

    **Raises:** `ValueError` for masks beside a key (or neither), a share that leaves nobody in or out,
    a point in or out of fewer than two subsets (its error is undefined), labels or queries that do
    not fit, and an outcome of anything but numbers; `RuntimeError` as `leave_subset_out`.

    **Cost:** k trainings, and m·n·k products.

    **Source:** Feldman & Zhang, "What Neural Networks Memorize and Why: Discovering the Long Tail via
    Influence Estimation", arXiv:2008.03703.
    """
    require_concrete("subsampled_memorization", risk, model0)
    risk = validate(risk, model0)
    masks = check_subsets(_chosen(risk.n, masks, key, share, trials), risk)
    of_example = _of_example(risk, model0, outcome)
    if queries is not None:
        check_queries(risk, model0, queries)
        queries = jtu.tree_map(jnp.asarray, tuple(queries))
    inside = (masks > 0) & (risk.weights > 0)[None, :]
    _check_counts(np.asarray(inside))
    own, watched = leave_subset_out(
        risk,
        model0,
        trainer,
        masks=masks,
        outcome=_Outcomes(of_example, risk.data, queries),
        chunk_size=chunk_size,
    )
    for name, values in {"a training point": own, "a query": watched}.items():
        bad = [] if values is None else np.flatnonzero(~np.isfinite(_flat(values)).all(axis=1))
        if len(bad):
            raise ValueError(
                f"`outcome` is NaN or infinite at {name} for {len(bad)} of the {len(masks)} trained "
                f"models, the first that of subset {bad[0]}. Look for log(0), 0/0 or overflow in it."
            )
    return _estimated(own, watched, inside)


def _flat(values: Array) -> np.ndarray:
    return np.asarray(values).reshape(len(values), -1)


class _OfLogits(eqx.Module):
    """A function of class logits and label, as one of (model, example)."""

    of_logits: Callable[[Array, Array], Array]
    loss: AbstractLoss
    predict: Callable[[Any, Any], Any]

    def __call__(self, model: Model, example: Example) -> Array:
        x, y = example
        return self.of_logits(
            self.loss.class_logits(self.predict(model, x)), y.reshape(()).astype(int)
        )


class _Outcomes(eqx.Module):
    """The outcome on every training point and on every query. Data are its leaves: no constants."""

    of_example: Callable[[Any, Example], Array]
    data: PyTree[Array]
    queries: PyTree[Array] | None

    def __call__(self, model: Model):
        one = lambda example: jnp.asarray(self.of_example(model, example))
        every = lambda data: jax.vmap(one)(data)
        return every(self.data), None if self.queries is None else every(self.queries)


def _correct(logits: Float[Array, " C"], label: Int[Array, ""]) -> Float[Array, ""]:
    return (jnp.argmax(logits) == label).astype(logits.dtype)


def _probability(logits: Float[Array, " C"], label: Int[Array, ""]) -> Float[Array, ""]:
    return jnn.softmax(logits)[label]


def _margin(logits: Float[Array, " C"], label: Int[Array, ""]) -> Float[Array, ""]:
    others = jnp.arange(logits.shape[0]) != label
    return logits[label] - jnn.logsumexp(logits, where=others)


_NAMED = {"correct": _correct, "probability": _probability, "margin": _margin}


def _of_example(risk: EmpiricalRisk, model0: Model, outcome: Any) -> Callable:
    if isinstance(outcome, str) and outcome in _NAMED:
        try:
            class_logits_shape(risk, model0)
            require_labels(risk)
        except ValueError as error:
            raise ValueError(
                f"`outcome={outcome!r}` is a classifier's, of one label an example: {error} Pass "
                "`outcome=` a function of (model, example), where more is better."
            ) from error
        return _OfLogits(_NAMED[outcome], risk.loss, risk.predict)
    if not callable(outcome):
        raise ValueError(
            f"`outcome` must be one of {', '.join(map(repr, _NAMED))}, or a function of "
            f"(model, example), got {outcome!r}."
        )
    of_first = lambda model: jnp.asarray(outcome(risk.whole(model), take(risk.data, 0)))
    answer = eqx.filter_eval_shape(of_first, model0)
    if not bool(jnp.all(jnp.isfinite(of_first(model0)))):
        raise ValueError(
            "`outcome` is NaN or infinite for the model given and the first training point. Look for "
            "log(0), 0/0 or overflow in it."
        )
    if len(answer.shape) > 1 or not jnp.issubdtype(answer.dtype, jnp.floating):
        raise ValueError(
            f"`outcome` must answer a floating-point number, or a vector of them, for (model, example); "
            f"got {answer.dtype} of shape {answer.shape}. Write `.astype(float)` for a yes or no."
        )
    return outcome


def _chosen(n: int, masks, key, share, trials):
    """The masks as given, or as drawn."""
    drawn = {"key": key, "share": share, "trials": trials}
    if masks is not None:
        beside = [f"`{name}`" for name, value in drawn.items() if value is not None]
        if beside:
            raise ValueError(
                f"`masks` are the subsets: {' and '.join(beside)} would draw others. Leave out one or "
                "the other."
            )
        return masks
    if key is None:
        raise ValueError(
            "Subsets are drawn at random: pass `key=jax.random.key(0)`, or subsets of your own as "
            "`masks`."
        )
    check_key("key", key)
    share, trials = SHARE if share is None else share, TRIALS if trials is None else trials
    check_whole("trials", trials, least=4, hint=" It counts subsets.")
    size = round(float(share) * n) if is_real(share) and 0 < share < 1 else 0
    if not 0 < size < n:
        raise ValueError(
            f"`share` is the part of the {n} points in each subset and must leave some in and some "
            f"out, got {share!r}. Feldman and Zhang's is 0.7."
        )
    return _draw(key, int(trials), n, size)


def _draw(key: PRNGKeyArray, trials: int, n: int, size: int) -> Bool[Array, "k n"]:
    """`size` of n points, uniformly, for each of the trials."""
    return jax.vmap(lambda k: jr.permutation(k, n) < size)(jr.split(key, trials))


def _check_counts(inside: np.ndarray) -> None:
    k, n = inside.shape
    count = inside.sum(axis=0)
    few = np.flatnonzero((count < 2) | (k - count < 2))
    if few.size:
        i = few[0]
        raise ValueError(
            f"{few.size} of {n} points are in or out of fewer than 2 subsets of {k} (the first is "
            f"point {i}: in {count[i]}, out of {k - count[i]}; of weight 0 a point is never in), and "
            "their memorization, or its error, is undefined. Raise `trials`, or take a share nearer ½."
        )


@eqx.filter_jit
def _estimated(
    own: Float[Array, "k n *c"], watched: Float[Array, "k m *c"] | None, inside: Bool[Array, "k n"]
) -> SubsampledMemorization:
    memorization, error = _contrast(own, inside, "kn,kn...->...n")
    on_queries = (None, None) if watched is None else _contrast(watched, inside, "kn,km...->m...n")
    count = jnp.sum(inside, axis=0)
    return SubsampledMemorization(memorization, error, *on_queries, count, inside.shape[0] - count)


def _contrast(outcomes: Float[Array, "k ..."], inside: Bool[Array, "k n"], pairs: str):
    """The mean outcome of the trainings with each point less that of those without it, and the
    standard error of the difference; `pairs` says which outcomes go with which points."""
    # Deviations from the mean over all trainings: their squares do not cancel.
    centred = outcomes - jnp.mean(outcomes, axis=0, keepdims=True)

    def moments(members):
        members = members.astype(outcomes.dtype)
        total, squares = (einsum(pairs, members, x) for x in (centred, jnp.square(centred)))
        count = jnp.broadcast_to(jnp.sum(members, axis=0), total.shape)
        mean = total / count
        return mean, jnp.maximum(squares / count - jnp.square(mean), 0) / (count - 1)

    (within, error_within), (without, error_without) = moments(inside), moments(~inside)
    return within - without, jnp.sqrt(error_within + error_without)
