"""The damping that `damping="auto"` stands for."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import root_scalar

from .._checks import is_concrete
from .._chunks import chunked_sum
from .._custom_types import Model, Scalar
from .._risk import EmpiricalRisk, l2_tree
from .kronecker import EigenBlock

_STEPS = 1000  # more than bisection to the last digit takes
_BLOCK = 512  # examples whose losses are taken at a time


def auto_damping(
    blocks: list[EigenBlock], penalties: list[Array], risk: EmpiricalRisk, model: Model
) -> Array:
    """The least λ ≥ 0 at which the energy of the trained weights is what the data decide of them,

        n θᵀ(diag l2 + λI)θ ≥ d/(1 + d/N),   d = tr F(F + diag l2 + λI)⁻¹,

    F the eigenvalues of the data part, `penalties` those of l2, N = Σ wᵢ. exp(−nJ) has a Gaussian prior
    of precision n(l2 + λ). Where no common factor of it raises the evidence (with one l2 for all: where
    no other λ does) its energy is the effective dimension d (MacKay, "A practical Bayesian framework for
    backpropagation networks", 1992; for networks of today Immer et al., arXiv:2104.04975). The weights
    are taken as they are: at the maximum they would be smaller and λ larger, the more so the less the
    data decide; near 0 they make λ large without bound. Layer-norm gains and what is left of initial
    weights count as well (Antorán et al., arXiv:2206.08900), but for squared error, below.

    EK-FAC's d adds up the points' leverages in a basis that hardly knows any one of them: an output
    direction comes out as x where a matrix of the point itself says x/(1 + x). The sum of those is at
    most d/(1 + d/N), and just that for equal leverages. That a point counts for one direction, however
    many outputs or places it has, is a choice, held to retraining in docs/how-to-choose.md.

    For squared error each eigendirection counts as far as the data decide it, γ = F/(F + l2 + λ):

        n Σ γ (l2 + λ) θ² ≥ σ² Σ γ,   Σ γ = d,   σ² = Σ wᵢ‖rᵢ‖²/(N K),

    θ in the eigenbasis, K residuals a point: the prior's variance is the mean square of the weights that
    are decided. The others have kept their initial values, which say nothing of it. (A softmax's
    curvature fades where it fits: directions that data have decided show little of it at the end of
    training. So there all weights count.) The noise is σ² over 1 − d′/(N K), d′ = d/(1 + d/(N K)) being
    lost to the fit: d′ times it is σ²d.

    Where l2 and λ leave a block singular to rounding, λ, one for all blocks, is its `rounding_floor`.
    """
    if not is_concrete((blocks, penalties, risk.weights, model)):
        raise ValueError(
            'damping="auto" looks at eigenvalues, and inside `jax.jit`, `jax.vmap` or `jax.grad` there '
            "are none yet. Give the damping as a number, or call `influence` outside."
        )
    values, penalty = _joined([b.values for b in blocks]), _joined(penalties)
    data = np.maximum(values - penalty, 0)
    decided = lambda damping: data / np.where(data > 0, values + damping, 1)  # γ
    variance = _variance(risk, model)
    if variance is None:
        excess, size = _excess_of_energy(risk, model, decided)
    else:
        squares = np.square(_joined(_in_eigenbasis(blocks, model)))
        energy = lambda damping: risk.n * (penalty + damping) * squares
        excess = lambda damping: decided(damping) @ (energy(damping) - variance)
        size = np.sum(data * squares)

    found, undamped = 0.0, excess(0.0)
    if not np.isfinite(undamped):
        raise ValueError(
            'damping="auto" is read off parameters, losses and eigenvalues, and some are NaN or '
            "overflow at this model. Mend that, or give the damping as a number."
        )
    if undamped < 0:
        if not size > 0:
            raise ValueError(
                'damping="auto" is read off the size of the parameters, and all that the data decide '
                "are 0. Train the model, or give the damping as a number."
            )
        high = np.max(values)
        while excess(high) < 0:
            high *= 2
        found = root_scalar(
            excess, bracket=(0.0, high), xtol=np.finfo(float).tiny, maxiter=_STEPS
        ).root
    least = [(b, rounding_floor(b.values, penalty)) for b, penalty in zip(blocks, penalties)]
    short = [limit for b, limit in least if float(np.min(np.asarray(b.values))) + found <= limit]
    return jnp.asarray(max([found, *short]), blocks[0].values.dtype)


def _joined(parts) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])


def _excess_of_energy(risk: EmpiricalRisk, model: Model, decided: Callable):
    """λ ↦ n θᵀ(diag l2 + λI)θ − d/(1 + d/N), and θᵀθ."""
    params = eqx.filter(model, eqx.is_inexact_array)
    l2 = np.asarray([float(x) for x in jtu.tree_leaves(l2_tree(risk.l2, params))])
    squares = [np.sum(np.square(np.asarray(x, np.float64))) for x in jtu.tree_leaves(params)]
    held, size = float(l2 @ squares), float(np.sum(squares))
    points = float(np.sum(np.asarray(risk.weights, np.float64)))

    def excess(damping: float) -> float:
        dimension = np.sum(decided(damping))
        return risk.n * (held + damping * size) - dimension / (1 + dimension / points)

    return excess, size


@eqx.filter_jit
def _in_eigenbasis(blocks: list[EigenBlock], model: Model) -> list[Float[Array, "S l r"]]:
    """The parameters of each block."""
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return [block.rotate(block.layer.matrix(leaves)) for block in blocks]


def _variance(risk: EmpiricalRisk, model: Model) -> float | None:
    """The mean square of the residuals, of a loss whose noise has a size of its own; else none."""
    residuals = risk.loss.residuals(risk.output_struct(model))
    if residuals == 0:
        return None
    return 2 * float(_sum_of_losses(risk, model)) / (residuals * float(jnp.sum(risk.weights)))


@eqx.filter_jit
def _sum_of_losses(risk: EmpiricalRisk, model: Model) -> Scalar:
    block = lambda args: jnp.vdot(risk.losses(model, args[0]), args[1])
    return chunked_sum(block, (risk.data, risk.weights), _BLOCK)


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
