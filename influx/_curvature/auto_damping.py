"""The damping that `damping="auto"` stands for."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import root_scalar

from .._checks import is_concrete
from .kronecker import EigenBlock

_STEPS = 1000  # more than bisection to the last digit takes


def auto_damping(
    blocks: list[EigenBlock], penalties: list[Array], weights: Float[Array, " n"]
) -> Array:
    """The least λ ≥ 0 at which the effective dimension tr F (F + diag l2 + λI)⁻¹ is at most n.

    F are the eigenvalues of the data part, `penalties` those of l2, and n counts the training
    points of positive weight. A point's leverage is its share of the effective dimension, what it
    decides of its own fit. The rule allows one direction a point, and takes what the curvature claims
    beyond that for l2's or nobody's. It is a rule of thumb: with K outputs n points may decide up to nK
    directions, and a weight of 2 counts as one point. Where l2 alone keeps the dimension below n, λ is
    0. Where that leaves a block singular to rounding (l2 = 0 on a part of it), λ, one for all blocks, is
    that block's `rounding_floor`.
    """
    if not is_concrete((blocks, penalties, weights)):
        raise ValueError(
            'damping="auto" looks at eigenvalues, and inside `jax.jit`, `jax.vmap` or `jax.grad` there '
            "are none yet. Give the damping as a number, or call `influence` outside."
        )
    points = int(np.sum(np.asarray(weights) > 0))
    values, l2 = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])
        for parts in ([b.values for b in blocks], penalties)
    )
    data = np.maximum(values - l2, 0)
    dimension = lambda damping: np.sum(data / np.where(data > 0, values + damping, 1))
    found = 0.0
    if dimension(found) > points:
        high = float(np.sum(data)) / points  # there the dimension is at most n
        beyond = lambda damping: dimension(damping) - points
        found = root_scalar(
            beyond, bracket=(0.0, high), xtol=np.finfo(float).tiny, maxiter=_STEPS
        ).root
    least = [(b, rounding_floor(b.values, penalty)) for b, penalty in zip(blocks, penalties)]
    short = [limit for b, limit in least if float(np.min(np.asarray(b.values))) + found <= limit]
    return jnp.asarray(max([found, *short]), blocks[0].values.dtype)


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
