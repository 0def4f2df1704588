"""A preconditioner changes how long CG takes, and nothing that it answers."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import influx as ix
from influx._curvature.cg import factor_preconditioner
from influx._curvature.iterative import Iterative
from influx._misc import ravel
from influx.extend import AbstractCurvature, Factored
from tests.helpers import LAMBDA, problem

SAMPLED = ix.EKFAC("sampled", key=jr.key(0))
PRECONDITIONERS = {
    "EKFAC": ix.EKFAC(),
    "EKFAC sampled": SAMPLED,
    "KFAC": ix.KFAC(),
    "Diagonal": ix.Diagonal(ix.GaussNewton(damping=LAMBDA)),
    "BlockDiagonal": ix.BlockDiagonal(ix.GaussNewton(damping=LAMBDA)),
    "Nystrom": ix.Nystrom(ix.GaussNewton(damping=LAMBDA), 10, key=jr.key(1)),
    "Arnoldi": ix.Arnoldi(ix.GaussNewton(damping=LAMBDA), 10, key=jr.key(1)),
    "Mixture": ix.Mixture({lambda m: m.layers[0]: SAMPLED}, ix.EKFAC()),
}


def ill_conditioned(dtype=np.float64):
    """A network on inputs of very different sizes, with more examples than parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) * np.logspace(0, -2, 12)
    y = np.argmax(x[:, :3] * [0.3, 0.5, 0.8] + 0.3 * rng.normal(size=(400, 3)), axis=1)
    risk = ix.EmpiricalRisk((x.astype(dtype), y), ix.SoftmaxCrossEntropy(), l2=1e-5)
    model = eqx.nn.MLP(12, 3, 10, 1, jnp.tanh, key=jr.key(0))
    model = jax.tree.map(lambda p: p.astype(dtype) if eqx.is_inexact_array(p) else p, model)
    trainer = ix.SGD(optax.adam(1e-2), batch_size=40, epochs=40, key=jr.key(1))
    return risk, ix.fit(risk, model, trainer)


@eqx.filter_jit
def solved(factored: Iterative, vectors):
    return jax.lax.map(factored.counted_solve, vectors)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-8), (np.float32, 1e-3)])
def test_it_halves_the_steps_on_an_ill_conditioned_network(dtype, rtol):
    risk, model = ill_conditioned(dtype)
    matrix = np.asarray(ix.GaussNewton().matrix(risk, model), float)
    matrix = matrix + 1e-5 * np.eye(len(matrix))
    gradient = lambda example: ravel(jax.grad(risk.loss_of)(model, example))[0]
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(4, len(matrix))), dtype)
    steps = {}
    for name in (None, "EKFAC", "EKFAC sampled", "KFAC"):
        member = ix.CG(
            ix.GaussNewton(damping=1e-5), rtol=rtol, preconditioner=PRECONDITIONERS.get(name)
        )
        x, converged, count = solved(member.factor(risk, model), vectors)
        assert bool(converged.all())
        residual = np.linalg.norm(vectors - np.asarray(x, float) @ matrix, axis=1)
        slack = 1 + 1e-6 if dtype == np.float64 else 1.1
        assert np.all(residual <= slack * rtol * np.linalg.norm(vectors, axis=1))
        steps[name] = int(count.max())
    print(steps)
    assert all(2 * steps[name] <= steps[None] for name in steps if name), steps
