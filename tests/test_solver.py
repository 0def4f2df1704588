"""Minimal residuals, and bounds on quadratic forms of an inverse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influx._solver import bounds
from influx._solver.bounds import krylov, lanczos, quadrature
from influx._solver.minres import MINRES
from tests.linear_algebra import result_is, symmetric

P = 16
STEPS = (1, 3, 6, 12)
SEEDS = st.integers(0, 2**32 - 1)


# --- MINRES ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("rtol", "max_steps"))
def minres(A, b, rtol=1e-10, max_steps=None):
    operator = lx.MatrixLinearOperator(A, lx.symmetric_tag)
    return lx.linear_solve(operator, b, MINRES(rtol, 0.0, max_steps), throw=False)


@given(SEEDS, st.sampled_from([1e1, 1e3, 1e5]))
def test_minres_agrees_with_numpy_on_indefinite_systems(seed, condition):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(-np.log(condition), 0, P))
    A, _ = symmetric(rng, size * rng.choice([-1, 1], P))
    b = rng.normal(size=P)
    solution = minres(A, b)
    assert result_is(solution.result, "successful")
    assert np.linalg.norm(b - A @ solution.value) <= 1e-10 * np.linalg.norm(b)
    truth = np.linalg.solve(A, b)
    assert np.linalg.norm(solution.value - truth) <= 2e-10 * condition * np.linalg.norm(truth)


@given(SEEDS, st.integers(1, P - 1), st.booleans())
def test_minres_finds_the_least_norm_solution_of_consistent_singular_systems(seed, nullity, psd):
    rng = np.random.default_rng(seed)
    spectrum = rng.uniform(0.1, 1, P) * (1 if psd else rng.choice([-1, 1], P))
    spectrum[:nullity] = 0
    A, _ = symmetric(rng, spectrum)
    b = A @ rng.normal(size=P)
    solution = minres(A, b)
    assert result_is(solution.result, "successful")
    np.testing.assert_allclose(
        solution.value, np.linalg.pinv(A, rcond=1e-8) @ b, rtol=0, atol=1e-8 * np.linalg.norm(b)
    )


@given(SEEDS, st.integers(1, P - 1))
def test_minres_says_so_where_there_is_no_solution(seed, nullity):
    rng = np.random.default_rng(seed)
    spectrum = rng.uniform(0.1, 1, P) * rng.choice([-1, 1], P)
    spectrum[:nullity] = 0
    A, Q = symmetric(rng, spectrum)
    solution = minres(A, Q @ rng.choice([-1.0, 1.0], P))
    assert result_is(solution.result, "breakdown")
    assert np.linalg.norm(solution.value) < 1e3 * P


def test_minres_ends_in_as_many_steps_as_there_are_eigenvalues():
    A, _ = symmetric(np.random.default_rng(0), np.repeat([-1.0, 0.5, 2.0, 3.0], P // 4))
    assert minres(A, np.ones(P)).stats["num_steps"] == 4
    assert minres(A, np.zeros(P)).stats["num_steps"] == 0


def test_minres_reports_too_few_steps_and_counts_them():
    rng = np.random.default_rng(0)
    A, _ = symmetric(rng, np.linspace(-1, 1, P))
    solution = minres(A, rng.normal(size=P), max_steps=5)
    assert result_is(solution.result, "max_steps_reached")
    assert solution.stats["num_steps"] == 5 == solution.stats["max_steps"]
    operator = lx.MatrixLinearOperator(jnp.asarray(A), lx.symmetric_tag)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        lx.linear_solve(operator, jnp.ones(P), MINRES(1e-10, 0.0, 5)).value.block_until_ready()


def test_minres_says_stagnation_below_what_rounding_allows():
    rng = np.random.default_rng(0)
    A, _ = symmetric(rng, np.geomspace(1e-4, 1, P))
    solution = minres(A, rng.normal(size=P), rtol=1e-17)
    assert result_is(solution.result, "stagnation")


def test_minres_names_what_is_not_finite():
    A, b = np.eye(P), np.ones(P)
    assert result_is(minres(A, b * np.nan).result, "nonfinite_input")
    assert result_is(minres(A * np.nan, b).result, "singular")


def test_minres_under_vmap_is_minres_row_by_row():
    rng = np.random.default_rng(0)
    A, _ = symmetric(rng, np.linspace(-1, 1, P))
    b = rng.normal(size=(4, P)) * np.array([1, 1e-3, 0, 10])[:, None]
    together = jax.vmap(lambda v: minres(jnp.asarray(A), v).value)(jnp.asarray(b))
    np.testing.assert_allclose(together, [minres(A, v).value for v in b], atol=1e-9)
    np.testing.assert_allclose(together, np.linalg.solve(A, b.T).T, atol=1e-7)


def test_minres_takes_pytrees_and_float32():
    def matvec(tree):
        return {"a": 2 * tree["a"] + jnp.sum(tree["b"]), "b": jnp.sum(tree["a"]) - tree["b"]}

    vector = {"a": jnp.ones(2, jnp.float32), "b": jnp.arange(3, dtype=jnp.float32)}
    structure = jax.eval_shape(lambda: vector)
    operator = lx.FunctionLinearOperator(matvec, structure, lx.symmetric_tag)
    solution = lx.linear_solve(operator, vector, MINRES(1e-5, 0.0))
    back = matvec(solution.value)
    for key in vector:
        assert solution.value[key].dtype == jnp.float32
        np.testing.assert_allclose(back[key], vector[key], atol=1e-4)


def test_derivatives_pass_through_minres():
    rng = np.random.default_rng(0)
    A, _ = symmetric(rng, np.linspace(-1, 1, P))
    D, b = symmetric(rng, np.ones(P) + rng.random(P))[0], rng.normal(size=P)
    value = lambda t: jnp.sum(minres(jnp.asarray(A) + t * jnp.asarray(D), jnp.asarray(b)).value)
    inverse = np.linalg.inv(A)
    expected = -np.ones(P) @ inverse @ D @ inverse @ b
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), expected, rtol=1e-6)


def test_the_transposed_state_is_the_state_of_the_transpose():
    A, _ = symmetric(np.random.default_rng(0), np.linspace(-1, 1, P))
    operator, solver = lx.MatrixLinearOperator(jnp.asarray(A), lx.symmetric_tag), MINRES(1e-10, 0.0)
    state, options = solver.transpose(solver.init(operator, {}), {})
    other = solver.init(operator.T, {})
    assert options == {}
    np.testing.assert_array_equal(state.as_matrix(), other.as_matrix())
    assert lx.is_symmetric(state)


@pytest.mark.parametrize(
    ("matrix", "tags", "match"),
    [
        (np.eye(3), (), "symmetric_tag"),
        (np.ones((2, 3)), (), "square"),
        (np.eye(3) * 1j, lx.symmetric_tag, "complex"),
    ],
)
def test_minres_refuses_other_operators(matrix, tags, match):
    with pytest.raises(ValueError, match=match):
        MINRES(1e-8, 0.0).init(lx.MatrixLinearOperator(jnp.asarray(matrix), tags), {})


def test_minres_refuses_bad_settings():
    with pytest.raises(ValueError, match="rtol=-1"):
        MINRES(-1.0, 0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MINRES(1e-8, 0.0, 0)
    operator = lx.MatrixLinearOperator(jnp.eye(3), lx.symmetric_tag)
    with pytest.raises(ValueError, match="no options"):
        lx.linear_solve(operator, jnp.ones(3), MINRES(1e-8, 0.0), options={"y0": jnp.ones(3)})


# --- Lanczos ---------------------------------------------------------------------------------------

_lanczos = jax.jit(lambda H, v, k: lanczos(lambda x: H @ x, v, k), static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def interval(H, v, steps, lower):
    _, alpha, beta = lanczos(lambda x: H @ x, v, steps)
    return quadrature(alpha, beta, jnp.linalg.norm(v), lower, scale=1.0)


@functools.partial(jax.jit, static_argnums=3)
def improve(H, start, v, steps, lower):
    return krylov(lambda x: H @ x, start, v, steps, lower, scale=1.0)


def spectra(rng, kind, lower):
    if kind == "uniform":
        spectrum = np.exp(rng.uniform(np.log(lower), 0, P))
    elif kind == "clusters":
        near = lower * (1 + 1e-6 * rng.random(P))
        spectrum = np.where(rng.random(P) < 0.5, near, rng.choice([0.3, 1.0], P))
    elif kind == "repeated":
        spectrum = rng.choice([lower, min(10 * lower, 1.0), 0.5, 1.0], P)
    else:
        spectrum = np.where(np.arange(P) < P - 4, lower, rng.uniform(0.1, 1, P))
    spectrum[0], spectrum[-1] = lower, 1.0
    return spectrum


KINDS = st.sampled_from(["uniform", "clusters", "repeated", "low rank plus ridge"])
DIRECTIONS = st.sampled_from(["random", "lowest eigenvector", "two eigenvectors"])
# The last conditions are where float64 has next to nothing left: containment holds there too.
CONDITIONS = st.sampled_from([1e1, 1e3, 1e6, 1e9, 1e12])


def problem(seed, kind, condition, direction):
    rng = np.random.default_rng(seed)
    H, Q = symmetric(rng, spectra(rng, kind, 1 / condition))
    if direction == "random":
        v = rng.normal(size=P)
    elif direction == "lowest eigenvector":
        v = Q[:, 0].copy()
    else:
        v = Q[:, 0] + 3 * Q[:, -1]
    # λ_min of the matrix as rounded, in 50 digits: the ridge itself is off by eps·‖H‖.
    with mpmath.workdps(50):
        low = float(mpmath.eigsy(mpmath.matrix(H.tolist()), eigvals_only=True)[0])
    return rng, H, v, low * (1 - 1e-15)


class Exact:
    """xᵀH⁻¹x, and residuals, in 50 digits."""

    def __init__(self, H):
        with mpmath.workdps(50):
            self.H = mpmath.matrix(H.tolist())
            self.inverse = self.H**-1

    def form(self, v):
        with mpmath.workdps(50):
            v = mpmath.matrix(v)
            return (v.T * self.inverse * v)[0]

    def leftovers(self, v, solve):
        with mpmath.workdps(50):
            v = mpmath.matrix(v.tolist())
            at_x = v - self.H * mpmath.matrix(np.asarray(solve.x).tolist())
            as_said = v - mpmath.matrix(np.asarray(solve.Hx).tolist())
            return self.form(at_x), self.form(as_said)


@given(SEEDS, KINDS, CONDITIONS)
def test_lanczos_factors_the_matrix(seed, kind, condition):
    _, H, v, _ = problem(seed, kind, condition, "random")
    for k in STEPS:
        Q, alpha, beta = map(np.asarray, _lanczos(H, v, k))
        alive = np.any(Q != 0, axis=1)
        np.testing.assert_allclose(Q @ Q.T, np.diag(alive.astype(float)), atol=1e-13)
        T = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
        np.testing.assert_allclose((Q @ H @ Q.T)[alive][:, alive], T[alive][:, alive], atol=1e-13)
        rest = H @ Q.T - Q.T @ T
        rest[:, ~alive] = 0
        np.testing.assert_allclose(rest[:, :-1], 0, atol=1e-13)
        np.testing.assert_allclose(np.linalg.norm(rest[:, -1]), beta[-1], atol=1e-13)
        # Padding repeats an entry, which keeps T's spectrum within H's.
        assert np.all(alpha[~alive] == alpha[0])
        ends = np.linalg.eigvalsh(H)[[0, -1]]
        assert np.all(np.linalg.eigvalsh(T) >= ends[0] - 1e-13)
        assert np.all(np.linalg.eigvalsh(T) <= ends[1] + 1e-13)


def test_lanczos_ends_where_the_space_does():
    H, _ = symmetric(np.random.default_rng(0), np.repeat([0.1, 0.4, 0.7, 1.0], P // 4))
    Q, _, beta = map(np.asarray, _lanczos(H, np.ones(P), 6))
    assert np.all(beta[:3] > 1e-3)
    assert np.all(beta[3:] == 0)
    assert np.all(Q[4:] == 0)
    full = np.asarray(_lanczos(np.diag(np.arange(1.0, 5.0)), np.ones(4), 6)[0])
    assert np.all(full[4:] == 0)
    np.testing.assert_allclose(full[:4] @ full[:4].T, np.eye(4), atol=1e-13)


def test_a_zero_vector_has_a_zero_form():
    Q, alpha, beta = _lanczos(np.eye(P), np.zeros(P), 3)
    assert not any(np.any(np.asarray(x)) for x in (Q, alpha, beta))
    assert [float(x) for x in interval(np.eye(P), np.zeros(P), 3, 0.5)] == [0, 0]
    solve = improve(np.eye(P), np.zeros(P), np.zeros(P), 3, 0.5)
    assert float(solve.leftover) == 0
    assert not np.any(solve.x)


def test_nan_is_never_a_bound():
    H = np.eye(P)
    H[3, 3] = np.nan
    assert np.isnan(interval(H, np.ones(P), 3, 0.5)[1])
    assert np.isnan(improve(H, np.zeros(P), np.ones(P), 3, 0.5).leftover)


def test_steps_are_at_least_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lanczos(lambda x: x, jnp.ones(3), 0)


# --- Quadrature ------------------------------------------------------------------------------------


@given(SEEDS, KINDS, CONDITIONS, DIRECTIONS, st.sampled_from([1.0, 0.5, 1e-2]))
def test_gauss_and_radau_contain_the_form_and_tighten(seed, kind, condition, direction, below):
    _, H, v, low = problem(seed, kind, condition, direction)
    truth = Exact(H).form(v.tolist())
    intervals = [tuple(map(float, interval(H, v, k, below * low))) for k in STEPS]
    for lower, upper in intervals:
        assert lower <= truth <= upper
        assert upper <= float(v @ v) / (below * low) * (1 + 1e-12)
    slack = 1e-12 * condition
    for (lower, upper), (next_lower, next_upper) in itertools.pairwise(intervals):
        assert next_lower >= lower * (1 - slack)
        assert next_upper <= upper * (1 + slack)


@given(SEEDS, st.sampled_from([1e1, 1e3, 1e6]))
def test_quadrature_is_exact_where_the_krylov_space_ends(seed, condition):
    rng = np.random.default_rng(seed)
    H, _ = symmetric(rng, rng.choice([1 / condition, 3 / condition, 0.5, 1.0], P))
    v = rng.normal(size=P)
    truth = float(Exact(H).form(v.tolist()))
    for bound in interval(H, v, 6, 0.5 / condition):
        np.testing.assert_allclose(bound, truth, rtol=1e-13 * condition)


def ladder():
    """H with an isolated λ_min = 1e-2 whose eigenvector v barely meets: no Ritz value of few steps tells
    a wrong `lower` from a right one."""
    return np.diag(np.r_[1e-2, np.linspace(0.5, 1, P - 1)]), np.r_[0.1, np.ones(P - 1)], 1e-2


def test_a_lower_end_too_large_by_two_breaks_containment():
    # This is what the guarantee rests on; the test shows that containment can fail at all.
    H, v, low = ladder()
    truth = float(v @ (v / np.diag(H)))
    assert truth <= interval(H, v, 3, low)[1]
    assert truth > interval(H, v, 3, 2 * low)[1]


def test_the_gauss_rule_is_no_upper_bound():
    H, v, low = ladder()
    truth = float(v @ (v / np.diag(H)))
    gauss, radau = interval(H, v, 3, low)
    assert gauss < 0.99 * truth
    assert truth <= radau


def test_a_lower_end_above_a_ritz_value_is_refuted():
    H, v, _ = ladder()
    assert tuple(map(float, interval(H, v, 12, 0.5))) == (0, np.inf)
    assert improve(H, np.zeros(P), v, 12, 0.5).leftover == np.inf


# --- The improved solve ----------------------------------------------------------------------------


@given(SEEDS, KINDS, CONDITIONS, DIRECTIONS, st.sampled_from([1.0, 0.1]), st.booleans())
def test_the_leftover_is_never_below_the_truth(seed, kind, condition, direction, below, warm):
    rng, H, v, low = problem(seed, kind, condition, direction)
    start = np.linalg.solve(H + 1e-2 * np.eye(P), v) if warm else np.zeros(P)
    start = start + (1e-3 * rng.normal(size=P) if warm else 0)
    exact = Exact(H)
    for k in STEPS:
        solve = improve(H, start, v, k, below * low)
        assert float(solve.leftover) >= max(exact.leftovers(v, solve))


@given(SEEDS, KINDS, st.sampled_from([1e1, 1e3]))
def test_the_improved_solve_is_conjugate_gradients(seed, kind, condition):
    rng, H, v, low = problem(seed, kind, condition, "random")
    start = rng.normal(size=P)
    for k in (1, 3):
        solve = improve(H, start, v, k, low)
        # The minimiser of (v − Hx)ᵀH⁻¹(v − Hx) over start + span{ρ, Hρ, …}, by least squares.
        rho = v - H @ start
        powers = np.linalg.qr(np.stack([np.linalg.matrix_power(H, j) @ rho for j in range(k)], 1))[
            0
        ]
        y = np.linalg.solve(powers.T @ H @ powers, powers.T @ rho)
        np.testing.assert_allclose(
            solve.x, start + powers @ y, atol=1e-9 * condition * np.linalg.norm(v)
        )
        np.testing.assert_allclose(solve.Hx, H @ solve.x, atol=1e-12 * np.linalg.norm(solve.x))


@given(SEEDS, st.sampled_from([1e2, 1e3]))
def test_the_leftover_shrinks_with_steps_and_is_far_below_the_crude_bound(seed, condition):
    rng = np.random.default_rng(seed)
    spectrum = 1 / condition + np.geomspace(1, 1e-2 / condition, P)
    H, _ = symmetric(rng, spectrum)
    v, low = rng.normal(size=P), 1 / condition
    exact, before = Exact(H), np.inf
    for k in STEPS:
        solve = improve(H, np.zeros(P), v, k, low)
        assert solve.leftover <= before * (1 + 1e-9)
        before = solve.leftover
        crude = float(np.sum(np.square(v - solve.Hx))) / low
        assert solve.leftover <= crude * (1 + 1e-9)
        truth = float(exact.leftovers(v, solve)[0])
        assert solve.leftover <= max(30 * truth, 1e-20 * float(exact.form(v.tolist())))


def test_the_rounding_term_is_needed():
    # After the space is exhausted all that is left is rounding: a formula without it would say 0.
    H, _ = symmetric(np.random.default_rng(0), np.repeat([1e-6, 0.4, 0.7, 1.0], P // 4))
    v = np.random.default_rng(1).normal(size=P)
    solve = improve(H, np.zeros(P), v, 6, 0.999e-6)
    truth = max(Exact(H).leftovers(v, solve))
    assert 0 < truth <= float(solve.leftover) <= 1e-10 * float(Exact(H).form(v.tolist()))


def test_bounds_under_vmap_are_the_bounds_row_by_row():
    H = jnp.asarray(symmetric(np.random.default_rng(0), np.linspace(0.1, 1, P))[0])
    V = jr.normal(jr.key(0), (3, P)).at[1].set(0.0)
    solve = lambda v: improve(H, 0.5 * v, v, 6, 0.1)
    together, alone = jax.vmap(solve)(V), [solve(v) for v in V]
    np.testing.assert_allclose(together.x, [one.x for one in alone], atol=1e-12)
    np.testing.assert_allclose(together.leftover, [one.leftover for one in alone], rtol=1e-6)


def test_float32_bounds_contain():
    rng = np.random.default_rng(0)
    H = symmetric(rng, np.geomspace(1e-2, 1, P))[0].astype(np.float32)
    v = rng.normal(size=P).astype(np.float32)
    exact = Exact(H.astype(np.float64))
    lower, upper = interval(H, v, 6, np.float32(0.0099))
    assert upper.dtype == jnp.float32
    assert float(lower) <= exact.form(v.tolist()) <= float(upper)
    solve = improve(H, np.zeros(P, np.float32), v, 6, np.float32(0.0099))
    assert float(solve.leftover) >= max(exact.leftovers(v, solve))


def test_the_margin_of_rounding_is_what_keeps_containment(monkeypatch):
    # v = the lowest eigenvector: the form is 1/λ_min to the last digit and T has one entry, so that
    # without a margin rounding alone decides on which side of the truth the bounds fall.
    misses = 0
    monkeypatch.setattr(bounds, "_PRODUCT", 0)
    for seed in range(10):
        _, H, v, low = problem(seed, "uniform", 1e6, "lowest eigenvector")
        _, alpha, beta = _lanczos(H, v, 1)
        lower, upper = quadrature(alpha, beta, jnp.linalg.norm(v), 0.5 * low)
        misses += not float(lower) <= Exact(H).form(v.tolist()) <= float(upper)
    assert misses > 0
