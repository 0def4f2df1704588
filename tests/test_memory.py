"""What a fit or a curvature holds beside its results stays within the byte budget, whatever n is."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import influx as ix
from influx._chunks import chunked_sum, dividing_length, even_length
from influx._curvature.diagonal import _diagonal
from influx._curvature.ggn import gauss_newton_matrix
from influx._curvature.hessian import _hessian_matrix
from influx._curvature.kronecker_diagonal import second_moments
from influx._curvature.kronecker_factors import eigenblock, factors
from influx._curvature.subspace import _restricted
from influx._linalg import ravel
from influx._train.base import flat
from influx._train.newton import hessian

N, BUDGET = 2000, 4 * 2**20


def newton_hessian(risk, model):
    return hessian(*flat(risk, model, None)[:2])


def restricted(risk, model):
    theta, _ = ravel(model)
    return _restricted(ix.GaussNewton(), risk, model, jnp.eye(theta.size)[:64])


def gauss_newton_product(risk, model):
    theta, _ = ravel(model)
    return ix.GaussNewton().matvec(risk, model)(theta)


DENSE = {
    "Newton": newton_hessian,
    "Hessian": lambda risk, model: _hessian_matrix(ix.Hessian(), risk, model),
    "Gauss–Newton": gauss_newton_matrix,
    "diagonal": lambda risk, model: _diagonal(ix.Hessian(), risk, model),
    "subspace": restricted,
}


def temporaries(fn, risk, model) -> int:
    compiled = eqx.filter_jit(fn).lower(risk, model).compile().compiled
    return compiled.memory_analysis().temp_size_in_bytes


def network(outputs: int):
    model = eqx.nn.MLP(4, outputs, 12, 1, activation=jax.nn.gelu, key=jr.key(0))
    data = jr.normal(jr.key(1), (N, 4)), jr.randint(jr.key(2), (N,), 0, outputs)
    return ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=1e-2), model


class Convolutions(eqx.Module):
    """Many classes, and a wide kernel behind another convolution."""

    layers: list

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 4, 3, padding=1, key=a),
            eqx.nn.Conv2d(4, 4, 5, padding=2, key=b),
            eqx.nn.Conv2d(4, 40, 8, key=c),
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.gelu(layer(x))
        return self.layers[-1](x).reshape(-1)


def test_kronecker_factors_of_convolutions_stay_within_the_byte_budget(monkeypatch):
    """A cotangent of every window's entry, for each of 39 of the output, would take eight."""
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", 4 * BUDGET)
    data = jr.normal(jr.key(1), (200, 1, 8, 8)), jr.randint(jr.key(2), (200,), 0, 40)
    risk, model = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy()), Convolutions(jr.key(0))
    fit = lambda risk, model: [
        pair for _, *pair in factors(ix.GaussNewton(), "expand", risk, model)
    ]
    assert temporaries(fit, risk, model) <= 4 * BUDGET


class Tied(eqx.Module):
    """A table that reads tokens and writes one: places of both are joined, one-hot rows in full."""

    table: jax.Array

    def __call__(self, ids):
        return self.table @ jnp.tanh(jnp.mean(self.table[ids], axis=0))


def test_the_diagonal_of_a_tied_table_stays_within_the_byte_budget(monkeypatch):
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", 4 * BUDGET)
    ids, y = jr.randint(jr.key(1), (200, 16), 0, 5000), jr.randint(jr.key(2), (200,), 0, 5000)
    risk = ix.EmpiricalRisk((ids, y), ix.SoftmaxCrossEntropy())
    model, fisher = Tied(jr.normal(jr.key(0), (5000, 8))), ix.Fisher("empirical")
    blocks = [eigenblock(*found) for found in factors(fisher, "expand", risk, model)]
    fit = lambda risk, model: second_moments(fisher, blocks, risk, model)
    assert temporaries(fit, risk, model) <= 4 * BUDGET


def test_a_compensated_sum_rounds_as_if_there_were_one_block():
    """A thousand blocks added one after the other lose several times as much."""
    x = jr.uniform(jr.key(0), (100_003, 5), jnp.float32)
    truth = np.sum(np.asarray(x, np.float64), axis=0)
    block = lambda rows: jnp.sum(rows, axis=0)
    off = lambda got: np.max(np.abs(np.asarray(got, np.float64) / truth - 1))
    unit = np.finfo(np.float32).eps
    assert off(jax.jit(lambda x: chunked_sum(block, x, 100, compensated=True))(x)) < 2 * unit
    assert off(jax.jit(lambda x: chunked_sum(block, x, 100))(x)) > 4 * unit


def test_blocks_of_a_sum_are_no_longer_than_asked_and_leave_no_rest_where_one_of_over_half_does():
    for n, chunk in itertools.combinations(range(61, 0, -1), 2):
        divisors = [x for x in range(1, n + 1) if n % x == 0 and chunk < 2 * x <= 2 * chunk]
        length = dividing_length(n, chunk)
        assert length == (max(divisors) if divisors else even_length(n, chunk)) <= chunk


def test_a_sum_over_blocks_without_rest_compiles_its_body_once():
    block = lambda rows: jnp.sum(jnp.sin(rows))
    program = lambda n: str(jax.make_jaxpr(lambda x: chunked_sum(block, x, 7))(jnp.ones(n)))
    assert program(25).count(" sin ") == 1
    assert program(23).count(" sin ") == 2


class Bag(eqx.Module):
    """The mean of many rows of a table of more."""

    table: jax.Array

    def __call__(self, ids):
        return jnp.mean(self.table[ids], axis=0)


def test_the_diagonal_of_many_look_ups_stays_within_the_byte_budget(monkeypatch):
    """Which of them are the same is T × T numbers an example."""
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", 4 * BUDGET)
    ids, y = jr.randint(jr.key(1), (64, 500), 0, 1000), jr.randint(jr.key(2), (64,), 0, 4)
    risk, model = ix.EmpiricalRisk((ids, y), ix.SoftmaxCrossEntropy()), Bag(jnp.ones((1000, 4)))
    fisher = ix.Fisher("empirical")
    blocks = [eigenblock(*found) for found in factors(fisher, "expand", risk, model)]
    fit = lambda risk, model: second_moments(fisher, blocks, risk, model)
    assert temporaries(fit, risk, model) <= 4 * BUDGET


@pytest.mark.parametrize("path", DENSE)
def test_matrices_are_built_within_the_byte_budget(path, monkeypatch):
    """All columns at once would take more than four budgets for the hidden layer alone."""
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", BUDGET)
    risk, model = network(3)
    assert ravel(model)[0].size * 12 * N * 8 > 4 * BUDGET
    assert temporaries(DENSE[path], risk, model) < 2 * BUDGET


def test_a_gauss_newton_product_forms_no_output_hessian():
    risk, model = network(60)
    assert temporaries(gauss_newton_product, risk, model) < N * 60**2 * 8 / 4


def test_a_gauss_newton_matrix_forms_its_output_hessians_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr("influx._chunks.BYTE_BUDGET", BUDGET)
    risk, model = network(60)
    assert temporaries(gauss_newton_matrix, risk, model) < N * 60**2 * 8 / 2
