"""K-FAC and EK-FAC of whole models: scores, damping, tolerance, rules, and what is refused.

Their matrices are held against NumPy in `test_curvature.py` and in P13; here, what users do with them.
"""

import functools
import re
import warnings
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import chi2

import influx as ix
from influx._curvature.truncated import _sizes as truncated_sizes
from influx._engine import ForwardMode, Layered, PerExample
from influx._gradients import map_gradients
from influx._linalg import from_strips, gram_strips, ravel
from tests.test_taps import custom

N, M, C = 24, 5, 3
KFACS = (ix.KFAC, ix.EKFAC)


class Tokens(eqx.Module):
    """Embedding, learned positions, attention, a norm and a head: every kind of layer at once."""

    embed: eqx.nn.Embedding
    position: jax.Array
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key, width=4):
        a, b, c, d = jr.split(key, 4)
        self.embed = eqx.nn.Embedding(9, width, key=a)
        self.position = jr.normal(b, (5, width))
        self.attention = eqx.nn.MultiheadAttention(2, width, use_query_bias=True, key=c)
        self.norm, self.head = eqx.nn.LayerNorm(width), eqx.nn.Linear(width, C, key=d)

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids) + self.position
        x = jax.vmap(self.norm)(x + self.attention(x, x, x))
        return self.head(jnp.mean(x, axis=0))


@functools.cache
def problem(kind: str = "mlp"):
    key = jr.key(1)
    y = jr.randint(jr.key(2), (N + M,), 0, C)
    if kind == "mlp":
        model = eqx.nn.MLP(3, C, 5, 2, activation=jnp.tanh, key=key)
        X = jr.normal(jr.key(3), (N + M, 3))
    else:
        model, X = Tokens(key), jr.randint(jr.key(3), (N + M, 5), 0, 9)
    weights = jnp.where(jnp.arange(N) == 2, 0.0, 0.5 + jr.uniform(jr.key(4), (N,)))
    risk = ix.EmpiricalRisk((X[:N], y[:N]), ix.SoftmaxCrossEntropy(), l2=2e-2, weights=weights)
    return risk, model, (X[N:], y[N:])


def dense(f: ix.Influence) -> np.ndarray:
    """H + λI of a Kronecker-factored handle."""
    factored = f.response.factored
    size = sum(block.layer.size for block in factored.blocks)
    return np.asarray(eqx.filter_jit(jax.vmap(factored.matvec))(jnp.eye(size)))


MEASUREMENTS = {
    "loss": lambda f: f,
    "probability": lambda f: ix.classification(f, "probability"),
    "margin": lambda f: ix.classification(f, "margin"),
    "of a model called twice": lambda f: ix.measure(f, lambda m, q: m(q[0]) * m(q[0])[::-1]),
    "of the parameters": lambda f: ix.measure(f, squared_head),
}


def squared_head(model, query):
    layer = model.head if isinstance(model, Tokens) else model.layers[-1]
    return jnp.sum(model(query[0])) * jnp.sum(jnp.square(layer.weight))


@pytest.mark.parametrize(("kind", "curvature"), [("mlp", ix.KFAC), ("tokens", ix.EKFAC)])
def test_scores_are_those_of_the_dense_matrix_whatever_the_measurement(kind, curvature):
    risk, model, queries = problem(kind)
    f = ix.influence(risk, model, curvature(damping=1e-3))
    G = np.asarray(map_gradients(lambda _, g: g, risk, model))
    H = dense(f)
    for name, change in MEASUREMENTS.items():
        g = change(f)
        V = np.asarray(jax.vmap(lambda q, g=g: g.measurement.gradient(risk, model, q))(queries))
        solved = np.linalg.solve(H, V.reshape(-1, len(H)).T).T.reshape(V.shape)
        want = -np.einsum("...p,np->...n", solved, G)
        np.testing.assert_allclose(g(queries), want, atol=1e-11 * np.abs(want).max(), err_msg=name)
    s = np.einsum("np,np->n", G, np.linalg.solve(H, G.T).T)
    np.testing.assert_allclose(ix.self_influence(f), -s, rtol=1e-10)
    lengths = np.linalg.norm(np.linalg.solve(H, G.T), axis=0)
    np.testing.assert_allclose(ix.relative(f, "parameters").scale.size, lengths, rtol=1e-10)
    cosine = ix.relative(f, "cosine")(queries)
    assert float(jnp.max(jnp.abs(cosine))) <= 1 + 1e-12


def test_every_way_of_scoring_gives_the_same_scores():
    risk, model, queries = problem("tokens")
    f = ix.classification(ix.influence(risk, model, ix.EKFAC(damping=1e-3)), "logit")
    want = f(queries)
    layered = Layered(), Layered(points=5), Layered(ways=("forward mode",))
    for way in (PerExample(), PerExample(points=3), ForwardMode(), ForwardMode(points=7), *layered):

        def scores(query, way=way):
            prepared = way.prepare(f.response, f.measurement, query)
            return way.columns(f.response, prepared, None)

        got = jax.jit(jax.vmap(scores))(queries)
        np.testing.assert_allclose(got, want, atol=1e-11 * float(jnp.abs(want).max()))
        own = way.own(f.response, f.measurement, 1)
        np.testing.assert_allclose(own, f.response.own(f.measurement), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [0, 3, 255, 256, 258])
def test_a_gram_matrix_of_strips_is_that_of_all_rows(width):
    rng = np.random.default_rng(width)
    rows, weights = rng.normal(size=(2, 7, width)), rng.uniform(size=(7, 1))
    want = np.stack([x.T @ (weights * x) for x in rows])
    got = from_strips(gram_strips(jnp.asarray(weights * rows), jnp.asarray(rows)))
    np.testing.assert_allclose(got, want, atol=1e-13)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 12, 4160, 71_242])
def test_few_numbers_of_coordinates_are_in_use(size):
    sizes = truncated_sizes(size)
    assert (sizes[0], sizes[-1]) == (-(-size // 2), 1)
    assert all(2 * after >= before >= after for before, after in pairwise(sizes))
    assert len(sizes) <= np.ceil(np.log2(size)) + 2


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), tolerance=st.sampled_from([0.3, 0.1, 0.01]))
def test_scores_are_within_their_tolerance(seed, tolerance):
    a, b, c = jr.split(jr.key(seed), 3)
    model = eqx.nn.MLP(12, 4, 16, 2, activation=jax.nn.relu, key=a)
    X = jr.normal(b, (80, 12)) * jnp.geomspace(1, 0.05, 12)[None]
    y = jr.randint(c, (80,), 0, 4)
    risk = ix.EmpiricalRisk((X[:60], y[:60]), ix.SoftmaxCrossEntropy(), l2=1e-4)
    queries = (X[60:], y[60:])
    exact = ix.influence(risk, model, ix.EKFAC())(queries)
    near = ix.influence(risk, model, ix.EKFAC(tolerance=tolerance))
    terms = [block.terms for block in near.response.factored.blocks]
    assert tolerance < 0.1 or any(t is not None for t in terms)
    error = jnp.linalg.norm(near(queries) - exact) / jnp.linalg.norm(exact)
    assert error <= tolerance


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31), tolerance=st.sampled_from([0.2, 0.05, 0.01]))
def test_layers_with_shared_weights_are_scored_at_the_coordinates_that_matter(seed, tolerance):
    a, b, c = jr.split(jr.key(seed), 3)
    ids, y = jr.randint(b, (80, 5), 0, 9), jr.randint(c, (80,), 0, C)
    risk = ix.EmpiricalRisk((ids[:60], y[:60]), ix.SoftmaxCrossEntropy(), l2=1e-2)
    model, queries = Tokens(a, width=32), (ids[60:], y[60:])
    exact = ix.influence(risk, model, ix.EKFAC(damping=1e-2))
    near = ix.influence(risk, model, ix.EKFAC(damping=1e-2, tolerance=tolerance))
    blocks = near.response.factored.blocks
    assert any(block.kept is not None for block in blocks)
    scores = np.asarray(exact(queries))
    assert np.linalg.norm(near(queries) - scores) <= 2 * tolerance * np.linalg.norm(scores)
    np.testing.assert_allclose(ix.self_influence(near), ix.self_influence(exact), rtol=1e-12)

    # Whatever the way, the inverse is the same: its coordinates that are not kept are zeros.
    for block in blocks:
        if block.kept is not None:
            flat = np.zeros(block.layer.size)
            flat[block.kept] = np.ravel(block.inverse)[block.kept]
            np.testing.assert_array_equal(np.ravel(block.scored_inverse), flat)
    want = near(queries)
    for dense in ("dense per layer, by factors", "dense per layer, by gradients in its eigenbasis"):
        way = Layered(ways=(dense,) * len(blocks))
        score = lambda q, way=way: way.columns(
            near.response, way.prepare(near.response, near.measurement, q), None
        )
        got = jax.jit(jax.vmap(score))(queries)[:, 0]
        np.testing.assert_allclose(got, want, atol=1e-11 * float(jnp.abs(want).max()))


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), tolerance=st.sampled_from([0.3, 0.05]))
def test_diagnose_bounds_what_few_terms_change(seed, tolerance):
    a, b, c = jr.split(jr.key(seed), 3)
    model = eqx.nn.MLP(12, 4, 16, 2, activation=jax.nn.relu, key=a)
    X = jr.normal(b, (80, 12)) * jnp.geomspace(1, 0.05, 12)[None]
    y = jr.randint(c, (80,), 0, 4)
    risk = ix.EmpiricalRisk((X[:20], y[:20]), ix.SoftmaxCrossEntropy(), l2=1e-2)
    exact = ix.influence(risk, model, ix.EKFAC(damping=1e-2))
    near = ix.influence(risk, model, ix.EKFAC(damping=1e-2, tolerance=tolerance))
    assert any(block.terms is not None for block in near.response.factored.blocks)
    figure = ix.diagnose(near)["solve"].figure
    number = lambda pattern: float(re.search(pattern, figure)[1])
    of_points, of_query = number(r"at most (\S+) of √"), number(r"\((\S+) of a query\)")
    assert "tolerance" not in ix.diagnose(exact)["solve"].figure
    own = -np.asarray(ix.self_influence(exact))
    s = np.sqrt(np.maximum(own, own.mean()))
    G = np.asarray(map_gradients(lambda _, g: g, risk, model, (X[20:], y[20:])))
    H = dense(exact)
    s_query = np.sqrt(np.einsum("mp,mp->m", G, np.linalg.solve(H, G.T).T))
    error = lambda data, size: np.abs(near(data) - exact(data)) / size[:, None] / s[None]
    slack = 1.06  # the figure has two digits
    assert 1e-9 < np.max(error(risk.data, s)) <= slack * of_points
    assert of_points < 1
    assert np.max(error((X[20:], y[20:]), s_query)) <= slack * of_query
    # It is no larger than a solve by the terms is off, in the norm of H, for the worst vector.
    blocks = near.response.factored.blocks
    ratios = [np.abs(np.asarray(b.scored_inverse / b.inverse) - 1).max() for b in blocks]
    assert float(near.response.factored.most_missed) == pytest.approx(max(ratios), rel=1e-9)
    assert of_points <= slack * max(ratios)


def float32(tree):
    low = lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x
    return jax.tree_util.tree_map(low, tree)


def linear_problem(seed, n, precision, noise, dtype=jnp.float64):
    """A layer whose weights are drawn with that precision, and data with noise of that size."""
    rng = np.random.default_rng(seed)
    X, W = rng.normal(size=(n, 12)), rng.normal(size=(4, 12)) / np.sqrt(precision)
    y = X @ W.T + noise * rng.normal(size=(n, 4))
    layer = eqx.nn.Linear(12, 4, use_bias=False, key=jr.key(0))
    at = lambda W: eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(W, dtype))
    return at, W, (jnp.asarray(X, dtype), jnp.asarray(y, dtype))


@given(seed=st.integers(0, 2**31 - 1), noise=st.sampled_from([0.1, 3.0]))
def test_the_automatic_damping_finds_the_precision_that_weights_were_drawn_with(seed, noise):
    """48 of them show it to a factor of 48/χ²₄₈; K-FAC of a linear layer is exact."""
    n, precision = 2000, 5.0
    at, _, (X, y) = linear_problem(seed, n, precision, noise)
    least_squares = np.linalg.lstsq(np.asarray(X), np.asarray(y), rcond=None)[0].T
    l2 = 1e-3 * precision * noise**2 / n  # of so little as all the evidence is λ's
    risk = ix.EmpiricalRisk((X, y), ix.SquaredError(), l2=l2)
    damping = float(ix.KFAC().factor(risk, at(least_squares)).blocks[0].damping)
    found = (l2 + damping) * n / noise**2 / precision
    low, high = chi2.isf([1e-7, 1 - 1e-7], 48)
    assert 48 / low < found < 48 / high


def test_the_automatic_damping_finds_the_precision_where_the_fit_takes_much_of_the_noise():
    """200 weights drawn and 300 points, ridge regression at the true precision: a mean over draws."""
    n, d, precision, found = 300, 200, 200.0, []
    layer = eqx.nn.Linear(d, 1, use_bias=False, key=jr.key(0))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(n, d))
        y = X @ rng.normal(size=(d, 1)) / np.sqrt(precision) + 0.7 * rng.normal(size=(n, 1))
        ridge = np.linalg.solve(X.T @ X + precision * 0.7**2 * np.eye(d), X.T @ y).T
        risk = ix.EmpiricalRisk((jnp.asarray(X), jnp.asarray(y)), ix.SquaredError())
        model = eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(ridge))
        found.append(n * float(ix.KFAC().factor(risk, model).dampings[0]) / 0.7**2)
    assert 0.8 < np.mean(found) / precision < 1.05


@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([0.0, 1.0, 100.0]))
def test_weights_that_no_data_decide_say_nothing_to_the_automatic_damping(seed, size):
    """Of squared error: half the features are 0 throughout, their weights those of the start."""
    at, W, (X, _) = linear_problem(seed, 200, 5.0, 0.0)
    rng = np.random.default_rng(seed)
    X = jnp.where(np.arange(12) < 6, X, 0.0)
    y = X @ W.T + 0.5 * rng.normal(size=(200, 4))
    risk = ix.EmpiricalRisk((X, y), ix.SquaredError(), l2=1e-7)
    idle = np.where(np.arange(12) < 6, W, size * rng.normal(size=(4, 12)))
    one, other = (float(ix.EKFAC().factor(risk, at(w)).dampings[0]) for w in (W, idle))
    assert one == pytest.approx(other, rel=1e-6)
    assert one > 0


@given(seed=st.integers(0, 2**31 - 1), l2=st.sampled_from([1e-4, 1e-2]))
def test_the_automatic_damping_is_where_the_evidence_is_highest(seed, l2):
    """Of ridge regression with known noise, the weights held, against SciPy's maximum: here the data
    decide every direction, γ ≈ 1, so that weighting by it changes nothing."""
    n, noise = 2000, 0.5
    at, W, (X, y) = linear_problem(seed, n, 0.3, noise)
    risk = ix.EmpiricalRisk((X, y), ix.SquaredError(), l2=l2)
    factored = ix.KFAC().factor(risk, at(W))
    variance = float(jnp.mean((jax.vmap(at(W))(X) - y) ** 2))
    spectrum = np.repeat(np.linalg.eigvalsh(np.asarray(X).T @ np.asarray(X) / n), 4)

    def evidence(log_precision):
        floor = np.exp(log_precision)
        of_prior = np.sum(np.log(floor) - np.log(spectrum + floor))
        return of_prior / 2 - n * floor * np.sum(W**2) / (2 * variance)

    best = np.exp(minimize_scalar(lambda x: -evidence(x), bounds=(-20, 5)).x)
    assert float(factored.dampings[0]) == pytest.approx(max(best - l2, 0), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("curvature", KFACS)
@pytest.mark.parametrize("kind", ["softmax", "squared"])
@pytest.mark.parametrize("l2", [0.0, 1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("to", [float32, lambda tree: tree], ids=["float32", "float64"])
def test_the_automatic_damping_is_the_least_that_the_evidence_allows(curvature, kind, l2, to):
    risk, model, _ = problem()
    X, y = risk.data
    weights = 2 * risk.weights
    leaves = jax.tree_util.tree_map(lambda x: (1 + x.ndim) * l2, eqx.filter(model, eqx.is_array))
    if kind == "softmax":
        few = ix.EmpiricalRisk((X, y), risk.loss, l2=leaves, weights=weights)
    else:
        target = jax.nn.one_hot(y, C, dtype=X.dtype)
        few = ix.EmpiricalRisk((X, target), ix.SquaredError(), l2=leaves, weights=weights)
    few, net = to(few), to(model)
    factored = curvature().factor(few, net)
    dampings = np.asarray(factored.dampings)
    assert len(set(dampings)) == 1
    damping = float(dampings[0])
    joined = lambda parts: np.concatenate([np.ravel(x) for x in parts]).astype(float)
    values = joined([b.values for b in factored.blocks])
    undamped = curvature(damping=1.0).factor(
        to(ix.EmpiricalRisk(few.data, few.loss, weights=few.weights)), net
    )
    data = joined([b.values for b in undamped.blocks])
    decided = data / (values + damping)
    dimension, total = np.sum(decided), float(jnp.sum(few.weights))
    side = lambda basis, size: np.eye(size)[None] if basis is None else np.asarray(basis, float)
    turned = joined(
        np.einsum("sai,sab,sbj->sij", side(b.left, W.shape[1]), W, side(b.right, W.shape[2]))
        for b, W in zip(factored.blocks, factored.split(ravel(net)[0]))
    )
    energy = N * (values - data + damping) * turned**2
    if kind == "softmax":
        energy, bound = np.sum(energy), dimension / (1 + dimension / total)
    else:
        residuals = np.asarray(jax.vmap(net)(few.data[0]) - few.data[1], float)
        mean = np.asarray(few.weights) @ np.sum(residuals**2, axis=1) / (total * C)
        energy = decided @ energy
        bound = mean * (1 + dimension / (total * C)) * np.sum(decided**2)
    assert energy >= bound * (1 - 1e-4)
    assert damping == 0 or energy == pytest.approx(bound, rel=1e-4)
    assert (damping > 0) == (l2 < 1)


def test_a_point_of_twice_the_weight_is_two_points_to_the_automatic_damping():
    risk, model, _ = problem()
    twice = jax.tree_util.tree_map(lambda x: jnp.concatenate([x, x]), risk.data)
    ways = (
        ix.EmpiricalRisk(twice, risk.loss, l2=1e-4, weights=jnp.tile(risk.weights, 2)),
        ix.EmpiricalRisk(risk.data, risk.loss, l2=2e-4, weights=2 * risk.weights),
    )
    one, other = (r.n * float(ix.EKFAC().factor(r, model).dampings[0]) for r in ways)
    assert one == pytest.approx(other, rel=1e-6)
    assert one > 0


@pytest.mark.parametrize("curvature", KFACS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_l2_is_exceeded_by_the_floor_of_the_automatic_damping(curvature, dtype):
    """However small it is: then H is not singular, and without noise the rule's λ is 0."""
    at, W, (X, _) = linear_problem(0, 40, 1.0, 0.0, dtype)
    X = X.at[:, 1].set(X[:, 0])  # the same feature twice
    data = X, jax.vmap(at(W))(X)
    for l2 in (1e-7, 1e-12):
        blocks = curvature().factor(ix.EmpiricalRisk(data, ix.SquaredError(), l2=l2), at(W)).blocks
        assert float(blocks[0].damping) == 0
        assert min(float(jnp.min(b.values)) for b in blocks) >= l2 * (1 - 1e-6)
    blocks = curvature().factor(ix.EmpiricalRisk(data, ix.SquaredError()), at(W)).blocks
    top, unit = float(jnp.max(blocks[0].values)), jnp.finfo(dtype).eps
    assert 0 < float(blocks[0].damping) <= 33 * unit * top


def test_the_automatic_damping_of_zero_parameters_or_infinite_losses_is_refused():
    at, W, data = linear_problem(0, 40, 1.0, 1.0)
    X, y = linear_problem(0, 40, 1.0, 1.0, jnp.float32)[2]
    fit = lambda data, model: ix.EKFAC().factor(ix.EmpiricalRisk(data, ix.SquaredError()), model)
    with pytest.raises(ValueError, match="NaN or overflow"):
        fit((X, y + 1e30), float32(at(W)))
    with pytest.raises(ValueError, match="are 0 to rounding"):
        fit(data, at(0 * W))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    idle = turn @ np.diag(np.arange(12) < 6) @ turn.T  # half the directions of the features
    with pytest.raises(ValueError, match="are 0 to rounding"):
        fit((data[0] @ idle, data[1]), at(W @ (np.eye(12) - idle)))


def test_the_automatic_damping_may_exceed_the_largest_eigenvalue():
    """Small weights and much noise: 48 γ-weighted squares, all at γ near F/λ."""
    at, W, (X, _) = linear_problem(3, 40, 1e4, 0.0)
    y = 100 * np.random.default_rng(4).normal(size=(40, 4))
    factored = ix.EKFAC().factor(ix.EmpiricalRisk((X, y), ix.SquaredError()), at(W))
    (block,) = factored.blocks
    assert float(block.damping) > 10 * float(jnp.max(block.values))


def test_a_weight_is_a_multiplicity_and_zero_is_absence():
    risk, model, queries = problem()
    X, y = risk.data
    twice = ix.EmpiricalRisk(
        (jnp.concatenate([X, X[:3]]), jnp.concatenate([y, y[:3]])), risk.loss, l2=0.1
    )
    heavy = ix.EmpiricalRisk(
        (X, y), risk.loss, l2=0.1 * (N + 3) / N, weights=jnp.ones(N).at[:3].set(2.0)
    )
    scores = [
        ix.influence(r, model, ix.EKFAC(damping=1e-2 * (N + 3) / r.n))(queries)[:, :N] / r.n
        for r in (twice, heavy)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-8)


@pytest.mark.parametrize("curvature", [ix.KFAC(damping=0.1), ix.EKFAC(damping=0.1)])
def test_curvature_has_a_derivative_in_a_weight_of_zero(curvature):
    risk, model, _ = problem()
    theta, _ = ravel(model)
    v = jr.normal(jr.key(0), theta.shape)

    def along(weights):
        return jnp.vdot(v, curvature.factor(risk.with_weights(weights), model).matvec(v))

    absent = jnp.ones(N).at[0].set(0.0)
    step = 1e-4 * jnp.eye(N)[0]
    at = [along(absent + k * step) for k in range(3)]
    want = (-3 * at[0] + 4 * at[1] - at[2]) / 2e-4
    np.testing.assert_allclose(jax.grad(along)(absent)[0], want, rtol=1e-5)
    # Weights that are known to be 1 are not multiplied by: the same matrix.
    np.testing.assert_allclose(along(jnp.ones(N)), jax.jit(along)(jnp.ones(N)), rtol=1e-10)


def test_a_sampled_fisher_tends_to_the_exact_one():
    risk, model, _ = problem()
    exact = dense(ix.influence(risk, model, ix.KFAC(damping=0.1)))
    errors = [
        np.linalg.norm(
            dense(
                ix.influence(risk, model, ix.KFAC("sampled", key=jr.key(0), draws=d, damping=0.1))
            )
            - exact
        )
        for d in (4, 64, 1024)
    ]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05 * np.linalg.norm(exact)


WEIGHTED = {"class_weights": np.array([0.5, 2.0, 1.25]), "label_smoothing": 0.1}
LOSSES = {
    "class weights and smoothing": ix.SoftmaxCrossEntropy(**WEIGHTED),
    "mean over places": ix.SoftmaxCrossEntropy(reduction="mean"),
    "all of it": ix.SoftmaxCrossEntropy(reduction="mean", **WEIGHTED),
    "quartic": ix.CustomLoss(lambda o, t: jnp.sum((o - t.astype(o.dtype)[..., None]) ** 4)),
}


class Sequence(eqx.Module):
    """One matrix, applied once, that answers the logits of two places."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        return self.layer(x).reshape(2, C)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("curvature", KFACS)
def test_of_one_datum_it_is_the_gauss_newton_matrix_whatever_the_loss(name, curvature):
    model = Sequence(eqx.nn.Linear(3, 2 * C, key=jr.key(15)))
    data = jr.normal(jr.key(16), (1, 3)), jnp.array([[2, 1]])
    risk = ix.EmpiricalRisk(data, LOSSES[name], l2=0.05, weights=jnp.array([1.5]))
    truth = np.asarray(ix.GaussNewton().matrix(risk, model)) + 1e-4 * np.eye(24)
    got = dense(ix.influence(risk, model, curvature(damping=1e-4)))
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-12 * np.abs(truth).max())
    if name != "quartic":
        other = dense(ix.influence(risk, model, curvature("exact", damping=1e-4)))
        assert np.abs(other - truth).max() > 0.1 * np.abs(truth).max()


def test_the_exact_fisher_of_a_plain_likelihood_is_the_gauss_newton_matrix():
    risk, model, _ = problem()
    want, got = (
        dense(ix.influence(risk, model, ix.EKFAC(f, damping=0.1))) for f in ("ggn", "exact")
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


class Autoencoder(eqx.Module):
    """Tied with its own transpose."""

    weight: jax.Array

    def __call__(self, x):
        return self.weight.T @ jnp.tanh(self.weight @ x)


class TiedTable(eqx.Module):
    """A table [3, 7] read by look-up of its columns and by a product with its transpose."""

    table: jax.Array
    product_first: bool = eqx.field(static=True)

    def __call__(self, ids):
        look_up, product = jax.vmap(lambda i: self.table.T[i]), lambda h: self.table.T @ h
        if self.product_first:
            shift = product(jnp.array([0.3, -1.0, 0.5]))
            return jnp.tanh(look_up(ids)) + shift[None, :3]
        return jax.vmap(product)(jnp.tanh(look_up(ids)))[:, :3]


TIED = ("autoencoder", "look-up and product", "product and look-up")


def tied(kind: str):
    matrix, ids = jr.normal(jr.key(13), (3, 7)) / 3, jr.randint(jr.key(14), (N, 4), 0, 7)
    if kind == "autoencoder":
        X = jr.normal(jr.key(12), (N, 7))
        model, data = Autoencoder(matrix), (X, X)
    else:
        model, data = TiedTable(matrix, kind == "product and look-up"), (ids, jnp.zeros((N, 4, 3)))
    return ix.EmpiricalRisk(data, ix.SquaredError(), weights=problem()[0].weights), model


def data_trace(curvature, risk, model) -> float:
    return float(sum(jnp.sum(block.values) for block in curvature.blocks(risk, model)[0]))


@pytest.mark.parametrize("kind", TIED)
def test_the_size_of_a_matrix_tied_with_its_transpose_is_the_same_with_any_number_of_draws(kind):
    risk, model = tied(kind)
    exact = data_trace(ix.KFAC(), risk, model)
    sampled = lambda d, seed: ix.KFAC("sampled", key=jr.key(seed), draws=d)
    for draws in (1, 16):
        found = [data_trace(sampled(draws, seed), risk, model) for seed in range(24)]
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        assert abs(np.mean(found) - exact) < 4 * error < 0.3 * exact


def test_a_tied_matrix_has_the_size_of_its_two_uses():
    """tr(G ⊗ A) = Σ tr(G_τ) tr(A_τ): for places of their own that is the trace of the Fisher matrix."""
    risk, model = tied("autoencoder")
    X, w, W = (np.asarray(x) for x in (risk.data[0], risk.weights, model.weight))
    h = np.tanh(X @ W.T)
    back = (1 - h**2)[:, :, None] * W[None]  # ∂output/∂z of the encoder, transposed
    share = w / N
    encoder = np.sum(share[:, None, None] * back**2) * np.sum(w[:, None] * X**2) / w.sum()
    decoder = 7 * np.sum(share) * np.sum(w[:, None] * h**2) / w.sum()
    assert data_trace(ix.KFAC(), risk, model) == pytest.approx(encoder + decoder, rel=1e-12)
    J = jax.vmap(jax.jacrev(lambda m, x: m(x)), (None, 0))(model, risk.data[0]).weight
    F = np.einsum("n,nkp,nkp->", share, *[np.asarray(J).reshape(N, 7, -1)] * 2)
    assert data_trace(ix.EKFAC(), risk, model) == pytest.approx(F, rel=1e-12)


class Opaque(eqx.Module):
    """A layer whose derivative is its own, so that its program cannot be read."""

    weight: jax.Array

    def __call__(self, x):
        return custom(self.weight, x)


def opaque_model():
    layers = [Opaque(jr.normal(jr.key(5), (40, 30))), jnp.tanh, eqx.nn.Linear(40, C, key=jr.key(6))]
    return eqx.nn.Sequential([eqx.nn.Lambda(l) if l is jnp.tanh else Wrapped(l) for l in layers])


class Wrapped(eqx.Module):
    """Sequential passes a key; these layers take none."""

    layer: object

    def __call__(self, x, *, key=None):
        return self.layer(x)


def test_a_layer_without_a_rule_is_an_error_and_a_rule_is_a_line():
    model = opaque_model()
    X, y = jr.normal(jr.key(7), (N, 30)), jr.randint(jr.key(8), (N,), 0, C)
    risk = ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy(), l2=1e-2)
    message = r"weight \[40, 30\] \(in `custom_jvp_call`\).*rules=.*Mixture.*restrict"
    with pytest.raises(ValueError, match=message):
        ix.influence(risk, model, ix.EKFAC())
    plain = eqx.tree_at(lambda m: m.layers[0].layer, model, Linear(model.layers[0].layer.weight))
    ruled = ix.EKFAC(rules={Opaque: lambda layer, x: layer.weight @ x}, tolerance=0.1)
    f = ix.influence(risk, model, ruled)
    g = ix.influence(risk, plain, ix.EKFAC(tolerance=0.1))
    np.testing.assert_allclose(f((X[:4], y[:4])), g((X[:4], y[:4])), rtol=1e-9)
    np.testing.assert_allclose(ix.self_influence(f), ix.self_influence(g), rtol=1e-9)
    where = lambda m: m.layers[0].layer
    mixed = ix.influence(risk, model, ix.Mixture({where: ix.Identity()}, ix.EKFAC()))
    assert mixed((X[:4], y[:4])).shape == (4, N)
    kept, part = ix.restrict(risk, model, lambda m: m.layers[-1])
    left_out = ix.coverage(ix.influence(kept, part, ix.EKFAC()))
    assert left_out.share["excluded"] == pytest.approx(1200 / 1323)


@jax.custom_vjp
def reverse_only(weight, x):
    return weight @ x


reverse_only.defvjp(
    lambda weight, x: (weight @ x, (weight, x)),
    lambda kept, g: (jnp.outer(g, kept[1]), kept[0].T @ g),
)


class ReverseOnly(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return reverse_only(self.weight, x)


@pytest.mark.parametrize("rows", [1, 200])
def test_a_rule_serves_every_way_of_scoring(rows):
    """Forward mode too, which a layer with a reverse rule of its own has none for."""
    own = eqx.nn.Sequential([Wrapped(ReverseOnly(jr.normal(jr.key(5), (40, 30))))])
    plain = eqx.tree_at(lambda m: m.layers[0].layer, own, Linear(own.layers[0].layer.weight))
    X, y = jr.normal(jr.key(7), (N, 30)), jr.randint(jr.key(8), (N,), 0, C)
    risk = ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy(), l2=1e-2)
    f = ix.influence(risk, own, ix.EKFAC(rules={ReverseOnly: lambda layer, x: layer.weight @ x}))
    queries = jnp.resize(X, (rows, 30)), jnp.resize(y, (rows,))
    want = ix.influence(risk, plain, ix.EKFAC())(queries)
    np.testing.assert_allclose(f(queries), want, rtol=1e-9, atol=1e-12)


def test_draws_of_a_regression_are_not_rounded_to_its_whole_targets():
    X = jr.normal(jr.key(9), (N, 3))
    whole = jnp.zeros((N, 2), int)
    model = Linear(jr.normal(jr.key(10), (2, 3)))
    sampled = ix.EKFAC("sampled", key=jr.key(11), damping=1e-3)
    factored = [
        sampled.factor(ix.EmpiricalRisk((X, y), ix.SquaredError()), model)
        for y in (whole, whole.astype(float))
    ]
    v = jnp.ones(6)
    np.testing.assert_array_equal(*(f.matvec(v) for f in factored))


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return self.weight @ x


def test_a_mixture_is_each_curvature_on_its_part():
    risk, model, queries = problem()
    last = lambda m: m.layers[-1]
    f = ix.influence(
        risk, model, ix.Mixture({last: ix.GaussNewton(damping=0.1)}, ix.EKFAC(damping=0.2))
    )
    full = ix.influence(risk, model, ix.EKFAC(damping=0.2))
    small, part = ix.restrict(risk, model, last)
    head = ix.influence(small, part, ix.GaussNewton(damping=0.1))
    head_kfac = ix.influence(small, part, ix.EKFAC(damping=0.2))
    want = full(queries) - head_kfac(queries) + head(queries)
    np.testing.assert_allclose(f(queries), want, rtol=1e-9, atol=1e-12)
    table = ix.coverage(f)
    assert [row.treatment for row in table.rows] == ["GaussNewton", "Kronecker", "Kronecker"]
    assert sum(table.share.values()) == pytest.approx(1)
    assert ".layers[2].weight" in str(table)
    both = {last: ix.Hessian(), lambda m: m.layers[-1].bias: ix.Hessian()}
    with pytest.raises(ValueError, match="parts of a Mixture overlap"):
        ix.influence(risk, model, ix.Mixture(both, ix.EKFAC()))


def test_coverage_names_every_parameter():
    risk, model, _ = problem("tokens")
    table = ix.coverage(ix.influence(risk, model, ix.EKFAC()))
    treatments = {row.parameters[0]: row.treatment for row in table.rows}
    assert treatments[".embed.weight"] == "Kronecker, one-hot input"
    assert treatments[".attention.query_proj.weight"] == "Kronecker"
    assert treatments[".norm.weight"] == treatments[".position"] == "exact"
    params = jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    assert sum(row.entries for row in table.rows) == sum(p.size for p in params)


def test_float32_stays_float32_and_keeps_its_digits():
    risk, model, queries = problem()
    exact = ix.influence(risk, model, ix.EKFAC(damping=1e-2))(queries)
    f = ix.influence(float32(risk), float32(model), ix.EKFAC(damping=1e-2))
    got = f(float32(queries))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=1e-4 * float(jnp.abs(exact).max()))


def test_no_recompilation_over_damping_and_no_change_on_a_second_call():
    risk, model, queries = problem()
    first = ix.influence(risk, model, ix.EKFAC(damping=0.1))
    before = first(queries)
    traces = []

    @eqx.filter_jit
    def scores(f, queries):
        traces.append(f)
        return f(queries)

    assert np.array_equal(before, first(queries))
    other = ix.influence(risk, model, ix.EKFAC(damping=0.2))
    assert np.max(np.abs(other(queries) - before)) > 1e-3 * np.max(np.abs(before))
    for f in (first, other, first):
        np.testing.assert_allclose(scores(f, queries), f(queries), rtol=1e-12)
    assert len(traces) == 1


@pytest.mark.parametrize("curvature", [ix.GaussNewton(damping=0.1), ix.EKFAC(damping=0.1)])
def test_whole_numbers_as_inputs_leave_the_dtype_to_the_model(curvature):
    risk, model, queries = problem("tokens")
    assert not any(eqx.is_inexact_array(x) for x in jax.tree_util.tree_leaves(risk.data))
    want = ix.influence(risk, model, curvature)(queries)
    f = ix.influence(risk, float32(model), curvature)
    assert (
        f.risk.weights.dtype == f.risk.with_weights(jnp.ones(risk.n)).weights.dtype == jnp.float32
    )
    got = f(queries)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))


class Idle(eqx.Module):
    """A layer, and parameters that the output does not depend on."""

    layer: eqx.nn.MLP
    idle: jax.Array

    def __call__(self, x):
        return self.layer(x)


def test_a_layer_without_gradients_has_terms_as_well():
    risk, model, queries = problem()
    idle = Idle(model, jnp.ones((40, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tolerance in (0.0, 0.1):
            curvature = ix.EKFAC(damping=0.1, tolerance=tolerance)
            got = ix.influence(risk, idle, curvature)(queries)
            want = ix.influence(risk, model, curvature)(queries)
            np.testing.assert_allclose(got, want, rtol=1e-9)


REFUSED = {
    "damping by another name": (lambda: ix.EKFAC(damping="heuristic"), '"auto"'),
    "negative damping": (lambda: ix.KFAC(damping=-1.0), "at least 0"),
    "tolerance of a percentage": (lambda: ix.EKFAC(tolerance=5), r"relative error in \[0, 1\)"),
    "unknown sharing": (lambda: ix.KFAC(sharing="sum"), '"expand" or "reduce"'),
    "unknown Fisher": (lambda: ix.EKFAC("true"), '"exact", "sampled" or "empirical"'),
    "sampled without a key": (lambda: ix.EKFAC("sampled"), "draws labels"),
    "rules that are a list": (lambda: ix.EKFAC(rules=[Opaque]), "maps layer types to functions"),
    "automatic damping in CG": (lambda: ix.CG(ix.EKFAC()), "needs one number λ"),
    "a mixture of nothing": (lambda: ix.Mixture({}, ix.EKFAC()), "`parts` maps functions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_does_not_combine_says_what_does():
    risk, model, queries = problem()
    f = ix.influence(risk, model, ix.EKFAC())
    with pytest.raises(ValueError, match="EKFAC does not say what one point adds"):
        ix.removal(f, "newton")
    with pytest.raises(ValueError, match="is another approximation, not a part"):
        ix.restriction_bound(f, lambda m: m.layers[-1], queries)
    with pytest.raises(ValueError, match="looks at eigenvalues"):
        eqx.filter_jit(lambda m: ix.EKFAC().factor(risk, m).blocks[0].values)(model)
    free = ix.EmpiricalRisk(risk.data, risk.loss)
    with pytest.raises(ValueError, match=r"curvature of .*layers.* is singular"):
        ix.influence(free, model, ix.KFAC(damping=0.0))
    quartic = ix.CustomLoss(lambda o, t: jnp.sum((o - t) ** 4))
    custom_risk = ix.EmpiricalRisk((risk.data[0], jnp.zeros((N, C))), quartic, l2=0.1)
    with pytest.raises(ValueError, match="CustomLoss has no exact Fisher"):
        ix.influence(custom_risk, model, ix.EKFAC("exact"))
    assert ix.influence(custom_risk, model, ix.EKFAC()).response.factored.blocks
    wavy = ix.CustomLoss(lambda o, t: jnp.sum(jnp.cos(3 * (o - t))))
    wavy_risk = ix.EmpiricalRisk(custom_risk.data, wavy, l2=0.1)
    with pytest.raises(RuntimeError, match="loss is not convex in its output"):
        ix.influence(wavy_risk, model, ix.EKFAC())
    assert ix.influence(custom_risk, model, ix.EKFAC("empirical")).response.factored.blocks
