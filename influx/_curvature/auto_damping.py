"""The damping that `damping="auto"` stands for."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import root_scalar

from .._checks import is_concrete
from .._chunks import chunked_sum
from .._custom_types import Model, Scalar
from .._risk import EmpiricalRisk
from .kronecker import EigenBlock

_STEPS = 1000  # more than bisection to the last digit takes
_UNITS = 32  # of rounding, that a zero may come out as
_BLOCK = 512  # examples whose losses are taken at a time


def auto_damping(
    blocks: list[EigenBlock], penalties: list[Array], risk: EmpiricalRisk, model: Model
) -> Array:
    """The least λ ≥ 0 at which the energy of the trained weights is what the data decide of them,

        n θᵀ(diag l2 + λI)θ ≥ d/(1 + d/N),   d = tr F(F + diag l2 + λI)⁻¹,

    F the eigenvalues of the data part, `penalties` those of l2 (its diagonal in the eigenbasis, where it
    differs within a layer), N = Σ wᵢ. exp(−nJ) has a Gaussian prior of precision n(l2 + λ). Where no
    common factor of it raises the evidence (with one l2 for all: where no other λ does) its energy is
    the effective dimension d (MacKay, "A practical Bayesian framework for backpropagation networks",
    1992; for networks of today Immer et al., arXiv:2104.04975). The weights are taken as they are: at
    the maximum they would mostly be smaller and λ larger, the more so the less the data decide. Near 0
    they make λ large, and are refused where the curvature would round to 0 beside it. Layer-norm gains
    and what is left of initial weights count as well (Antorán et al., arXiv:2206.08900).

    EK-FAC's d adds up the points' leverages in a basis that hardly knows any one of them: an output
    direction comes out as x where a matrix of the point itself says x/(1 + x). The sum of those is at
    most d/(1 + d/N), and just that for equal leverages. That a point counts for one direction, however
    many outputs or places it has, is a choice, held to retraining in docs/how-to-choose.md.

    For squared error each eigendirection counts by the share of it that the data decide:

        n Σ γ (l2 + λ) θ² ≥ σ² Σ γ²,   γ = F/(F + l2 + λ),   σ² = (1 + d/(N K)) Σ wᵢ‖rᵢ‖²/(N K),

    θ and l2 in the eigenbasis, K residuals a point. At the maximum a direction's θ² is σ²γ/(n(l2 + λ))
    on average, over weights drawn from the prior: MacKay's condition is the sum of that over all of
    them, and this the sum weighted by γ. Weights without curvature, which no data have moved from their
    start, drop out; in a network of many weights they are most of θᵀθ. (A softmax's curvature fades
    where it fits, and no longer shows what data have decided: for other losses all weights count.) σ² is
    the noise: the fit takes d′ = d/(1 + d/(N K)) of N K, and 1/(1 − d′/(N K)) = 1 + d/(N K).

    Where l2 and λ leave a block singular to rounding, λ, one for all blocks, is its `rounding_floor`.
    """
    if not is_concrete((blocks, penalties, risk.weights, model)):
        raise ValueError(
            'damping="auto" looks at eigenvalues, and inside `jax.jit`, `jax.vmap` or `jax.grad` there '
            "are none yet. Give the damping as a number, or call `influence` outside."
        )
    values, penalty = _joined([b.values for b in blocks]), _joined(penalties)
    data = np.maximum(values - penalty, 0)
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    squares = np.square(_joined(_in_eigenbasis(blocks, leaves)))
    points = float(np.sum(np.asarray(risk.weights, np.float64)))
    residuals = points * risk.loss.residuals(risk.output_struct(model))
    mean_square = 2 * float(_sum_of_losses(risk, model)) / residuals if residuals else 0.0

    def excess(damping: float) -> float:
        decided = data / np.where(data > 0, values + damping, 1)  # γ
        energy, dimension = risk.n * (penalty + damping) * squares, np.sum(decided)
        if not residuals:
            return float(np.sum(energy) - dimension / (1 + dimension / points))
        noise = mean_square * (1 + dimension / residuals)
        return float(decided @ (energy - noise * decided))

    found, undamped = 0.0, excess(0.0)
    if not np.isfinite(undamped):
        raise ValueError(
            'damping="auto" is read off parameters, losses and eigenvalues, and some are NaN or '
            "overflow at this model. Mend that, or give the damping as a number."
        )
    if undamped < 0:
        high = np.max(values)
        unit = float(jnp.finfo(blocks[0].values.dtype).eps)
        most = high / (_UNITS * unit)  # beside which the curvature is a zero of rounding
        while excess(high) < 0:
            high *= 2
            if high > most:
                raise ValueError(
                    'damping="auto" is read off the size of the parameters, and all of them, or all '
                    "that the data decide, are 0 to rounding. Train the model, or give the damping as a "
                    "number."
                )
        found = root_scalar(
            excess, bracket=(0.0, high), xtol=np.finfo(float).tiny, maxiter=_STEPS
        ).root
    least = [(b, rounding_floor(b.values, penalty)) for b, penalty in zip(blocks, penalties)]
    short = [limit for b, limit in least if float(np.min(np.asarray(b.values))) + found <= limit]
    return jnp.asarray(max([found, *short]), blocks[0].values.dtype)


def _joined(parts) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])


@eqx.filter_jit
def _in_eigenbasis(blocks: list[EigenBlock], leaves: list[Array]) -> list[Float[Array, "S l r"]]:
    """The parameters of each block, in its basis."""
    return [block.rotate(block.layer.matrix(leaves)) for block in blocks]


@eqx.filter_jit
def _sum_of_losses(risk: EmpiricalRisk, model: Model) -> Scalar:
    block = lambda args: jnp.vdot(risk.losses(model, args[0]), args[1])
    return chunked_sum(block, (risk.data, risk.weights), _BLOCK)


def rounding_floor(
    values: Float[Array, "S l r"], penalty: Float[Array, "S l r"], units: int = _UNITS
) -> Float[Array, ""] | np.ndarray:
    """What every eigenvalue of a block that can be inverted exceeds: 0 where l2 > 0 on all of it, which
    bounds them from below; else so many units of rounding of the largest, as what a zero may come out.

    A solve in the eigenbasis divides by each eigenvalue by itself, so that no condition number enters.
    """
    lib = np if is_concrete((values, penalty)) else jnp
    largest, l2 = lib.max(lib.asarray(values)), lib.asarray(penalty)
    unit = float(jnp.finfo(values.dtype).eps)
    held = lib.min(l2) > _UNITS * unit * lib.max(l2)  # what rounding leaves of an l2 = 0 is none
    return lib.where(held, 0.0, units * unit * largest)
