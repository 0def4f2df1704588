"""Scores, transforms and their laws, over the family tables."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx._solver.minres import MINRES as Minres
from influx.extend import AbstractFactored, AbstractWrapped, Factored, ravel
from proofs_checks import _oracle as oracle
from proofs_checks._library import model_at, queries, risk_of
from proofs_checks._problems import draw
from tests.helpers import (
    CLASSIFIERS,
    CURVATURES,
    FAMILIES,
    LAMBDA,
    MEASUREMENTS,
    SCALES,
    handle,
    name_of,
    problem,
)


def numpy_scores(p, curvature: str, kind: str = "loss") -> np.ndarray:
    matrix = CURVATURES[curvature][1](p) + LAMBDA * np.eye(p.theta.size)
    solved = np.linalg.solve(matrix, oracle.gradients(p, p.theta).T)
    return -oracle.measurement_gradient(p, kind) @ solved


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_formula(name, curvature):
    p, _, _, queries = problem(name)
    expected = numpy_scores(p, curvature)
    np.testing.assert_allclose(handle(name, curvature)(queries), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["probability", "logit", "margin"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_is_the_formula(name, kind):
    p, _, _, queries = problem(name)
    f = handle(name)
    expected = numpy_scores(p, "Hessian", kind)
    got = ix.classification(f, kind)(queries)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)
    if kind != "margin":
        one = ix.classification(f, kind, class_=1)(queries)
        np.testing.assert_allclose(one, expected[:, 1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", SCALES, ids=name_of)
@pytest.mark.parametrize("name", ["softmax", "network"])
def test_relative_is_the_formula(name, kind):
    p, _, _, queries = problem(name)
    f = handle(name)
    matrix = oracle.hessian(p, p.theta) + LAMBDA * np.eye(p.theta.size)
    g, m = oracle.gradients(p, p.theta), oracle.measurement_gradient(p)
    plain, solved = numpy_scores(p, "Hessian"), np.linalg.solve(matrix, g.T)
    s = np.einsum("np,pn->n", g, solved)
    sizes = {
        "loss": np.sqrt(s)[None],
        "parameters": np.linalg.norm(solved, axis=0)[None],
        "self": s[None],
        "cosine": np.sqrt(
            s[None] * np.einsum("mp,pm->m", m, np.linalg.solve(matrix, m.T))[:, None]
        ),
    }
    if isinstance(kind, ix.Reference):
        expected = plain / plain[:, list(kind.points)].sum(axis=1, keepdims=True)
    else:
        expected = plain / sizes[kind]
    np.testing.assert_allclose(ix.relative(f, kind)(queries), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", SCALES, ids=name_of)
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_relative_and_measurement_commute(measurement, kind):
    queries = problem("softmax")[3]
    f, rewrite = handle("softmax"), MEASUREMENTS[measurement]
    one = rewrite(ix.relative(f, kind))(queries)
    other = ix.relative(rewrite(f), kind)(queries)
    # The sum of all logits has no influence at all: relative to that, 0/0 is NaN.
    assert np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("measurement", MEASUREMENTS)
@pytest.mark.parametrize("effect", ["first-order", "newton"])
def test_removal_and_measurement_commute(measurement, effect):
    queries = problem("softmax")[3]
    f, rewrite = handle("softmax"), MEASUREMENTS[measurement]
    one = rewrite(ix.removal(f, effect))(queries)
    other = ix.removal(rewrite(f), effect)(queries)
    assert np.array_equal(one, other)


def test_groups_commute_with_measurement_and_removal():
    _, risk, _, queries = problem("softmax")
    f = handle("softmax")
    masks = np.random.default_rng(0).random((4, risk.n)) < 0.4
    a = ix.groups(ix.removal(ix.classification(f), "first-order"), masks)(queries)
    b = ix.removal(ix.classification(ix.groups(f, masks)), "first-order")(queries)
    assert np.array_equal(a, b)
    assert a.shape == (3, 3, 4)
    members = -np.asarray(risk.weights) / risk.n * np.asarray(ix.classification(f)(queries))
    np.testing.assert_allclose(a, members @ masks.T, rtol=1e-9, atol=1e-13)


def test_groups_are_linear():
    _, risk, _, queries = problem("softmax")
    f = handle("softmax")
    masks = np.random.default_rng(1).uniform(0, 2, (3, risk.n))
    total = ix.groups(f, masks.sum(axis=0)[None])(queries)[:, 0]
    np.testing.assert_allclose(ix.groups(f, masks)(queries).sum(axis=1), total, rtol=1e-9)
    single = ix.groups(f, np.eye(risk.n))(queries)
    np.testing.assert_allclose(single, f(queries), rtol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_first_order_removal_is_minus_w_over_n(name):
    _, risk, _, queries = problem(name)
    f = handle(name)
    expected = -np.asarray(risk.weights) / risk.n * np.asarray(f(queries))
    np.testing.assert_allclose(ix.removal(f, "first-order")(queries), expected, rtol=1e-12)


@pytest.mark.parametrize("curvature", ["GaussNewton", "CG", "MINRES", "Hessian"])
@pytest.mark.parametrize("name", FAMILIES)
def test_newton_displacements_are_those_of_the_reduced_problem(name, curvature):
    """−(H₋ᵢ + λI)⁻¹∇J₋ᵢ in NumPy, at a model that is NOT stationary, for weights 0 and above 1."""
    p, risk, _, queries = problem(name)
    theta = p.theta + 0.02 * np.random.default_rng(2).normal(size=p.theta.size)
    f = ix.influence(risk, model_at(p.family, theta), CURVATURES[curvature][0])
    full = oracle.gauss_newton if curvature in ("GaussNewton", "MINRES") else oracle.hessian
    A = oracle.jacobians(p.family, theta, p.X)
    S = oracle.output_hessians(p.family.loss, oracle.outputs(p.family, theta, p.X))
    steps = []
    for i in range(p.n):
        w = np.where(np.arange(p.n) == i, 0.0, p.w)
        if full is oracle.hessian:
            H = oracle.hessian(p, theta, w)
        else:
            H = full(p, theta) - p.w[i] / p.n * A[i].T @ S[i] @ A[i]
        H = H + LAMBDA * np.eye(theta.size)
        steps.append(-np.linalg.solve(H, oracle.gradient(p, theta, w)))
    got = f.response.displace(jnp.arange(p.n))
    np.testing.assert_allclose(got, steps, rtol=1e-7, atol=1e-9)
    some = f.response.displace(jnp.asarray([4]))  # few rows take the other side of Woodbury
    np.testing.assert_allclose(some[0], steps[4], rtol=1e-7, atol=1e-9)
    settled = theta - np.linalg.solve(
        full(p, theta) + LAMBDA * np.eye(theta.size), oracle.gradient(p, theta)
    )
    change = oracle.measurement(p, "loss", theta + steps[3]) - oracle.measurement(
        p, "loss", settled
    )
    np.testing.assert_allclose(
        ix.removal(f, "newton")(queries)[:, 3], change, rtol=1e-6, atol=1e-10
    )


class Solved(AbstractWrapped):
    """`curvature`, solved with by what `ready` makes of its damped products and the parameters."""

    ready: Callable

    def factor(self, risk, model):
        product = self.curvature.matvec(risk, model)
        return self.ready(lambda v: product(v) + self.damping * v, ravel(model)[0])


def by_lineax(solver, *tags):
    def ready(product, theta):
        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: theta), tags)
        return Factored(operator, solver)

    return ready


SYMMETRIC, DEFINITE = lx.symmetric_tag, lx.positive_semidefinite_tag
BY_LINEAX = {
    "BiCGStab": by_lineax(lx.BiCGStab(rtol=1e-12, atol=1e-12), SYMMETRIC),
    "MINRES": by_lineax(Minres(rtol=0.0, atol=1e-12, max_steps=500), SYMMETRIC),
    "CG": by_lineax(lx.CG(rtol=1e-12, atol=1e-12), SYMMETRIC, DEFINITE),
    "Cholesky": by_lineax(lx.Cholesky(), SYMMETRIC, DEFINITE),
}


class Held(AbstractFactored):
    """An inverse that takes no other matrix on."""

    inverse: jax.Array

    @property
    def matrix(self):
        return None

    @property
    def matvec(self):
        return lambda v: jnp.linalg.solve(self.inverse, v)

    def try_solve(self, v):
        return self.inverse @ v, jnp.asarray(True)


@pytest.mark.parametrize("solver", BY_LINEAX)
def test_newton_steps_of_a_networks_hessian_by_any_solver_of_lineax(solver):
    _, risk, model, _ = problem("network")
    hessian, points = ix.Hessian(damping=LAMBDA), jnp.arange(3)
    direct = ix.influence(risk, model, hessian).response.displace(points)
    solved = ix.influence(risk, model, Solved(hessian, BY_LINEAX[solver]))
    np.testing.assert_allclose(solved.response.displace(points), direct, rtol=1e-7, atol=1e-9)


PERTURBABLE = {
    "Hessian": ix.Hessian(damping=LAMBDA),
    "CG": ix.CG(ix.Hessian(damping=LAMBDA), rtol=1e-12),
    "Projected": ix.Projected(ix.Hessian(damping=LAMBDA), 5, key=jr.key(0)),
    "Diagonal": ix.Diagonal(ix.Hessian(damping=LAMBDA)),
    **{name: Solved(ix.Hessian(damping=LAMBDA), ready) for name, ready in BY_LINEAX.items()},
}


@pytest.mark.parametrize("name", PERTURBABLE)
def test_matrices_can_be_added_to_a_curvature_one_after_another(name):
    _, risk, model, _ = problem("network")
    factored = PERTURBABLE[name].factor(risk, model)
    theta, _ = ravel(model)
    rows = 0.3 * jr.normal(jr.key(1), (2, theta.size))
    first, second = (lambda v, row=row: row * jnp.vdot(row, v) for row in rows)
    both = factored.perturbed(first).perturbed(second)
    v = jr.normal(jr.key(2), theta.shape)
    if name == "Projected":
        v = factored.solve(v)  # within its span
    added = factored.matvec(v) + first(v) + second(v)
    np.testing.assert_allclose(both.matvec(v), added, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(both.solve(added), v, rtol=1e-6, atol=1e-9)


def test_an_inverse_that_takes_no_share_away_has_no_newton_steps():
    _, risk, model, _ = problem("network")
    hessian = ix.Hessian(damping=LAMBDA)
    held = lambda product, theta: Held(jnp.linalg.inv(jax.vmap(product)(jnp.eye(theta.size))))
    with pytest.raises(ValueError, match=r"Solved does not say .* or Held, by which it solves"):
        ix.removal(ix.influence(risk, model, Solved(hessian, held)), "newton")


@pytest.mark.parametrize("curvature", ["Hessian", "GaussNewton", "CG"])
def test_self_influence_is_the_diagonal_and_never_positive(curvature):
    _, risk, _, _ = problem("network")
    f = handle("network", curvature)
    own = ix.self_influence(f)
    np.testing.assert_allclose(own, jnp.diagonal(f(risk.data)), rtol=1e-7)
    assert np.all(own <= 0)
    transformed = ix.removal(ix.classification(f, "margin"), "first-order")
    assert np.array_equal(ix.self_influence(transformed), own)


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_permuting_the_data_permutes_the_scores(seed):
    _, risk, model, queries = problem("softmax")
    order = np.random.default_rng(seed).permutation(risk.n)
    shuffled = ix.EmpiricalRisk(
        jtu.tree_map(lambda x: x[order], risk.data),
        risk.loss,
        l2=risk.l2,
        weights=risk.weights[order],
    )
    a = ix.influence(risk, model)(queries)[:, order]
    b = ix.influence(shuffled, model)(queries)
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("measurement", ["loss", "probability", "custom vector"])
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
def test_nothing_depends_on_chunk_size(chunk_size, measurement):
    _, risk, model, queries = problem("network")
    rewrite = MEASUREMENTS[measurement]
    whole = rewrite(ix.influence(risk, model, ix.GaussNewton()))
    parts = rewrite(ix.influence(risk, model, ix.GaussNewton(), chunk_size=chunk_size))
    np.testing.assert_allclose(parts(queries), whole(queries), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(
        ix.self_influence(parts), ix.self_influence(whole), rtol=1e-10, atol=1e-13
    )
    tops = ix.top_k(whole, queries, 4, chunk_size=chunk_size)
    np.testing.assert_allclose(
        tops.highest.values,
        -np.sort(-np.asarray(whole(queries)), axis=-1)[..., :4],
        rtol=1e-10,
        atol=1e-13,
    )


def everything(risk, model, queries) -> list:
    """What every verb answers that works through training points or queries in blocks."""
    dense, rows = ix.influence(risk, model), ix.influence(risk, model, ix.CG(ix.Hessian()))
    answers = [ix.memorization(dense), ix.value(dense, queries), ix.self_influence(rows)]
    weights = jnp.where(risk.weights > 0, risk.weights, 0.7)
    removable = ix.influence(risk.with_weights(weights), model)
    answers += [
        ix.memorization(rows, refine=1), ix.value(removable, queries, "newton", refine=1),
    ]  # fmt: skip
    for f in (dense, rows):
        answers += [
            ix.removal(ix.classification(f), "newton")(queries),
            ix.relative(f, ix.Reference(1))(queries),
            ix.certify(f, tier=1, refine=1),
            ix.certify(f, queries, tier=2),
        ]
    answers.append(ix.restriction_bound(rows, lambda m: m.bias, queries, steps=4))
    return answers


def test_nothing_depends_on_the_memory_that_may_be_used(monkeypatch):
    _, risk, model, queries = problem("softmax")
    expected = jtu.tree_leaves(everything(risk, model, queries))
    jax.clear_caches()  # budgets are read while a program is traced
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", 8 * 40)
    monkeypatch.setattr("influx._certify.certificate._CACHE_BYTES", 8 * 40)
    try:
        got = jtu.tree_leaves(everything(risk, model, queries))
    finally:
        jax.clear_caches()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("effect", [None, "first-order", "newton"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_top_k_is_a_sort_of_all_scores(measurement, effect):
    queries = problem("softmax")[3]
    f = MEASUREMENTS[measurement](handle("softmax"))
    f = f if effect is None else ix.removal(f, effect)
    scores = np.asarray(f(queries))
    tops = ix.top_k(f, queries, 3, chunk_size=4)
    for extreme, sign in ((tops.highest, -1), (tops.lowest, 1)):
        order = np.argsort(sign * scores, axis=-1, kind="stable")[..., :3]
        np.testing.assert_allclose(
            extreme.values, np.take_along_axis(scores, order, -1), rtol=1e-9, atol=1e-13
        )
        assert extreme.indices.shape == (*scores.shape[:-1], 3)
        picked = np.take_along_axis(scores, np.asarray(extreme.indices), -1)
        np.testing.assert_allclose(extreme.values, picked, rtol=1e-9, atol=1e-13)


def zero_gradient_problem():
    """Least squares with targets that two points meet exactly: their gradient is 0."""
    _, risk, model, queries = problem("squared")
    x, y = risk.data
    y = y.at[:2].set(jax.vmap(model)(x)[:2])
    return ix.EmpiricalRisk((x, y), risk.loss, l2=risk.l2), model, queries


@pytest.mark.parametrize("kind", ["loss", "parameters", "self", "cosine"])
def test_undefined_relative_influence_is_reported_never_a_number(kind):
    risk, model, queries = zero_gradient_problem()
    f = ix.relative(ix.influence(risk, model), kind)
    scores = np.asarray(f(queries))
    assert np.isnan(scores[:, :2]).all()
    assert np.isfinite(scores[:, 2:]).all()
    assert np.flatnonzero(f.undefined).tolist() == [0, 1]
    tops = ix.top_k(f, queries, risk.n)
    assert np.isfinite(tops.highest.values[:, :-2]).all()
    assert np.isnan(tops.highest.values[:, -2:]).all()
    assert np.all(np.asarray(tops.lowest.indices[:, -2:]) == -1)
    rows = np.asarray(ix.relative(ix.influence(risk, model), ix.Reference(0))(queries))
    assert np.isnan(rows).all()


def test_repeated_calls_are_equal_and_compile_once():
    _, risk, model, queries = problem("softmax")
    traces = []

    def counted(model, query):
        traces.append(None)
        return jnp.sum(model(query[0]))

    f = ix.measure(ix.influence(risk, model), counted)
    first = f(queries)
    count = len(traces)
    assert count > 0
    f(queries)
    moved = ix.measure(ix.influence(risk.with_weights(risk.weights * 2), model), counted)
    moved(jtu.tree_map(lambda x: x + 1, queries))
    assert len(traces) - count == 2  # a call asks for the measurement's shape; nothing is compiled
    assert np.array_equal(f(queries), first)


def penalised(risk, l2: float):
    return ix.EmpiricalRisk(risk.data, risk.loss, l2=l2, weights=risk.weights)


def _layer(number: int):
    return lambda model: model.layers[number]  # a new function each time


# A problem in another setting of the same shapes: the setting s is 1, then 2.
SETTINGS = {
    "damping": lambda r, m, q, s: ix.influence(r, m, ix.Hessian(damping=0.1 * s))(q),
    "damping of an iterative one": lambda r, m, q, s: ix.influence(
        r, m, ix.CG(ix.GaussNewton(damping=0.1 * s))
    )(q),
    "l2": lambda r, m, q, s: ix.influence(penalised(r, 0.1 * s), m)(q),
    "class": lambda r, m, q, s: ix.classification(ix.influence(r, m), class_=s)(q),
    "reference": lambda r, m, q, s: ix.relative(ix.influence(r, m), ix.Reference(s))(q),
    "part": lambda r, m, q, s: ix.influence(*ix.restrict(r, m, _layer(-1)), ix.GaussNewton())(q),
    "bound": lambda r, m, q, s: ix.restriction_bound(
        ix.influence(r, m, ix.CG(ix.GaussNewton(damping=0.1 * s))), _layer(-1), q
    ),
    "diagnosis": lambda r, m, q, s: ix.diagnose(ix.influence(r, m, ix.Hessian(damping=0.1 * s))),
    "layers": lambda r, m, q, s: ix.influence(r, m, ix.BlockDiagonal())(q),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_of_equal_shapes_compiles_nothing(name):
    _, risk, model, queries = problem(
        "network" if name in ("part", "bound", "layers") else "softmax"
    )
    risk = penalised(risk, 0.3)
    compiled = []
    count = lambda event, duration, **_: (
        compiled.append(event) if "backend_compile" in event else None
    )
    SETTINGS[name](risk, model, queries, 1)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        SETTINGS[name](risk, model, queries, 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


def test_an_influence_passes_through_jit_vmap_and_grad():
    _, _, _, queries = problem("softmax")
    f = handle("softmax")
    eager = f(queries)
    np.testing.assert_allclose(eqx.filter_jit(lambda g, q: g(q))(f, queries), eager, rtol=1e-12)
    single = jtu.tree_map(lambda x: x[:, None], queries)
    mapped = jax.vmap(lambda q: f(q))(single)[:, 0]
    np.testing.assert_allclose(mapped, eager, rtol=1e-10, atol=1e-13)

    def of_inputs(x):
        return jnp.sum(f((x, queries[1]))[:, 4])

    slope = jax.grad(of_inputs)(queries[0])
    step = 1e-6 * jr.normal(jr.key(0), slope.shape)
    central = (of_inputs(queries[0] + step) - of_inputs(queries[0] - step)) / 2
    np.testing.assert_allclose(jnp.vdot(slope, step), central, rtol=1e-5)


def test_influence_itself_may_be_traced():
    """Weights may be traced: the derivative of a score with respect to data weights exists."""
    _, risk, model, queries = problem("softmax")

    @jax.jit
    def score(weights):
        moved = ix.EmpiricalRisk(risk.data, risk.loss, l2=risk.l2, weights=weights)
        return ix.influence(moved, model)(queries)[0, 1]

    np.testing.assert_allclose(score(risk.weights), handle_plain(risk, model, queries), rtol=1e-9)
    slope = jax.grad(score)(risk.weights)
    e = jnp.zeros(risk.n).at[5].set(1e-5)
    central = (score(risk.weights + e) - score(risk.weights - e)) / 2e-5
    np.testing.assert_allclose(slope[5], central, rtol=1e-5)


def handle_plain(risk, model, queries):
    return ix.influence(risk, model)(queries)[0, 1]


@pytest.mark.parametrize("name", ["network", "squared network"])
def test_restriction_is_influence_with_the_rest_frozen(name):
    p, risk, model, queries = problem(name)
    small, part = ix.restrict(risk, model, lambda m: m.layers[-1])
    f = ix.influence(small, part, ix.Hessian(damping=LAMBDA))
    kept = np.arange(p.theta.size) >= sum(p.family.leaves[:2])
    H = oracle.hessian(p, p.theta)[np.ix_(kept, kept)] + LAMBDA * np.eye(kept.sum())
    g = oracle.gradients(p, p.theta)[:, kept]
    m = oracle.measurement_gradient(p)[:, kept]
    np.testing.assert_allclose(f(queries), -m @ np.linalg.solve(H, g.T), rtol=1e-8, atol=1e-10)
    seen = ix.measure(f, lambda whole, x: jnp.sum(whole.layers[0](x)))(queries[0])
    assert np.all(np.asarray(seen) == 0)  # measurements see the whole model; this part is frozen


def test_data_of_weight_zero_do_not_count():
    p = draw(FAMILIES["softmax"], 3, 0.0, True)
    risk, model, q = risk_of(p), model_at(p.family, p.theta), queries(p)
    kept = np.flatnonzero(p.w > 0)
    fewer = ix.EmpiricalRisk(
        jtu.tree_map(lambda x: x[kept], risk.data),
        risk.loss,
        l2=jtu.tree_map(lambda v: v * p.n / kept.size, risk.l2),
        weights=p.w[kept],
    )
    a = ix.removal(ix.influence(risk, model))(q)
    b = ix.removal(ix.influence(fewer, model))(q)
    np.testing.assert_allclose(a[:, kept], b, rtol=1e-8, atol=1e-11)
    assert np.all(np.asarray(a)[:, p.w == 0] == 0)
