"""The Jacobians of a risk's outputs: a head's where they have its structure, found by values."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._checks import is_concrete
from .._chunks import chunk_length, chunked_map, leading_length
from .._custom_types import Model
from .._linalg import ravel
from .._risk import EmpiricalRisk
from .base import AbstractJacobian
from .head import HeadJacobian
from .reverse import OutputJacobian


def output_jacobian(risk: EmpiricalRisk, model: Model, inputs=None) -> AbstractJacobian:
    """The Jacobians of the outputs at `inputs` (the training inputs by default), as a head's where
    they have exactly its structure on every one of them."""
    require_array_output(risk, model)
    inputs = risk.data[0] if inputs is None else inputs
    general = OutputJacobian(risk, model, inputs)
    layout = _head_layout(risk, model)
    if layout is None or not general.affine or not is_concrete((risk, model, inputs)):
        return general
    is_head, features = _head_features(general, *layout)
    if not is_concrete(is_head) or not bool(is_head):  # inside a trace nothing can be compared
        return general
    return HeadJacobian(features, *layout)


def require_array_output(risk: EmpiricalRisk, model: Model) -> None:
    output = risk.output_struct(model)
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise ValueError(
            f"A Gauss–Newton or Fisher matrix needs outputs that are one array, got {output}. Join "
            "them in `predict`, e.g. by `jnp.concatenate`, and take them apart in the loss; or use "
            "Hessian()."
        )


def _head_layout(risk: EmpiricalRisk, model: Model) -> tuple[int, tuple[int, ...]] | None:
    """K and the widths, where every leaf has the K outputs as its first axis."""
    output = risk.output_struct(model)
    if not isinstance(output, jax.ShapeDtypeStruct) or len(output.shape) > 1:
        return None
    K = int(np.prod(output.shape))
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    if any(leaf.ndim == 0 or leaf.shape[0] != K for leaf in leaves):
        return None
    return K, tuple(leaf.size // K for leaf in leaves)


def _head_order(K: int, widths: tuple[int, ...]) -> Int[np.ndarray, "K d"]:
    starts = K * np.cumsum((0, *widths[:-1]))
    blocks = [s + np.arange(K * w).reshape(K, w) for s, w in zip(starts, widths)]
    return np.concatenate(blocks, axis=1)


@eqx.filter_jit
def _head_features(general: OutputJacobian, K: int, widths: tuple[int, ...]):
    """Row k of A is the features at output k's parameters and 0 elsewhere, the same for every k."""
    order = _head_order(K, widths)

    def one(x):
        blocks = general.rows(x)[:, order]  # [K, K, d]
        features = blocks[0, 0]
        expected = jnp.eye(K, dtype=features.dtype)[:, :, None] * features[None, None, :]
        return jnp.all(blocks == expected), features

    n = leading_length(general.inputs)
    chunk = min(n, chunk_length(3 * K * order.size, jnp.float64))
    is_head, features = chunked_map(one, general.inputs, chunk)
    return jnp.all(is_head), features


def head_features(risk: EmpiricalRisk, model: Model, inputs: PyTree[Array]) -> Float[Array, "n d"]:
    """h̃ of a linear head at `inputs`, as `HeadJacobian` holds them, of what is known to be one: the
    gradient of the first output, which is one forward pass and a copy."""
    layout = _head_layout(risk, model)
    assert layout is not None  # `output_jacobian` has found the head
    theta, rebuild = ravel(model)
    first = lambda t, x: risk.output(rebuild(t), x).reshape(-1)[0]
    rows = jax.vmap(lambda x: jax.grad(first)(theta, x))(inputs)
    return rows[:, _head_order(*layout)[0]]
