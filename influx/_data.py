"""Data, weights, masks and penalties as users give them: arrays of real, finite numbers."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._checks import is_concrete


def checked_data(data, what: str = "data"):
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(
            f"`{what}` must be a pair (inputs, targets), got {_describe(data)}. "
            "Several inputs or targets go in a tuple or dict of their own. Where nothing reads the "
            "targets any valid ones do, such as zeros."
        )
    check_axes(data, what)
    return jtu.tree_map(jnp.asarray, tuple(data))


def _describe(data) -> str:
    name = type(data).__name__
    return f"a {name} of {len(data)}" if isinstance(data, (tuple, list, dict)) else f"a {name}"


def check_axes(data: PyTree[Array], what: str) -> None:
    """Arrays of real, finite numbers with one leading axis of the same, positive length."""
    leaves = jtu.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(
            f"`{what}` holds no arrays. Pass arrays whose leading axis counts examples."
        )
    for path, leaf in leaves:
        _check_numeric(leaf, f"`{what}`{jtu.keystr(path)}")
    lengths = {jtu.keystr(path): leaf.shape[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The leading axes of `{what}` differ: {lengths}. Every array needs one row per example."
        )
    if leaves[0][1].shape[0] == 0:
        raise ValueError(f"`{what}` is empty: it has 0 examples. Pass at least one.")
    for path, leaf in leaves:
        if is_concrete(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            rows = np.isfinite(np.asarray(leaf)).reshape(leaf.shape[0], -1).all(axis=1)
            if not rows.all():
                bad = np.flatnonzero(~rows)
                raise ValueError(
                    f"`{what}`{jtu.keystr(path)} is NaN or infinite at {bad.size} example(s), the "
                    f"first at index {bad[0]}. Impute or drop them: `~np.isfinite(x)` finds them."
                )


def _check_numeric(leaf, name: str) -> None:
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype):
        raise ValueError(
            f"{name} must be a numeric array, got {type(leaf).__name__}. Lists, tensors and the like "
            "become arrays by `np.asarray(...)`, anything else is to be encoded as numbers first."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"{name} is {dtype}; influx takes real numbers. Split it: `np.stack([x.real, x.imag], -1)`."
        )
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
        raise ValueError(
            f"{name} must be a numeric array, got dtype {dtype}. Encode it as numbers first, "
            "categories for instance by `np.unique(x, return_inverse=True)[1]`."
        )
    if leaf.ndim == 0:
        raise ValueError(
            f"{name} has no leading axis of examples. For one example write `(x[None], y[None])`."
        )


def real_array(values, name: str, remedy: str) -> Array:
    """`values` as a JAX array of real numbers (or booleans); `ValueError` where they are not."""
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    real = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_
    if not real or jnp.issubdtype(array.dtype, jnp.complexfloating):
        got = "rows of different lengths, or no numbers" if array.dtype == object else array.dtype
        raise ValueError(f"`{name}` must be an array of real numbers, got {got}. {remedy}")
    return jnp.asarray(array)


def checked_weights(weights, data) -> Float[Array, " n"]:
    leaves = jtu.tree_leaves(data)
    n = leaves[0].shape[0]
    dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    dtype = dtypes[0] if dtypes else jnp.result_type(float)
    if weights is None:
        return jnp.ones((n,), dtype)
    weights = real_array(weights, "weights", "One number per example: 1 keeps it, 0 removes it.")
    if weights.shape != (n,):
        raise ValueError(
            f"`weights` needs shape ({n},), one per example; got {weights.shape}. "
            f"Equal weights are the default, `np.ones({n})`."
        )
    weights = weights.astype(dtype)
    if is_concrete(weights):
        bad = np.flatnonzero(~(np.isfinite(np.asarray(weights)) & (np.asarray(weights) >= 0)))
        if bad.size:
            raise ValueError(
                f"`weights` must be finite and at least 0, got {weights[int(bad[0])]} at index "
                f"{bad[0]}. Weight 0 removes a point."
            )
        if not np.asarray(weights).any():
            raise ValueError(
                "All `weights` are 0: no training point is left. Give at least one a positive weight."
            )
    return weights


def checked_masks(masks, n: int, rows: str) -> Array:
    """Masks [k, n], a row for each of k ≥ 1 groups or subsets of the n training points."""
    members = "A list of members becomes a row by `np.isin(np.arange(n), members)`."
    masks = real_array(masks, "masks", members)
    if masks.ndim != 2 or masks.shape[0] == 0 or masks.shape[1] != n:
        raise ValueError(
            f"`masks` needs shape [k, {n}] (k {rows}, n training points), got {masks.shape}. "
            f"For a single row add a leading axis: `mask[None]`. {members}"
        )
    return masks


def checked_l2(l2):
    leaves = jtu.tree_leaves_with_path(l2)
    if not leaves:
        raise ValueError(f"`l2` must be a number, or one per leaf, got {l2!r}. Use 0. for none.")
    for path, value in leaves:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        name = f"`l2`{jtu.keystr(path)}"
        if not (jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError(f"{name} must be a real number, got {value!r}. For instance 1e-2.")
        values = np.asarray(value) if is_concrete(value) else np.zeros(())
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"{name} must be finite and at least 0, got {value}: a negative penalty has no minimum. "
                "Use 0. for no penalty."
            )
    # As arrays, so that another l2 is no other program.
    return jtu.tree_map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x, float), l2)
