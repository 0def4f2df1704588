"""`diagnose` names the cause, and `testing.check` breaks on a broken loss."""

import math
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize

import influx as ix
from influx._certify.affine import affine
from influx._certify.enclosure import gradient_rounding
from influx._gradients import risk_gradient
from influx._linalg import ravel
from influx._measurement import Margin
from influx.testing import BrokenLaw
from tests.helpers import alone, linear_model, problem


def culprit(f) -> set[str]:
    return {x.name for x in ix.diagnose(f).findings if x.verdict == "bad"}


def test_a_healthy_problem_has_no_bad_finding():
    _, risk, model, _ = problem("softmax")
    assert culprit(ix.influence(risk, model)) == set()


def test_an_untrained_model_is_named():
    _, risk, model, _ = problem("softmax")
    theta, rebuild = ravel(model)
    f = ix.influence(risk, rebuild(theta + 0.3), ix.GaussNewton())
    assert culprit(f) == {"stationarity"}
    assert "fit(" in ix.diagnose(f)["stationarity"].remedy


def test_a_dominating_damping_is_named():
    _, risk, model, _ = problem("softmax")
    assert culprit(ix.influence(risk, model, ix.Hessian(damping=1e4))) == {"effective dimension"}


def test_a_nearly_singular_curvature_is_named():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3))
    x = np.hstack([x, x[:, :1] + 1e-7 * rng.normal(size=(20, 1))])
    risk = ix.EmpiricalRisk((x, rng.normal(size=(20, 3))), ix.SquaredError(), l2=1e-13)
    model = ix.fit(risk, linear_model(), ix.Newton(tolerance=1e-8))
    assert "spectrum" in culprit(ix.influence(risk, model))


def test_a_solve_that_does_not_converge_is_named():
    _, risk, model, _ = problem("network")
    f = ix.influence(risk, model, ix.CG(ix.GaussNewton(), max_steps=2))
    assert "solve" in culprit(f)
    assert "max_steps" in ix.diagnose(f)["solve"].remedy


def test_an_infinite_gradient_is_named_with_its_example():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4))
    root = ix.CustomLoss(lambda o, y: jnp.sum(jnp.sqrt(jnp.abs(o - y))))
    model = linear_model()
    y = np.asarray(jax.vmap(model)(jnp.asarray(x))) + 1.0
    y[4] = np.asarray(model(jnp.asarray(x[4])))
    f = ix.influence(ix.EmpiricalRisk((x, y), root), model, ix.Identity())
    assert culprit(f) == {"finite"}
    assert "[4]" in ix.diagnose(f)["finite"].means


def test_check_holds_on_a_healthy_problem():
    rng = np.random.default_rng(0)
    data = rng.gamma(2.0, size=(12, 4)) - 1.5, rng.integers(0, 3, 12)
    risk = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=0.05)
    model = ix.fit(risk, linear_model(), ix.Newton())
    with jax.numpy_rank_promotion("allow"):
        assert ix.testing.check(risk, model, points=5).holds


@jax.custom_jvp
def steep(o, y):
    return 0.5 * jnp.sum((o - y) ** 2)


@steep.defjvp
def _(primals, tangents):
    (o, y), (do, _) = primals, tangents
    return steep(o, y), 1.1 * jnp.sum((o - y) * do)


def severed(o, y):
    """Half of the outputs get no gradient."""
    return 0.5 * jnp.sum((jnp.where(jnp.arange(3) < 2, o, jax.lax.stop_gradient(o)) - y) ** 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrong", [steep, severed])
def test_check_breaks_on_a_wrong_gradient(wrong, dtype):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(12, 4)).astype(dtype), rng.normal(size=(12, 3)).astype(dtype)
    model = jax.tree.map(lambda p: p.astype(dtype), linear_model(1))
    right = ix.EmpiricalRisk(data, ix.CustomLoss(lambda o, y: 0.5 * jnp.sum((o - y) ** 2)), l2=0.05)
    assert ix.testing.check(right, model, points=5).holds
    broken = ix.EmpiricalRisk(data, ix.CustomLoss(wrong), l2=0.05)
    with pytest.raises(BrokenLaw, match="BROKEN   gradient"):
        ix.testing.check(broken, model, points=5)


def test_certificates_contain_retraining_for_vector_measurements():
    _, risk, model, queries = problem("softmax")
    f = ix.classification(ix.influence(risk, model), "probability")
    watched = lambda m: jax.nn.softmax(jax.vmap(m)(queries[0]), axis=-1)
    after = ix.leave_one_out(risk, model, ix.Newton(tolerance=1e-12), outcome=watched)
    change = jnp.moveaxis(after - watched(model)[None], 0, -1)
    for tier in (1, 2):
        got = ix.certify(f, queries, tier=tier)
        assert got.lower.shape == change.shape
        assert bool(jnp.all((got.lower <= change + 1e-11) & (change <= got.upper + 1e-11)))


def awkward(name: str):
    """A risk and model at which an enclosure is easily lost: (risk, model)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4))
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.8)
    weights = rng.choice([0.0, 1.0, 5.0], 40)
    plain = ix.SoftmaxCrossEntropy()
    separable = (x[:, 0] > 0).astype(int) + (x[:, 0] > 0.8)
    outlier = np.where(np.arange(40)[:, None] == 3, 50 * x, x)
    risks = {
        "weights": ix.EmpiricalRisk((x, y), plain, l2=1e-2, weights=weights),
        "class weights": ix.EmpiricalRisk(
            (x, y), ix.SoftmaxCrossEntropy(class_weights=[0.2, 3.0, 1.0]), l2=1e-2, weights=weights
        ),
        "smoothing": ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(label_smoothing=0.3), l2=1e-2),
        "separable": ix.EmpiricalRisk((x, separable), plain, l2=1e-6),
        "outlier": ix.EmpiricalRisk((outlier, y), plain, l2=1e-2),
        "binary": ix.EmpiricalRisk(
            (x, (y > 0)[:, None].astype(int)), ix.BinaryCrossEntropy(), l2=1e-3, weights=weights
        ),
        "half trained": ix.EmpiricalRisk((x, y), plain, l2=1e-2),
        "damped": ix.EmpiricalRisk((x, y), plain, l2=1e-2),
    }
    outputs = 1 if name == "binary" else 3
    start = eqx.nn.Linear(4, outputs, key=jr.key(0))
    tolerance = 1e-3 if name == "half trained" else 1e-10
    return risks[name], ix.fit(risks[name], start, ix.Newton(tolerance=tolerance))


AWKWARD = "weights, class weights, smoothing, separable, outlier, binary, half trained, damped"


@pytest.mark.parametrize("name", AWKWARD.split(", "))
def test_certificates_contain_the_retrained_margins(name):
    risk, model = awkward(name)
    f = ix.influence(risk, model, ix.Hessian(damping=0.1 if name == "damped" else 0.0))

    def margins(whole):
        logits = jax.vmap(lambda x: risk.loss.class_logits(whole(x)))(risk.data[0])
        own = jnp.take_along_axis(logits, risk.data[1].reshape(-1, 1), axis=1)[:, 0]
        others = jnp.arange(logits.shape[1])[None] != risk.data[1].reshape(-1, 1)
        return own - jax.nn.logsumexp(logits, axis=1, where=others)

    trainer = ix.Newton(tolerance=1e-12)
    truth = jnp.diagonal(ix.leave_one_out(risk, model, trainer, outcome=margins))
    trained = margins(ix.fit(risk, model, trainer))
    # The truth itself is known up to ‖∇J₋ᵢ‖/μ, times the Lipschitz constant of a margin.
    lengths = jnp.sqrt(2 + 2 * jnp.sum(jnp.square(risk.data[0]), axis=1))
    slack = 1e-12 / float(jnp.min(risk.l2_vector(model))) * lengths
    total = float(risk.weights.sum())
    rest = [risk.with_weights(risk.weights.at[i].set(0)) for i in range(40)]
    grown = [r.with_weights(r.weights * (total / float(r.weights.sum()))) for r in rest]
    renormalised = jnp.stack([margins(ix.fit(r, model, trainer))[i] for i, r in enumerate(grown)])
    for tier, refine, renormalise in ((1, 0, False), (1, 1, False), (2, 0, False), (1, 1, True)):
        got = ix.certify(f, tier=tier, refine=refine, renormalise=renormalise)
        inside = renormalised if renormalise else truth
        assert bool(jnp.all((got.lower - slack <= inside) & (inside <= got.upper + slack)))
        label = jnp.where(trained <= 0, 2, (inside <= 0).astype(int))
        assert not bool(jnp.any(got.certified & (got.label != label)))


def test_the_renormalised_certificate_is_that_of_the_mean_over_the_rest():
    """It is narrow, and its middle is nearer by orders than the centred value and than erasing."""
    _, risk, model, queries = problem("softmax")
    f, n = ix.influence(risk, model), risk.n
    loss = lambda m: jnp.mean(risk.losses(m, queries))
    weights = risk.weights / jnp.mean(risk.weights)
    risk = risk.with_weights(weights)
    model = ix.fit(risk, model, ix.Newton(tolerance=1e-12))
    f = ix.influence(risk, model)
    truth = []
    for i in range(n):
        others = weights.at[i].set(0)
        rest = risk.with_weights(others * n / jnp.sum(others))
        truth.append(loss(ix.fit(rest, model, ix.Newton(tolerance=1e-12))) - loss(model))
    truth = jnp.stack(truth)
    errors = {}
    for refine in (0, 4):
        got = ix.certify(f, queries, mean=True, refine=refine, renormalise=True)
        assert bool(jnp.all((got.lower <= truth + 1e-11) & (truth <= got.upper + 1e-11)))
        errors[refine] = float(jnp.max(jnp.abs((got.lower + got.upper) / 2 - truth)))
    first = weights * ix.value(f, queries).value_centred / n
    erased = ix.certify(f, queries, mean=True, refine=4)
    erasing = float(jnp.max(jnp.abs((erased.lower + erased.upper) / 2 - truth)))
    assert errors[4] < 0.1 * errors[0] < 0.1 * min(float(jnp.max(jnp.abs(first - truth))), erasing)


def all_weighted():
    """A problem none of whose points weighs 0, and its minimum."""
    _, risk, model, queries = problem("softmax")
    risk = risk.with_weights(jnp.where(risk.weights > 0, risk.weights, 0.7))
    return risk, ix.fit(risk, model, ix.Newton(tolerance=1e-12)), queries


def without_each(risk, model, renormalise: bool = False) -> list:
    """The models of retraining without each point."""
    rest = [risk.weights.at[i].set(0) for i in range(risk.n)]
    grown = [w * jnp.sum(risk.weights) / jnp.sum(w) if renormalise else w for w in rest]
    return [ix.fit(risk.with_weights(w), model, ix.Newton(tolerance=1e-12)) for w in grown]


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_chord_steps_take_value_and_memorization_to_retraining(off):
    """At a minimum and near one, with weights, in both conventions."""
    risk, model, queries = all_weighted()
    theta, rebuild = ravel(model)
    f, n = ix.influence(risk, rebuild(theta + off), ix.Hessian(damping=0.01)), risk.n
    lost = lambda after: risk.losses(after, queries) - risk.losses(model, queries)
    erased = [without_each(risk, model, renormalise) for renormalise in (False, True)]
    changes = np.array([[lost(after) for after in models] for models in erased])
    truth = n / np.asarray(risk.weights)[None, :, None] * changes
    error = truth[0].std(axis=1, ddof=1) / np.sqrt(truth.shape[2])
    found = ix.value(f, queries, "newton", refine=30)
    np.testing.assert_allclose(found.value, truth[0].mean(axis=1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.value_centred, truth[1].mean(axis=1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-6)
    sure = np.abs(truth[0].mean(axis=1)) >= 2 * error
    assert ((np.asarray(found.verdict) == 2) == ~sure).all()
    predicted = ix.removal(f, "newton", refine=30)(queries)
    np.testing.assert_allclose(predicted, changes[0].T, rtol=1e-6, atol=1e-11)
    margin = Margin()
    own = lambda m, i: margin(risk, m, jax.tree.map(lambda x: x[i], risk.data))
    moved = [float(own(after, i) - own(model, i)) for i, after in enumerate(erased[0])]
    points = ix.memorization(f, refine=30)
    np.testing.assert_allclose(points.margin_without - points.margin, moved, rtol=1e-6, atol=1e-9)


def test_without_chord_steps_a_value_is_the_mean_of_newton_removals():
    risk, model, queries = all_weighted()
    f = ix.influence(risk, model)
    mean = jnp.mean(ix.removal(f, "newton")(queries), axis=0) * risk.n / risk.weights
    np.testing.assert_allclose(ix.value(f, queries, "newton").value, mean, rtol=1e-9)


def separable(dtype):
    """Three classes that a linear model tells apart without an error."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, 4))
    y = np.argmax(x[:, :3] + 0.5, axis=1)
    return jnp.asarray(x, dtype), jnp.asarray(y)


@pytest.mark.parametrize("refine", [1, 2, 3, 8, 50])
def test_chord_steps_that_diverge_are_refused(refine):
    """At a minimum too: where a little l2 holds what few points decide, the Hessian without one of them
    is another. Every number of steps sees it."""
    risk = ix.EmpiricalRisk(separable(float), ix.SoftmaxCrossEntropy(), l2=1e-6)
    f = ix.influence(risk, ix.fit(risk, linear_model(), ix.Newton()))
    for verb in (
        lambda: ix.value(f, risk.data, "newton", refine=refine),
        lambda: ix.memorization(f, refine=refine),
    ):
        with pytest.raises(RuntimeError, match=r"of 100 points \(\d.* diverge.*`leave_one_out"):
            verb()
    with pytest.raises(RuntimeError, match="one of the training points chord steps diverge"):
        jax.block_until_ready(ix.removal(f, "newton", refine=refine)(risk.data))
    assert np.isfinite(ix.value(f, risk.data, "newton").value).all()


def test_a_newton_step_may_rise_before_chord_steps_converge():
    """Only what chord steps do is judged: without point 0 the step before them leads further away."""
    x = jnp.array([4.873, 0.489, 0.0765, 1.705, 0.862, -15.569])[:, None]
    risk = ix.EmpiricalRisk((x, jnp.array([0, 1, 0, 0, 1, 1])), ix.BinaryCrossEntropy(), l2=0.0884)
    linear = eqx.nn.Linear(1, "scalar", use_bias=False, dtype=float, key=jr.key(0))
    model = ix.fit(risk, linear, ix.Newton(tolerance=1e-13))
    f = ix.influence(risk, model)
    erased = risk.with_weights(risk.weights.at[0].set(0))
    theta, rebuild = ravel(model)
    slope = lambda step: float(jnp.abs(risk_gradient(erased, rebuild(theta + step))[0]))
    assert slope(f.response.displace(jnp.array([0]))[0]) > 1.1 * slope(0.0)
    own = lambda m: jnp.mean(risk.losses(m))
    change = ix.leave_one_out(risk, model, ix.Newton(tolerance=1e-13), outcome=own) - own(model)
    assert np.isfinite(ix.value(f, risk.data, "newton", refine=1).value).all()
    found = ix.value(f, risk.data, "newton", refine=60).value / 6
    np.testing.assert_allclose(found, change, rtol=1e-8)


def test_a_heavy_point_renormalised_is_left_by_chord_steps_too():
    """The others' weights grow by 2.5: with least squares both conventions still converge."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), rng.normal(size=(40, 3))
    weights = np.ones(40)
    weights[0] = 60
    risk = ix.EmpiricalRisk((x, y), ix.SquaredError(), l2=1e-2, weights=weights)
    model = ix.fit(risk, linear_model(), ix.Newton())
    found = ix.value(ix.influence(risk, model), (x, y), "newton", refine=60)
    rest = np.where(np.arange(40) == 0, 0.0, weights)
    after = ix.fit(risk.with_weights(rest * 99 / 39), model, ix.Newton())
    change = jnp.mean(risk.losses(after) - risk.losses(model))
    np.testing.assert_allclose(found.value_centred[0] * 60 / 40, change, rtol=1e-8)


@pytest.mark.parametrize("refine", [1, 2, 4, 10])
def test_off_a_minimum_chord_steps_that_diverge_are_refused(refine):
    """Where all points are fitted beyond doubt the Hessian is nearly 0, and each step goes too far."""
    risk, model, queries = all_weighted()
    theta, rebuild = ravel(model)
    f = ix.influence(ix.EmpiricalRisk(risk.data, risk.loss, l2=1e-6), rebuild(40 * theta))
    with pytest.raises(RuntimeError, match="diverge"):
        ix.value(f, queries, "newton", refine=refine)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_no_divergence(dtype, noise):
    """Regression that fits to the last digit, and a classifier, after more steps than digits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(dtype)
    y = (x @ rng.normal(size=(4, 3)) + noise * rng.normal(size=(60, 3))).astype(dtype)
    model = jax.tree.map(lambda p: p.astype(dtype), linear_model())
    trainer = ix.Newton(tolerance=1e-6 if dtype == np.float32 else 1e-10)
    for data, loss, l2 in (
        ((x, y), ix.SquaredError(), 0.0),
        (separable(dtype), ix.SoftmaxCrossEntropy(), 1e-2),
    ):
        risk = ix.EmpiricalRisk(data, loss, l2=l2)
        f = ix.influence(risk, ix.fit(risk, model, trainer))
        for refine in (1, 2, 7, 40):
            assert np.isfinite(ix.value(f, data, "newton", refine=refine).value).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("points", [20, 200])
def test_rounding_is_no_divergence_where_parameters_are_few_or_0(points, seed):
    """Parameters without a signal, whose own last digits say little of the sum that ∇J is; two of them
    from features that are nearly one, where the difference of two sums counts."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(points, 1)), rng.normal(size=points)
    mirrored = np.concatenate([x, -x]), np.concatenate([y, y])
    close = 1 + 0.1 * rng.normal(size=(points, 2))
    for data, loss, l2 in (
        ((x, y), ix.SquaredError(), 1e-2),
        ((np.concatenate([close, -close]), np.concatenate([y, y])), ix.SquaredError(), 1e-3),
        ((x, (y > 0).astype(float)), ix.BinaryCrossEntropy(), 1e-2),
        (mirrored, ix.SquaredError(), 0.1),
    ):
        risk = ix.EmpiricalRisk(data, loss, l2=l2)
        some = eqx.nn.Linear(data[0].shape[1], "scalar", use_bias=False, key=jr.key(0))
        f = ix.influence(risk, ix.fit(risk, some, ix.Newton()))
        for refine in (2, 3, 12):
            assert np.isfinite(ix.value(f, data, "newton", refine=refine).value).all()


def test_where_the_others_have_no_minimum_nearby_there_is_no_newton_step():
    """A loss that is not convex: H ≻ 0 with all points, and a maximum of the risk of the others."""
    x, y = np.ones((5, 1)), np.array([0.0, -1.5, 1.45, -1.2, 1.3])
    risk = ix.EmpiricalRisk(
        (x, y),
        ix.CustomLoss(lambda o, t: jnp.square(o - t) / (1 + jnp.square(o - t))),
        l2=1e-3,
        weights=np.array([3.0, 1, 1, 1, 1]),
    )
    start = eqx.nn.Linear(1, "scalar", use_bias=False, key=jr.key(0))
    start = eqx.tree_at(lambda m: m.weight, start, jnp.full((1, 1), -0.006))
    f = ix.influence(risk, ix.fit(risk, start, ix.Newton()))
    alone = np.array([True, False, False, False, False])
    for found in (
        ix.removal(f, "newton")((x, y))[0],
        ix.value(f, (x, y), "newton").value,
        ix.removal(ix.influence(risk, f.model, ix.CG(ix.Hessian())), "newton")((x, y))[0],
    ):
        np.testing.assert_array_equal(np.isnan(np.asarray(found)), alone)
    assert int(ix.value(f, (x, y), "newton").verdict[0]) == 2


@pytest.mark.parametrize("scale", [0.9, 1.0, 1.1, 1.3, 2.7])
def test_a_point_of_leverage_1_has_no_newton_step(scale):
    """Without it its direction is nobody's, and what is left of the curvature there is rounding."""
    x = scale * np.array([[1.0, 0.3], [1.0, 0.3], [1.0, 0.3], [0.7, 1.1]])
    data = x, np.array([1.0, 2.0, 4.0, 3.0])
    risk = ix.EmpiricalRisk(data, ix.SquaredError())
    linear = eqx.nn.Linear(2, "scalar", use_bias=False, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, linear, ix.Newton()))
    found = ix.value(f, data, "newton")
    np.testing.assert_array_equal(np.isnan(np.asarray(found.value)), [False, False, False, True])
    refined = ix.value(f, data, "newton", refine=2)
    np.testing.assert_array_equal(np.isnan(np.asarray(refined.value)), [False, False, False, True])
    removed = ix.removal(f, "newton", refine=1)(data)
    assert (np.isnan(np.asarray(removed)) == np.array([False, False, False, True])).all()


@pytest.mark.parametrize(
    "curvature", [ix.Hessian(), ix.CG(ix.GaussNewton()), ix.MINRES(ix.Hessian())], ids=str
)
@pytest.mark.parametrize("seed", range(4))
def test_leverage_1_is_seen_whatever_the_condition(curvature, seed):
    """Nobody but the last point has a part in one direction, where H is small and rounding is not."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(2, 2)))
    x = np.stack([np.append(30 * rng.normal(size=9), 3.0), np.append(np.zeros(9), 1.0)], axis=1)
    data = x @ turn, rng.normal(size=10)
    risk = ix.EmpiricalRisk(data, ix.SquaredError())
    linear = eqx.nn.Linear(2, "scalar", use_bias=False, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, linear, ix.Newton()), curvature)
    undefined = np.isnan(np.asarray(ix.value(f, data, "newton").value))
    np.testing.assert_array_equal(undefined, np.arange(10) == 9)


@pytest.mark.parametrize("l2", [5e-4, 1e-3])
def test_float32_has_a_newton_step_where_leverages_are_nearly_1(l2):
    """More parameters than points: 1 − hᵢ is small, and H₋ᵢ along it well above rounding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 300)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=40)).astype(np.float32)
    risk = ix.EmpiricalRisk((x, y), ix.SquaredError(), l2=l2)
    linear = eqx.nn.Linear(300, "scalar", use_bias=False, dtype=jnp.float32, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, linear, ix.Newton(tolerance=1e-5)))
    found = np.diagonal(np.asarray(ix.removal(f, "newton")((x, y))))
    wide = x.astype(np.float64)
    inner = np.linalg.inv(wide @ wide.T + 40 * l2 * np.eye(40))
    left = 40 * l2 * np.diagonal(inner)  # 1 − h
    residual = 40 * l2 * inner @ y.astype(np.float64)
    want = 0.5 * np.square(residual / left) - 0.5 * np.square(residual)
    np.testing.assert_allclose(found, want, rtol=0.1)


def test_a_step_does_not_depend_on_which_points_it_is_taken_beside():
    """Float32 and features of very different size, beside a point that is alone in one direction."""
    x = np.random.default_rng(0).normal(size=(60, 3)) * np.array([100, 0.1, 1])
    x[:, 2] = np.arange(60) == 59
    data = x.astype(np.float32), x[:, 1].astype(np.float32)
    risk = ix.EmpiricalRisk(data, ix.SquaredError())
    line = eqx.nn.Linear(3, "scalar", use_bias=False, dtype=jnp.float32, key=jr.key(0))
    f = ix.influence(risk, line, ix.GaussNewton(damping=1e-2))
    single = np.concatenate([ix.value(f, data, "newton", indices=[i]).value for i in range(60)])
    together = np.asarray(ix.value(f, data, "newton").value)
    np.testing.assert_array_equal(np.isnan(together), np.isnan(single))
    assert not np.isnan(together[:59]).any()


def test_a_network_has_a_newton_step_without_most_points():
    """Where outputs are not affine in the parameters, one indefinite H₋ᵢ is NaN for its point alone."""
    x, y = np.ones((5, 1)), np.array([0.0, -1.5, 1.45, -1.2, 1.3])
    loss = ix.CustomLoss(lambda o, t: jnp.square(o - t) / (1 + jnp.square(o - t)))
    weights = np.array([3.0, 1, 1, 1, 1])
    risk = ix.EmpiricalRisk(
        (x, y), loss, l2=1e-3, weights=weights, predict=lambda m, x: jnp.sin(m(x))
    )
    start = eqx.nn.Linear(1, "scalar", use_bias=False, key=jr.key(0))
    start = eqx.tree_at(lambda m: m.weight, start, jnp.full((1, 1), -0.006))
    model = ix.fit(risk, start, ix.Newton())
    for curvature in (ix.Hessian(), ix.CG(ix.Hessian())):
        found = ix.value(ix.influence(risk, model, curvature), (x, y), "newton")
        np.testing.assert_array_equal(np.isnan(np.asarray(found.value)), np.arange(5) == 0)


def test_memorization_names_points_without_which_there_is_no_newton_step():
    risk, model = alone()
    with pytest.raises(
        RuntimeError, match=r"1 of 7 points \(6\) the Hessian is not positive definite"
    ):
        ix.memorization(ix.influence(risk, model))


def test_a_point_without_an_effect_is_undecided_and_undefined():
    x, y, queries = *separable(np.float64), separable(np.float64)
    x = np.array(x)
    x[:3] = 0
    model = eqx.nn.Linear(x.shape[1], 3, use_bias=False, key=jr.key(0))
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=1e-2)
    f = ix.influence(risk, ix.fit(risk, model, ix.Newton()))
    for step in ("first-order", "newton"):
        assert (np.asarray(ix.value(f, queries, step).verdict)[:3] == 2).all()
    for g in (f, ix.relative(f, "loss")):
        assert ix.diagnose(g)["undefined"].figure.startswith(f"3 of {len(x)}")


def test_stationarity_does_not_depend_on_the_unit_of_the_weights():
    x, y = separable(np.float64)

    def shown(data, l2, weights):
        risk = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=l2, weights=weights)
        return ix.diagnose(ix.influence(risk, linear_model()))["stationarity"]

    weights = np.where(np.arange(len(x)) < 5, 0.0, 1.0)
    without = shown((x[5:], y[5:]), 1e-2 * len(x) / (len(x) - 5), np.ones(len(x) - 5))
    for unit in (1.0, 1e-3):
        found = shown((x, y), unit * 1e-2, unit * weights)
        assert found.verdict == without.verdict == "bad"
        assert found.figure.split(", ")[1] == without.figure.split(", ")[1]


def test_a_value_of_a_removal_is_traced_and_differentiated():
    risk, model, queries = all_weighted()
    f = ix.influence(risk, model)
    want = ix.value(f, queries, "newton", refine=2)
    inside = eqx.filter_jit(lambda q: ix.value(f, q, "newton", refine=2))(queries)
    np.testing.assert_allclose(inside.value, want.value, rtol=1e-10)

    def worth(scale):
        x, y = queries
        return ix.value(f, (scale * x, y), "newton", refine=2).value[0]

    def remembered(model):
        return ix.memorization(ix.influence(risk, model), refine=1).margin_without[0]

    step = 1e-5
    slope = (worth(1 + step) - worth(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(worth)(1.0), slope, rtol=1e-6)
    theta, rebuild = ravel(model)
    there = lambda e: remembered(rebuild(theta.at[0].add(e)))
    slope = (there(step) - there(-step)) / (2 * step)
    gradient, _ = ravel(eqx.filter_grad(remembered)(model))
    np.testing.assert_allclose(gradient[0], slope, rtol=1e-5)


def test_a_value_of_some_points_is_theirs():
    risk, model, queries = all_weighted()
    f, some = ix.influence(risk, model), np.array([4, 1])
    for options in ({}, {"step": "newton"}, {"step": "newton", "refine": 2}):
        whole, part = ix.value(f, queries, **options), ix.value(f, queries, indices=some, **options)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            np.testing.assert_allclose(b, a[some], rtol=1e-10)
    separated = ix.EmpiricalRisk(separable(float), ix.SoftmaxCrossEntropy(), l2=1e-6)
    g = ix.influence(separated, ix.fit(separated, linear_model(), ix.Newton()))
    with pytest.raises(RuntimeError, match=r"1 of 2 points \(86\)"):
        ix.value(g, separated.data, "newton", refine=3, indices=[5, 86])


def test_a_value_that_memory_does_not_hold_is_refused():
    risk, model, queries = all_weighted()
    f = ix.influence(risk, model, memory=100)
    with pytest.raises(ValueError, match=r"one training point's share.*memory="):
        ix.value(f, queries, "newton", refine=1)


def test_what_is_undefined_is_undecided():
    """A weight that no trace can see to be 0."""
    _, risk, model, queries = problem("softmax")
    absent = np.asarray(risk.weights) == 0
    found = eqx.filter_jit(lambda f: ix.value(f, queries, "newton"))(ix.influence(risk, model))
    np.testing.assert_array_equal(np.isnan(np.asarray(found.value)), absent)
    assert (np.asarray(found.verdict)[absent] == 2).all()


# --- rounding: the truth in extended precision ------------------------------------------------------


def extended_retraining(x, y, weights, l2: float, offset: float = 0.0):
    """Softmax regression without a bias, θ of shape [C, d], minimised in 80 bits; logits are Wx +
    offset·(1, …)."""
    long = np.longdouble
    x, weights, l2 = x.astype(long), weights.astype(long), long(l2)
    n, d, C = *x.shape, int(y.max()) + 1
    W = np.zeros((C, d), long)
    hot = np.eye(C, dtype=long)[y]
    for _ in range(60):
        z = x @ W.T
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True)
        gradient = ((weights[:, None] * (p - hot)).T @ x / n + l2 * W).reshape(-1)
        S = p[:, :, None] * np.eye(C)[None] - p[:, :, None] * p[:, None, :]
        H = np.einsum("n,nab,ni,nj->aibj", *(a.astype(float) for a in (weights, S, x, x)))
        H = H.reshape(C * d, C * d) / n + float(l2) * np.eye(C * d)
        W = W - np.linalg.solve(H, gradient.astype(float)).astype(long).reshape(C, d)
    assert np.linalg.norm(gradient) < 1e-15 * max(1, l2 * np.linalg.norm(W))
    return W


def long_loss(W, x, y):
    z = x.astype(np.longdouble) @ W.T
    z = z - z.max(axis=1, keepdims=True)
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]


@pytest.mark.parametrize("l2", [1e-2, 1e2, 1e8, 1e14])
def test_enclosures_hold_beyond_double_precision(l2):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    weights = rng.choice([0.0, 1e-13, 1.0], 20)
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=l2, weights=weights)
    start = eqx.nn.Linear(3, 3, use_bias=False, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, start, ix.Newton(tolerance=1e-12)))
    queries = (7 * rng.normal(size=(6, 3)), rng.integers(0, 3, 6))
    at = long_loss(extended_retraining(x, y, weights, l2), *queries)
    keep = lambda i: np.where(np.arange(20) == i, 0, weights).astype(np.longdouble)
    grown = lambda w: w * (weights.astype(np.longdouble).sum() / w.sum())
    without = lambda w: long_loss(extended_retraining(x, y, w, l2), *queries) - at
    erased = np.stack([without(keep(i)) for i in range(20)], axis=1)
    renormalised = np.stack([without(grown(keep(i))) for i in range(20)], axis=1)
    mean_of_rest = {"refine": 3, "renormalise": True}
    for options in ({"refine": 0}, {"refine": 3}, {"tier": 2}, mean_of_rest):
        change = renormalised if options is mean_of_rest else erased
        for mean in (False, True):
            got, truth = ix.certify(f, queries, mean=mean, **options), change
            truth = truth.mean(axis=0) if mean else truth
            assert np.all((np.asarray(got.lower) <= truth) & (truth <= np.asarray(got.upper)))
            sign = np.where(np.asarray(got.lower) > 0, 1, -1)
            assert not np.any(np.asarray(got.certified) & (sign * truth <= 0))


@pytest.mark.parametrize("weight", [1.0, 1e3])
def test_enclosures_of_fitted_queries_hold_under_class_weights(weight):
    """ℓ → cℓ, Ω → cΩ: the same parameters, c times the change and c times the loss's own rounding."""
    rng = np.random.default_rng(3)
    x = np.round(64 * rng.normal(size=(10, 2))) / 64
    y = (x.sum(axis=1) + np.round(64 * rng.normal(size=10)) / 64 > 0).astype(int)
    loss = ix.SoftmaxCrossEntropy(class_weights=np.full(2, weight))
    risk = ix.EmpiricalRisk((x, y), loss, l2=weight / 32)
    start = eqx.nn.Linear(2, 2, use_bias=False, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, start, ix.Newton(tolerance=3e-15 * weight)))
    W = extended_retraining(x, y, np.ones(10), 1 / 32)
    ends = np.linspace(32, 36.8, 60) / float(W[1, 0] - W[0, 0])  # logits 32 … 36.8 apart
    queries = np.stack([ends, 0 * ends], axis=1), np.ones(60, int)
    at = long_loss(W, *queries)
    keep = [(np.arange(10) != i).astype(float) for i in range(10)]
    each = [long_loss(extended_retraining(x, y, w, 1 / 32), *queries) - at for w in keep]
    truth = weight * np.stack(each, axis=1)
    got = ix.certify(f, queries, refine=100)
    assert np.all((np.asarray(got.lower) <= truth) & (truth <= np.asarray(got.upper)))
    scale = weight * np.finfo(float).eps
    assert float(jnp.max(got.upper - got.lower)) < 1e3 * scale  # and no wider than it needs to be


def extended_logistic(x, y, weights, l2: float):
    """Logistic regression of one output with a bias, minimised in 80 bits."""
    long = np.longdouble
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(long)
    theta, weights = np.zeros(x.shape[1], long), weights.astype(long)
    for _ in range(60):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (weights * (p - y)) / len(x) + long(l2) * theta
        H = ((weights * p * (1 - p))[:, None] * x).T @ x / len(x) + long(l2) * np.eye(x.shape[1])
        theta = theta - np.linalg.solve(H.astype(float), gradient.astype(float)).astype(long)
    assert np.linalg.norm(gradient) < 1e-17
    return theta


@pytest.mark.parametrize("outputs", [1, 10])
def test_enclosures_of_fitted_queries_hold_for_yes_or_no_labels(outputs):
    """Where every label's loss is small and its logit is not."""
    rng = np.random.default_rng(0)
    x = np.round(64 * rng.normal(size=(8, 1))) / 64
    y = (x[:, 0] + np.round(64 * rng.normal(size=8)) / 128 > 0).astype(int)
    y[0] = 1 - y[0]
    all_alike = np.repeat(y[:, None], outputs, axis=1)
    risk = ix.EmpiricalRisk((x, all_alike), ix.BinaryCrossEntropy(), l2=1 / 32)
    start = eqx.nn.Linear(1, outputs, key=jr.key(0))
    f = ix.influence(risk, ix.fit(risk, start, ix.Newton(tolerance=1e-14)))
    theta = extended_logistic(x, y, np.ones(8), 1 / 32)
    ends = (np.linspace(33, 33.6, 100) - float(theta[1])) / float(theta[0])
    loss = lambda t: outputs * np.log1p(np.exp(-(t[0] * ends.astype(np.longdouble) + t[1])))
    keep = [(np.arange(8) != i).astype(float) for i in range(8)]
    without = [loss(extended_logistic(x, y, w, 1 / 32)) - loss(theta) for w in keep]
    truth = np.stack(without, axis=1)
    queries = ends[:, None], np.ones((100, outputs), int)
    got = ix.certify(f, queries, refine=80)
    assert np.all((np.asarray(got.lower) <= truth) & (truth <= np.asarray(got.upper)))


@pytest.mark.parametrize("apart", [1.0, 1e6])
def test_what_a_program_cancels_on_its_way_is_no_rounding_of_the_certificate(apart):
    """A head on tokens that are far apart, and whose mean is what counts."""
    rng = np.random.default_rng(0)
    mean = np.round(256 * rng.normal(size=(20, 3))) / 256
    away = apart * np.round(64 * rng.normal(size=(20, 2, 3))) / 64
    tokens = mean[:, None] + np.concatenate([away, -away], axis=1)
    assert np.all(tokens.mean(axis=1) == mean)
    y = rng.integers(0, 2, 20)
    predict = lambda model, z: jnp.mean(jax.vmap(model)(z), axis=0)
    risk = ix.EmpiricalRisk((tokens, y), ix.SoftmaxCrossEntropy(), l2=0.1, predict=predict)
    pooled = ix.EmpiricalRisk((mean, y), ix.SoftmaxCrossEntropy(), l2=0.1)
    model = ix.fit(pooled, eqx.nn.Linear(3, 2, use_bias=False, key=jr.key(0)), ix.Newton())
    f = ix.influence(risk, model)
    theta, _ = ravel(model)
    exact = long_gradient(np.asarray(theta), mean, y, 0.1, 0.0)
    error = np.linalg.norm(np.asarray(risk_gradient(affine(f).risk, model)) - exact)
    assert error <= float(gradient_rounding(affine(f))(jnp.zeros((1, theta.size)))[0])
    queries = mean[:5], y[:5]
    at = long_loss(extended_retraining(mean, y, np.ones(20), 0.1), *queries)
    keep = [(np.arange(20) != i).astype(float) for i in range(20)]
    each = [long_loss(extended_retraining(mean, y, w, 0.1), *queries) - at for w in keep]
    for options in ({"refine": 30}, {"tier": 2}):
        got = ix.certify(f, (tokens[:5], y[:5]), **options)
        truth = np.stack(each, axis=1)
        assert np.all((np.asarray(got.lower) <= truth) & (truth <= np.asarray(got.upper)))


def long_gradient(theta, x, y, l2: float, offset: float):
    """∇J of a linear layer's parameters (weight, then bias, if any) in 80 bits, the data as they are."""
    long = np.longdouble
    C, (n, d) = int(y.max()) + 1, x.shape
    W, b = theta[: C * d].reshape(C, d).astype(long), theta[C * d :].astype(long)
    has_bias, b = b.size > 0, b if b.size else np.zeros(C, long)
    z = x.astype(long) @ W.T + b + long(offset)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    error = p / p.sum(axis=1, keepdims=True) - np.eye(C, dtype=long)[y]
    weight = error.T @ x.astype(long) / n + long(l2) * W
    bias = error.sum(axis=0) / n + long(l2) * b
    return np.concatenate([weight.ravel(), bias] if has_bias else [weight.ravel()])


@pytest.mark.parametrize("features", [5, 500])  # one block of an inner product, and four
@pytest.mark.parametrize("kind", ["head", "constant", "positions"])
def test_the_affine_problem_is_the_problem(kind, features):
    """Its outputs at other parameters, and the rounding of its gradient over several blocks."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(12, features)), rng.integers(0, 3, 12)
    predict = {
        "head": lambda model, z: model(z),
        "constant": lambda model, z: model(z) + jnp.sum(z),
        "positions": lambda model, z: jnp.stack([model(z), model(2 * z)]),
    }[kind]
    targets = np.stack([y, y], axis=1) if kind == "positions" else y
    loss = ix.SoftmaxCrossEntropy()
    risk = ix.EmpiricalRisk((x, targets), loss, l2=1e-2, predict=predict)
    model = eqx.nn.Linear(features, 3, key=jr.key(0))
    f = affine(ix.influence(risk, model, ix.CG(ix.GaussNewton())))
    theta, rebuild = ravel(model)
    other = rebuild(theta + jr.normal(jr.key(1), theta.shape))
    outputs = lambda r: jax.vmap(lambda z: r.output(other, z))(r.data[0])
    np.testing.assert_allclose(outputs(f.risk), outputs(risk), rtol=1e-11, atol=1e-11)
    if kind == "head":
        exact = long_gradient(np.asarray(theta), x, y, 1e-2, 0.0)
        error = np.linalg.norm(np.asarray(risk_gradient(f.risk, model)) - exact)
        assert error <= float(gradient_rounding(f)(jnp.zeros((1, theta.size)))[0]) <= 1e4 * error


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_the_bound_on_a_gradients_rounding_contains_it(scale, size, offset):
    """Large and small data, parameters and offsets; at θ̂ and away from it."""
    rng = np.random.default_rng(3)
    x, y = scale * rng.normal(size=(300, 6)), rng.integers(0, 4, 300)
    predict = lambda model, z: model(z) + offset
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=1e-2, predict=predict)
    model = eqx.nn.Linear(6, 4, key=jr.key(0))
    vector = size / scale * rng.normal(size=28)
    vector[24:] = size * rng.normal(size=4)
    rebuild = ravel(model)[1]
    model = rebuild(jnp.asarray(vector))
    f = affine(ix.influence(risk, model, ix.GaussNewton()))
    for moved in (0.0, 1.0):
        step = moved * rng.normal(size=28) * np.abs(vector)
        at = jnp.asarray(vector + step)
        got = np.asarray(risk_gradient(f.risk, rebuild(at)))
        error = np.linalg.norm(got - long_gradient(np.asarray(at), x, y, 1e-2, offset))
        bound = float(gradient_rounding(f)(jnp.asarray(step)[None])[0])
        assert error <= bound
        if offset == 0 and size <= 1 and scale <= 1:  # else the rounding may happen to be small
            assert bound <= 1e5 * error
        if offset == 0 and size == 30 and scale <= 1 and not moved:  # the loss bends little here
            assert bound <= 2e3 * error


def test_the_bound_on_rounding_follows_to_where_the_loss_bends():
    """Points fitted beyond doubt at θ̂, where ∂ℓ forgives the logits' rounding, and not at θ̃."""
    rng = np.random.default_rng(3)
    x, vector, offset = rng.normal(size=(300, 6)), 1e3 * rng.normal(size=28), 1e8
    logits = x @ vector[:24].reshape(4, 6).T + vector[24:]
    beyond_doubt = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0] > 100
    x, y = x[beyond_doubt], np.argmax(logits, axis=1)[beyond_doubt]
    predict = lambda model, z: model(z) + offset
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=1e-2, predict=predict)
    rebuild = ravel(eqx.nn.Linear(6, 4, key=jr.key(0)))[1]
    f = affine(ix.influence(risk, rebuild(jnp.asarray(vector)), ix.GaussNewton()))
    step = -0.999 * vector
    at = jnp.asarray(vector + step)
    got = np.asarray(risk_gradient(f.risk, rebuild(at)))
    error = np.linalg.norm(got - long_gradient(np.asarray(at), x, y, 1e-2, offset))
    assert 1e-12 < error <= float(gradient_rounding(f)(jnp.asarray(step)[None])[0])


@pytest.mark.parametrize("K", [1, 40])
def test_a_gradient_that_is_summed_over_outputs_is_enclosed(K):
    """One term of size 1, and nK − 1 that are each nearly lost when they are added to it: outputs θ₀aᵢ
    of no head, squared error, whose gradient is a sum of products."""
    n, small = 30, 2.0**-30
    a, y = np.full((n, K), small), np.full((n, K), 0.98 * 2.0**-53 / small)
    a[0, 0], y[0, 0] = 2.0**-12, 2.0**12
    predict = lambda m, x: x * m[0] + 0 * x * (m[1] + m[2])
    risk = ix.EmpiricalRisk((a, y), ix.SquaredError(), l2=1.0, predict=predict)
    f = affine(ix.influence(risk, jnp.zeros(3)))
    got = float(risk_gradient(f.risk, f.model)[0])
    error = abs(got + math.fsum((a * y).ravel()) / n)
    assert error <= float(gradient_rounding(f)(jnp.zeros((1, 3)))[0])
    assert K == 1 or error > (n + K) * 2.0**-53 / n  # what a sum over examples alone would lose


@pytest.mark.parametrize("size", [1e9, 1e16])
def test_a_mean_whose_parts_cancel_is_enclosed(size):
    """Logits at inputs (B, ε, ε, −B): their mean is affine, and its slope 2ε/4."""
    x, y = np.array([1.0, 1.0, -2.0, -2.0, 3.0]), np.array([0, 1, 0, 1, 1])
    risk = ix.EmpiricalRisk((x[:, None], y[:, None]), ix.BinaryCrossEntropy(), l2=0.5)
    layer = eqx.nn.Linear(1, 1, use_bias=False, key=jr.key(0))
    at = lambda t: eqx.tree_at(lambda m: m.weight, layer, jnp.full((1, 1), t))
    slope = lambda t, w: np.mean(w * (1 / (1 + np.exp(-t * x)) - y) * x) + 0.5 * t
    whole = scipy.optimize.brentq(lambda t: slope(t, np.ones(5)), -1, 1, xtol=1e-15)
    queries = np.array([size, *2 * [0.4 * np.spacing(size)], -size])
    truth = 2 * queries[1] / 4 * (0 - whole)  # without the last point the minimum is at 0
    f = ix.classification(ix.influence(risk, at(0.0)), "logit", class_=1)
    labels = jnp.zeros((4, 1), int)
    got = ix.certify(f, (queries[:, None], labels), indices=jnp.array([4]), mean=True)
    assert float(got.lower[0]) <= truth <= float(got.upper[0])
    assert not bool(got.certified[0])


def test_a_step_along_which_features_cancel_is_enclosed_without_a_pass():
    """Tier 2 where the third derivative's form is all rounding: logits of inputs (B + ξ, B − ξ)."""
    rng = np.random.default_rng(2)
    xi = np.round(64 * rng.normal(size=8)) / 256
    x, y = np.stack([1e9 + xi, 1e9 - xi], axis=1), np.array([0, *7 * [1]])
    weights = np.array([2.0**-18, *7 * [1.0]])
    layer = eqx.nn.Linear(2, 1, use_bias=False, key=jr.key(0))
    away = eqx.tree_at(lambda m: m.weight, layer, jnp.array([[1 + 1e-8, -1 + 1e-8]]))
    loss = ix.BinaryCrossEntropy()
    risk = ix.EmpiricalRisk((x, y[:, None]), loss, l2=1.0, weights=weights)
    got = ix.certify(ix.influence(risk, away), tier=2)
    assert bool(jnp.all(got.radius > 0))
    assert bool(jnp.all(got.lower <= got.upper))


def test_a_common_offset_of_the_logits_is_enclosed():
    """Frozen biases of 1e10 cost ten digits of the logits, and change nothing in truth."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=0.1)
    plain = eqx.nn.Linear(3, 3, key=jr.key(0))
    shifted = eqx.tree_at(lambda m: m.bias, plain, jnp.full(3, 1e10))
    small, _ = ix.restrict(risk, shifted, lambda m: m.weight)
    without = np.zeros(20)
    W = extended_retraining(x, y, np.ones(20), 0.1)
    for i in range(20):
        each = extended_retraining(x, y, (np.arange(20) != i).astype(float), 0.1)
        without[i] = np.log(np.expm1(long_loss(each, x[i : i + 1], y[i : i + 1]))).item() * -1
    f = ix.influence(small, jnp.asarray(W.astype(float)))
    for options in ({"refine": 0}, {"refine": 6}, {"tier": 2}):
        got = ix.certify(f, **options)
        assert bool(jnp.all((got.lower <= without) & (without <= got.upper)))


def test_a_cast_to_fewer_digits_is_no_affine_output():
    _, risk, model, _ = problem("softmax")
    for cast in (jnp.float32, jnp.bfloat16, int):
        narrow = lambda m, x, cast=cast: m(x).astype(cast).astype(float)
        rounded = ix.EmpiricalRisk(risk.data, risk.loss, l2=0.1, predict=narrow)
        with pytest.raises(ValueError, match="fewer digits"):
            ix.certify(ix.influence(rounded, model, ix.GaussNewton()))


def test_restriction_bounds_enclose_their_own_rounding():
    """As many steps as the space has dimensions: what is left is rounding alone."""
    _, risk, model, queries = problem("network")
    f = ix.influence(risk, model, ix.GaussNewton())
    matrix = np.asarray(f.response.factored.matrix, np.longdouble)
    gradient = lambda z: np.asarray(f.measurement.gradient(risk, model, z), float)
    queries = jax.tree.map(lambda a: a[:3], queries)
    rows = np.array([gradient(jax.tree.map(lambda a, i=i: a[i], queries)) for i in range(3)])
    points = np.array(
        [gradient(jax.tree.map(lambda a, i=i: a[i], risk.data)) for i in range(risk.n)]
    )
    solved = np.zeros(points.T.shape, np.longdouble)
    for _ in range(5):  # iterative refinement
        rest = (points.T - matrix @ solved).astype(float)
        solved = solved + np.linalg.solve(matrix.astype(float), rest)
    truth = -(rows @ solved)
    for steps in (1, 6, 40):
        bound = ix.restriction_bound(f, lambda m: m.layers[-1], queries, steps=steps)
        lower, upper = (np.asarray(b, np.longdouble) for b in (bound.full_lower, bound.full_upper))
        assert np.all((lower <= truth) & (truth <= upper))
        distance = np.abs(truth - np.asarray(bound.restricted, np.longdouble))
        assert np.all((np.asarray(bound.lower) <= distance) & (distance <= np.asarray(bound.upper)))


def test_newton_steps_without_many_points_return_every_time():
    """Two batched LAPACK calls at once can wait for each other's thread for ever: see `OutputTerms`.
    In a process of its own, whose end can be demanded."""
    code = """
import equinox as eqx, influx as ix, jax.random as jr
x = jr.normal(jr.key(0), (1500, 64))
risk = ix.EmpiricalRisk((x, x[:, :10].argmax(1)), ix.SoftmaxCrossEntropy(), l2=1e-2)
f = ix.influence(risk, ix.fit(risk, eqx.nn.Linear(64, 10, key=jr.key(1)), ix.Newton()))
for _ in range(20):
    ix.memorization(f).margin.block_until_ready()
"""
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
