"""The Neumann series: its partial sums, its measured step, and its limit, the direct solve."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import influx as ix
from influx._linalg import ravel
from influx._solver.neumann import Neumann
from tests.helpers import LAMBDA, linear_model, problem
from tests.linear_algebra import result_is, symmetric

P = 16
SEEDS = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnames=("rtol", "max_steps"))
def neumann(A, b, rtol=1e-10, max_steps=None, step=None):
    operator = lx.MatrixLinearOperator(A, lx.symmetric_tag)
    return lx.linear_solve(operator, b, Neumann(rtol, 0.0, max_steps, step), throw=False)


# --- The solver ------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1e1, 1e2]))
def test_neumann_agrees_with_numpy(seed, condition):
    rng = np.random.default_rng(seed)
    A = symmetric(rng, np.exp(rng.uniform(-np.log(condition), 0, P)))[0]
    b = rng.normal(size=P)
    solution = neumann(A, b)
    assert result_is(solution.result, "successful")
    assert np.linalg.norm(b - A @ solution.value) <= 1e-10 * np.linalg.norm(b)
    truth = np.linalg.solve(A, b)
    assert np.linalg.norm(solution.value - truth) <= 2e-10 * condition * np.linalg.norm(truth)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_iterate_is_a_partial_sum_of_the_series(steps):
    rng = np.random.default_rng(0)
    A, b, s = symmetric(rng, np.linspace(0.1, 1.5, P))[0], rng.normal(size=P), 0.4
    terms = [s * np.linalg.matrix_power(np.eye(P) - s * A, j) @ b for j in range(steps)]
    solution = neumann(A, b, max_steps=steps, step=s)
    np.testing.assert_allclose(solution.value, sum(terms), rtol=1e-12)
    assert result_is(solution.result, "max_steps_reached")
    assert solution.stats["num_steps"] == steps == solution.stats["max_steps"]


@given(SEEDS, st.sampled_from([1, 2, P // 2]))
def test_the_measured_step_converges_and_the_sums_grow(seed, copies):
    """From below: with s‖A‖ ≤ 1 every term of the series is positive semi-definite."""
    rng = np.random.default_rng(seed)
    spectrum = np.exp(rng.uniform(-3, 3, P))
    spectrum[:copies] = spectrum.max()
    A, b = symmetric(rng, spectrum)[0], rng.normal(size=P)
    operator = lx.MatrixLinearOperator(jnp.asarray(A), lx.symmetric_tag)
    _, step = Neumann(1e-10, 0.0).init(operator, {})
    # P is below the 20 Lanczos steps: the Ritz value is the norm, and the step 1/1.1 of 1/‖A‖.
    np.testing.assert_allclose(step, 1 / (1.1 * spectrum.max()), rtol=1e-9)
    forms = [b @ np.asarray(neumann(A, b, max_steps=k).value) for k in (1, 8, 64)]
    assert np.all(np.diff(forms) >= -1e-9 * forms[-1])
    assert forms[-1] <= b @ np.linalg.solve(A, b) * (1 + 1e-9)


def test_the_measured_step_is_safe_for_a_spectrum_that_lanczos_does_not_resolve():
    n = 600
    spectrum = np.r_[np.linspace(0.5, 1, n - 1), 1.02]
    operator = lx.DiagonalLinearOperator(jnp.asarray(spectrum))
    _, step = Neumann(1e-8, 0.0).init(operator, {})
    assert 1 / 1.1 < step * 1.02 < 1  # the Ritz value is below the norm, by less than the margin
    solution = lx.linear_solve(operator, jnp.ones(n), Neumann(1e-8, 0.0))
    np.testing.assert_allclose(solution.value, 1 / spectrum, rtol=1e-6)


def test_neumann_says_why_there_is_no_solution():
    rng = np.random.default_rng(0)
    A, b = symmetric(rng, np.linspace(0.1, 1, P))[0], rng.normal(size=P)
    assert result_is(neumann(A, b, step=2.1).result, "breakdown")  # too long a step
    assert result_is(neumann(A - 0.5 * np.eye(P), b, step=0.9).result, "breakdown")  # indefinite
    assert result_is(neumann(A, b, rtol=1e-18).result, "stagnation")
    singular = symmetric(rng, np.r_[0.0, np.linspace(0.5, 1, P - 1)])[0]
    assert result_is(neumann(singular, b, max_steps=500).result, "max_steps_reached")
    assert result_is(neumann(A * np.nan, b).result, "singular")
    assert result_is(neumann(A, b * np.nan).result, "nonfinite_input")
    assert neumann(A, np.zeros(P)).stats["num_steps"] == 0


def test_neumann_under_vmap_is_neumann_row_by_row():
    rng = np.random.default_rng(0)
    A = symmetric(rng, np.linspace(0.2, 1, P))[0]
    b = rng.normal(size=(4, P)) * np.array([1, 1e-3, 0, 10])[:, None]
    together = jax.vmap(lambda v: neumann(jnp.asarray(A), v).value)(jnp.asarray(b))
    np.testing.assert_allclose(together, [neumann(A, v).value for v in b], atol=1e-9)
    np.testing.assert_allclose(together, np.linalg.solve(A, b.T).T, atol=1e-7)


def test_neumann_takes_pytrees_and_float32():
    def matvec(tree):
        return {"a": 3 * tree["a"] + tree["b"], "b": tree["a"] + 2 * tree["b"]}

    vector = {"a": jnp.ones(2, jnp.float32), "b": jnp.arange(2, dtype=jnp.float32)}
    structure = jax.eval_shape(lambda: vector)
    operator = lx.FunctionLinearOperator(matvec, structure, lx.symmetric_tag)
    solution = lx.linear_solve(operator, vector, Neumann(1e-5, 0.0))
    back = matvec(solution.value)
    for key in vector:
        assert solution.value[key].dtype == jnp.float32
        np.testing.assert_allclose(back[key], vector[key], atol=1e-4)


def test_derivatives_pass_through_neumann():
    rng = np.random.default_rng(0)
    (A, _), (D, _) = (
        symmetric(rng, np.linspace(0.2, 1, P)),
        symmetric(rng, np.ones(P) + rng.random(P)),
    )
    b = rng.normal(size=P)
    value = lambda t: jnp.sum(neumann(jnp.asarray(A) + t * jnp.asarray(D), jnp.asarray(b)).value)
    inverse = np.linalg.inv(A)
    expected = -np.ones(P) @ inverse @ D @ inverse @ b
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), expected, rtol=1e-6)


def test_the_transposed_state_is_the_state_of_the_transpose():
    A, _ = symmetric(np.random.default_rng(0), np.linspace(0.2, 1, P))
    operator, solver = lx.MatrixLinearOperator(jnp.asarray(A), lx.symmetric_tag), Neumann(1e-8, 0.0)
    (matrix, step), options = solver.transpose(solver.init(operator, {}), {})
    other, other_step = solver.init(operator.T, {})
    assert options == {}
    np.testing.assert_array_equal(matrix.as_matrix(), other.as_matrix())
    np.testing.assert_allclose(step, other_step, rtol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "tags", "match"),
    [(np.eye(3), (), "symmetric_tag"), (np.eye(3) * 1j, lx.symmetric_tag, "complex")],
)
def test_neumann_refuses_other_operators(matrix, tags, match):
    with pytest.raises(ValueError, match=match):
        Neumann(1e-8, 0.0).init(lx.MatrixLinearOperator(jnp.asarray(matrix), tags), {})


def test_neumann_refuses_bad_settings():
    with pytest.raises(ValueError, match="rtol=-1"):
        Neumann(-1.0, 0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Neumann(1e-8, 0.0, 0)
    operator = lx.MatrixLinearOperator(jnp.eye(3), lx.symmetric_tag)
    with pytest.raises(ValueError, match="no options"):
        lx.linear_solve(operator, jnp.ones(3), Neumann(1e-8, 0.0), options={"y0": jnp.ones(3)})


# --- The curvature. That its solves are those of the dense matrix, tests of all curvatures say. -----


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_limit_is_the_direct_solve_at_the_stated_damping(damping):
    _, risk, model, queries = problem("softmax")
    exact = ix.influence(risk, model, ix.Hessian(damping=damping))(queries)
    series = ix.influence(risk, model, ix.Neumann(ix.Hessian(damping=damping), rtol=1e-12))(queries)
    np.testing.assert_allclose(series, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("inner", [ix.Hessian(damping=LAMBDA), ix.GaussNewton(damping=LAMBDA)])
def test_newton_steps_are_those_of_the_direct_solve(inner):
    """Those of a network's Hessian solve with a perturbed curvature, at the step of the whole one."""
    _, risk, model, _ = problem("network")
    points = jnp.arange(3)
    series = ix.influence(risk, model, ix.Neumann(inner, rtol=1e-12)).response.displace(points)
    direct = ix.influence(risk, model, inner).response.displace(points)
    np.testing.assert_allclose(series, direct, rtol=1e-7, atol=1e-9)


def test_a_series_that_does_not_converge_says_so():
    _, risk, model, queries = problem("network")
    f = ix.influence(risk, model, ix.Neumann(ix.GaussNewton(), max_steps=3))
    with pytest.raises(Exception, match="did not converge"):
        f(queries)
    finding = ix.diagnose(f)["solve"]
    assert finding.verdict == "bad"
    assert "max_steps" in finding.remedy
    free = ix.EmpiricalRisk(problem("softmax")[1].data, ix.SoftmaxCrossEntropy())
    singular = ix.influence(free, linear_model(inputs=2), ix.Neumann(ix.Hessian(), max_steps=300))
    with pytest.raises(Exception, match="did not converge"):
        singular.response.solve(jnp.ones((1, 9)))  # a null direction: softmax without l2


def test_a_curvature_in_which_the_series_diverges_is_refused():
    _, risk, model, _ = problem("network")
    theta, rebuild = ravel(model)
    elsewhere = rebuild(theta + 2.5 * jr.normal(jr.key(0), theta.shape))
    with pytest.raises(ValueError, match=r"not positive definite.*at most -.*damping > .*MINRES"):
        ix.influence(risk, elsewhere, ix.Neumann(ix.Hessian()))
    broken = ix.CustomLoss(lambda o, y: jnp.sum(jnp.sqrt(jnp.abs(o - o))))
    data = jnp.ones((3, 4)), jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"NaN or infinite.*log\(0\)"):
        ix.Neumann(ix.Hessian()).factor(ix.EmpiricalRisk(data, broken), linear_model())
    with pytest.raises(ValueError, match="`max_steps` must be a whole number"):
        ix.Neumann(ix.Hessian(), max_steps=0)
    with pytest.raises(ValueError, match="such as influx"):
        ix.Neumann(ix.Hessian)
