"""What can be wrong where a risk, a model and queries meet."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from ._checks import is_concrete
from ._chunks import row_struct
from ._custom_types import Model
from ._data import checked_data
from ._risk import EmpiricalRisk, l2_tree


def validate(risk: EmpiricalRisk, model: Model) -> EmpiricalRisk:
    """Everything about a risk and a model together that can be wrong before work starts.

    **Returns:** the risk, its weights in the parameters' dtype: inputs that are whole numbers, such as
    tokens, do not say which that is.

    **Raises:** `ValueError` naming the cause: no parameters, NaN or infinity in a parameter (which
    leaf), several dtypes, layers whose output for one example depends on others or on chance, a model
    that cannot be called on one input, an output the loss cannot take, labels out of range, a loss
    that is not a real scalar.
    """
    if not isinstance(risk, EmpiricalRisk):
        raise ValueError(
            f"The first argument must be an influx.EmpiricalRisk, got {type(risk).__name__}. "
            "The order is (risk, model)."
        )
    _check_layers(risk.whole(model))
    _check_parameters(model)
    dtype = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
    for path, leaf in jtu.tree_leaves_with_path(risk.data):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype != dtype:
            raise ValueError(
                f"The parameters are {dtype} but the data leaf {jtu.keystr(path)} is "
                f"{leaf.dtype}: convert one, e.g. by `.astype(jnp.{dtype})`."
            )
    l2_tree(risk.l2, eqx.filter(model, eqx.is_inexact_array))
    x, y = row_struct(risk.data)
    output = traced(
        risk.output,
        model,
        x,
        what="The model cannot be called on the input",
        remedy="`predict(model, x)` sees one example, without the leading axis of examples.",
    )
    risk.loss.check(output, risk.data[1])
    value = traced(
        risk.loss,
        output,
        y,
        what="The loss cannot be called on one output and the target",
        remedy="`loss(output, target)` sees one example, without the leading axis of examples.",
    )
    _check_scalar(value, dtype)
    return eqx.tree_at(lambda r: r.weights, risk, risk.weights.astype(dtype))


def traced(fn: Callable, *args, what: str, remedy: str) -> PyTree:
    """The shapes that `fn(*args)` answers; where it fails, an error that says on which shapes."""
    try:
        return eqx.filter_eval_shape(fn, *args)
    except (TypeError, ValueError, IndexError) as error:
        arrays = [x for x in jtu.tree_leaves(args[-1]) if hasattr(x, "dtype")]
        rows = ", ".join(f"{x.dtype}{list(x.shape)}" for x in arrays)
        raise ValueError(f"{what} {rows}: {str(error).rstrip('.')}. {remedy}") from error


def _check_scalar(value, dtype) -> None:
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"The loss of one example must be a scalar, got {value}. "
            "Sum or average over its axes inside the loss."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"The loss of one example must be a real floating number, got {value.dtype}: only such a "
            "loss has a gradient. Use a differentiable one, such as cross-entropy for a 0/1 loss."
        )
    if jnp.finfo(value.dtype).bits < jnp.finfo(dtype).bits:
        raise ValueError(
            f"The loss is {value.dtype} where the parameters are {dtype}, and would lose their digits. "
            f"Compute it in {dtype}: look for an `astype` inside `predict` or the loss."
        )


def _check_parameters(model: Model) -> None:
    leaves = jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
    if not leaves or all(leaf.size == 0 for _, leaf in leaves):
        raise ValueError(
            "The model has no parameters: none of its leaves is a floating array. Pass an Equinox "
            "module, or any pytree of arrays with `predict=lambda params, x: ...`."
        )
    dtypes = {jtu.keystr(path): str(leaf.dtype) for path, leaf in leaves}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"The parameters have several dtypes: {dtypes}. Convert them to one, e.g. "
            "`jtu.tree_map(lambda p: p.astype(float) if eqx.is_inexact_array(p) else p, model)`."
        )
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"The parameter {jtu.keystr(path)} is {leaf.dtype}; influx needs real ones. Keep the "
                "real and the imaginary part as two real arrays."
            )
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"The parameter {jtu.keystr(path)} is {leaf.dtype}, in which no curvature can be "
                "factored. Convert model and data to float32, or better float64."
            )
        if is_concrete(leaf) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(
                f"The parameter {jtu.keystr(path)} is NaN or infinite: training diverged. "
                "Retrain with a smaller step, or restore an earlier model."
            )


def _check_layers(model: Model) -> None:
    frozen = lambda x: isinstance(x, eqx.nn.StatefulLayer) and getattr(x, "inference", False)
    is_layer = lambda x: isinstance(x, (eqx.nn.StateIndex, eqx.nn.Dropout)) or frozen(x)
    for path, layer in jtu.tree_leaves_with_path(model, is_leaf=is_layer):
        if isinstance(layer, eqx.nn.StateIndex):
            raise ValueError(
                f"The layer at {jtu.keystr(path[:-1])} keeps state (BatchNorm): the loss of one "
                "example then depends on the others. Freeze it, `model = eqx.nn.inference_mode(model)` "
                "with `predict=lambda m, x: m(x, state)[0]`; or use GroupNorm or LayerNorm."
            )
        if isinstance(layer, eqx.nn.Dropout) and not layer.inference and float(layer.p) > 0:
            raise ValueError(
                f"The Dropout at {jtu.keystr(path)} is in training mode: the loss is random. "
                "Write `model = eqx.nn.inference_mode(model)`."
            )


def check_queries(
    risk: EmpiricalRisk, model: Model, queries: PyTree[Array], what: str = "queries"
) -> None:
    """Queries are `(inputs, targets)` whose rows look like the training data's, which `validate` has
    seen, with targets that the loss takes."""
    queries = checked_data(queries, what)  # as arrays of JAX, like the training data
    expected, got = (jtu.tree_structure(x) for x in (risk.data, tuple(queries)))
    rows = lambda tree: [(x.shape[1:], x.dtype) for x in jtu.tree_leaves(tree)]
    if expected != got or [r[0] for r in rows(risk.data)] != [r[0] for r in rows(queries)]:
        raise ValueError(
            "A query must look like a training point: rows of shapes "
            f"{[r[0] for r in rows(risk.data)]} in {expected}, got {[r[0] for r in rows(queries)]} "
            f"in {got}. For one query add a leading axis: `(x[None], y[None])`."
        )
    inputs = len(jtu.tree_leaves(risk.data[0]))  # of targets the loss itself says which it takes
    for i, ((shape, want), (_, have)) in enumerate(zip(rows(risk.data), rows(queries))):
        floats, given = (jnp.issubdtype(dtype, jnp.inexact) for dtype in (want, have))
        if (floats and want != have) or (i < inputs and floats != given):
            raise ValueError(
                f"Query rows of shape {shape} are {have}, the training data's are {want}: pass them on "
                f"the same scale and convert them, e.g. `.astype({want})`."
            )
    risk.loss.check(risk.output_struct(model), queries[1])


def class_logits_shape(risk: EmpiricalRisk, model: Model) -> jax.ShapeDtypeStruct:
    """The shape of one example's class logits; `ValueError` where the loss is no classifier's."""
    logits = eqx.filter_eval_shape(risk.loss.class_logits, risk.output_struct(model))
    if len(getattr(logits, "shape", ())) != 1:
        raise ValueError(
            f"The class logits of one example must be a vector [C], got {logits}. "
            "Return one from `logits=`: for a binary output z that is `jnp.stack([0 * z, z])`."
        )
    return logits


def class_labels(targets: Array) -> Int[Array, " n"]:
    """Labels as whole numbers: yes-or-no labels may be numbers of any kind, or bool."""
    return jnp.asarray(targets).reshape(-1).astype(int)


def require_labels(risk: EmpiricalRisk) -> None:
    """Margins are those of one label per example."""
    labels = risk.data[1]
    if not isinstance(labels, jax.Array) or labels.size != risk.n:
        shapes = jtu.tree_map(jnp.shape, labels)
        raise ValueError(
            f"A margin is that of one label per example, and the targets have shapes {shapes}. Use "
            "`influx.measure(f, fn)` for a margin of your own."
        )
