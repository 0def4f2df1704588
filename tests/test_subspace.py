"""Curvatures that look at few directions: where they are exact, on which side they err, what they drop.

That they are the dense matrix at full rank, tests of all curvatures say.
"""

import functools
import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx._curvature.subspace import random_subspace
from influx._linalg import ravel
from proofs_checks import _oracle as oracle
from proofs_checks._library import model_at, risk_of
from proofs_checks._oracle import Family
from proofs_checks._problems import draw
from tests.helpers import CURVATURES, LAMBDA, OfFullRank, linear_model, problem

WIDE = Family("wide", "softmax", (3, 4, 3), n=30)
P = WIDE.P  # 31
GGN = ix.GaussNewton(damping=LAMBDA)
KEY = jr.key(0)
RANKS = (3, 6, 12)  # few, and the same everywhere: each is a program of its own
MEMBERS = {
    "Arnoldi": lambda curvature, rank, key=KEY: ix.Arnoldi(curvature, rank, key=key),
    "dropped": lambda curvature, rank, key=KEY: ix.Arnoldi(
        curvature, rank, key=key, complement=False
    ),
    "Nystrom": lambda curvature, rank, key=KEY: ix.Nystrom(curvature, rank, key=key),
    "Projected": lambda curvature, rank, key=KEY: ix.Projected(curvature, rank, key=key),
}
ALL = pytest.mark.parametrize("member", MEMBERS)


@functools.cache
def wide(seed: int = 0):
    """A network with uneven weights and an l2 per leaf, and F, its Gauss–Newton matrix without l2."""
    p = draw(WIDE, seed, 0.0, True)
    F = oracle.gauss_newton(p, p.theta) - np.diag(p.penalty)
    return p, risk_of(p), model_at(p.family, p.theta), F


@functools.cache
def uniform(l2: float = 0.05):
    """The same with one l2 for all parameters."""
    _, risk, model, F = wide()
    return ix.EmpiricalRisk(risk.data, risk.loss, l2=l2, weights=risk.weights), model, F


@eqx.filter_jit
def _applied(fn):
    theta_size = P
    return jax.vmap(fn)(jnp.eye(theta_size))


def inverse_of(curvature, risk, model) -> np.ndarray:
    return np.asarray(_applied(curvature.factor(risk, model).solve))


def matrix_of(curvature, risk, model) -> np.ndarray:
    return np.asarray(_applied(curvature.matvec(risk, model)))


def sizes(p, inverse: np.ndarray) -> np.ndarray:
    g = oracle.gradients(p, p.theta)
    return np.einsum("np,pq,nq->n", g, inverse, g)


def score_error(p, inverse: np.ndarray) -> float:
    g, m = oracle.gradients(p, p.theta), oracle.measurement_gradient(p)
    exact = np.linalg.inv(oracle.gauss_newton(p, p.theta) + LAMBDA * np.eye(P))
    return np.linalg.norm(m @ (inverse - exact) @ g.T) / np.linalg.norm(m @ exact @ g.T)


# --- Where they are exact --------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["Arnoldi", "Nystrom"])
def test_exact_on_data_of_that_rank(member):
    """Softmax regression has (classes − 1)(features + 1) = 6 directions, and here an l2 per leaf."""
    p, risk, model, queries = problem("softmax")
    matrix = oracle.gauss_newton(p, p.theta) + LAMBDA * np.eye(p.theta.size)
    g, m = oracle.gradients(p, p.theta), oracle.measurement_gradient(p)
    expected = -m @ np.linalg.solve(matrix, g.T)
    scores = lambda rank: ix.influence(risk, model, MEMBERS[member](GGN, rank))(queries)
    np.testing.assert_allclose(scores(6), expected, rtol=1e-7, atol=1e-10)
    # One eigenvalue left out is its own mean, and gradients have nothing where there is none.
    fewer = 4 if member == "Arnoldi" else 5
    assert np.linalg.norm(scores(fewer) - expected) > 1e-3 * np.linalg.norm(expected)


@ALL
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_at_full_rank_the_limit_is_the_direct_solve_at_the_stated_damping(member, damping):
    p, risk, model, F = wide()
    inverse = inverse_of(MEMBERS[member](ix.GaussNewton(damping=damping), P), risk, model)
    direct = np.linalg.inv(F + np.diag(p.penalty + damping))
    np.testing.assert_allclose(inverse, direct, rtol=1e-8, atol=1e-9)


@ALL
def test_repeated_eigenvalues_are_all_found(member):
    """One Krylov space has one vector of each eigenspace."""
    _, risk, model, _ = problem("softmax")
    blocks = MEMBERS[member](ix.Identity(damping=0.5), 9).factor(risk, model)
    v = jr.normal(jr.key(1), (9,))
    np.testing.assert_allclose(blocks.solve(v), v / 1.5, rtol=1e-10)


INNER = {
    "BlockDiagonal": ix.BlockDiagonal(ix.GaussNewton(damping=LAMBDA)),
    "Fisher empirical": ix.Fisher("empirical", damping=LAMBDA),
    "MINRES": ix.MINRES(ix.GaussNewton(damping=LAMBDA)),
}


@pytest.mark.parametrize("inner", INNER)
def test_they_take_any_curvature_and_go_into_any(inner):
    p, risk, model, _ = problem("network")
    size = p.theta.size
    v = jr.normal(jr.key(1), (size,))
    dense = CURVATURES[inner][1](p)
    expected = np.linalg.solve(dense + LAMBDA * np.eye(size), v)
    for make in MEMBERS.values():
        factored = make(INNER[inner], size).factor(risk, model)
        np.testing.assert_allclose(eqx.filter_jit(factored.solve)(v), expected, rtol=1e-7)


@ALL
def test_blocks_of_them_are_blocks(member):
    p, risk, model, _ = problem("network")
    dense = CURVATURES["BlockDiagonal"][1](p) + LAMBDA * np.eye(p.theta.size)
    blocks = ix.BlockDiagonal(OfFullRank(lambda size: MEMBERS[member](GGN, size)))
    v = jr.normal(jr.key(1), (p.theta.size,))
    solved = blocks.factor(risk, model).solve(v)
    np.testing.assert_allclose(solved, np.linalg.solve(dense, v), rtol=1e-7)


# --- What they are below full rank: the definitions, in NumPy --------------------------------------


@pytest.mark.parametrize("rank", [3, 12])
def test_nystrom_is_its_definition_and_lies_below(rank):
    p, risk, model, F = wide()
    got = matrix_of(ix.Nystrom(GGN, rank, key=KEY), risk, model) - np.diag(p.penalty)
    omega = np.asarray(random_subspace(KEY, rank, model)).T
    expected = F @ omega @ np.linalg.solve(omega.T @ F @ omega, omega.T @ F)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.linalg.norm(F, 2))
    assert np.linalg.eigvalsh(F - got)[0] >= -1e-10
    best = np.linalg.svd(F, compute_uv=False)[rank]  # no matrix of that rank is nearer
    assert np.linalg.norm(F - got, 2) >= best * (1 - 1e-9)


def test_a_larger_nystrom_sketch_of_the_same_key_only_adds():
    _, risk, model, F = wide()
    matrices = [matrix_of(ix.Nystrom(GGN, rank, key=KEY), risk, model) for rank in RANKS]
    for small, large in itertools.pairwise(matrices):
        assert np.linalg.eigvalsh(large - small)[0] >= -1e-9 * np.linalg.norm(F, 2)


def truncated(F: np.ndarray, rank: int, start: np.ndarray):
    """Leading eigenpairs by size, and the weighted mean of the others as `start` sees them."""
    values, vectors = np.linalg.eigh(F)
    order = np.argsort(-np.abs(values))
    values, vectors = values[order], vectors[:, order]
    share, rest = (vectors[:, rank:].T @ start) ** 2, np.abs(values[rank:])
    return values[:rank], vectors[:, :rank], (share * rest**2).sum() / (share * rest).sum()


@pytest.mark.parametrize("rank", [3, 12])
def test_arnoldi_is_the_leading_eigenvectors_and_the_mean_of_the_rest(rank):
    p, risk, model, F = wide()
    values, V, c = truncated(F, rank, np.asarray(jr.normal(KEY, (P,))))
    got = matrix_of(ix.Arnoldi(GGN, rank, key=KEY, steps=P), risk, model)
    expected = (V * (values - c)) @ V.T + c * np.eye(P) + np.diag(p.penalty)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    inverse = inverse_of(ix.Arnoldi(GGN, rank, key=KEY, steps=P), risk, model)
    np.testing.assert_allclose(
        inverse, np.linalg.inv(expected + LAMBDA * np.eye(P)), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("rank", [3, 12])
def test_arnoldi_with_one_l2_is_the_published_formula(rank):
    risk, model, F = uniform()
    values, V, c = truncated(F, rank, np.asarray(jr.normal(KEY, (P,))))
    theta, kept = values + 0.05, np.eye(P) - V @ V.T
    for complement in (True, False):
        curvature = ix.Arnoldi(GGN, rank, key=KEY, steps=P, complement=complement)
        expected = V @ np.diag(1 / (theta + LAMBDA)) @ V.T
        expected = expected + complement * kept / (c + 0.05 + LAMBDA)
        np.testing.assert_allclose(inverse_of(curvature, risk, model), expected, atol=1e-9)


def test_few_steps_find_the_leading_directions():
    """20 steps beyond twice the rank, the default, are nearly as good as all P."""
    risk, model, F = uniform()
    top = np.linalg.eigvalsh(F)[::-1][:4]
    curvature = ix.Arnoldi(GGN, 4, key=KEY, steps=14, complement=False)
    inverse = inverse_of(curvature, risk, model)
    got = np.sort(1 / np.linalg.eigvalsh(inverse)[-4:])[::-1] - 0.05 - LAMBDA
    np.testing.assert_allclose(got, top, rtol=1e-3)
    assert np.all(got <= top * (1 + 1e-9))  # Ritz values interlace


def test_arnoldi_keeps_negative_eigenvalues_by_their_size():
    """Of the data part; the whole is positive definite here by its damping."""
    p, risk, model, _ = wide()
    theta, rebuild = ravel(model)
    elsewhere = rebuild(theta + jr.normal(jr.key(0), theta.shape))
    F = oracle.hessian(p, np.asarray(ravel(elsewhere)[0])) - np.diag(p.penalty)
    values, V, c = truncated(F, 8, np.asarray(jr.normal(KEY, (P,))))
    assert values.min() < 0
    damping = 1 - values.min()
    curvature = ix.Arnoldi(ix.Hessian(damping=damping), 8, key=KEY, steps=P)
    expected = (V * (values - c)) @ V.T + (c + damping) * np.eye(P) + np.diag(p.penalty)
    np.testing.assert_allclose(
        inverse_of(curvature, risk, elsewhere), np.linalg.inv(expected), atol=1e-9
    )
    with pytest.raises(ValueError, match=r"indefinite.*eigenvalue of at most -.*damping > "):
        ix.Arnoldi(ix.Hessian(), 8, key=KEY).factor(risk, elsewhere)
    with pytest.raises(ValueError, match=r"indefinite: its smallest eigenvalue is -"):
        ix.Arnoldi(ix.Hessian(), 8, key=KEY, complement=False).factor(risk, elsewhere)


@pytest.mark.parametrize("member", ["Projected", "dropped"])
def test_a_projection_is_the_galerkin_solve_and_its_law_holds_on_its_span(member):
    p, risk, model, F = wide()
    A = F + np.diag(p.penalty + LAMBDA)
    factored = MEMBERS[member](GGN, 5).factor(risk, model)
    Q = np.asarray(factored.basis)
    np.testing.assert_allclose(Q @ Q.T, np.eye(5), atol=1e-12)
    solve = lambda v: np.asarray(factored.solve(jnp.asarray(v)))
    matvec = lambda v: np.asarray(factored.matvec(jnp.asarray(v)))
    rng = np.random.default_rng(0)
    v, inside = rng.normal(size=P), Q.T @ rng.normal(size=5)
    np.testing.assert_allclose(matvec(v), A @ v, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(solve(v), Q.T @ np.linalg.solve(Q @ A @ Q.T, Q @ v), atol=1e-10)
    np.testing.assert_allclose(solve(matvec(inside)), inside, atol=1e-10)
    np.testing.assert_allclose(Q @ matvec(solve(v)), Q @ v, atol=1e-10)
    np.testing.assert_allclose(Q @ solve(v), np.linalg.solve(Q @ A @ Q.T, Q @ v), atol=1e-10)


def test_only_the_span_of_the_projection_counts():
    """Any other rows of the same span give the same scores, with λRRᵀ in place of λI."""
    p, risk, model, F = wide()
    A = F + np.diag(p.penalty)
    R = np.random.default_rng(0).normal(size=(5, 5)) @ random_subspace(KEY, 5, model)
    expected = R.T @ np.linalg.solve(R @ A @ R.T + LAMBDA * R @ R.T, R)
    got = inverse_of(ix.Projected(GGN, 5, key=KEY), risk, model)
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


# --- On which side they err, and how far -----------------------------------------------------------


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_self_influence_is_never_above_in_a_subspace_and_never_below_with_nystrom(seed):
    """P9d, and F̂ ≼ F; both tighten as directions are added."""
    p, risk, model, F = wide(seed % 3)
    exact = sizes(p, np.linalg.inv(F + np.diag(p.penalty + LAMBDA)))
    inside, outside = (
        [sizes(p, inverse_of(make(GGN, rank, key=jr.key(seed)), risk, model)) for rank in RANKS]
        for make in (MEMBERS["Projected"], MEMBERS["Nystrom"])
    )
    slack = 1e-9 * exact.max()
    for small, large in zip(inside, [*inside[1:], exact]):
        assert np.all(small <= large + slack)
    for small, large in zip(outside, [*outside[1:], exact]):
        assert np.all(small >= large - slack)


@ALL
def test_the_error_falls_with_the_rank(member):
    p, risk, model, _ = wide()
    errors = [score_error(p, inverse_of(MEMBERS[member](GGN, rank), risk, model)) for rank in RANKS]
    assert np.all(np.diff(errors) < 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_complement_is_worth_keeping_and_its_mean_well_chosen(seed):
    """In the order: the weighted mean, nothing (the published method), the prior alone."""
    p, risk, model, F = wide(seed)
    for rank in RANKS[:2]:
        kept = score_error(p, inverse_of(ix.Arnoldi(GGN, rank, key=KEY), risk, model))
        dropped = ix.Arnoldi(GGN, rank, key=KEY, complement=False)
        values, V, _ = truncated(F, rank, np.ones(P))
        prior = np.linalg.inv((V * values) @ V.T + np.diag(p.penalty + LAMBDA))
        assert kept < score_error(p, inverse_of(dropped, risk, model))
        assert kept < score_error(p, prior)
        random = score_error(p, inverse_of(ix.Projected(GGN, rank, key=KEY), risk, model))
        assert kept < random


# --- One meaning of n, λ and the numbers -----------------------------------------------------------


@pytest.mark.parametrize("member", [*MEMBERS, "Neumann"])
def test_data_twice_over_are_the_same_curvature(member):
    _, risk, model, _ = wide()
    rank = 6
    twice = jtu.tree_map(lambda x: jnp.concatenate([x, x]), risk.data)
    weights = jnp.concatenate([risk.weights, risk.weights])
    double = ix.EmpiricalRisk(twice, risk.loss, l2=risk.l2, weights=weights)
    make = (lambda c, _: ix.Neumann(c)) if member == "Neumann" else MEMBERS[member]
    once, again = (inverse_of(make(GGN, rank), r, model) for r in (risk, double))
    np.testing.assert_allclose(once, again, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("member", [*MEMBERS, "Neumann"])
def test_another_damping_is_another_answer_of_the_same_program(member):
    traces = []

    def loss(o, y):
        traces.append(1)
        return jnp.sum(jnp.square(o - y))

    data = jr.normal(jr.key(1), (8, 4)), jnp.ones((8, 3))
    risk, model = ix.EmpiricalRisk(data, ix.CustomLoss(loss), l2=0.1), linear_model()
    make = (lambda c, _: ix.Neumann(c)) if member == "Neumann" else MEMBERS[member]
    solve = eqx.filter_jit(lambda factored, v: factored.solve(v))

    def answer(damping):
        curvature = make(ix.GaussNewton(damping=damping), 6)
        return solve(curvature.factor(risk, model), jnp.ones(15))

    first = answer(0.1)
    count = len(traces)
    other, again = answer(0.2), answer(0.1)
    assert len(traces) == count
    assert np.array_equal(first, again)
    assert np.linalg.norm(first - other) > 1e-3 * np.linalg.norm(first)


@ALL
def test_the_lower_end_lies_below_the_spectrum(member):
    p, risk, model, _ = wide()
    curvature = MEMBERS[member](GGN, 6)
    lowest = np.linalg.eigvalsh(matrix_of(curvature, risk, model))[0] + LAMBDA
    end = curvature.lower_end(risk, model)
    assert p.penalty.min() + LAMBDA - 1e-9 <= end <= lowest + 1e-12
    hessian = MEMBERS[member](ix.Hessian(damping=LAMBDA), 6)
    if member in ("Projected", "dropped"):
        assert hessian.lower_end(risk, model) is None  # as of a network's Hessian itself


@ALL
def test_the_lower_end_of_blocks_lies_below_each(member):
    """Of an approximation a block's end may lie below that of the whole."""
    p, risk, model, _ = wide()
    curvature = ix.BlockDiagonal(MEMBERS[member](GGN, 3))
    lowest = np.linalg.eigvalsh(matrix_of(curvature, risk, model))[0] + LAMBDA
    assert p.penalty.min() + LAMBDA - 1e-9 <= curvature.lower_end(risk, model) <= lowest + 1e-12


@ALL
def test_float32_stays_float32(member):
    p, risk, model, _ = wide()
    single = lambda tree: jtu.tree_map(
        lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
    )
    factored = MEMBERS[member](GGN, P).factor(single(risk), single(model))
    g = oracle.gradients(p, p.theta)[0]
    solved = factored.solve(jnp.asarray(g, jnp.float32))
    assert solved.dtype == jnp.float32
    exact = np.linalg.solve(oracle.gauss_newton(p, p.theta) + LAMBDA * np.eye(P), g)
    assert np.linalg.norm(np.asarray(solved) - exact) < 1e-3 * np.linalg.norm(exact)


# --- Steps, certificates, diagnosis ----------------------------------------------------------------


@pytest.mark.parametrize("inner", [ix.GaussNewton(damping=LAMBDA), ix.Hessian(damping=LAMBDA)])
def test_newton_steps_of_a_projection_are_those_within_its_span(inner):
    p, risk, model, _ = problem("network")
    f = ix.influence(risk, model, ix.Projected(inner, 5, key=KEY))
    got, Q = f.response.displace(jnp.arange(3)), np.asarray(f.response.factored.basis)
    A = oracle.jacobians(p.family, p.theta, p.X)
    S = oracle.output_hessians(p.family.loss, oracle.outputs(p.family, p.theta, p.X))
    for i in range(3):
        w = np.where(np.arange(p.n) == i, 0.0, p.w)
        if isinstance(inner, ix.Hessian):
            H = oracle.hessian(p, p.theta, w)
        else:
            H = oracle.gauss_newton(p, p.theta) - p.w[i] / p.n * A[i].T @ S[i] @ A[i]
        H = H + LAMBDA * np.eye(p.theta.size)
        step = -Q.T @ np.linalg.solve(Q @ H @ Q.T, Q @ oracle.gradient(p, p.theta, w))
        np.testing.assert_allclose(got[i], step, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("member", ["Arnoldi", "Nystrom"])
def test_a_matrix_of_low_rank_has_no_newton_step(member):
    _, risk, model, _ = problem("softmax")
    f = ix.influence(risk, model, MEMBERS[member](GGN, 4))
    with pytest.raises(ValueError, match=rf"{member} does not say what one point adds"):
        ix.removal(f, "newton")


def test_certificates_hold_whatever_a_projection_drops():
    _, risk, model, queries = problem("softmax")
    f = ix.influence(risk, model, ix.Projected(ix.GaussNewton(), 3, key=KEY))
    losses = lambda m: risk.losses(m, queries)
    after = ix.leave_one_out(risk, model, ix.Newton(tolerance=1e-12), outcome=losses)
    change = (after - losses(model)[None]).T
    for tier in (1, 2):
        got = ix.certify(f, queries, tier=tier)
        assert np.all((got.lower <= change) & (change <= got.upper))


def test_diagnose_shows_what_a_projection_drops():
    """The residual is against the whole curvature, and the bound on scores holds."""
    _, risk, model, _ = problem("softmax")
    f = ix.influence(risk, model, ix.Projected(ix.Hessian(), 4, key=KEY))
    exact, own = -ix.self_influence(ix.influence(risk, model)), -ix.self_influence(f)
    finding = ix.diagnose(f)["solve"]
    assert finding.verdict == "bad"
    relative, bound = map(float, re.findall(r"[\d.]+e[-+]\d+", finding.figure))
    floored = lambda s: np.maximum(s, np.mean(s))
    gap = np.max(np.abs(own - exact) / np.sqrt(floored(exact) * floored(own)))
    assert 0.1 < relative <= 1
    assert 0.01 < gap <= bound


# --- What is refused -------------------------------------------------------------------------------

REFUSED = {
    "rank 0": (lambda: ix.Nystrom(GGN, 0, key=KEY), "`rank` must be a whole number.*got 0"),
    "rank a fraction": (lambda: ix.Arnoldi(GGN, 2.5, key=KEY), "`rank`.*got 2.5"),
    "dim True": (lambda: ix.Projected(GGN, True, key=KEY), "`dim`.*got True"),
    "no key, Nystrom": (lambda: ix.Nystrom(GGN, 2), r"Nystrom draws.*jax\.random\.key\(0\)"),
    "no key, Arnoldi": (lambda: ix.Arnoldi(GGN, 2), r"Arnoldi draws.*jax\.random\.key\(0\)"),
    "no key, Projected": (lambda: ix.Projected(GGN, 2), r"Projected draws.*jax\.random\.key"),
    "a number as key": (lambda: ix.Projected(GGN, 2, key=3), "`key` must be a random key.*got 3"),
    "not a curvature": (lambda: ix.Nystrom(ix.GaussNewton, 2, key=KEY), "Mind the parentheses"),
    "few steps": (lambda: ix.Arnoldi(GGN, 9, key=KEY, steps=8), "at least the rank, 9, got 8"),
    "complement": (lambda: ix.Arnoldi(GGN, 9, key=KEY, complement="mean"), "True, or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


@ALL
def test_more_directions_than_parameters_are_refused(member):
    _, risk, model, _ = problem("softmax")
    word = "dim" if member == "Projected" else "rank"
    with pytest.raises(ValueError, match=f"`{word}` is 10, and there are 9 parameters.*{word}=9"):
        ix.influence(risk, model, MEMBERS[member](GGN, 10))
    if member == "Arnoldi":
        with pytest.raises(ValueError, match="`steps` is 12, and there are 9 parameters"):
            ix.influence(risk, model, ix.Arnoldi(GGN, 2, key=KEY, steps=12))


@ALL
def test_what_has_no_inverse_is_refused(member):
    _, risk, model, _ = problem("softmax")
    free = ix.EmpiricalRisk(risk.data, risk.loss)  # 6 of 9 directions have curvature, and no l2
    with pytest.raises(ValueError, match=r"singular.*l2 > 0"):
        ix.influence(free, model, MEMBERS[member](ix.GaussNewton(), 8))


def test_nystrom_refuses_a_data_part_with_a_negative_eigenvalue():
    p, risk, model, _ = wide()
    F = oracle.hessian(p, p.theta) - np.diag(p.penalty)
    assert np.linalg.eigvalsh(F)[0] < -1e-4
    with pytest.raises(ValueError, match=r"Without l2 .* at most -.*GaussNewton.*Arnoldi"):
        ix.influence(risk, model, ix.Nystrom(ix.Hessian(damping=10.0), P, key=KEY))


@ALL
def test_what_is_not_finite_is_named(member):
    broken = ix.CustomLoss(lambda o, y: jnp.sum(jnp.sqrt(jnp.abs(o - o))))
    risk = ix.EmpiricalRisk((jnp.ones((3, 4)), jnp.zeros((3, 3))), broken, l2=0.1)
    with pytest.raises(ValueError, match=r"NaN or infinite.*log\(0\)"):
        MEMBERS[member](ix.Hessian(), 3).factor(risk, linear_model())
