"""The subject: influx's own functions, on the oracle's problems."""

from functools import cache

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

import influx as ix

from ._oracle import Family, Problem

_LOSSES = {
    "softmax": ix.SoftmaxCrossEntropy(),
    "binary": ix.BinaryCrossEntropy(),
    "squared": ix.SquaredError(),
}


@cache
def template(family: Family):
    if len(family.sizes) == 2:
        return eqx.nn.Linear(*family.sizes, key=jr.key(0))
    d, hidden, K = family.sizes
    return eqx.nn.MLP(d, K, hidden, depth=1, activation=jnp.tanh, key=jr.key(0))


def model_at(family: Family, theta: np.ndarray):
    """The Equinox model whose parameters, leaf after leaf, are θ."""
    params, static = eqx.partition(template(family), eqx.is_inexact_array)
    return eqx.combine(ravel_pytree(params)[1](jnp.asarray(theta)), static)


def parameters(model) -> np.ndarray:
    return np.asarray(ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0])


def l2_of(problem: Problem):
    # Arrays, not Python floats: a new number must not compile anything anew.
    params = eqx.filter(template(problem.family), eqx.is_inexact_array)
    return jtu.tree_unflatten(jtu.tree_structure(params), [jnp.asarray(v) for v in problem.l2])


def loss_of(problem: Problem):
    return _LOSSES[problem.family.loss]


def risk_of(problem: Problem) -> ix.EmpiricalRisk:
    return ix.EmpiricalRisk(
        training(problem),
        loss_of(problem),
        l2=l2_of(problem),
        weights=jnp.asarray(problem.w),
    )


def training(problem: Problem):
    return jnp.asarray(problem.X), jnp.asarray(problem.y)


def queries(problem: Problem):
    return jnp.asarray(problem.Xq), jnp.asarray(problem.yq)


def handle(problem: Problem, curvature=ix.Hessian) -> ix.Influence:
    """`ix.influence` at the problem's θ and damping."""
    model = model_at(problem.family, problem.theta)
    return ix.influence(risk_of(problem), model, curvature(damping=jnp.asarray(problem.damping)))


def influence(problem: Problem, curvature=ix.Hessian) -> np.ndarray:
    """I(i; ℓ_q), [m, n]."""
    return np.asarray(handle(problem, curvature)(queries(problem)))


def empirical_fisher(damping):
    return ix.Fisher("empirical", damping=damping)


def on_training(problem: Problem, curvature=ix.Hessian) -> np.ndarray:
    """I(i; ℓⱼ) of training points on training points, [n, n]: row j, column i."""
    return np.asarray(handle(problem, curvature)(training(problem)))


def self_influence(problem: Problem) -> np.ndarray:
    return np.asarray(ix.self_influence(handle(problem)))


def relative(problem: Problem, kind) -> np.ndarray:
    """Relative influence on the loss of the queries, [m, n]."""
    return np.asarray(ix.relative(handle(problem), kind)(queries(problem)))


def classification(problem: Problem, kind: str) -> np.ndarray:
    return np.asarray(ix.classification(handle(problem), kind)(queries(problem)))


def project(model, v):
    """The measurement m(θ) = vᵀθ, whose gradient is any v one likes."""
    return jnp.vdot(v, ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0])


def linear(problem: Problem, vectors: np.ndarray, kind=None) -> np.ndarray:
    """(Relative) influence on vᵀθ for each row v, [k, n]."""
    f = ix.measure(handle(problem), project)
    f = f if kind is None else ix.relative(f, kind)
    return np.asarray(f(jnp.asarray(vectors)))


def newton(problem: Problem, kind: str = "newton") -> np.ndarray:
    """The predicted change of the queries' loss when a point is removed, [m, n]."""
    return np.asarray(ix.removal(handle(problem), kind)(queries(problem)))


def steps(problem: Problem, vectors: np.ndarray, kind: str = "newton") -> np.ndarray:
    """The predicted change of vᵀθ when a point is removed, [k, n]; for v = e_k the step itself."""
    f = ix.removal(ix.measure(handle(problem), project), kind)
    return np.asarray(f(jnp.asarray(vectors)))


def value(problem: Problem, step: str = "newton", refine: int = 0) -> np.ndarray:
    """The value of each point to the queries, erased and renormalised, [2, n]."""
    found = ix.value(handle(problem), queries(problem), step, refine=refine)
    return np.stack([found.value, found.value_centred])
