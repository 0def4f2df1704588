"""What a loss demands of outputs and targets."""

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._checks import is_concrete


def check_output(output, loss: str) -> None:
    dtype = getattr(output, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{loss} takes one floating array as the model's output, got {output}. Pick it with "
            "`predict=lambda model, x: ...`, or use `CustomLoss`."
        )


def array_target(targets) -> Array:
    leaves = jtu.tree_leaves(targets)
    if len(leaves) != 1:
        raise ValueError(
            f"This loss takes one array of targets, got a pytree of {len(leaves)} arrays. "
            "Use `CustomLoss` for targets with several parts."
        )
    return leaves[0]


def check_shape(targets: Array, expected: tuple[int, ...], what: str, remedy: str) -> None:
    if targets.shape[1:] != tuple(expected):
        raise ValueError(
            f"{what}: expected shape [{', '.join(map(str, ('n', *expected)))}] (n examples), "
            f"got {tuple(targets.shape)}. {remedy}"
        )


def check_range(targets: Array, low: int, high: int, why: str) -> None:
    if not is_concrete(targets):
        return
    values = np.asarray(targets)
    bad = np.flatnonzero(np.any(flat_rows((values < low) | (values > high)), axis=1))
    if bad.size:
        raise ValueError(
            f"Labels out of range at examples {few(bad)} (for instance "
            f"{flat_rows(values)[bad[0]].ravel()[:3].tolist()}): {why}. Renumber them, as "
            "`np.unique(y, return_inverse=True)[1]` does, or give the model more outputs."
        )


def flat_rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


def few(indices: np.ndarray, show: int = 5) -> str:
    text = ", ".join(map(str, indices[:show].tolist()))
    return f"[{text}{', …' if indices.size > show else ''}] ({indices.size} in all)"
