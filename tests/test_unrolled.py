"""`Unrolled`: the derivative of the run that was made, and what it combines with."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import influx as ix
from influx._diagnose.run import _changes, _erasure
from influx._response.reverse import pull
from tests.helpers import MEASUREMENTS

N, D, C = 23, 3, 3
KEY = jr.key(7)


def problem(seed: int = 0):
    """A small network before its training, with uneven weights and batches that n does not fill."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N + 6, D))
    y = np.argmax(x @ rng.normal(size=(D, C)) + rng.gumbel(size=(N + 6, C)), axis=1)
    w = rng.choice([0.5, 1.0, 2.0], N)
    w[rng.integers(N)] = 0.0
    risk = ix.EmpiricalRisk((x[:N], y[:N]), ix.SoftmaxCrossEntropy(), l2=1e-2, weights=w)
    model = eqx.nn.MLP(D, C, 4, 1, activation=jnp.tanh, key=jr.key(seed))
    return risk, model, (jnp.asarray(x[N:]), jnp.asarray(y[N:]))


OPTIMISERS = {
    "plain": optax.sgd(0.2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05),
    "weight decay": optax.adamw(0.05, weight_decay=0.1),
    # Exact in float32, in which optax computes schedules: two programs may round others apart.
    "schedule": optax.sgd(optax.linear_schedule(0.375, 0.0, 16), momentum=0.5),
    "clipped": optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(0.3)),
}
TRAINERS = {
    name: ix.SGD(optimiser, batch_size=5, epochs=3, key=KEY)
    for name, optimiser in OPTIMISERS.items()
}
MOMENTUM = TRAINERS["momentum"]


@functools.cache
def handle(name: str = "momentum") -> ix.Influence:
    risk, model, _ = problem()
    return ix.influence(risk, model, ix.Unrolled(TRAINERS[name]))


def end(trainer, risk, model, weights):
    return trainer.train(trainer.init(risk, model, weights), risk, model, weights)[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_it_is_the_derivative_of_the_run(name):
    risk, model, queries = problem()
    trainer, f = TRAINERS[name], handle(name)
    losses = lambda w: risk.losses(end(trainer, risk, model, w), queries)
    expected = N * jax.jit(jax.jacrev(losses))(risk.weights)
    np.testing.assert_allclose(f(queries), expected, rtol=1e-10, atol=1e-13)
    for got, want in zip(jtu.tree_leaves(f.model), jtu.tree_leaves(ix.fit(risk, model, trainer))):
        if eqx.is_inexact_array(got):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("batch_size", "epochs"), [(N, 1), (7, 1), (2, 3)])
def test_segments_of_any_length_make_one_run(batch_size, epochs):
    risk, model, queries = problem(1)
    trainer = ix.SGD(OPTIMISERS["momentum"], batch_size=batch_size, epochs=epochs, key=KEY)
    f = ix.influence(risk, model, ix.Unrolled(trainer))
    losses = lambda w: risk.losses(end(trainer, risk, model, w), queries)
    expected = N * jax.jit(jax.jacrev(losses))(risk.weights)
    np.testing.assert_allclose(f(queries), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_it_is_what_retraining_with_moved_weights_finds(name):
    """P1 for a run: n (m(w + δeᵢ) − m(w − δeᵢ))/2δ, and a point of weight 0 taken in."""
    risk, model, queries = problem()
    trainer, delta = TRAINERS[name], 1e-4
    chosen = [0, int(np.argmin(risk.weights)), 9]
    unit = np.eye(N)[chosen] * delta
    trained = lambda w: risk.losses(ix.fit(risk.with_weights(w), model, trainer), queries)
    inward = np.maximum(np.asarray(risk.weights)[None] - unit, 0)
    steps = np.asarray(risk.weights)[None] + unit
    width = (steps - inward).sum(axis=1)
    slopes = [(trained(a) - trained(b)) / h for a, b, h in zip(steps, inward, width)]
    got = handle(name)(queries)[:, chosen].T
    np.testing.assert_allclose(got, N * np.stack(slopes), rtol=1e-3, atol=1e-6)


def test_removal_foresees_a_repeated_run():
    risk, model, queries = problem()
    outcome = lambda m: risk.losses(m, queries)
    masks = 1 - np.eye(N)
    after = ix.leave_subset_out(risk, model, MOMENTUM, masks=masks, outcome=outcome)
    change = np.asarray(after) - np.asarray(outcome(handle().model))[None]
    predicted = np.asarray(ix.removal(handle())(queries)).T
    assert np.corrcoef(predicted.ravel(), change.ravel())[0, 1] > 0.98
    assert np.polyfit(predicted.ravel(), change.ravel(), 1)[0] == pytest.approx(1, abs=0.15)


def test_it_tends_to_the_implicit_response():
    """P14, at a minimum that the run reaches: a tenth of the error for a few epochs more."""
    risk, _, queries = problem()
    start = eqx.nn.Linear(D, C, key=jr.key(1))
    risk = ix.EmpiricalRisk(risk.data, risk.loss, l2=0.1, weights=risk.weights)
    implicit = ix.influence(risk, ix.fit(risk, start, ix.Newton()))(queries)
    errors = []
    for epochs in (40, 80, 160):
        trainer = ix.SGD(optax.sgd(1.0), batch_size=N, epochs=epochs, key=KEY)
        got = ix.influence(risk, start, ix.Unrolled(trainer))(queries)
        errors.append(float(jnp.max(jnp.abs(got - implicit)) / jnp.max(jnp.abs(implicit))))
    assert errors[0] > errors[1] > 10 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("measurement", ["loss", "margin", "custom vector"])
def test_transforms_mean_what_they_mean_elsewhere(measurement):
    risk, _, queries = problem()
    rewrite = MEASUREMENTS[measurement]
    f = rewrite(handle())
    plain = np.asarray(f(queries))
    assert plain.shape == (6, *((2,) if measurement == "custom vector" else ()), N)
    masks = np.random.default_rng(0).random((4, N)) < 0.4
    np.testing.assert_allclose(ix.groups(f, masks)(queries), plain @ masks.T, rtol=1e-9, atol=1e-12)
    removal = rewrite(ix.removal(handle()))(queries)
    np.testing.assert_allclose(removal, -np.asarray(risk.weights) / N * plain, rtol=1e-12)
    assert np.array_equal(removal, ix.removal(f)(queries))
    reference = ix.Reference([3, 5])
    expected = plain / plain[..., [3, 5]].sum(axis=-1, keepdims=True)
    one, other = rewrite(ix.relative(handle(), reference)), ix.relative(f, reference)
    assert np.array_equal(one(queries), other(queries), equal_nan=True)
    np.testing.assert_allclose(other(queries), expected, rtol=1e-8)


@pytest.mark.parametrize("measurement", ["probability"])
def test_the_best_are_those_of_the_whole_matrix(measurement):
    _, _, queries = problem()
    f = MEASUREMENTS[measurement](handle())
    scores, found = np.asarray(f(queries)), ix.top_k(f, queries, 4, chunk_size=6)
    np.testing.assert_allclose(found.highest.values, -np.sort(-scores)[..., :4], rtol=1e-9)
    np.testing.assert_allclose(found.lowest.values, np.sort(scores)[..., :4], rtol=1e-9)


def test_values_are_means_over_the_held_out_data():
    _, _, queries = problem()
    scores, found = np.asarray(handle()(queries)), ix.value(handle(), queries)
    np.testing.assert_allclose(found.value, -scores.mean(axis=0), rtol=1e-9, atol=1e-13)
    error = scores.std(axis=0, ddof=1) / np.sqrt(len(scores))
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_nothing_depends_on_chunk_size(chunk_size):
    risk, model, queries = problem()
    f = ix.influence(risk, model, ix.Unrolled(MOMENTUM), chunk_size=chunk_size)
    for rewrite in (MEASUREMENTS["loss"], MEASUREMENTS["custom vector"]):
        got, want = rewrite(f)(queries), rewrite(handle())(queries)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("chunk_size", "queries"), [(None, 6), (1, 1), (4, 3), (100, 6)])
def test_a_chunk_of_a_run_is_one_of_queries(chunk_size, queries):
    risk, model, held = problem()
    f = ix.influence(risk, model, ix.Unrolled(MOMENTUM), chunk_size=chunk_size)
    assert ix.plan(f, held).queries == queries


def test_a_restricted_run_moves_the_kept_parameters_only():
    risk, model, queries = problem()
    small, part = ix.restrict(risk, model, lambda m: m.layers[-1])
    f = ix.influence(small, part, ix.Unrolled(MOMENTUM))
    losses = lambda w: small.losses(end(MOMENTUM, small, part, w), queries)
    expected = N * jax.jit(jax.jacrev(losses))(risk.weights)
    np.testing.assert_allclose(f(queries), expected, rtol=1e-10, atol=1e-13)


def test_it_passes_through_jit_vmap_and_grad():
    _, _, queries = problem()
    f = handle()
    eager = f(queries)
    np.testing.assert_allclose(eqx.filter_jit(lambda g, q: g(q))(f, queries), eager, rtol=1e-12)
    single = jtu.tree_map(lambda x: x[:, None], queries)
    np.testing.assert_allclose(jax.vmap(f)(single)[:, 0], eager, rtol=1e-10, atol=1e-13)
    of_inputs = lambda x: jnp.sum(f((x, queries[1]))[:, 4])
    slope = jax.grad(of_inputs)(queries[0])
    step = 1e-6 * jr.normal(jr.key(0), slope.shape)
    central = (of_inputs(queries[0] + step) - of_inputs(queries[0] - step)) / 2
    np.testing.assert_allclose(jnp.vdot(slope, step), central, rtol=1e-5)


def test_an_influence_of_weights_that_are_traced():
    risk, model, queries = problem()
    again = jax.jit(
        lambda w: ix.influence(risk.with_weights(w), model, ix.Unrolled(MOMENTUM))(queries)
    )
    np.testing.assert_allclose(again(risk.weights), handle()(queries), rtol=1e-10, atol=1e-13)


def test_few_states_are_kept():
    """Of T steps, √T states stand in the response; queries go back in √T more."""
    risk, model, _ = problem()
    trainer = ix.SGD(OPTIMISERS["momentum"], batch_size=2, epochs=33, key=KEY)  # 363 steps
    response = ix.influence(risk, model, ix.Unrolled(trainer)).response
    assert all(x.shape[0] <= 20 for x in jtu.tree_leaves(response.states))
    row = jnp.ones_like(ravelled(response.model))
    parts = trainer, risk, response.model, response.states, response.batches
    text = str(jax.make_jaxpr(lambda row: pull(*parts, row))(row))
    assert not re.search(r"\[(2\d\d|3\d\d)", text)
    assert bool(jnp.all(jnp.isfinite(pull(*parts, row))))


def ravelled(model):
    return jax.flatten_util.ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0]


REFUSED = {
    "newton": (lambda f: ix.removal(f, "newton"), r'`removal\(f, "first-order"\)`.*leave_one_out'),
    "memorization": (
        lambda f: ix.memorization(f),
        r"`influence\(risk, f.model, GaussNewton\(\)\)`",
    ),
    "memorization first-order": (
        lambda f: ix.memorization(f, "first-order"),
        r"`influence\(risk, f.model, GaussNewton\(\)\)`",
    ),
    "certify": (lambda f: ix.certify(f), "influence"),
    "bound": (
        lambda f: ix.restriction_bound(f, lambda m: m.layers[-1], problem()[2]),
        r"`influence\(risk, f.model, Hessian\(\)\)`",
    ),
    "second-order groups": (
        lambda f: ix.groups(f, jnp.ones((1, N)), order=2),
        r"`groups\(f, masks\)`, the first order.*leave_subset_out.*f.model, GaussNewton\(\)",
    ),
    "subset": (
        lambda f: ix.most_influential_subset(f, problem()[2], 2),
        r"`influence\(risk, f.model, GaussNewton\(\)\)`",
    ),
    "coverage": (lambda f: ix.coverage(f), r"`influence\(risk, f.model, Hessian\(\)\)`"),
    "self": (lambda f: ix.self_influence(f), r"reverse run for each.*Reference"),
    **{
        kind: (lambda f, kind=kind: ix.relative(f, kind), r"`relative\(f, Reference\(i\)\)`")
        for kind in ("loss", "parameters", "self", "cosine")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_curvature_is_refused_with_the_alternative(name):
    call, remedy = REFUSED[name]
    with pytest.raises(ValueError, match=remedy):
        call(handle())


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (ix.Newton(), r"Newton ends at a minimum.*Hessian\(\).*SGD"),
        (ix.LBFGS(), r"LBFGS ends at a minimum.*Hessian\(\).*SGD"),
        (ix.SGD, r"Mind the parentheses"),
        (optax.sgd(0.1), r"goes into influx.SGD"),
    ],
)
def test_only_a_run_of_steps_unrolls(trainer, words):
    with pytest.raises(ValueError, match=words):
        ix.Unrolled(trainer)


def test_a_run_that_diverges_is_an_error():
    risk, _, _ = problem()
    wild = ix.SGD(optax.sgd(1e200), batch_size=5, epochs=3, key=KEY)
    squares = ix.EmpiricalRisk((risk.data[0], jnp.eye(C)[risk.data[1]]), ix.SquaredError())
    line = eqx.nn.Linear(D, C, key=jr.key(0))
    with pytest.raises(RuntimeError, match=r"nothing to differentiate.*smaller step"):
        ix.influence(squares, line, ix.Unrolled(wild))


def test_an_update_without_a_derivative_is_an_error():
    """Adam's √v where a gradient is always 0: of an input that is."""
    risk, model, (x, y) = problem()
    blank = ix.EmpiricalRisk((risk.data[0].at[:, 0].set(0), risk.data[1]), ix.SoftmaxCrossEntropy())
    for options, smooth in (({}, False), ({"eps_root": 1e-8}, True)):
        adam = ix.SGD(optax.adam(1e-2, **options), batch_size=5, epochs=2, key=KEY)
        f = ix.influence(blank, model, ix.Unrolled(adam))
        if smooth:
            assert np.isfinite(f((x, y))).all()
        else:
            with pytest.raises(RuntimeError, match="eps_root"):
                f((x, y))
            assert "eps_root" in ix.diagnose(f)["metasmoothness"].remedy


def test_diagnose_tells_a_smooth_run_from_a_rough_one():
    risk, _, _ = problem()
    smooth = ix.diagnose(handle())
    assert [x.name for x in smooth.findings] == ["finite", "metasmoothness"]
    assert smooth.verdict == "good"
    rough = eqx.nn.MLP(D, C, 16, 2, activation=jax.nn.relu, key=jr.key(0))
    trainer = ix.SGD(optax.sgd(0.8, momentum=0.9), batch_size=5, epochs=12, key=KEY)
    found = ix.diagnose(ix.influence(risk, rough, ix.Unrolled(trainer)))
    assert found.verdict == found["metasmoothness"].verdict == "bad"
    assert "smaller step, larger batches" in found["metasmoothness"].remedy


def test_the_diagnosis_of_a_line_by_squares_is_the_cosine_of_numpy():
    """Full-batch descent on squares, θ_{t+1} = θ_t − η(A(w)θ_t − b(w)), and its derivative, in NumPy."""
    rng = np.random.default_rng(3)
    x, y, w = rng.normal(size=(40, 2)), rng.normal(size=(40, 1)), np.ones(40)
    risk = ix.EmpiricalRisk((x, y), ix.SquaredError(), l2=0.1)
    line = eqx.nn.Linear(2, 1, use_bias=False, key=jr.key(0))
    trainer = ix.SGD(optax.sgd(0.3), batch_size=40, epochs=9, key=KEY)
    f = ix.influence(risk, line, ix.Unrolled(trainer))
    predicted, actual = _changes(f)

    def descend(w, v):
        theta, slope = np.asarray(line.weight)[0], np.zeros(2)
        for _ in range(9):
            residual = x @ theta - y[:, 0]
            curved = x.T @ (w[:, None] * x) / 40 + 0.1 * np.eye(2)
            slope = slope - 0.3 * (curved @ slope + x.T @ (v * residual) / 40)
            theta = theta - 0.3 * (x.T @ (w * residual) / 40 + 0.1 * theta)
        return theta, slope

    order = np.asarray(jr.permutation(jr.key(1), 40))
    for row in range(2):
        v = np.asarray(_erasure(jnp.asarray(w), jr.split(jr.key(0), 2)[row]))
        assert sorted(v) == [-1.0] * 2 + [0.0] * 38
        (before, slope), (after, _) = descend(w, v), descend(w + v, v)
        np.testing.assert_allclose(predicted[row], x[order] @ slope, rtol=1e-9)
        np.testing.assert_allclose(actual[row], x[order] @ (after - before), rtol=1e-9)
