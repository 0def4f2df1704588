"""Ground truth, against closed forms and refits in NumPy and SciPy."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from influx._linalg import ravel
from influx._loss import SoftmaxCrossEntropy, SquaredError
from influx._restriction import restrict
from influx._risk import EmpiricalRisk
from influx._train import LBFGS, SGD, Newton, fit
from influx._train.newton import Chord
from influx._truth import (
    lds,
    leave_one_out,
    leave_subset_out,
    pbrf,
    subsampled_memorization,
)
from influx._truth.subsampled_memorization import _contrast
from tests.softmax_oracle import ones, root, softmax_gradient, softmax_minimum

N, D, C = 24, 3, 3
seeds = st.integers(0, 2**31 - 1)


def linear(outputs: int, seed: int = 0) -> eqx.nn.Linear:
    return eqx.nn.Linear(D, outputs, key=jr.key(seed), dtype=jnp.float64)


def as_theta(W):
    """[K, D+1], the bias last, in the order of a Linear's parameter vector."""
    return np.concatenate([W[:, :-1].ravel(), W[:, -1]])


def regression(seed: int):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((N, D)), rng.standard_normal((N, 2))
    return X, Y, rng.uniform(0.2, 2.0, N)


def classification(seed: int):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, D)), rng.integers(0, C, N), rng.uniform(0.2, 2.0, N)


def ridge(X, Y, w, l2, bias_l2):
    X1 = ones(X)
    A = X1.T @ (w[:, None] * X1) / len(X) + np.diag([l2] * D + [bias_l2])
    return as_theta(np.linalg.solve(A, X1.T @ (w[:, None] * Y) / len(X)).T)


def softmax_problem(seed: int, l2: float = 0.1):
    X, y, w = classification(seed)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=l2, weights=w)
    return X, y, w, risk, fit(risk, linear(C), Newton(1e-12))


def bare(w, i):
    w = w.copy()
    w[i] = 0
    return w


@given(seed=seeds)
def test_leave_one_out_is_ridge_without_the_point(seed):
    X, Y, w = regression(seed)
    model = linear(2)
    l2 = jtu.tree_map(lambda p: 0.2 * (p.ndim > 1), eqx.filter(model, eqx.is_inexact_array))
    risk = EmpiricalRisk((X, Y), SquaredError(), l2=l2, weights=w)
    model = fit(risk, model, Newton(1e-12))
    thetas = leave_one_out(risk, model, Newton())
    expected = [ridge(X, Y, bare(w, i), 0.2, 0.0) for i in range(N)]
    np.testing.assert_allclose(thetas, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "trainer",
    [Newton(), Newton(solver=lx.CG(rtol=1e-4, atol=0.0)), LBFGS()],
    ids=["newton", "newton-cg", "lbfgs"],
)
def test_leave_one_out_is_scipys_refit(trainer):
    X, y, w, risk, model = softmax_problem(1)
    indices = [5, 0, 23, 5]
    thetas = leave_one_out(risk, model, trainer, indices=indices)
    for row, i in zip(thetas, indices):
        expected = as_theta(softmax_minimum(X, y, bare(w, i), 0.1, C))
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-8)


def test_what_the_shared_inverse_cannot_finish_newton_does():
    X, y, w = classification(2)
    X[4], w[4] = 60 * X[4], 3 * N  # without it the curvature is another one
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=1e-2, weights=w)
    model = fit(risk, linear(C), Newton(1e-12))
    with pytest.raises(RuntimeError, match=r"of 24 retrainings did not converge \(rows "):
        leave_one_out(risk, model, Chord(1e-10))
    thetas = leave_one_out(risk, model, Newton())
    for i in (3, 4, 5):
        W = np.asarray(thetas[i])
        W = np.hstack([W[: C * D].reshape(C, D), W[C * D :, None]])
        assert np.linalg.norm(softmax_gradient(W, X, y, bare(w, i), 1e-2)) < 2e-10


def test_any_start_leads_to_the_same_minimum():
    _, _, _, risk, model = softmax_problem(3)
    near = leave_one_out(risk, model, Newton(), indices=[1, 2, 3])
    far = jtu.tree_map(lambda p: 50 + 30 * p if eqx.is_inexact_array(p) else p, model)
    np.testing.assert_allclose(
        leave_one_out(risk, far, Newton(), indices=[1, 2, 3]), near, rtol=0, atol=1e-8
    )


def parts(model):
    return {"b": model.bias, "a": model.weight}


@pytest.mark.parametrize("chunk_size", [1, 7, 23])
def test_chunks_do_not_matter(chunk_size):
    _, _, _, risk, model = softmax_problem(4)
    whole = leave_one_out(risk, model, Newton(), outcome=parts)
    chunked = leave_one_out(risk, model, Newton(), outcome=parts, chunk_size=chunk_size)
    assert chunked["a"].shape == (N, C, D)
    assert chunked["b"].shape == (N, C)
    for name in "ab":
        np.testing.assert_allclose(chunked[name], whole[name], rtol=0, atol=1e-12)


def test_a_second_call_compiles_nothing():
    _, _, _, risk, model = softmax_problem(5)
    traces = []

    def outcome(retrained):
        traces.append(1)
        return retrained.bias

    leave_one_out(risk, model, Newton(), indices=[0, 1, 2], outcome=outcome)
    first = len(traces)
    changed = jtu.tree_map(lambda p: p + 1e-3 if eqx.is_inexact_array(p) else p, model)
    other = risk.with_weights(0.9 * risk.weights)
    leave_one_out(other, changed, Newton(), indices=[4, 9, 7], outcome=outcome)
    assert len(traces) == first >= 1


def test_the_outcome_sees_the_whole_model():
    X, y, w = classification(6)
    mlp = eqx.nn.MLP(D, C, 5, 1, activation=jnp.tanh, key=jr.key(0), dtype=jnp.float64)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    small, head = restrict(risk, mlp, lambda m: m.layers[-1])
    head = fit(small, head, Newton(1e-12))
    outcome = lambda m: (m.layers[0].weight, m.layers[-1].weight)
    frozen, moved = leave_one_out(small, head, Newton(), indices=[2, 3], outcome=outcome)
    np.testing.assert_array_equal(frozen, np.stack([mlp.layers[0].weight] * 2))
    assert np.abs(np.asarray(moved) - np.asarray(head.weight)[None]).max() > 1e-4
    assert leave_one_out(small, head, Newton(), indices=[2]).shape == (1, ravel(mlp)[0].size)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([24], r"0…23 \(there are 24 training points\), got 24"),
        ([0, -1], "got -1. Do you mean 23"),
        ([], "list of whole numbers"),
        ([0.5], "float64"),
        (3, "For one point"),
        (np.ones(N, bool), "for a mask"),
    ],
)
def test_indices_are_checked(indices, words):
    _, _, _, risk, model = softmax_problem(7)
    for verb in (
        lambda: leave_one_out(risk, model, Newton(), indices=indices),
        lambda: pbrf(risk, model, indices=indices),
    ):
        with pytest.raises(ValueError, match=words):
            verb()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        leave_one_out(risk, model, Newton(), chunk_size=0)


def test_a_retraining_that_did_not_converge_is_named():
    _, _, _, risk, model = softmax_problem(8)
    weights = risk.weights.at[jnp.asarray([2, 6])].set(0.0)
    risk = risk.with_weights(weights)
    model = fit(risk, model, Newton(1e-12))
    # Points of weight 0 are absent already: theirs are the only retrainings with nothing to do.
    with pytest.raises(RuntimeError, match=r"2 of 4 retrainings .*\(rows 0, 3\).*within 1 steps"):
        leave_one_out(risk, model, LBFGS(max_steps=1), indices=[0, 2, 6, 7])
    unmoved = leave_one_out(risk, model, LBFGS(max_steps=1), indices=[2, 6])
    np.testing.assert_array_equal(unmoved, np.stack([ravel(model)[0]] * 2))


@given(seed=seeds)
def test_masks_multiply_the_weights(seed):
    X, Y, w = regression(seed)
    masks = np.random.default_rng(seed + 1).integers(0, 2, (5, N)).astype(bool)
    masks[0] = True
    risk = EmpiricalRisk((X, Y), SquaredError(), l2=0.3, weights=w)
    thetas = leave_subset_out(risk, linear(2), Newton(), masks=masks)
    expected = [ridge(X, Y, w * mask, 0.3, 0.3) for mask in masks]
    np.testing.assert_allclose(thetas, expected, rtol=0, atol=1e-8)
    fractions = np.where(masks, 0.7, 1.6)
    thetas = leave_subset_out(risk, linear(2), Newton(), masks=fractions)
    expected = [ridge(X, Y, w * mask, 0.3, 0.3) for mask in fractions]
    np.testing.assert_allclose(thetas, expected, rtol=0, atol=1e-8)


def test_subsets_repeat_the_same_run():
    X, y, w = classification(9)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    trainer = SGD(optax.adam(0.05), batch_size=7, epochs=4, key=jr.key(5))
    masks = np.random.default_rng(9).integers(0, 2, (3, N))
    thetas = leave_subset_out(risk, linear(C), trainer, masks=masks, chunk_size=2)
    for theta, mask in zip(thetas, masks):
        alone = fit(risk.with_weights(jnp.asarray(w * mask)), linear(C), trainer)
        np.testing.assert_allclose(theta, ravel(alone)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (np.ones(N), "mask\\[None\\]"),
        (np.ones((2, N + 1)), r"needs shape \[k, 24\]"),
        (-np.ones((2, N)), r"got -1.0 at \[0, 0\]"),
        (np.full((2, N), np.nan), "finite and at least 0"),
        (np.eye(3, N) * [[1], [1], [0]], r"no point of a weight above 0 in rows \[2\]"),
    ],
)
def test_masks_are_checked(masks, words):
    _, _, _, risk, model = softmax_problem(10)
    with pytest.raises(ValueError, match=words):
        leave_subset_out(risk, model, Newton(), masks=masks)


@given(seed=seeds)
def test_pbrf_of_linear_regression_is_leave_one_out(seed):
    X, Y, w = regression(seed)
    risk = EmpiricalRisk((X, Y), SquaredError(), l2=0.2, weights=w)
    model = fit(risk, linear(2), Newton(1e-13))
    thetas = pbrf(risk, model, tolerance=1e-11)
    expected = [ridge(X, Y, bare(w, i), 0.2, 0.2) for i in range(N)]
    np.testing.assert_allclose(thetas, expected, rtol=0, atol=1e-9)


def bregman_gradient(W, W0, X, y, w, i, l2, damping):
    """The proximal Bregman objective's gradient for softmax outputs, written out in NumPy."""
    X1 = ones(X)
    P, P0 = (scipy.special.softmax(X1 @ V.T, axis=1) for V in (W, W0))
    error = P[i] - np.eye(C)[y[i]]
    fit_term = ((P - P0) * w[:, None]).T @ X1
    return (fit_term - w[i] * np.outer(error, X1[i])) / N + (l2 + damping) * (W - W0)


@pytest.mark.parametrize("solver", [None, lx.CG(rtol=1e-6, atol=0.0)], ids=["dense", "cg"])
def test_pbrf_away_from_a_minimum_is_scipys(solver):
    X, y, w = classification(11)
    l2 = 0.05
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=l2, weights=w)
    model = linear(C, 3)  # not trained at all
    W0 = np.hstack([np.asarray(model.weight), np.asarray(model.bias)[:, None]])
    thetas = pbrf(risk, model, indices=[0, 9], damping=0.02, solver=solver)
    for theta, i in zip(thetas, (0, 9)):
        W = root(lambda W, i=i: bregman_gradient(W, W0, X, y, w, i, l2, 0.02), W0)
        np.testing.assert_allclose(theta, as_theta(W), rtol=0, atol=1e-8)


def test_pbrf_to_first_order_is_the_gauss_newton_response():
    X, y, w = classification(12)
    i, small = 7, 1e-5
    w[i] = small
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.05, weights=w)
    mlp = eqx.nn.MLP(D, C, 4, 1, activation=jnp.tanh, key=jr.key(1), dtype=jnp.float64)
    theta0, rebuild = ravel(mlp)
    moved = np.asarray(pbrf(risk, mlp, indices=[i], damping=0.01, tolerance=1e-13))[0]
    jacobians = np.asarray(
        jax.vmap(jax.jacobian(lambda t, x: rebuild(t)(x)), in_axes=(None, 0))(theta0, risk.data[0])
    )
    P = scipy.special.softmax(np.asarray(jax.vmap(mlp)(risk.data[0])), axis=1)
    middle = np.einsum("nc,cd->ncd", P, np.eye(C)) - np.einsum("nc,nd->ncd", P, P)
    ggn = np.einsum("n,ncp,ncd,ndq->pq", w, jacobians, middle, jacobians) / N
    gradient = jacobians[i].T @ (P[i] - np.eye(C)[y[i]])
    response = np.linalg.solve(ggn + 0.06 * np.eye(len(ggn)), gradient) / N
    np.testing.assert_allclose((moved - np.asarray(theta0)) / small, response, rtol=1e-3, atol=1e-6)


def test_pbrf_without_removal_stays():
    X, y, w = classification(13)
    w[3] = 0.0
    mlp = eqx.nn.MLP(D, C, 4, 1, activation=jnp.tanh, key=jr.key(1), dtype=jnp.float64)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.05, weights=w)
    stay = pbrf(risk, mlp, indices=[3])[0]
    np.testing.assert_allclose(stay, ravel(mlp)[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="damping"):
        pbrf(risk, mlp, damping=-1.0)


def lds_problem(seed: int, m: int = 6, n: int = 11, k: int = 15):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2, (k, n))
    # Multiples of 2⁻¹⁰, whose sums are exact: equal masks are ties, in whatever order they are summed.
    scores = np.round(1024 * rng.standard_normal((m, n))) / 1024
    # Rounding to halves makes ties in both rankings' outcomes.
    outcomes = np.round(2 * (masks @ scores.T + 2 * rng.standard_normal((k, m)))) / 2
    return scores, masks, outcomes


def spearman(scores, masks, outcomes):
    predicted = masks @ scores.T
    return [scipy.stats.spearmanr(p, o).statistic for p, o in zip(predicted.T, outcomes.T)]


@given(seed=seeds)
def test_lds_is_scipys_spearman_with_a_jackknife_by_hand(seed):
    scores, masks, outcomes = lds_problem(seed)
    result = lds(scores, masks, outcomes, chunk_size=4)
    expected = spearman(scores, masks, outcomes)
    np.testing.assert_allclose(result.per_query, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.value, np.mean(expected), rtol=0, atol=1e-12)
    k, m = outcomes.shape
    without = [
        np.mean(spearman(scores, np.delete(masks, j, 0), np.delete(outcomes, j, 0)))
        for j in range(k)
    ]
    variance = (k - 1) / k * np.sum((without - np.mean(without)) ** 2) + np.var(
        expected, ddof=1
    ) / m
    np.testing.assert_allclose(result.standard_error, np.sqrt(variance), rtol=1e-10)
    half = 1.96 * np.sqrt(variance)
    np.testing.assert_allclose(
        result.interval, (np.mean(expected) - half, np.mean(expected) + half), atol=1e-10
    )


def test_lds_of_a_perfect_and_of_a_reversed_ranking():
    scores, masks, _ = lds_problem(0)
    truth = np.exp(masks @ scores.T)
    assert float(lds(scores, masks, truth).value) == pytest.approx(1.0, abs=1e-12)
    assert float(lds(-scores, masks, truth).value) == pytest.approx(-1.0, abs=1e-12)
    one = lds(scores[:1], masks, truth[:, :1])
    assert float(one.standard_error) == pytest.approx(0.0, abs=1e-6)


def test_lds_standard_error_covers_other_masks_and_queries():
    # 200 repetitions of the whole experiment: the interval contains the limit at least as often as
    # it says, less 3 standard errors of that frequency (95 % − 3 · 1.5 %).
    rng = np.random.default_rng(4)
    draw = lambda k, m: (rng.standard_normal((m, 11)), rng.integers(0, 2, (k, 11)))

    def experiment(k, m):
        scores, masks = draw(k, m)
        noise = rng.standard_normal((k, m)) * rng.uniform(1, 4, m)
        return lds(scores, masks, masks @ scores.T + noise)

    limit = np.mean([float(experiment(20, 10).value) for _ in range(600)])
    results = [experiment(20, 10).interval for _ in range(200)]
    inside = np.mean([float(low) <= limit <= float(high) for low, high in results])
    assert inside >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, k, o: (s, k, np.full_like(o, 2.0)), r"`outcomes` of 6 queries .*query 0\)"),
        (lambda s, k, o: (s * (np.arange(6) != 4)[:, None], k, o), r"predictions.*query 4\)"),
        (
            lambda s, k, o: (s, k, np.where(np.arange(6) == 2, np.eye(15)[:, :1], o)),
            r"of 1 queries .*query 2\) are equal for all models, or all but one",
        ),
        (lambda s, k, o: (s, k, o.T), "Transpose `outcomes`"),
        (lambda s, k, o: (s, k[:, :5], o), r"masks \(15, 5\)"),
        (lambda s, k, o: (s[0], k, o[:, 0]), r"scores \(11,\)"),
        (lambda s, k, o: (s, k[:3], o[:3]), "at least 4 masks"),
        (lambda s, k, o: (s, k, np.where(o == o[0, 0], np.nan, o)), "NaN"),
    ],
)
def test_lds_refuses_what_is_undefined(change, words):
    with pytest.raises(ValueError, match=words):
        lds(*change(*lds_problem(1)))


def outcomes_by_hand(kind: str, W, X, y):
    """[len(y)]: what `outcome` says of weights W [C, D+1], in NumPy."""
    P = scipy.special.softmax(ones(X) @ W.T, axis=1)
    own = P[np.arange(len(y)), y]
    return {
        "correct": (P.argmax(axis=1) == y).astype(float),
        "probability": own,
        "margin": np.log(own) - np.log1p(-own),
    }[kind]


def difference_by_hand(a, inside):
    """The mean of the outcomes `a` [k] inside less that outside, and its standard error."""
    groups = a[inside], a[~inside]
    error = np.sqrt(sum(g.var(ddof=1) / g.size for g in groups))
    return groups[0].mean() - groups[1].mean(), error


@pytest.mark.parametrize("outcome", ["correct", "probability", "margin"])
def test_subsampled_memorization_is_a_difference_of_means(outcome):
    X, y, _, risk, model = softmax_problem(14)
    queries = X[:5] + 0.1, (y[:5] + 1) % C
    rng = np.random.default_rng(14)
    masks = rng.integers(0, 2, (12, N)) * rng.uniform(0.5, 2.0, (12, N))
    found = subsampled_memorization(
        risk, model, Newton(), masks=masks, queries=queries, outcome=outcome
    )
    thetas = np.asarray(leave_subset_out(risk, model, Newton(), masks=masks))
    each = [np.hstack([t[: C * D].reshape(C, D), t[C * D :, None]]) for t in thetas]
    own = np.array([outcomes_by_hand(outcome, W, X, y) for W in each])
    watched = np.array([outcomes_by_hand(outcome, W, *queries) for W in each])
    inside = masks > 0
    np.testing.assert_array_equal(found.inside, inside.sum(axis=0))
    np.testing.assert_array_equal(found.outside, 12 - inside.sum(axis=0))
    for i in range(N):
        value, error = difference_by_hand(own[:, i], inside[:, i])
        np.testing.assert_allclose(found.memorization[i], value, atol=1e-10)
        np.testing.assert_allclose(found.standard_error[i], error, atol=1e-10)
        for j in range(5):
            value, error = difference_by_hand(watched[:, j], inside[:, i])
            np.testing.assert_allclose(found.influence[j, i], value, atol=1e-10)
            np.testing.assert_allclose(found.influence_standard_error[j, i], error, atol=1e-10)


def test_the_influence_of_a_point_on_itself_is_its_memorization():
    mlp = eqx.nn.MLP(D, C, 5, 1, activation=jnp.tanh, key=jr.key(0), dtype=jnp.float64)
    X, y, w = classification(15)
    whole = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    risk, head = restrict(whole, mlp, lambda m: m.layers[-1])
    squared = lambda model, example: jnp.square(model(example[0])[example[1]])
    found = subsampled_memorization(
        risk, head, Newton(), key=jr.key(3), trials=30, share=0.5, queries=(X, y), outcome=squared
    )
    assert float(jnp.max(jnp.abs(found.memorization))) > 1e-3
    np.testing.assert_allclose(jnp.diagonal(found.influence), found.memorization, atol=1e-12)
    errors = jnp.diagonal(found.influence_standard_error)
    np.testing.assert_allclose(errors, found.standard_error, atol=1e-12)
    np.testing.assert_array_equal(found.inside + found.outside, 30)
    assert int(found.inside.sum()) == 30 * N // 2


def test_a_vector_of_outcomes_is_each_of_them():
    X, y, _, risk, model = softmax_problem(18)
    queries = X[:4] - 0.2, y[:4]
    run = lambda outcome: subsampled_memorization(
        risk, model, Newton(), key=jr.key(1), trials=30, share=0.5, queries=queries, outcome=outcome
    )
    both = run(lambda m, z: jnp.stack([jax.nn.softmax(m(z[0]))[z[1]], jnp.sum(m(z[0]) ** 3)]))
    assert both.memorization.shape == (2, N)
    assert both.influence.shape == (4, 2, N)
    for c, one in enumerate(("probability", lambda m, z: jnp.sum(m(z[0]) ** 3))):
        alone = run(one)
        for name in ("memorization", "standard_error"):
            np.testing.assert_allclose(getattr(both, name)[c], getattr(alone, name), atol=1e-12)
        for name in ("influence", "influence_standard_error"):
            np.testing.assert_allclose(getattr(both, name)[:, c], getattr(alone, name), atol=1e-12)


def test_a_flipped_point_is_memorized_and_a_duplicated_one_is_not():
    # Input: the class that it looks like, and a feature of its own, which its duplicate shares.
    own = np.concatenate([np.repeat(np.arange(10), 2), [10], [11, 11]])
    looks = own % 2
    X = np.hstack([2 * np.eye(2)[looks], 4 * np.eye(12)[own]])
    y = np.where(own >= 10, 1 - looks, looks)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=1e-3)
    start = eqx.nn.Linear(14, 2, key=jr.key(0), dtype=jnp.float64)
    masks = np.random.default_rng(0).random((60, 23)) < 0.7
    found = subsampled_memorization(risk, start, Newton(1e-8), masks=masks)
    np.testing.assert_allclose(found.memorization[:21], [0] * 20 + [1], atol=1e-12)
    # Flipped and duplicated: without it, it is explained as often as its twin was there.
    for i, twin in ((21, 22), (22, 21)):
        expected = 1 - masks[~masks[:, i], twin].mean()
        np.testing.assert_allclose(found.memorization[i], expected, atol=1e-12)


def test_subsampled_memorization_and_its_squared_error_are_unbiased():
    """Over all 10,000 ordered draws of 4 of the 10 subsets of 3 of 5 points."""
    rng = np.random.default_rng(16)
    X, y = rng.standard_normal((5, 2)), np.array([0, 1, 0, 1, 1])
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.05)
    start = eqx.nn.Linear(2, 2, key=jr.key(0), dtype=jnp.float64)
    every = np.array([np.isin(np.arange(5), s) for s in itertools.combinations(range(5), 3)])
    probability = lambda m: jax.vmap(lambda x, c: jax.nn.softmax(m(x))[c])(*risk.data)
    own = np.asarray(leave_subset_out(risk, start, Newton(), masks=every, outcome=probability))
    truth = subsampled_memorization(risk, start, Newton(), masks=every, outcome="probability")
    defined = [difference_by_hand(own[:, i], every[:, i])[0] for i in range(5)]
    np.testing.assert_allclose(truth.memorization, defined, atol=1e-10)
    draws = np.array(list(itertools.product(range(10), repeat=4)))
    estimate = jax.jit(jax.vmap(lambda d, m: _contrast(d, m, "kn,kn...->...n")))
    values, errors = map(np.asarray, estimate(jnp.asarray(own[draws]), jnp.asarray(every[draws])))
    for i in range(5):
        inside = every[draws][:, :, i].sum(axis=1)
        assert np.unique(inside).tolist() == [0, 1, 2, 3, 4]
        for count in (1, 2, 3):  # given how often the point is in
            of = values[inside == count, i]
            np.testing.assert_allclose(of.mean(), defined[i], atol=1e-12)
        both = inside == 2
        np.testing.assert_allclose((errors[both, i] ** 2).mean(), values[both, i].var(), rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"pass `key=jax.random.key\(0\)`"),
        ({"key": jr.key(0), "trials": 3}, "at least 4, got 3"),
        ({"key": jr.key(0), "share": 1.0}, "some out, got 1.0"),
        ({"key": jr.key(0), "share": 0.01}, "some in"),
        ({"key": jr.key(0), "share": 0.9, "trials": 5}, r"fewer than 2 subsets of 5.*Raise"),
        ({"masks": np.eye(N), "trials": 9}, "`trials` would draw others"),
        ({"masks": np.eye(N)}, "24 of 24 points .*point 0: in 1, out of 23"),
        ({"masks": np.ones((3, N - 1))}, r"needs shape \[k, 24\]"),
        ({"key": jr.key(0), "outcome": "accuracy"}, "'correct', 'probability', 'margin'"),
        ({"key": jr.key(0), "outcome": lambda m, z: m(z[0])[None]}, r"a floating.*\(1, 3\)"),
        ({"key": jr.key(0), "outcome": lambda m, z: z[1]}, "a floating.*int"),
        ({"key": jr.key(0), "queries": (np.ones((2, D + 1)), [0, 1])}, "numeric array"),
        ({"key": jr.key(0), "queries": (np.ones((2, 4)), np.zeros(2, int))}, "like a training"),
    ],
)
def test_subsampled_memorization_refuses_what_is_undefined(options, words):
    _, _, _, risk, model = softmax_problem(17)
    with pytest.raises(ValueError, match=words):
        subsampled_memorization(risk, model, Newton(), **options)


def test_a_point_of_weight_0_is_never_in_a_subset():
    _, _, w, risk, model = softmax_problem(17)
    absent = risk.with_weights(bare(w, 5))
    with pytest.raises(ValueError, match=r"1 of 24 .*point 5: in 0, out of 200.*weight 0"):
        subsampled_memorization(absent, model, Newton(), key=jr.key(0))
