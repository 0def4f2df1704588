"""The points that change a measurement most together, found greedily."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_flag, check_whole
from ._chunks import chunked_map
from ._effect import change_along
from ._gradients import risk_gradient
from ._influence import Influence, check_influence
from ._linalg import ravel
from ._scale import Unscaled


class InfluentialSubset(eqx.Module):
    """What `most_influential_subset` found, for each query (and component).

    - `indices`: the training points in the order they were taken
    - `values`: the score of the first j + 1 of them together, `groups(f, masks, order=2)`
    """

    indices: Int[Array, "*mc size"]
    values: Float[Array, "*mc size"]


def most_influential_subset(
    f: Influence,
    queries: PyTree[Array],
    size: int,
    extreme: Literal["highest", "lowest"] = "highest",
    *,
    mean: bool = False,
    candidates: int = 8,
) -> InfluentialSubset:
    r"""The `size` training points whose joint score is the highest (or lowest), found greedily.

    Which points, removed together, would change this prediction the most, and how many flip it?

    ```python
    g = influx.removal(influx.classification(f, "margin"))
    found = influx.most_influential_subset(g, (Xq, yq), 20, "lowest")    # .indices, .values [m, 20]
    flipped = margins[:, None] + found.values < 0                        # predicted, for each prefix
    ```

    The most influential k points are not the k most influential: points that explain a query together
    hide one another. The score of a group is that of `groups(f, masks, order=2)`, a quadratic in the
    data weights v that it loses (of C, the change of m; x = H⁻¹∇m, θ′ and K those of v):

        C(v) = Σ bᵢvᵢ + ½ Σ Qᵢⱼ vᵢvⱼ,
        ∂C/∂vⱼ = (1/n) (∇ℓⱼ·(x + y) + xᵀ∇²ℓⱼ θ′),    H y = ∇²m θ′ + ∇²K x − ∇³J[x, θ′],

    the influence of j as it is, to first order, without the group. Each step takes the gradient at the
    group so far, which has every pairwise term, scores the groups enlarged by each of the `candidates`
    that it puts first, self term Qⱼⱼ included, and keeps the best. The first step's gradient is `f`'s
    own score; to first order the answer would be `top_k`.

    **Sign.** That of `f`. Under `removal` of a margin, "lowest" is the group whose removal hurts the
    label most; under influence on a loss, "lowest" is the most helpful group.

    **Arguments:** `size` ≤ n; `extreme`: which end; `mean`: one group for the mean of m over all
    queries; `candidates` ≥ 1 of a step: n of them try every point, few are enough where no point
    changes the curvature much by itself. Exactly `size` points are taken, also where the last no longer
    help: read the best prefix off `values`. Greedy is no proof: another group may be more extreme.

    **Returns:** [m, size], [m, c, size] for a vector measurement; with `mean` without the m. A value is
    a prediction: check it with `leave_subset_out`.

    **Raises:** `ValueError` for another size or extreme, for an `f` under `relative`, `groups` or
    `removal(f, "newton")`, and for an unrolled response, which has no second order.

    **Cost:** per query, component and step: that of `candidates` + 1 groups at `groups(..., order=2)`, a
    solve more, and two passes over the training data. Linear in n.

    **Source:** Yang, Jain & Wallace, "How Many and Which Training Points Would Need to be Removed to
    Flip this Prediction?", arXiv:2302.02169; Hu, Hu, Zhao & Ma, "Most Influential Subset Selection:
    Challenges, Promises, and Beyond", arXiv:2409.18153 (adaptive greedy, by retraining); Basu, You &
    Feizi, arXiv:1911.00418 (the quadratic).
    """
    check_influence("most_influential_subset", f)
    _check(f, size, extreme, mean, candidates)
    f.measurement.check(f.risk, f.model, queries)
    shortlist = min(int(candidates), f.risk.n)
    return _search(f, queries, int(size), 1 if extreme == "highest" else -1, bool(mean), shortlist)


def _check(f: Influence, size, extreme, mean, candidates) -> None:
    n = f.risk.n
    if f.masks is not None:
        raise ValueError(
            "`most_influential_subset` builds its own groups of training points: use an `f` without "
            "`groups`."
        )
    if not isinstance(f.scale, Unscaled):
        raise ValueError(
            "Relative influences of points have different units, and a group has none of its own: use "
            "an `f` without `relative`."
        )
    check_flag("mean", mean)
    check_whole("size", size, most=n, hint=f" There are {n} training points.")
    check_whole("candidates", candidates, hint=f" {n} try all points.")
    if extreme not in ("highest", "lowest"):
        raise ValueError(
            f'`extreme` must be "highest" or "lowest", the end of the scores to go to; got {extreme!r}.'
        )
    f.effect.lost(f, jnp.zeros((1, n), f.risk.weights.dtype))  # refuses effects of single points
    f.response.check_path()


@eqx.filter_jit
def _search(f: Influence, queries: PyTree[Array], size: int, sign: int, mean: bool, shortlist: int):
    _, rebuild = ravel(f.model)
    one = lambda theta, query: f.measurement(f.risk, rebuild(theta), query)
    if mean:
        measured = lambda theta, all_: jnp.mean(jax.vmap(lambda q: one(theta, q))(all_), axis=0)
        return _of_query(f, lambda theta: measured(theta, queries), size, sign, shortlist)
    of_query = lambda q: _of_query(f, lambda theta: one(theta, q), size, sign, shortlist)
    return jax.lax.map(of_query, queries)


def _of_query(f, measured, size, sign, shortlist) -> InfluentialSubset:
    theta, _ = ravel(f.model)
    m = jax.eval_shape(measured, theta)
    picks = jnp.eye(m.size, dtype=m.dtype).reshape(m.size, *m.shape)
    component = lambda pick: lambda t: jnp.sum(pick * measured(t))
    found = jax.lax.map(lambda pick: _greedy(f, component(pick), size, sign, shortlist), picks)
    return jtu.tree_map(lambda x: x.reshape(*m.shape, size), found)


def _greedy(f, watched, size: int, sign: int, shortlist: int) -> InfluentialSubset:
    n = f.risk.n
    theta, _ = ravel(f.model)
    (adjoint,) = f.response.solve(jax.grad(watched)(theta)[None])
    share = f.effect.lost(f, jnp.ones((1, n), f.risk.weights.dtype))[0]

    def step(members, _):
        lost = members * share
        gains = sign * f.effect.of_change(f, _slopes(f, watched, adjoint, lost)) * share
        _, candidates = jax.lax.top_k(jnp.where(members > 0, -jnp.inf, gains), shortlist)
        joint = lambda j: change_along(f, watched, f.response.path(lost.at[j].add(share[j])))
        scores = f.effect.of_change(f, jax.lax.map(joint, candidates))
        # Where fewer points are left than the shortlist holds, it ends with members.
        best = jnp.argmax(jnp.where(members[candidates] > 0, -jnp.inf, sign * scores))
        return members.at[candidates[best]].set(1), (candidates[best], scores[best])

    _, (indices, values) = jax.lax.scan(step, jnp.zeros_like(share), None, size)
    return InfluentialSubset(indices, values)


def _slopes(f, watched, adjoint: Float[Array, " P"], lost: Float[Array, " n"]):
    """∂C/∂vⱼ at v = `lost`, [n]. Along the path x becomes x + y, and ∇ℓⱼ becomes ∇ℓⱼ + ∇²ℓⱼθ′: the
    value of ∇ℓⱼ·x there, to first order, is its value at θ̂ and its derivative."""
    risk = f.risk
    theta, rebuild = ravel(f.model)
    first, _ = f.response.path(lost)
    one, zero = jnp.ones((), theta.dtype), jnp.zeros((), theta.dtype)
    derivative = lambda fn: jax.jvp(fn, (zero,), (one,))

    def left(e):
        """∇m − Hx along the path: its derivative is what Hy makes up for."""
        slope = lambda t: risk_gradient(risk, rebuild(t), risk.weights - e * lost)
        here = theta + e * first
        return jax.grad(watched)(here) - jax.jvp(slope, (here,), (adjoint,))[1]

    (turn,) = f.response.solve(derivative(left)[1][None])

    def along(example):
        loss = lambda t: risk.example_loss(rebuild(t), example)
        product = lambda e: jax.jvp(loss, (theta + e * first,), (adjoint + e * turn,))[1]
        value, change = derivative(product)
        return (value + change) / risk.n

    return chunked_map(along, risk.data, f.response.limits.rows(4096, theta.dtype))
