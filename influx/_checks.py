"""Settings and arguments, checked where they are written."""

import math
import os
from numbers import Integral, Real
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._custom_types import Scalar, ScalarLike


def is_concrete(tree: PyTree) -> bool:
    """Whether every array of `tree` holds values, so that they may be inspected."""
    return not any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(tree))


def require_concrete(verb: str, *trees: PyTree) -> None:
    """Refuse to run inside a trace, for verbs that look at numbers to decide."""
    if not is_concrete(trees):
        raise ValueError(
            f"`{verb}` looks at numbers to decide what it answers, and inside `jax.jit`, `jax.vmap` or "
            "`jax.grad` there are none yet. Call it outside."
        )


def check_whole(
    name: str, value: Any, *, least: int = 1, most: int | None = None, hint: str = ""
) -> int:
    """A count: a whole number, of Python, NumPy or JAX, within bounds."""
    value = _scalar(value)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bounds = f"at least {least}" if most is None else f"in {least}…{most}"
        raise ValueError(f"`{name}` must be a whole number, {bounds}, got {value!r}.{hint}")
    return int(value)


def is_real(value: Any) -> bool:
    """A finite real number, of Python, NumPy or JAX; True and False are none."""
    value = _scalar(value)
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _scalar(value: Any) -> Any:
    """The number in an array without axes; anything else as it is."""
    array = isinstance(value, np.ndarray | jax.Array) and is_concrete(value) and value.ndim == 0
    return value.item() if array else value


def check_chunk(chunk_size: int | None) -> int | None:
    if chunk_size is None:
        return None
    return check_whole("chunk_size", chunk_size, hint=" None chooses one.")


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def check_key(name: str, key: Any) -> PRNGKeyArray:
    """A random key: typed, or of the old kind, two numbers of uint32."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or np.shape(key) != (2,)):
        raise ValueError(f"`{name}` must be a random key such as jax.random.key(0), got {key!r}.")
    return key


def check_indices(indices: Any, n: int) -> Array:
    """Points as an array of indices 0…n−1; `None` means all."""
    if indices is None:
        return jnp.arange(n)
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"`indices` must be a list of whole numbers, got shape {indices.shape} of "
            f"{indices.dtype}. For one point write `[i]`, for a mask `np.flatnonzero(mask)`."
        )
    bad = indices[(indices < 0) | (indices >= n)]
    if bad.size:
        raise ValueError(
            f"`indices` must lie in 0…{n - 1} (there are {n} training points), got {bad[0]}."
            + (f" Do you mean {bad[0] + n}?" if -n <= bad[0] < 0 else "")
        )
    return jnp.asarray(indices)


def check_memory(memory: int | None) -> int | None:
    if memory is None:
        return None
    hint = " It counts bytes: for one gigabyte write memory=10**9. None is 256 MiB."
    return check_whole("memory", memory, hint=hint)


def check_held(size: int, what: str, remedy: str) -> None:
    """Refuse what takes more bytes than this machine has."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system says
        return
    if size > memory:
        raise ValueError(
            f"{what} takes {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}. {remedy}"
        )


def check_damping(damping: ScalarLike) -> Scalar:
    """A damping λ, a number at least zero, as an array: another λ is then no other program."""
    if not is_concrete(damping):
        damping = jnp.asarray(damping)
        bad = ~(jnp.isfinite(damping) & (damping >= 0))
        return eqx.error_if(damping, bad, "`damping` is λ in (H + λI) and must be at least 0.")
    dtype = np.asarray(damping).dtype
    real = np.issubdtype(dtype, np.number) and not np.issubdtype(dtype, np.complexfloating)
    if not real or np.ndim(damping) != 0:
        raise ValueError(f"`damping` must be one real number, got {damping!r}.")
    if not np.isfinite(damping) or damping < 0:
        raise ValueError(
            f"`damping` is λ in (H + λI) and must be at least 0, got {damping}. "
            "Use damping=0. for the plain inverse, or a positive number such as 1e-3."
        )
    return damping if isinstance(damping, jax.Array) else np.asarray(damping, float)
