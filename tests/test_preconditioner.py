"""A preconditioner changes how long CG takes, and nothing that it answers."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx._curvature.cg import factor_preconditioner
from influx._diagnose.curvature import known_lower_end
from influx._linalg import ravel
from influx.extend import AbstractCurvature, Factored
from proofs_checks import _oracle as oracle
from tests.helpers import LAMBDA, problem

SAMPLED = ix.EKFAC("sampled", key=jr.key(0))
GN = ix.GaussNewton(damping=LAMBDA)
PRECONDITIONERS = {
    "none": None,
    "EKFAC": ix.EKFAC(),
    "EKFAC sampled": SAMPLED,
    "KFAC": ix.KFAC(damping=3 * LAMBDA),
    "Diagonal": ix.Diagonal(GN),
    "Nystrom": ix.Nystrom(GN, 10, key=jr.key(1)),
    "Mixture": ix.Mixture({lambda m: m.layers[0]: SAMPLED}, ix.EKFAC()),
}


@eqx.filter_jit
def solved(factored, vectors):
    return jax.lax.map(factored.counted_solve, vectors)


def in_dtype(tree, dtype):
    cast = lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a
    return jax.tree.map(cast, tree)


def uneven(dtype):
    """A network on inputs of very different sizes, with more examples than parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) * np.logspace(0, -2, 12)
    y = np.argmax(x[:, :3] * [0.3, 0.5, 0.8] + 0.3 * rng.normal(size=(400, 3)), axis=1)
    risk = ix.EmpiricalRisk((x.astype(dtype), y), ix.SoftmaxCrossEntropy(), l2=1e-6)
    model = in_dtype(eqx.nn.MLP(12, 3, 10, 1, jnp.tanh, key=jr.key(0)), dtype)
    trainer = ix.SGD(optax.adam(1e-2), batch_size=40, epochs=40, key=jr.key(1))
    return risk, ix.fit(risk, model, trainer)


def residuals(matrix, x, vectors):
    rest = np.asarray(vectors, float) - np.asarray(x, float) @ matrix
    return np.linalg.norm(rest, axis=1) / np.linalg.norm(vectors, axis=1)


def test_it_halves_the_steps_on_an_ill_conditioned_network():
    risk, model = uneven(np.float64)
    matrix = np.asarray(ix.GaussNewton().matrix(risk, model))
    vectors = jax.random.normal(jr.key(2), (3, len(matrix)))
    truth = np.linalg.solve(matrix, np.asarray(vectors).T).T
    low = np.linalg.eigvalsh(matrix)[0]
    steps = {}
    for name in ("none", "EKFAC", "EKFAC sampled"):
        M = PRECONDITIONERS[name]
        member = ix.CG(ix.GaussNewton(), rtol=1e-8, max_steps=9999, preconditioner=M)
        x, converged, count = solved(member.factor(risk, model), vectors)
        assert bool(jnp.all(converged))
        assert np.all(residuals(matrix, x, vectors) <= 1e-8 * (1 + 1e-6))
        error = np.linalg.norm(x - truth, axis=1)
        assert np.all(error <= 1.01e-8 * np.linalg.norm(vectors, axis=1) / low)
        steps[name] = int(jnp.max(count))
    assert 2 * steps["EKFAC"] <= steps["none"], steps
    assert 2 * steps["EKFAC sampled"] <= steps["none"], steps


@pytest.mark.parametrize("name", PRECONDITIONERS)
@settings(max_examples=4)
@given(rtol=st.sampled_from([1e-1, 1e-4, 1e-8]), seed=st.integers(0, 2**31))
def test_the_stated_tolerance_is_met_by_the_true_residual(name, rtol, seed):
    p, risk, model, _ = problem("network")
    matrix = oracle.gauss_newton(p, p.theta) + LAMBDA * np.eye(p.theta.size)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(2, p.theta.size)) * np.exp(rng.normal(0, 4, p.theta.size))
    member = ix.CG(GN, rtol=rtol, preconditioner=PRECONDITIONERS[name])
    x, converged, _ = solved(member.factor(risk, model), jnp.asarray(vectors))
    assert bool(jnp.all(converged))
    assert np.all(residuals(matrix, x, vectors) <= rtol * (1 + 1e-6))


def test_the_zero_vector_takes_no_step():
    p, risk, model, _ = problem("network")
    factored = ix.CG(GN, preconditioner=ix.EKFAC()).factor(risk, model)
    x, converged, _ = solved(factored, jnp.zeros((1, p.theta.size)))
    assert bool(converged[0])
    assert not x.any()


def test_float32_keeps_the_tolerance_and_says_where_it_cannot():
    risk, model = uneven(np.float32)
    l2 = 1e-6 + 1e-3
    matrix = np.asarray(ix.GaussNewton().matrix(risk, model), float) + (l2 - 1e-6) * np.eye(163)
    vectors = jax.random.normal(jr.key(2), (3, 163), jnp.float32)
    for name in ("none", "EKFAC"):
        member = lambda rtol, name=name: ix.CG(
            ix.GaussNewton(damping=1e-3), rtol=rtol, preconditioner=PRECONDITIONERS[name]
        )
        x, converged, _ = solved(member(1e-3).factor(risk, model), vectors)
        assert bool(jnp.all(converged))
        assert x.dtype == jnp.float32
        assert np.all(residuals(matrix, x, vectors) <= 1.05e-3)
        # The residual of the recurrence goes on to shrink where the true one cannot.
        _, converged, _ = solved(member(1e-9).factor(risk, model), vectors)
        assert not bool(jnp.any(converged))


def test_automatic_damping_is_that_of_the_solve_and_a_number_stays():
    _, risk, model, _ = problem("network")
    own = lambda M: np.unique(factor_preconditioner(M, GN.damping, risk, model).dampings)
    np.testing.assert_allclose(own(ix.EKFAC()), LAMBDA)
    np.testing.assert_allclose(own(ix.EKFAC(damping=0.5)), 0.5)
    mixed = ix.Mixture({lambda m: m.layers[0]: ix.KFAC()}, ix.EKFAC(damping=0.5))
    np.testing.assert_allclose(own(mixed), [LAMBDA, 0.5])
    assert ix.EKFAC().damping is None


def test_scores_are_those_without_it_and_so_are_derivatives():
    _, risk, model, queries = problem("network")
    tight = lambda M: ix.CG(GN, rtol=1e-12, preconditioner=M)
    one = jax.tree.map(lambda a: a[:2], queries)
    scores = lambda scale, M: ix.influence(
        eqx.tree_at(lambda r: r.data[0], risk, scale * risk.data[0]), model, tight(M)
    )(one)
    fixed = ix.EKFAC(damping=LAMBDA)
    np.testing.assert_allclose(scores(1.0, fixed), scores(1.0, None), rtol=1e-8, atol=1e-10)
    slope = lambda M: jax.jvp(lambda s: scores(s, M), (1.0,), (1.0,))[1]
    np.testing.assert_allclose(slope(fixed), slope(None), rtol=1e-6, atol=1e-8)


# --- diagnose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["none", "EKFAC"])
def test_diagnose_bounds_the_error_of_every_score_and_counts_steps(preconditioner):
    """A loose tolerance leaves an error to bound: |I − Ĩ| over √(s̄ᵢs̄ⱼ), from the dense solve."""
    p, risk, model, _ = problem("network")
    member = ix.CG(GN, rtol=1e-2, preconditioner=PRECONDITIONERS[preconditioner])
    f = ix.influence(risk, model, member)
    matrix = oracle.gauss_newton(p, p.theta) + LAMBDA * np.eye(p.theta.size)
    g = oracle.gradients(p, p.theta)
    truth = -g @ np.linalg.solve(matrix, g.T)
    own = -np.diag(truth)
    size = np.sqrt(np.maximum(own, own.mean()))
    error = np.abs(np.asarray(f(risk.data)) - truth)
    worst = np.max(error / size[None] / size[:, None])
    text = ix.diagnose(f)["solve"].figure
    (bound,) = re.findall(r"at most ([\d.e+-]+) of √", text)
    assert 1e-6 < worst <= 1.05 * float(bound)
    _, _, steps = solved(f.response.factored, jnp.asarray(g))
    assert f"at most {int(jnp.max(steps))} steps" in text
    if preconditioner == "none":
        assert "without" not in text
    else:
        plain = ix.CG(GN, rtol=1e-2).factor(risk, model)
        _, _, steps = solved(plain, jnp.asarray(g[:1]))
        assert f"({int(steps[0])} without the preconditioner)" in text


def test_a_spectrum_of_unknown_end_gives_an_estimate():
    _, risk, model, _ = problem("network")
    least = float(jnp.min(risk.l2_vector(model))) + LAMBDA
    for curvature, end in ((GN, (least, True)), (ix.Hessian(damping=LAMBDA), (0.5, False))):
        f = ix.influence(risk, model, ix.CG(curvature, preconditioner=ix.EKFAC()))
        assert known_lower_end(f, 0.5) == pytest.approx(end)


# --- Refusals ---------------------------------------------------------------------------------------


class Indefinite(AbstractCurvature):
    """diag(1, −1, 1, −1, …)."""

    damping: float = 0.0

    def _signs(self, model):
        theta, _ = ravel(model)
        return jnp.where(jnp.arange(theta.size) % 2 == 0, 1.0, -1.0)

    def matvec(self, risk, model):
        return lambda v: self._signs(model) * v

    def lower_end(self, risk, model):
        return -1.0

    def factor(self, risk, model):
        return Factored(lx.DiagonalLinearOperator(self._signs(model)), lx.Diagonal())

    def newton_steps(self, risk, model, factored, jacobian):
        return None


REFUSED = {
    "a name": ("EKFAC", "must be a curvature such as.*got 'EKFAC'"),
    "a class": (ix.EKFAC, r"EKFAC\(\), not EKFAC"),
    "CG": (ix.CG(GN), r"fixed linear map, and a solve by CG.*Use EKFAC\(\)"),
    "MINRES": (ix.MINRES(GN), "a solve by MINRES"),
    "Neumann in a mixture": (
        ix.Mixture({lambda m: m.layers[0]: ix.Neumann(GN)}, ix.EKFAC()),
        "a solve by Neumann",
    ),
    "CG in blocks": (ix.BlockDiagonal(ix.CG(GN)), "a solve by CG"),
    "a projection": (ix.Projected(GN, 5, key=jr.key(0)), "Projected answers 0 outside"),
    "a projection in blocks": (
        ix.BlockDiagonal(ix.Projected(GN, 2, key=jr.key(0))),
        "BlockDiagonal answers 0 outside",
    ),
    "Arnoldi without complement": (
        ix.Arnoldi(GN, 5, key=jr.key(0), complement=False),
        "Arnoldi answers 0 outside",
    ),
    "indefinite": (Indefinite(), r"Indefinite is not positive definite.*at most -1 \(largest 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_preconditioner_is_refused_by_name(name):
    preconditioner, message = REFUSED[name]
    _, risk, model, _ = problem("network")
    with pytest.raises(ValueError, match=message):
        ix.influence(risk, model, ix.CG(GN, preconditioner=preconditioner))


def test_a_preconditioner_that_cannot_be_factored_says_whose_fault_it_is():
    _, risk, model, _ = problem("network")
    free = ix.EmpiricalRisk(risk.data, risk.loss)
    member = ix.CG(GN, preconditioner=ix.KFAC(damping=0.0))
    with pytest.raises(ValueError, match=r"preconditioner of CG cannot be used.*is singular"):
        ix.influence(free, model, member)


def test_an_indefinite_hessian_stays_refused():
    _, risk, model, _ = problem("network")
    theta, rebuild = ravel(model)
    elsewhere = rebuild(theta + 2.5 * jr.normal(jr.key(0), theta.shape))
    with pytest.raises(ValueError, match="The curvature is indefinite"):
        ix.influence(risk, elsewhere, ix.CG(ix.Hessian(), preconditioner=ix.EKFAC(damping=1.0)))
