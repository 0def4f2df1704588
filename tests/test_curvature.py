"""Every curvature equals the dense NumPy matrix that it claims to be."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx._linalg import ravel
from proofs_checks import _oracle as oracle
from tests.helpers import CURVATURES, LAMBDA, linear_model, problem

COMBINATIONS = [(name, c) for name in ("softmax", "network") for c in CURVATURES] + [
    (name, c)
    for name in ("binary", "squared", "squared network")
    for c in ("Hessian", "GaussNewton")
]


@pytest.mark.parametrize(("name", "curvature"), COMBINATIONS)
def test_products_and_solves_are_those_of_the_dense_matrix(name, curvature):
    p, risk, model, _ = problem(name)
    member, dense = CURVATURES[curvature]
    matrix = dense(p) + LAMBDA * np.eye(p.theta.size)
    factored = member.factor(risk, model)
    v = np.random.default_rng(1).normal(size=(3, p.theta.size))
    product = jax.jit(jax.vmap(factored.matvec))(jnp.asarray(v))
    np.testing.assert_allclose(product, v @ matrix, rtol=1e-9, atol=1e-10)
    solved = jax.jit(jax.vmap(factored.solve))(jnp.asarray(v))
    np.testing.assert_allclose(solved, np.linalg.solve(matrix, v.T).T, rtol=1e-7, atol=1e-9)
    undamped = eqx.filter_jit(member.matvec(risk, model))(jnp.asarray(v[0]))
    np.testing.assert_allclose(undamped, dense(p) @ v[0], rtol=1e-9, atol=1e-10)


def sampled(key, draws: int) -> ix.Fisher:
    return ix.Fisher("sampled", key=key, draws=draws)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_a_sampled_fisher_is_unbiased(seed):
    """Within 5 standard errors of the exact Fisher, at 400 draws fixed in advance."""
    p, risk, model, _ = problem("softmax")
    v = jr.normal(jr.key(3), (p.theta.size,))
    keys = jr.split(jr.key(seed), 20)
    groups = jax.jit(jax.vmap(lambda key: sampled(key, 20).matvec(risk, model)(v)))(keys)
    mean = np.mean(groups, axis=0)
    error = np.std(groups, axis=0, ddof=1) / np.sqrt(20)
    exact = oracle.gauss_newton(p, p.theta) @ np.asarray(v)
    assert np.all(np.abs(mean - exact) < 5 * error + 1e-12)
    dense = sampled(jr.key(seed), 2)
    np.testing.assert_allclose(
        dense.matrix(risk, model) @ v, dense.matvec(risk, model)(v), rtol=1e-10
    )


def test_the_curvatures_differ_where_they_should():
    """Away from affine outputs and zero residuals, no two of them coincide."""
    p, _, _, _ = problem("network")
    dense = {name: matrix(p) for name, (_, matrix) in CURVATURES.items()}
    for a in ("Hessian", "GaussNewton", "Fisher empirical", "BlockDiagonal", "Diagonal"):
        for b in ("Hessian", "GaussNewton", "Fisher empirical", "BlockDiagonal", "Diagonal"):
            if a < b:
                gap = np.linalg.norm(dense[a] - dense[b]) / np.linalg.norm(dense[a])
                assert gap > 1e-3, (a, b)


def test_a_new_damping_is_honoured_and_nothing_accumulates():
    _, risk, model, queries = problem("softmax")
    first = ix.influence(risk, model, ix.Hessian(damping=0.1))(queries)
    other = ix.influence(risk, model, ix.Hessian(damping=0.2))(queries)
    again = ix.influence(risk, model, ix.Hessian(damping=0.1))(queries)
    assert np.array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3 * np.max(np.abs(first))


@pytest.mark.parametrize("name", ["network", "squared network"])
def test_an_indefinite_hessian_is_refused_with_its_eigenvalue(name):
    p, risk, model, _ = problem(name)
    theta, rebuild = ravel(model)
    elsewhere = rebuild(theta + 2.5 * jr.normal(jr.key(0), theta.shape))
    low = np.linalg.eigvalsh(oracle.hessian(p, np.asarray(ravel(elsewhere)[0])))[0]
    assert low < 0
    with pytest.raises(ValueError, match=r"indefinite: its smallest eigenvalue is -.*GaussNewton"):
        ix.influence(risk, elsewhere)
    with pytest.raises(ValueError, match=r"indefinite: it has an eigenvalue of at most -"):
        ix.influence(risk, elsewhere, ix.CG(ix.Hessian()))
    lifted = ix.influence(risk, elsewhere, ix.Hessian(damping=1 - low))
    assert np.isfinite(ix.self_influence(lifted)).all()


def test_a_singular_curvature_is_refused():
    _, risk, model, _ = problem("softmax")
    free = ix.EmpiricalRisk(risk.data, risk.loss)  # softmax without l2 has a null direction
    with pytest.raises(ValueError, match="singular: its smallest eigenvalue"):
        ix.influence(free, model)
    diagonal = ix.EmpiricalRisk((jnp.zeros((4, 2)), jnp.zeros(4, int)), risk.loss)
    with pytest.raises(ValueError, match="diagonal of the curvature has the entry"):
        ix.influence(diagonal, model, ix.Diagonal())


def test_a_solve_that_does_not_converge_is_an_error():
    _, risk, model, queries = problem("network")
    f = ix.influence(risk, model, ix.CG(ix.GaussNewton(), max_steps=2))
    with pytest.raises(Exception, match="did not converge"):
        f(queries)


@pytest.mark.parametrize("curvature", [ix.Hessian, ix.GaussNewton, ix.Identity, ix.Fisher])
@pytest.mark.parametrize("damping", [-1e-3, np.nan, np.inf, "auto"])
def test_a_damping_is_a_number_of_at_least_zero(curvature, damping):
    with pytest.raises(ValueError, match="damping"):
        curvature(damping=damping)


def test_unknown_fishers_are_refused():
    with pytest.raises(ValueError, match='"exact", "sampled" or "empirical"'):
        ix.Fisher("true")
    with pytest.raises(ValueError, match=r"give it `key="):
        ix.Fisher("sampled")
    with pytest.raises(ValueError, match="`draws` must be a whole number, at least 1"):
        ix.Fisher("sampled", key=jr.key(0), draws=0)
    for kind in ("exact", "empirical"):
        with pytest.raises(ValueError, match=rf"'{kind}' draws nothing: leave out `draws=4`"):
            ix.Fisher(kind, draws=4)
    quartic = ix.CustomLoss(lambda o, y: jnp.sum((o - y) ** 4))
    risk = ix.EmpiricalRisk((jnp.ones((3, 4)), jnp.zeros((3, 3))), quartic)
    with pytest.raises(ValueError, match="CustomLoss has no exact Fisher"):
        ix.influence(risk, linear_model(), ix.Fisher("exact"))
