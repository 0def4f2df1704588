"""The damping that `damping="auto"` stands for."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import root_scalar

from .._checks import is_concrete
from .._custom_types import Model
from .._linalg import ravel
from .._loss import SquaredError
from .._risk import EmpiricalRisk
from .kronecker import EigenBlock

_STEPS = 1000  # more than bisection to the last digit takes


def auto_damping(
    blocks: list[EigenBlock], penalties: list[Array], risk: EmpiricalRisk, model: Model
) -> Array:
    """The least λ ≥ 0 at which the weights are as large as the evidence for l2 + λ wants them,

        n θᵀ(diag l2 + λI)θ ≥ φ d/(1 + d/N),   d = tr F(F + diag l2 + λI)⁻¹.

    F are the eigenvalues of the data part, `penalties` those of l2. With λI added to ∇²Ω, exp(−nJ/φ) has
    a Gaussian prior of precision n(l2 + λ)/φ. Where the evidence for that is highest, the energy of the
    weights under it is the effective dimension d (MacKay, "A practical Bayesian framework for
    backpropagation networks", 1992; by Kronecker factors Immer et al., arXiv:2104.04975). d adds up the
    leverages of the N points of positive weight. By a curvature that hardly knows the point in question
    one comes out as x, by one that does as x/(1 + x): for equal leverages, d becomes d/(1 + d/N).

    φ is 1, the loss being a negative log-likelihood, but for squared error, where it is the variance of
    the residuals. Where l2 and λ leave a block singular to rounding, λ, one for all blocks, is that
    block's `rounding_floor`.
    """
    if not is_concrete((blocks, penalties, risk.weights, model)):
        raise ValueError(
            'damping="auto" looks at eigenvalues, and inside `jax.jit`, `jax.vmap` or `jax.grad` there '
            "are none yet. Give the damping as a number, or call `influence` outside."
        )
    points = int(np.sum(np.asarray(risk.weights) > 0))
    theta, l2 = (np.asarray(x, np.float64) for x in (ravel(model)[0], risk.l2_vector(model)))
    values, penalty = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])
        for parts in ([b.values for b in blocks], penalties)
    )
    data = np.maximum(values - penalty, 0)
    dispersion = _dispersion(risk, model)

    def excess(damping: float) -> float:
        dimension = np.sum(data / np.where(data > 0, values + damping, 1))
        energy = risk.n * np.sum((l2 + damping) * theta**2)
        return energy - dispersion * dimension / (1 + dimension / points)

    found = 0.0
    if excess(0.0) < 0:
        size = float(np.sum(theta**2))
        if not size > 0:
            raise ValueError(
                'damping="auto" is read off the size of the parameters, and all of them are 0. Train '
                "the model, or give the damping as a number."
            )
        high = dispersion * points / (risk.n * size)  # there the energy is φN
        found = root_scalar(
            excess, bracket=(0.0, high), xtol=np.finfo(float).tiny, maxiter=_STEPS
        ).root
    least = [(b, rounding_floor(b.values, penalty)) for b, penalty in zip(blocks, penalties)]
    short = [limit for b, limit in least if float(np.min(np.asarray(b.values))) + found <= limit]
    return jnp.asarray(max([found, *short]), blocks[0].values.dtype)


def _dispersion(risk: EmpiricalRisk, model: Model) -> float:
    """φ, of which −nJ/φ is the logarithm of a posterior."""
    if not isinstance(risk.loss, SquaredError):
        return 1.0
    loss = eqx.filter_jit(lambda risk, model: risk.mean(risk.losses(model)))(risk, model)
    numbers = math.prod(risk.output_struct(model).shape) * float(jnp.sum(risk.weights))
    return 2 * risk.n * float(loss) / numbers


def rounding_floor(
    values: Float[Array, "S l r"], penalty: Float[Array, "S l r"], units: int = 32
) -> Float[Array, ""] | np.ndarray:
    """What every eigenvalue of a block that can be inverted exceeds: 0 where l2 > 0 on all of it, which
    bounds them from below; else so many units of rounding of the largest, as what a zero may come out.

    A solve in the eigenbasis divides by each eigenvalue by itself, so that no condition number enters.
    """
    lib = np if is_concrete((values, penalty)) else jnp
    largest, l2 = lib.max(lib.asarray(values)), lib.asarray(penalty)
    unit = float(jnp.finfo(values.dtype).eps)
    held = lib.min(l2) > 32 * unit * lib.max(l2)  # what rounding leaves of an l2 = 0 is none
    return lib.where(held, 0.0, units * unit * largest)
