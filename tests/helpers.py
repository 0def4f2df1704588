"""One table per family: a new member is one row, and runs through every suite.

Problems come from the NumPy oracle of proofs_checks: uneven weights (one of them 0), l2 per leaf,
θ at the minimum that NumPy found.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import influx as ix
from influx.extend import AbstractCurvature, ravel
from proofs_checks import _kronecker as kronecker
from proofs_checks import _oracle as oracle
from proofs_checks._library import model_at, queries, risk_of
from proofs_checks._problems import ALL, draw

FAMILIES = {family.name: family for family in ALL}
CLASSIFIERS = ("softmax", "binary", "network")
LAMBDA = 0.03  # far below the curvature's median eigenvalue, so that damping hides nothing


class OfFullRank(AbstractCurvature):
    """`make(P)` for whatever model it meets: exact, whatever else it is."""

    make: Callable[[int], AbstractCurvature] = eqx.field(static=True)

    @property
    def damping(self):
        return self.make(1).damping

    def _member(self, model):
        return self.make(ravel(model)[0].size)

    def matvec(self, risk, model):
        return self._member(model).matvec(risk, model)

    def lower_end(self, risk, model):
        return self._member(model).lower_end(risk, model)

    def factor(self, risk, model):
        return self._member(model).factor(risk, model)

    def newton_steps(self, risk, model, factored, jacobian):
        return self._member(model).newton_steps(risk, model, factored, jacobian)


# Each curvature with the dense NumPy matrix that it claims to be, undamped.
CURVATURES = {
    "Hessian": (ix.Hessian(damping=LAMBDA), lambda p: oracle.hessian(p, p.theta)),
    "GaussNewton": (ix.GaussNewton(damping=LAMBDA), lambda p: oracle.gauss_newton(p, p.theta)),
    "Fisher exact": (
        ix.Fisher("exact", damping=LAMBDA),
        lambda p: oracle.gauss_newton(p, p.theta),
    ),
    "Fisher empirical": (ix.Fisher("empirical", damping=LAMBDA), lambda p: second_moment(p)),
    "BlockDiagonal": (
        ix.BlockDiagonal(ix.GaussNewton(damping=LAMBDA)),
        lambda p: blocks(p, oracle.gauss_newton(p, p.theta)),
    ),
    "Diagonal": (
        ix.Diagonal(ix.Hessian(damping=LAMBDA)),
        lambda p: np.diag(np.diag(oracle.hessian(p, p.theta))),
    ),
    "Identity": (ix.Identity(damping=LAMBDA), lambda p: np.eye(p.theta.size)),
    "KFAC": (ix.KFAC(damping=LAMBDA), kronecker.kfac),
    "EKFAC": (ix.EKFAC(damping=LAMBDA), kronecker.ekfac),
    "CG": (ix.CG(ix.Hessian(damping=LAMBDA), rtol=1e-12), lambda p: oracle.hessian(p, p.theta)),
    "CG preconditioned": (
        ix.CG(ix.Hessian(damping=LAMBDA), rtol=1e-12, preconditioner=ix.EKFAC()),
        lambda p: oracle.hessian(p, p.theta),
    ),
    "MINRES": (
        ix.MINRES(ix.GaussNewton(damping=LAMBDA), rtol=1e-12),
        lambda p: oracle.gauss_newton(p, p.theta),
    ),
    "Neumann": (
        ix.Neumann(ix.GaussNewton(damping=LAMBDA), rtol=1e-12),
        lambda p: oracle.gauss_newton(p, p.theta),
    ),
    "Arnoldi": (
        OfFullRank(lambda P: ix.Arnoldi(ix.Hessian(damping=LAMBDA), P, key=jr.key(0))),
        lambda p: oracle.hessian(p, p.theta),
    ),
    "Arnoldi without complement": (
        OfFullRank(
            lambda P: ix.Arnoldi(ix.Hessian(damping=LAMBDA), P, key=jr.key(0), complement=False)
        ),
        lambda p: oracle.hessian(p, p.theta),
    ),
    "Nystrom": (
        OfFullRank(lambda P: ix.Nystrom(ix.GaussNewton(damping=LAMBDA), P, key=jr.key(0))),
        lambda p: oracle.gauss_newton(p, p.theta),
    ),
    "Projected": (
        OfFullRank(lambda P: ix.Projected(ix.Hessian(damping=LAMBDA), P, key=jr.key(0))),
        lambda p: oracle.hessian(p, p.theta),
    ),
}


def second_moment(p) -> np.ndarray:
    g = oracle.gradients(p, p.theta)
    return g.T @ (p.w[:, None] * g) / p.n + np.diag(p.penalty)


def blocks(p, matrix: np.ndarray) -> np.ndarray:
    """The blocks of each layer's weight and bias together."""
    layer = np.repeat(np.arange(len(p.family.leaves)) // 2, p.family.leaves)
    return matrix * (layer[:, None] == layer[None, :])


SCALES = ("loss", "parameters", "self", "cosine", ix.Reference(3), ix.Reference([2, 5]))
MEASUREMENTS = {
    "loss": lambda f: f,
    "probability": lambda f: ix.classification(f, "probability"),
    "one probability": lambda f: ix.classification(f, "probability", class_=1),
    "logit": lambda f: ix.classification(f, "logit"),
    "margin": lambda f: ix.classification(f, "margin"),
    "custom scalar": lambda f: ix.measure(f, custom_scalar),
    "custom vector": lambda f: ix.measure(f, custom_vector),
}


def custom_scalar(model, query):
    return jnp.sum(jnp.square(model(query[0])))


def custom_vector(model, query):
    out = model(query[0])
    return jnp.stack([jnp.sum(out), jnp.max(out)])


def name_of(value) -> str:
    return value if isinstance(value, str) else f"Reference{value.points}"


@functools.cache
def problem(name: str = "softmax", seed: int = 0):
    """An oracle problem, with the same risk, model and queries as influx sees them."""
    p = draw(FAMILIES[name], seed, 0.0, True)
    return p, risk_of(p), model_at(p.family, p.theta), queries(p)


@functools.cache
def handle(name: str = "softmax", curvature: str = "Hessian", seed: int = 0) -> ix.Influence:
    _, risk, model, _ = problem(name, seed)
    return ix.influence(risk, model, CURVATURES[curvature][0])


def alone():
    """Seven points and no l2; the last alone is at (0, 1), of leverage 1."""
    x = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    risk = ix.EmpiricalRisk((x, np.array([0, 1, 0, 1, 1, 0, 1.0])), ix.BinaryCrossEntropy())
    return risk, eqx.nn.Linear(2, "scalar", use_bias=False, key=jr.key(0))


def linear_model(key: int = 0, inputs: int = 4, outputs=3) -> eqx.nn.Linear:
    return eqx.nn.Linear(inputs, outputs, key=jr.key(key))
