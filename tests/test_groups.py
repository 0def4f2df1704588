"""Groups to second order, and the most influential subset, against retraining."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import influx as ix
from proofs_checks import _oracle as oracle
from tests.helpers import CLASSIFIERS, CURVATURES, FAMILIES, LAMBDA, MEASUREMENTS, handle, problem

TRAINER = ix.Newton(tolerance=1e-13)
STENCIL = np.array([-1, 16, -30, 16, -1]) / 12  # of the second derivative, at −2h … 2h, error O(h⁴)
H = 0.02


def fractions(n: int, k: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((k, n))


def second_order_term(f, masks, queries):
    return ix.groups(f, masks, order=2)(queries) - ix.groups(f, masks)(queries)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_order_is_that_of_retraining(name):
    """Central differences of retrained losses in the share ε of the masks that is erased."""
    _, risk, model, queries = problem(name)
    masks = fractions(risk.n)
    f = ix.removal(ix.influence(risk, model))
    steps = H * np.arange(-2, 3)
    kept = 1 - steps[:, None, None] * masks[None]
    after = ix.leave_subset_out(
        risk,
        model,
        TRAINER,
        masks=kept.reshape(-1, risk.n),
        outcome=lambda m: risk.losses(m, queries),
    )
    bend = np.einsum("s,skm->mk", STENCIL / H**2, np.asarray(after).reshape(5, 3, -1))
    term = second_order_term(f, masks, queries)
    np.testing.assert_allclose(term, bend / 2, rtol=1e-4, atol=1e-6 * np.abs(bend).max())
    # The weights that `influence` takes from a group are its masks, whatever the points' own.
    by_weight = masks * np.asarray(risk.weights)
    plain = ix.groups(ix.influence(risk, model), by_weight, order=2)(queries)
    np.testing.assert_allclose(-plain / risk.n, ix.groups(f, masks, order=2)(queries), rtol=1e-10)


@pytest.mark.parametrize("name", ["softmax", "network"])
def test_with_damping_it_is_the_second_order_of_the_proximal_problem(name):
    p, _, _, queries = problem(name)
    masks = fractions(p.n, 2, seed=1)
    values = np.zeros((5, 2, len(p.yq)))
    for s, step in enumerate(H * np.arange(-2, 3)):
        for k, mask in enumerate(masks):
            theta = proximal(p, p.w * (1 - step * mask))
            values[s, k] = oracle.measurement(p, "loss", theta)
    bend = np.einsum("s,skm->mk", STENCIL / H**2, values)
    term = second_order_term(ix.removal(handle(name)), masks, queries)
    np.testing.assert_allclose(term, bend / 2, rtol=1e-4, atol=1e-6 * np.abs(bend).max())


def proximal(p, w) -> np.ndarray:
    """The minimiser of J(·, w) + ½λ‖θ − θ̂‖², by Newton in NumPy."""
    theta = p.theta
    for _ in range(50):
        H = oracle.hessian(p, theta, w) + LAMBDA * np.eye(theta.size)
        theta = theta - np.linalg.solve(
            H, oracle.gradient(p, theta, w) + LAMBDA * (theta - p.theta)
        )
    return theta


@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_curvature_stands_for_the_inverse_in_both_lines(curvature):
    """The formula in NumPy, third derivatives by differences of the Hessian."""
    p, _, _, queries = problem("network")
    mask = fractions(p.n, 1, seed=2)
    inverse = np.linalg.inv(CURVATURES[curvature][1](p) + LAMBDA * np.eye(p.theta.size))
    # ∇K and ∇²K: J is linear in the weights, Ω drops out of differences.
    v = mask[0]
    K1 = oracle.gradient(p, p.theta, p.w + v) - oracle.gradient(p, p.theta, p.w)
    K2 = oracle.hessian(p, p.theta, p.w + v) - oracle.hessian(p, p.theta, p.w)
    first = inverse @ K1
    h = 1e-5
    third = (oracle.hessian(p, p.theta + h * first) - oracle.hessian(p, p.theta - h * first)) / (
        2 * h
    )
    second = inverse @ (2 * K2 @ first - third @ first)
    along = lambda e: oracle.measurement(p, "loss", p.theta + e * first)
    grad = oracle.measurement_gradient(p)
    h = 1e-2
    bend = np.einsum("s,sm->m", STENCIL / h**2, [along(h * s) for s in range(-2, 3)])
    change = grad @ first + 0.5 * (grad @ second + bend)
    got = ix.groups(handle("network", curvature), mask, order=2)(queries)[:, 0]
    np.testing.assert_allclose(got, -p.n * change, rtol=2e-5)


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_orders_commute_with_measurement_and_removal(measurement):
    p, _, _, queries = problem("softmax")
    f, rewrite, masks = handle("softmax"), MEASUREMENTS[measurement], fractions(p.n)
    a = ix.groups(rewrite(ix.removal(f)), masks, order=2)(queries)
    assert np.array_equal(a, ix.removal(rewrite(ix.groups(f, masks, order=2)))(queries))
    assert np.array_equal(a, rewrite(ix.groups(ix.removal(f), masks, order=2))(queries))
    small = ix.groups(rewrite(f), 1e-6 * masks, order=2)(queries)  # the leading term is order 1
    first = ix.groups(rewrite(f), 1e-6 * masks)(queries)
    np.testing.assert_allclose(small, first, rtol=1e-4, atol=1e-11)
    again = ix.groups(ix.groups(rewrite(f), masks, order=2), masks)(queries)  # the last one counts
    assert np.array_equal(again, ix.groups(rewrite(f), masks)(queries))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_second_orders_of_the_classes_sum_to_zero(name):
    _, risk, _, queries = problem(name)
    f = ix.classification(handle(name), "probability")
    scores = ix.groups(f, fractions(risk.n), order=2)(queries)
    np.testing.assert_allclose(scores.sum(axis=1), 0, atol=1e-10 * np.abs(scores).max())
    assert np.abs(second_order_term(f, fractions(risk.n), queries)).max() > 1e-3


def test_it_is_a_quadratic_set_function():
    """s(A ∪ B) = s(A) + s(B) + a cross term that is bilinear and symmetric; s(∅) = 0."""
    _, risk, _, queries = problem("network")
    score = lambda *masks: np.asarray(ix.groups(handle("network"), masks, order=2)(queries))
    a, b, _ = fractions(risk.n)
    cross = lambda x, y: score(x + y) - score(x) - score(y)
    scale = np.abs(score(a)).max()
    assert np.abs(cross(a, b)).max() > 1e-3 * scale
    np.testing.assert_allclose(cross(2 * a, b), 2 * cross(a, b), atol=1e-11 * scale)
    np.testing.assert_allclose(cross(a, 3 * b), 3 * cross(a, b), atol=1e-11 * scale)
    np.testing.assert_allclose(cross(a, a), 2 * second_order_term(
        handle("network"), a[None], queries), atol=1e-11 * scale)  # fmt: skip
    assert np.array_equal(score(0 * a), np.zeros((3, 1)))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_groups_do_not_depend_on_chunks(chunk_size):
    _, risk, model, queries = problem("network")
    masks = fractions(risk.n, 5)
    whole = ix.groups(ix.influence(risk, model), masks, order=2)(queries)
    parts = ix.influence(risk, model, chunk_size=chunk_size)
    np.testing.assert_allclose(ix.groups(parts, masks, order=2)(queries), whole, rtol=1e-11)
    plan = ix.plan(ix.groups(parts, masks, order=2), queries)
    assert plan.score_bytes == 8 * 3 * 5
    assert plan.training_points <= chunk_size
    assert f"; groups 5, {plan.training_points} at a time" in str(plan)
    assert "second order of a group" in plan.rows[0].way


# --- Correlated groups of digits, and the most influential subset ----------------------------------

POINTS, QUERIES, SIZE, SUBSET, GROUPS = 300, 20, 15, 6, 20


@functools.cache
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = jnp.asarray(X[order] / 16), jnp.asarray(y[order])
    risk = ix.EmpiricalRisk((X[:POINTS], y[:POINTS]), ix.SoftmaxCrossEntropy(), l2=1e-2)
    model = ix.fit(risk, eqx.nn.Linear(64, 10, key=jr.key(0)), ix.Newton())
    queries = X[POINTS : POINTS + QUERIES], y[POINTS : POINTS + QUERIES]
    f = ix.removal(ix.classification(ix.influence(risk, model), "margin"))
    return risk, model, queries, f


@eqx.filter_jit
def margins(model, queries):
    logits = jax.vmap(model)(queries[0])
    own = jnp.take_along_axis(logits, queries[1][:, None], axis=1)
    others = jnp.arange(10)[None] != queries[1][:, None]
    return own[:, 0] - jax.nn.logsumexp(logits, axis=1, where=others)


def retrained(masks):
    """The change of the queries' margins without groups of points, [m, k]."""
    risk, model, queries, _ = digits()
    watched = functools.partial(margins, queries=queries)
    after = ix.leave_subset_out(risk, model, ix.Newton(), masks=1.0 - masks, outcome=watched)
    return np.asarray(after).T - np.asarray(watched(model))[:, None]


def one_class(rng, X, y):
    return [rng.permutation(np.flatnonzero(y == k % 10))[:SIZE] for k in range(GROUPS)]


def neighbours(rng, X, y):
    centres = rng.permutation(POINTS)[:GROUPS]
    return [np.argsort(np.linalg.norm(X - X[i], axis=1))[:SIZE] for i in centres]


@pytest.mark.parametrize("kind", [one_class, neighbours])
def test_second_order_is_nearer_for_correlated_groups(kind):
    risk, _, queries, f = digits()
    groups = kind(np.random.default_rng(3), *map(np.asarray, risk.data))
    masks = np.array([np.isin(np.arange(POINTS), members) for members in groups], float)
    actual = retrained(masks)
    one, two = (np.asarray(ix.groups(f, masks, order=k)(queries)) for k in (1, 2))
    error = lambda guess: np.mean(np.abs(guess - actual), axis=0)  # of each group
    assert np.all(error(two) < error(one))
    assert np.mean(error(two)) < 0.6 * np.mean(error(one))
    rank = lambda guess: np.array([spearmanr(a, b)[0] for a, b in zip(guess, actual)])
    assert np.mean(rank(two)) > np.mean(rank(one))
    assert np.mean(rank(two) >= rank(one)) > 0.9


def test_the_most_influential_subset_is_at_least_the_first_order_one():
    _, _, queries, f = digits()
    found = ix.most_influential_subset(f, queries, SUBSET, "lowest")
    assert found.indices.shape == found.values.shape == (QUERIES, SUBSET)
    top = ix.top_k(f, queries, SUBSET).lowest
    masks_of = lambda rows: np.array(
        [np.isin(np.arange(POINTS), r) for r in np.asarray(rows)], float
    )
    masks = masks_of(found.indices)
    assert np.all(masks.sum(axis=1) == SUBSET)  # no point twice
    whole = np.diagonal(ix.groups(f, masks, order=2)(queries))
    np.testing.assert_allclose(found.values[:, -1], whole, rtol=1e-9)
    actual = np.diagonal(retrained(masks))
    other = np.diagonal(retrained(masks_of(top.indices)))
    assert np.mean(actual <= other + 1e-9) >= 0.95
    assert np.mean(actual < other - 1e-4) > 0.25  # and often further
    error = np.abs(found.values[:, -1] - actual)
    assert np.all(error < np.abs(np.diagonal(ix.groups(f, masks)(queries)) - actual))
    assert np.median(error / np.abs(actual)) < 0.2


@pytest.mark.parametrize(
    ("effect", "measurement", "extreme"),
    [(lambda f: f, "loss", "highest"), (ix.removal, "probability", "lowest")],
    ids=["influence", "removal"],
)
def test_it_takes_what_trying_every_point_takes(effect, measurement, extreme):
    """Greedy by `groups`, every enlarged group scored at every step; weights uneven, one of them 0."""
    p, _, _, queries = problem("network")
    f = effect(MEASUREMENTS[measurement](handle("network")))
    found = ix.most_influential_subset(f, queries, 4, extreme, candidates=p.n)
    sign = 1 if extreme == "highest" else -1
    every = lambda members: np.minimum(members[None] + np.eye(p.n), 1)
    score = lambda masks: sign * np.asarray(ix.groups(f, masks, order=2)(queries))
    for place in np.ndindex(found.indices.shape[:-1]):
        members = np.zeros(p.n)
        for index, value in zip(found.indices[place], found.values[place]):
            scores = np.where(members > 0, -np.inf, score(every(members))[place])
            assert int(np.argmax(scores)) == int(index)
            np.testing.assert_allclose(sign * value, scores.max(), rtol=1e-9)
            members[int(index)] = 1


def test_it_may_be_of_the_mean_over_queries():
    _, risk, _, queries = problem("softmax")
    f = ix.classification(handle("softmax"), "probability")
    found = ix.most_influential_subset(f, queries, risk.n, mean=True)
    assert found.indices.shape == (3, risk.n)
    average = lambda model, q: jnp.mean(jax.nn.softmax(jax.vmap(model)(q[0])), axis=0)
    batch = jax.tree_util.tree_map(lambda x: x[None], queries)
    same = ix.most_influential_subset(ix.measure(f, average), batch, risk.n)
    assert np.array_equal(found.indices, same.indices[0])
    np.testing.assert_allclose(found.values, same.values[0], rtol=1e-9, atol=1e-12)
    for order in found.indices:  # all of them, the last steps with fewer left than the shortlist
        assert sorted(order.tolist()) == list(range(risk.n))
