"""An ordinary network: ReLU, float32, trained by Adam until it is good and not to a minimum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import influx as ix

N, D, C = 40, 5, 3


def network(dtype, activation=jax.nn.relu, l2: float = 1e-3):
    """A trained network: (risk, model, queries)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N + 6, D)).astype(dtype)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] * x[:, 2] > 0.3)
    risk = ix.EmpiricalRisk((x[:N], y[:N]), ix.SoftmaxCrossEntropy(), l2=l2)
    model = eqx.nn.MLP(D, C, 16, 2, activation, key=jr.key(0))
    model = jax.tree.map(lambda p: p.astype(dtype) if eqx.is_inexact_array(p) else p, model)
    trainer = ix.SGD(optax.adam(1e-2), batch_size=10, epochs=30, key=jr.key(1))
    return risk, ix.fit(risk, model, trainer), (x[N:], y[N:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conjugate_gradients_reach_the_dense_solve(dtype):
    risk, model, queries = network(dtype)
    # Damped: float32 reaches a relative residual of about eps·κ, and undamped that is its tolerance.
    curvature = ix.GaussNewton(damping=1e-2)
    dense = ix.influence(risk, model, curvature)(queries)
    f = ix.influence(risk, model, ix.CG(curvature))
    scores = f(queries)
    assert scores.dtype == dtype
    error = jnp.linalg.norm(scores - dense) / jnp.linalg.norm(dense)
    assert error < (5e-3 if dtype == np.float32 else 1e-8)
    assert ix.diagnose(f)["solve"].verdict != "bad"


@pytest.mark.parametrize("l2", [1e-5, 10.0])
def test_a_small_curvature_is_not_taken_for_a_singular_one(l2):
    risk, model, queries = network(np.float64, l2=l2)
    scores = ix.influence(risk, model, ix.CG(ix.GaussNewton(damping=1e-9)))(queries)
    dense = ix.influence(risk, model, ix.GaussNewton(damping=1e-9))(queries)
    np.testing.assert_allclose(scores, dense, rtol=1e-3, atol=1e-3 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_check_holds_where_kinks_are_close(dtype):
    risk, model, _ = network(dtype)
    report = ix.testing.check(risk, model, curvature=ix.GaussNewton())
    status = {law.name: law.status for law in report.laws}
    assert status["gradient"] == "holds"
    assert status["second derivative"] == ("holds" if dtype == np.float64 else "skipped")
    assert status["P2 symmetry"] == "holds"


def test_check_says_what_holds_where_there_is_no_influence():
    risk, model, _ = network(np.float64)
    with pytest.raises(ValueError, match=r"(?s)holds    gradient.*indefinite.*curvature=\.\.\."):
        ix.testing.check(risk, model)


def test_no_enclosure_where_the_spectrum_has_no_known_end():
    """A network's Hessian reaches below l2, so that min l2 bounds nothing."""
    risk, model, queries = network(np.float64, jax.nn.tanh)
    part = lambda m: m.layers[-1]
    for curvature in (ix.Hessian(damping=1.0), ix.CG(ix.Hessian(damping=1.0))):
        f = ix.influence(risk, model, curvature)
        with pytest.raises(ValueError, match=r"is not known.*GaussNewton"):
            ix.restriction_bound(f, part, queries)
    squares = lambda o, y: jnp.sum(jnp.square(o - jax.nn.one_hot(y, C)))
    unknown, convex = (ix.CustomLoss(squares, convex=convex) for convex in (False, True))
    of = lambda loss: ix.influence(
        ix.EmpiricalRisk(risk.data, loss, l2=1e-1), model, ix.CG(ix.GaussNewton())
    )
    with pytest.raises(ValueError, match="is not known"):
        ix.restriction_bound(of(unknown), part, queries)
    bound = ix.restriction_bound(of(convex), part, queries, steps=20)
    full = of(convex)(queries)
    assert bool(jnp.all((bound.full_lower <= full + 1e-9) & (full <= bound.full_upper + 1e-9)))


@pytest.mark.parametrize(
    "curvature", [ix.Identity(), ix.Diagonal(), ix.BlockDiagonal(ix.GaussNewton())]
)
def test_enclosures_are_of_the_curvature_given(curvature):
    risk, model, queries = network(np.float64, jax.nn.tanh)
    f = ix.influence(risk, model, curvature)
    bound = ix.restriction_bound(f, lambda m: m.layers[-1], queries, steps=25)
    full = f(queries)
    slack = 1e-9 * float(jnp.abs(full).max())
    assert bool(jnp.all((bound.full_lower <= full + slack) & (full <= bound.full_upper + slack)))


def test_a_missing_minimum_is_nan_for_the_points_that_make_it():
    """λ just enough for H ≻ 0, so that it is not for some H₋ᵢ: told from those by their eigenvalues."""
    risk, model, queries = network(np.float64)
    low = float(np.linalg.eigvalsh(ix.Hessian().matrix(risk, model))[0])
    curvature = ix.Hessian(damping=-low * (1 + 1e-4))
    f = ix.influence(risk, model, curvature)

    def lowest(i):
        without = risk.with_weights(risk.weights.at[i].set(0))
        return np.linalg.eigvalsh(curvature.matrix(without, model))[0] + curvature.damping

    missing = np.array([lowest(i) < 0 for i in range(risk.n)])
    assert 0 < missing.sum() < risk.n
    found = np.asarray(ix.removal(f, "newton")(queries))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(missing, found.shape))
    points = ", ".join(map(str, np.flatnonzero(missing)[:5]))
    with pytest.raises(
        RuntimeError, match=rf"{missing.sum()} of {risk.n} points \({points}.*Hessian"
    ):
        ix.memorization(f)


def test_a_softmax_inside_the_model_is_no_affine_output():
    risk, _, queries = network(np.float64)
    soft = ix.EmpiricalRisk(risk.data, risk.loss, l2=0.1, predict=lambda m, x: jax.nn.softmax(m(x)))
    scores = ix.influence(soft, eqx.nn.Linear(D, C, key=jr.key(0)), ix.GaussNewton())(queries)
    assert bool(jnp.all(jnp.isfinite(scores)))


def test_a_frozen_batch_norm_is_a_function_of_its_example():
    model, state = eqx.nn.make_with_state(lambda: eqx.nn.BatchNorm(D, "b", mode="batch"))()
    frozen = eqx.nn.inference_mode(model)
    head = eqx.nn.Linear(D, C, key=jr.key(0))
    predict = lambda m, x: m[0](m[1](x, state)[0])
    data = np.zeros((4, D)), np.arange(4) % C
    risk = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=0.1, predict=predict)
    assert ix.influence(risk, (head, frozen), ix.GaussNewton())(data).shape == (4, 4)
    with pytest.raises(ValueError, match=r"keeps state.*inference_mode"):
        ix.influence(risk, (head, model), ix.GaussNewton())


def test_outputs_that_are_no_array_are_named():
    rng = np.random.default_rng(0)
    targets = {"class": rng.integers(0, C, 10), "size": rng.normal(size=10)}
    split = lambda m, x: {"class": m(x)[:C], "size": m(x)[C]}
    hard = ix.SoftmaxCrossEntropy()
    fn = lambda o, y: hard(o["class"], y["class"]) + jnp.square(o["size"] - y["size"])
    loss = ix.CustomLoss(fn, logits=lambda o: o["class"])
    data = rng.normal(size=(10, D)), targets
    risk = ix.EmpiricalRisk(data, loss, l2=0.1, predict=split)
    model = eqx.nn.Linear(D, C + 1, key=jr.key(0))
    for curvature in (ix.GaussNewton(), ix.CG(ix.GaussNewton())):
        with pytest.raises(ValueError, match=r"outputs that are one array.*Hessian"):
            ix.influence(risk, model, curvature)
    f = ix.influence(risk, model)
    assert ix.classification(f, "probability")(data).shape == (10, C, 10)
    for margin in (lambda: ix.memorization(f), lambda: ix.classification(f, "margin")):
        with pytest.raises(ValueError, match="one label per example"):
            margin()


def test_a_matrix_beyond_the_memory_is_refused_before_it_is_made():
    risk, _, _ = network(np.float64)
    model = eqx.nn.MLP(D, C, 3000, 2, key=jr.key(0))
    with pytest.raises(ValueError, match=r"takes .* GB.*CG\(GaussNewton\(\)\)"):
        ix.influence(risk, model, ix.GaussNewton())
