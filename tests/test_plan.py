"""What `plan` says is what the engine does, and memory is kept to."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx import _influence as influence
from influx._chunks import BYTE_BUDGET, Limits, even_length
from influx._cost import Cost, Parts, cost_of
from influx._engine import choose, gradients, layered
from influx._engine.schedule import Alternative, Piece
from influx._influence import _scores
from tests import helpers


@functools.cache
def wide_problem(n: int = 300, m: int = 60, seed: int = 0):
    """A network large enough that gradients, not the program's constants, are what memory holds."""
    a, b, c = jr.split(jr.key(seed), 3)
    model = eqx.nn.MLP(40, 4, 64, 2, activation=jax.nn.relu, key=a)
    X = jr.normal(b, (n + m, 40)) * jnp.geomspace(1, 0.05, 40)[None]
    y = jr.randint(c, (n + m,), 0, 4)
    risk = ix.EmpiricalRisk((X[:n], y[:n]), ix.SoftmaxCrossEntropy(), l2=1e-3)
    return risk, model, (X[n:], y[n:])


def take(queries, m: int):
    return tuple(x[:m] for x in queries)


CURVATURES = {
    "EKFAC": ix.EKFAC(damping=1e-2),
    "EKFAC, terms": ix.EKFAC(damping=1e-2, tolerance=0.3),
    "Identity": ix.Identity(),
    "CG": ix.CG(ix.GaussNewton(damping=0.5), rtol=1e-12),
}


@functools.cache
def handle(name: str, **limits) -> ix.Influence:
    risk, model, _ = wide_problem()
    return ix.influence(risk, model, CURVATURES[name], **limits)


def loops(f: ix.Influence, queries) -> set[tuple[int, ...]]:
    """The lengths of the nested loops that `f(queries)` is compiled to."""
    found = set()

    def walk(jaxpr, outer):
        for eqn in jaxpr.eqns:
            inside = (*outer, eqn.params["length"]) if eqn.primitive.name == "scan" else outer
            found.add(inside)
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    walk(inner, inside)

    arrays, static = eqx.partition(f, eqx.is_array)
    run = lambda arrays, q: _scores(eqx.combine(arrays, static), q)
    walk(jax.make_jaxpr(run)(arrays, queries).jaxpr, ())
    return found


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_the_engine_does_what_the_plan_says(name, rows, chunk_size, monkeypatch):
    f = ix.influence(*wide_problem()[:2], CURVATURES[name], chunk_size=chunk_size, memory=4 * 10**6)
    queries = take(wide_problem()[2], rows)
    planned = ix.plan(f, queries)
    done = set()
    for cls in (layered.Terms, layered.Coordinates, layered.Factors, layered.Gradients):
        products = cls.products

        def spied(self, block, rows, products=products, cls=cls):
            done.add((cls.__name__, block.layer.paths))
            return products(self, block, rows)

        monkeypatch.setattr(cls, "products", spied)
    whole = gradients.forward_columns

    def forward(*parts):
        done.add("forward")
        return whole(*parts)

    for module in (gradients, layered):
        monkeypatch.setattr(module, "forward_columns", forward)
    schedule = influence.scheduled

    def scheduled(*parts):
        answer = schedule(*parts)
        done.clear()  # the cost of every way has been read by tracing it
        return answer

    monkeypatch.setattr(influence, "scheduled", scheduled)
    counts = loops(f, queries)
    said = set()
    for row in planned.rows:
        if "rank one" in row.way:
            said.add(("Terms", row.parameters))
        elif "coordinates" in row.way:
            said.add(("Coordinates", row.parameters))
        elif "by factors" in row.way:
            said.add(("Factors", row.parameters))
        elif "by gradients" in row.way:
            said.add(("Gradients", row.parameters))
        elif row.way == "forward mode":
            said.add("forward")
    assert done == said
    (m, n), q, b = planned.shape, planned.queries, planned.training_points
    expected = tuple(-(-total // size) for total, size in ((m, q), (n, b)) if size < total)
    assert any(lengths[: len(expected)] == expected for lengths in counts), (expected, counts)
    assert chunk_size is None or b == even_length(n, chunk_size)


def temporaries(f: ix.Influence, queries) -> int:
    """Bytes that the compiled program takes beside its arguments and its answer."""
    arrays, static = eqx.partition(f, eqx.is_array)
    run = jax.jit(lambda arrays, q: _scores(eqx.combine(arrays, static), q))
    memory = run.lower(arrays, queries).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("name", CURVATURES)
def test_a_memory_limit_is_kept_and_changes_no_score(name):
    risk, model, queries = wide_problem()
    whole = handle(name)(queries)
    limit = 10**6 if name == "EKFAC, terms" else 2 * 10**6  # below what each takes without one
    f = ix.influence(risk, model, CURVATURES[name], memory=limit)
    planned = ix.plan(f, queries)
    assert planned.queries < 60 or planned.training_points < 300
    assert planned.peak_bytes <= limit
    # The chunks' answers stand beside the temporaries before they become the scores.
    assert temporaries(f, queries) <= limit + planned.score_bytes
    np.testing.assert_allclose(f(queries), whole, rtol=1e-9, atol=1e-12 * float(abs(whole).max()))
    assert temporaries(handle(name), queries) > temporaries(f, queries)


@settings(max_examples=6)
@given(
    chunk_size=st.sampled_from([None, 7, 50]),
    memory=st.sampled_from([None, 10**7, 10**9]),
    name=st.sampled_from(["EKFAC", "EKFAC, terms", "Identity"]),
    rows=st.sampled_from([1, 60]),
)
def test_scores_depend_neither_on_limits_nor_on_the_other_queries(chunk_size, memory, name, rows):
    risk, model, queries = wide_problem()
    want = handle(name)(queries)[:rows]
    f = ix.influence(risk, model, CURVATURES[name], chunk_size=chunk_size, memory=memory)
    got = f(take(queries, rows))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * float(abs(want).max()))


def test_few_queries_take_forward_mode_and_many_do_not():
    _, _, queries = wide_problem()
    for name in ("Identity", "CG"):
        ways = [{row.way for row in ix.plan(handle(name), take(queries, m)).rows} for m in (1, 60)]
        assert "forward mode" in ways[0]
        assert "per-example gradients" in ways[1]
    terms = ix.plan(handle("EKFAC, terms"), queries)
    assert any(re.fullmatch(r"rank one, \d+ terms", row.way) for row in terms.rows)


@pytest.mark.parametrize("name", helpers.CURVATURES)
def test_every_curvature_has_a_plan(name):
    _, _, _, queries = helpers.problem("network")
    f = helpers.handle("network", name)
    table = ix.plan(f, queries)
    step = any("per step" in row.way for row in table.rows)
    assert step == (name in ("CG", "CG preconditioned", "MINRES", "Neumann"))
    assert table.flops > 0
    assert str(table).count("\n") == len(table.rows) + 2


def test_transforms_have_plans():
    _, _, _, queries = helpers.problem("softmax")
    f = helpers.handle("softmax")
    plain = ix.plan(f, queries)
    assert ix.plan(ix.relative(f, "cosine"), queries).rows == plain.rows
    assert ix.plan(ix.removal(f), queries).rows == plain.rows
    assert ix.plan(ix.groups(f, jnp.ones((2, f.risk.n))), queries).score_bytes < plain.score_bytes
    vector = ix.plan(ix.classification(f, "probability"), queries)
    assert vector.score_bytes == 3 * plain.score_bytes
    assert vector.flops > plain.flops
    newton = ix.plan(ix.removal(f, "newton"), queries)
    assert "Newton step" in newton.rows[0].way


def test_a_cost_is_that_of_the_program():
    A, B = jnp.ones((6, 5)), jnp.ones((5, 4))

    def score(query, point):
        return jnp.sum((A @ query) * (A @ point)) + jnp.sum(jnp.sin(B))

    cost = cost_of(score, jnp.ones(5), jnp.ones(5))
    assert cost.flops.query == cost.flops.point == 2 * 6 * 5
    assert cost.flops.pair == 6 + 6 + 1  # the product, its sum, and what is added to it
    assert cost.flops.fixed == 2 * 20
    assert cost.moved.query == 2 * 6 * 8
    repeated = lambda q, z: jax.lax.scan(lambda c, _: (c + A.T @ (A @ q), None), q, None, 7)[0]
    assert cost_of(repeated, jnp.ones(5), jnp.ones(5)).flops.query == 7 * (4 * 6 * 5 + 5)
    kernel = jnp.ones((3, 2, 3, 3))
    image = jnp.ones((2, 8, 8))
    conv = lambda q, _: jax.lax.conv(q[None], kernel, (1, 1), "VALID")
    assert cost_of(conv, image, None).flops.query == 2 * (3 * 6 * 6) * 2 * 3 * 3


def test_a_factor_that_a_solve_only_reads_is_no_temporary():
    """Else a matrix beyond the byte budget would leave room for one training point at a time."""
    risk, _, _ = wide_problem(n=20)
    model = eqx.nn.MLP(40, 4, 16, 1, key=jr.key(0))
    f = ix.influence(risk, model, ix.GaussNewton(damping=0.1))
    size = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    index = jnp.zeros((), int)
    for work in (f.response.displace, lambda i: f.response.solve(jnp.full((1, size), i[0], float))):
        assert cost_of(lambda _, i, work=work: work(i[None]), index, index).live.fixed < 8 * size**2


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "1GB"])
def test_a_memory_limit_is_a_number_of_bytes(bad):
    risk, model, _ = wide_problem()
    with pytest.raises(ValueError, match=r"`memory` must be a whole number.*memory=10\*\*9"):
        ix.influence(risk, model, ix.Identity(), memory=bad)


def test_a_limit_that_holds_nothing_is_refused_with_the_one_that_does():
    risk, model, queries = wide_problem()
    f = ix.influence(risk, model, ix.Identity(), memory=1000)
    with pytest.raises(ValueError, match="do not hold one query's share") as refused:
        f(queries)
    enough = int(re.search(r"memory=(\d+)\)", str(refused.value))[1])
    assert np.isfinite(ix.influence(risk, model, ix.Identity(), memory=enough)(queries)).all()


def test_one_query_takes_all_points_at_once_where_they_fit():
    """Forward mode is little work a point; in smaller chunks it is the same."""
    risk, model, queries = wide_problem()
    many = jax.tree_util.tree_map(lambda x: jnp.tile(x, (4,) + (1,) * (x.ndim - 1)), risk.data)
    many = ix.EmpiricalRisk(many, risk.loss, l2=1e-3)
    query = take(queries, 1)
    scores = []
    for memory, points in ((None, [1200]), (2_000_000, range(1, 513))):
        f = ix.influence(many, model, ix.EKFAC(damping=1e-2), memory=memory)
        planned = ix.plan(f, query)
        assert planned.training_points in points
        assert "forward mode" in str(planned)
        scores.append(f(query))
    np.testing.assert_allclose(*scores, rtol=1e-8, atol=1e-12)


def test_a_chunk_beyond_the_byte_budget_does_not_take_queries_one_by_one(monkeypatch):
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", 2**19)
    risk, model, queries = wide_problem()
    plan = ix.plan(ix.influence(risk, model, ix.EKFAC(damping=1e-2), chunk_size=300), queries)
    assert plan.peak_bytes > 2**19
    assert plan.queries > 1


def test_self_influence_is_refused_where_memory_holds_no_point():
    f = ix.influence(*wide_problem()[:2], CURVATURES["EKFAC"], memory=100)
    with pytest.raises(ValueError, match="do not hold one training point's share") as refused:
        ix.self_influence(f)
    enough = int(re.search(r"memory=(\d+)\)", str(refused.value))[1])
    for limits in ({"memory": enough}, {"chunk_size": 7}):
        g = ix.influence(*wide_problem()[:2], CURVATURES["EKFAC"], **limits)
        np.testing.assert_allclose(
            ix.self_influence(g), ix.self_influence(handle("EKFAC")), rtol=1e-9
        )


@jax.custom_vjp
def kernel(weight, x):
    return weight @ x


kernel.defvjp(lambda w, x: (w @ x, (w, x)), lambda s, g: (jnp.outer(g, s[1]), s[0].T @ g))


class Custom(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return kernel(self.weight, x)


@pytest.mark.parametrize(
    "curvature", [ix.GaussNewton(damping=0.1), ix.EKFAC(damping=0.1)], ids=["dense", "layers"]
)
def test_a_model_without_a_forward_derivative_is_scored_without_forward_mode(curvature):
    X, y = jr.normal(jr.key(0), (20, 5)), jr.randint(jr.key(1), (20,), 0, 3)
    risk, weight = ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy()), jr.normal(jr.key(2), (3, 5))
    queries = (X[:1], y[:1])
    f = ix.influence(risk, Custom(weight), curvature)
    assert "forward mode" not in str(ix.plan(f, queries))
    plain = eqx.nn.Linear(5, 3, use_bias=False, key=jr.key(3))
    plain = eqx.tree_at(lambda m: m.weight, plain, weight)
    want = -ix.influence(risk, plain, ix.GaussNewton(damping=0.1))(queries)
    if isinstance(curvature, ix.EKFAC):  # exact blocks: the whole of a small matrix
        assert set(ix.coverage(f).share) == {"exact"}
    np.testing.assert_allclose(-f(queries), want, rtol=1e-8, atol=1e-12)


# Bytes: next to nothing, some, and more than the budget for one.
BYTES = st.sampled_from([0.0, 8.0, 1e3, 1e6, 3e8])


@settings(max_examples=300)
@given(
    live=st.builds(Parts, BYTES, BYTES, BYTES, BYTES),
    passing=st.sampled_from([0.0, 0.5, 1.0]),
    m=st.sampled_from([1, 2, 7, 1000]),
    n=st.sampled_from([1, 300, 4000]),
    chunk_size=st.sampled_from([1, 100, 10**6]),
)
def test_a_chunk_takes_at_most_twice_what_it_takes_with_one_query(live, passing, m, n, chunk_size):
    """Unless the byte budget is more."""
    piece = Piece(("all",), "a way", Cost(live=live), passing=passing * live.query)
    way = Alternative(lambda ways, points: None, (piece,))
    chosen = lambda m: choose((way,), Limits(chunk_size), m, n, 0, np.float32)
    many, one = chosen(m), chosen(1)
    assert many.points == one.points == even_length(n, chunk_size)
    assert many.peak <= max(BYTE_BUDGET, 2 * one.peak)


@settings(max_examples=300)
@given(
    fixed=st.sampled_from([0.0, 1e6, 1e8]),
    held=BYTES,
    passing=st.sampled_from([8.0, 1e5, 7e6]),
    m=st.sampled_from([1, 7, 1000]),
)
def test_all_queries_are_taken_at_once_where_they_fit_one_made_ready_at_a_time(
    fixed, held, passing, m
):
    cost = Cost(flops=Parts(point=1e9), live=Parts(fixed, held + passing, 8.0, 8.0))
    way = Alternative(lambda ways, points: None, (Piece(("all",), "a way", cost, held, passing),))
    found = choose((way,), Limits(), m, 300, 0, np.float32)
    if fixed + m * held + max(passing, 8.0 * (1 + m)) <= BYTE_BUDGET:
        assert found.queries == m
        assert found.peak <= BYTE_BUDGET
