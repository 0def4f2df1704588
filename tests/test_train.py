"""Trainers, against NumPy and SciPy in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influx._linalg import ravel
from influx._loss import SoftmaxCrossEntropy, SquaredError
from influx._risk import EmpiricalRisk
from influx._train import LBFGS, SGD, Newton, fit
from influx._train.newton import Chord
from tests.softmax_oracle import ones, softmax_gradient, softmax_minimum

N, D, C = 23, 4, 3
seeds = st.integers(0, 2**31 - 1)


def classification(seed: int, n: int = N):
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((n, D)), rng.integers(0, C, n)
    return X, y, rng.uniform(0.2, 2.0, n)


def linear(outputs: int, scale: float = 0.5, seed: int = 0) -> eqx.nn.Linear:
    model = eqx.nn.Linear(D, outputs, key=jr.key(seed), dtype=jnp.float64)
    return jtu.tree_map(lambda p: scale * p if eqx.is_inexact_array(p) else p, model)


def matrix(model: eqx.nn.Linear) -> np.ndarray:
    return np.hstack([np.asarray(model.weight), np.asarray(model.bias)[:, None]])


def no_bias_penalty(model, l2):
    return jtu.tree_map(lambda p: l2 * (p.ndim > 1), eqx.filter(model, eqx.is_inexact_array))


TRAINERS = {
    "newton": Newton(),
    "newton-cg": Newton(solver=lx.CG(rtol=1e-4, atol=0.0)),
    "chord": Chord(1e-10),
    "lbfgs": LBFGS(),
    "sgd": SGD(optax.sgd(0.3, momentum=0.5), batch_size=5, epochs=3, key=jr.key(3)),
    "adam": SGD(optax.adam(0.1), batch_size=N, epochs=7, key=jr.key(4)),
}
MINIMISERS = ("newton", "newton-cg", "lbfgs")


@eqx.filter_jit
def run(trainer, risk, model, weights):
    state = trainer.init(risk, model, risk.weights)
    return trainer.train(state, risk, model, weights)


@eqx.filter_jit
def run_rows(trainer, risk, model, rows):
    state = trainer.init(risk, model, risk.weights)

    def one(weights):
        retrained, trained = trainer.train(state, risk, model, weights)
        return ravel(retrained)[0], trained

    return jax.vmap(one)(rows)


@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_a_function_of_its_own_weights_alone(name):
    X, y, w = classification(0)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    rows = jnp.asarray(w * np.random.default_rng(1).uniform(0.7, 1.2, (4, N)))
    stacked, trained = run_rows(TRAINERS[name], risk, linear(C), rows)
    for i, row in enumerate(rows):
        alone, end = run(TRAINERS[name], risk, linear(C), row)
        np.testing.assert_allclose(stacked[i], ravel(alone)[0], rtol=0, atol=1e-9)
        norm = np.linalg.norm(softmax_gradient(matrix(alone), X, y, np.asarray(row), 0.1))
        np.testing.assert_allclose(end.gradient_norm, norm, rtol=1e-6, atol=1e-14)
        assert bool(end.converged)
        assert bool(trained.converged[i])


@pytest.mark.parametrize("name", MINIMISERS)
def test_fit_is_the_minimum_that_scipy_finds(name):
    X, y, w = classification(2)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.05, weights=w)
    model = fit(risk, linear(C), TRAINERS[name])
    np.testing.assert_allclose(matrix(model), softmax_minimum(X, y, w, 0.05, C), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MINIMISERS)
def test_fit_is_weighted_ridge_regression_with_the_bias_free(name):
    X, _, w = classification(3)
    Y = np.random.default_rng(3).standard_normal((N, 2))
    model = linear(2)
    l2 = no_bias_penalty(model, 0.2)
    fitted = fit(EmpiricalRisk((X, Y), SquaredError(), l2=l2, weights=w), model, TRAINERS[name])
    X1 = ones(X)
    A = X1.T @ (w[:, None] * X1) / N + 0.2 * np.diag([1.0] * D + [0.0])
    expected = np.linalg.solve(A, X1.T @ (w[:, None] * Y) / N).T
    np.testing.assert_allclose(matrix(fitted), expected, rtol=0, atol=1e-8)


@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6]))
def test_newton_converges_from_any_start(seed, scale):
    X, y, w = classification(seed)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.02, weights=w)
    model, trained = run(Newton(), risk, linear(C, scale, seed), risk.weights)
    assert bool(trained.converged)
    assert np.linalg.norm(softmax_gradient(matrix(model), X, y, w, 0.02)) < 2e-10


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_newton_converges_where_the_minimum_is_not_unique(scale):
    # Without l2 the loss does not see a shift of all logits: the Hessian is singular everywhere.
    X, y, w = classification(5, n=60)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), weights=w)
    model, trained = run(Newton(1e-11), risk, linear(C, scale), risk.weights)
    assert bool(trained.converged)
    assert np.linalg.norm(softmax_gradient(matrix(model), X, y, w, 0.0)) < 2e-11


def test_lbfgs_goes_below_the_rounding_of_the_objective():
    X, y, w = classification(6)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.02, weights=w)
    model, trained = run(LBFGS(1e-13), risk, linear(C), risk.weights)
    assert bool(trained.converged)
    assert np.linalg.norm(softmax_gradient(matrix(model), X, y, w, 0.02)) < 2e-13


@pytest.mark.parametrize("trainer", [Newton(1e-5), LBFGS(1e-5)], ids=["newton", "lbfgs"])
def test_float32_models_stay_float32(trainer):
    X, y, _ = classification(7)
    risk = EmpiricalRisk((X.astype(np.float32), y), SoftmaxCrossEntropy(), l2=0.1)
    start = eqx.nn.Linear(D, C, key=jr.key(0), dtype=jnp.float32)
    model = fit(risk, start, trainer)
    assert model.weight.dtype == jnp.float32
    expected = softmax_minimum(X, y, np.ones(N), 0.1, C)
    np.testing.assert_allclose(matrix(model), expected, rtol=0, atol=1e-3)


@given(seed=seeds)
def test_weight_two_is_a_duplicate_and_weight_zero_an_absence(seed):
    X, y, _ = classification(seed)
    w = np.ones(N)
    w[3], w[5] = 2.0, 0.0
    weighted = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    rows = np.r_[np.delete(np.arange(N), 5), 3]  # 23 rows again: n'/n = 1
    rewritten = EmpiricalRisk((X[rows], y[rows]), SoftmaxCrossEntropy(), l2=0.1)
    a, _ = run(Newton(), weighted, linear(C), weighted.weights)
    b, _ = run(Newton(), rewritten, linear(C), rewritten.weights)
    np.testing.assert_allclose(matrix(a), matrix(b), rtol=0, atol=1e-8)
    fewer = np.delete(np.arange(N), 5)
    w[3] = 1.0
    erased = weighted.with_weights(jnp.asarray(w))
    gone = EmpiricalRisk((X[fewer], y[fewer]), SoftmaxCrossEntropy(), l2=0.1 * N / (N - 1))
    a, _ = run(Newton(), erased, linear(C), erased.weights)
    b, _ = run(Newton(), gone, linear(C), gone.weights)
    np.testing.assert_allclose(matrix(a), matrix(b), rtol=0, atol=1e-8)


def descend(W, X, y, weights, l2, batches, rate, momentum):
    """Mini-batch descent with heavy-ball momentum in NumPy, 1/B whatever the weights."""
    velocity = np.zeros_like(W)
    for batch in batches:
        gradient = softmax_gradient(W, X[batch], y[batch], weights[batch], l2)
        velocity = momentum * velocity + gradient
        W = W - rate * velocity
    return W


# Made once: an optax optimiser compares by identity, so that each new one is compiled anew.
DESCENT = SGD(optax.sgd(0.3), batch_size=N, epochs=12, key=jr.key(0))


@given(seed=seeds)
def test_full_batches_are_gradient_descent(seed):
    X, y, w = classification(seed)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    trainer = DESCENT
    model, trained = run(trainer, risk, linear(C), risk.weights)
    expected = descend(matrix(linear(C)), X, y, w, 0.1, [np.arange(N)] * 12, 0.3, 0.0)
    np.testing.assert_allclose(matrix(model), expected, rtol=0, atol=1e-12)
    assert int(trained.steps) == 12


def test_mini_batches_divide_by_their_size_and_drop_the_rest():
    X, y, w = classification(8)
    w[:6] = 0.0
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    trainer = SGD(optax.sgd(0.3, momentum=0.5), batch_size=5, epochs=3, key=jr.key(3))
    epochs = [np.asarray(trainer.batches(N, jnp.asarray(e))) for e in range(3)]
    assert [e.shape for e in epochs] == [(4, 5)] * 3  # 23 = 4·5 + 3: three points sit out
    assert all(len(set(e.ravel())) == 20 for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    model, trained = run(trainer, risk, linear(C), risk.weights)
    expected = descend(matrix(linear(C)), X, y, w, 0.1, np.concatenate(epochs), 0.3, 0.5)
    np.testing.assert_allclose(matrix(model), expected, rtol=0, atol=1e-12)
    assert int(trained.steps) == 12


def test_the_key_alone_decides_the_order():
    X, y, w = classification(9)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    trainer = lambda key: SGD(optax.sgd(0.3), batch_size=5, epochs=3, key=jr.key(key))
    same = [matrix(fit(risk, linear(C), trainer(1))) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert np.abs(same[0] - matrix(fit(risk, linear(C), trainer(2)))).max() > 1e-6


def test_a_run_is_differentiable_in_the_data_weights():
    X, y, w = classification(10)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1, weights=w)
    trainer = SGD(optax.adam(0.1), batch_size=5, epochs=3, key=jr.key(3))
    end = eqx.filter_jit(lambda w: jnp.sum(ravel(run(trainer, risk, linear(C), w)[0])[0] ** 3))
    slope = jax.grad(end)(risk.weights)
    for i in range(0, N, 6):
        step = 1e-5 * jnp.zeros(N).at[i].set(1.0)
        difference = (end(risk.weights + step) - end(risk.weights - step)) / 2e-5
        np.testing.assert_allclose(slope[i], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (Newton(max_steps=2), "within 2 steps"),
        (LBFGS(max_steps=3), "within 3 steps"),
        (Newton(1e-17), "‖∇J‖ < 1e-17"),
        (SGD(optax.sgd(1e200), batch_size=5, epochs=9, key=jr.key(0)), "smaller step"),
    ],
    ids=["newton", "lbfgs", "unreachable", "diverged"],
)
def test_a_fit_that_did_not_converge_is_an_error(trainer, words):
    X, y, _ = classification(11)
    Y = np.eye(C)[y]
    risk = EmpiricalRisk((X, Y), SquaredError(), l2=0.1)
    if isinstance(trainer, Newton):
        risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.001)
    with pytest.raises(RuntimeError, match=r"did not converge: ‖∇J‖ = .*" + words):
        fit(risk, linear(C, 30.0), trainer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Newton(0.0), "must be positive, got 0.0"),
        (lambda: LBFGS(-1.0), "must be positive, got -1.0"),
        (lambda: SGD(0.1, batch_size=1, epochs=1, key=jr.key(0)), "optax.sgd"),
        (lambda: SGD(optax.sgd(0.1), batch_size=1, epochs=1, key=0), "random key"),
        (lambda: Newton(solver="cg"), "solver of lineax"),
        (lambda: Newton(max_steps=0), "at least 1, got 0"),
        (lambda: SGD(optax.sgd(0.1), batch_size=0, epochs=1, key=jr.key(0)), "at least 1, got 0"),
        (lambda: SGD(optax.sgd(0.1), batch_size=2, epochs=1.5, key=jr.key(0)), "got 1.5"),
    ],
)
def test_trainers_refuse_what_they_cannot_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_fit_checks_before_it_works():
    X, y, _ = classification(12)
    risk = EmpiricalRisk((X, y), SoftmaxCrossEntropy(), l2=0.1)
    with pytest.raises(ValueError, match="labels run from 0 to 1"):
        fit(risk, linear(2), Newton())
    with pytest.raises(ValueError, match="Use batch_size=23"):
        fit(risk, linear(C), SGD(optax.sgd(0.1), batch_size=24, epochs=1, key=jr.key(0)))
