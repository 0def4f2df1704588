"""Every product of a Jacobian is that of the dense array [n, K, P], for a head and in general."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influx as ix
from influx._jacobian import HeadJacobian, OutputJacobian, is_affine, output_jacobian
from influx._linalg import ravel
from tests.helpers import problem


@pytest.fixture(params=["softmax", "binary", "squared", "network"])
def pair(request):
    """A Jacobian, and the array it stands for, by forward mode."""
    _, risk, model, _ = problem(request.param)
    theta, rebuild = ravel(model)
    output = lambda t: jax.vmap(lambda x: risk.output(rebuild(t), x).reshape(-1))(risk.data[0])
    jacobian = output_jacobian(risk, model)
    assert isinstance(jacobian, OutputJacobian if request.param == "network" else HeadJacobian)
    assert is_affine(risk, model) == jacobian.affine == (request.param != "network")
    return jacobian, np.asarray(jax.jit(jax.jacfwd(output))(theta))


def test_products_are_those_of_the_dense_array(pair):
    jacobian, A = pair
    n, K, P = A.shape
    assert (jacobian.examples, jacobian.outputs) == (n, K)
    rng = np.random.default_rng(0)
    S, M = rng.normal(size=(n, K, K)), rng.normal(size=(P, P))
    u, v, each = rng.normal(size=(n, K)), rng.normal(size=P), rng.normal(size=(n, P))
    s, rows, some = rng.gamma(1.0, size=n), rng.normal(size=(5, P)), np.array([4, 0, 4])

    @eqx.filter_jit
    def products(J):
        return {
            "gram": J.gram(jnp.asarray(S)),
            "sandwich": J.sandwich(jnp.asarray(M)),
            "outer": J.outer(),
            "pull": J.pull(jnp.asarray(u)),
            "push": J.push(jnp.asarray(v)),
            "push_each": J.push_each(jnp.asarray(each)),
            "energy": J.energy(jnp.asarray(s))(jnp.asarray(rows)),
            "dense": J.dense(),
            "take": J.take(jnp.asarray(some)).dense(),
        }

    expected = {
        "gram": np.einsum("nkp,nkl,nlq->pq", A, S, A),
        "sandwich": np.einsum("nkp,pq,nlq->nkl", A, M, A),
        "outer": np.einsum("nkp,nlp->nkl", A, A),
        "pull": np.einsum("nkp,nk->np", A, u),
        "push": np.einsum("nkp,p->nk", A, v),
        "push_each": np.einsum("nkp,np->nk", A, each),
        "energy": np.einsum("n,kp,ncp,ncq,kq->k", s, rows, A, A, rows),
        "dense": A,
        "take": A[some],
    }
    got = products(jacobian)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", ["head", "general"])
@pytest.mark.parametrize("apart", [1.0, 2.0**30])
def test_an_energy_that_nearly_vanishes_is_not_below_the_truth(kind, apart):
    """Features (apart + ξ, apart − ξ) at v = (1, −1): Σ s (2ξ)², in whole numbers of 2⁻⁶."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        xi = rng.integers(-64, 65, 8) / 64
        X, s = np.stack([apart + xi, apart - xi], axis=1), rng.integers(1, 5, 8).astype(float)
        layer = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
        risk = ix.EmpiricalRisk((X, np.zeros((8, 1))), ix.SquaredError(), l2=0.1)
        jacobian = output_jacobian(risk, layer)
        if kind == "general":
            jacobian = OutputJacobian(risk, layer, risk.data[0])
        exact = np.sum(s * np.square(2 * xi))
        found = float(jacobian.energy(jnp.asarray(s))(jnp.asarray([[1.0, -1.0]]))[0])
        assert exact <= found
        assert apart > 1 or found <= exact * (1 + 1e-12) + 1e-12


def test_norms_bound_the_spectral_norm(pair):
    jacobian, A = pair
    exact = np.linalg.norm(A, 2, axis=(1, 2))
    bound = np.asarray(jacobian.norms())
    assert np.all(exact <= bound * (1 + 1e-12))
    assert np.all(bound <= exact * A.shape[1] ** (1 / 16) * (1 + 1e-9))


def test_absolute_norms_bound_that_of_the_entries_sizes(pair):
    jacobian, A = pair
    bound = np.asarray(jacobian.absolute_norms())
    assert np.all(np.linalg.norm(np.abs(A), 2, axis=(1, 2)) <= bound * (1 + 1e-12))
    assert np.all(bound <= np.linalg.norm(A, axis=(1, 2)) * (1 + 1e-12))
