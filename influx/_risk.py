"""The empirical risk: the one place for 1/n, sums over examples, data weights and l2."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._custom_types import Example, Model, Scalar
from ._loss import AbstractLoss
from ._misc import is_concrete, ravel, take


def call(model: Model, x: PyTree[Array]) -> PyTree[Array]:
    """The default `predict`: the model called on one input."""
    return model(x)


def itself(model: Model) -> Model:
    """The default `whole`: the model is whole already."""
    return model


class EmpiricalRisk(eqx.Module):
    r"""J(θ, w) = (1/n) Σᵢ wᵢ ℓ(zᵢ, θ) + Ω(θ), with Ω(θ) = ½ Σ_leaf l2_leaf ‖θ_leaf‖².

    **n and Ω do not change with w**: weight 0 *erases* a point, as removing a row does under
    scikit-learn's C·Σℓ + ½‖θ‖².

    **Arguments:**

    - `data`: `(inputs, targets)`, each a pytree of arrays whose leading axis counts the n examples.
    - `loss`: an [`AbstractLoss`][]; `CustomLoss(fn)` for any function of (output, target).
    - `l2`: a number for every parameter, or one per leaf: a pytree that is a prefix of the model's
      parameters (an array of a leaf's own shape is one number per entry). No penalty on biases:
      `jtu.tree_map(lambda p: 1e-2 * (p.ndim > 1), eqx.filter(model, eqx.is_inexact_array))`.
    - `weights`: w ≥ 0, [n]: 1 = trained on once (the default), 0 = absent.
    - `predict`: `predict(model, x)`, the output for one input; the model itself by default.

    **Raises:** `ValueError` for empty data, leading axes that differ, leaves that are not arrays of
    real numbers, NaN or infinity (naming leaf and example), weights or l2 below 0, and weights that
    are all 0. What depends on a model (label range, output shape, dtypes) is checked where risk and
    model first meet.
    """

    data: tuple[PyTree[Array], PyTree[Array]]
    loss: AbstractLoss
    l2: PyTree[Scalar]
    weights: Float[Array, " n"]
    predict: Callable[[Any, Any], Any]
    whole: Callable[[Any], Any]

    def __init__(self, data, loss, *, l2=0.0, weights=None, predict=None, whole=None):
        self.data = _checked_data(data)
        if not isinstance(loss, AbstractLoss):
            raise ValueError(
                f"`loss` must be an influx loss such as SoftmaxCrossEntropy(), got {loss!r}. "
                "Wrap a function of (output, target) as `CustomLoss(fn)`."
            )
        self.loss = loss
        self.l2 = _checked_l2(l2)
        self.weights = _checked_weights(weights, self.data)
        if predict is not None and not callable(predict):
            raise ValueError(
                f"`predict` must be a function of (model, x), got {predict!r}. "
                "For instance `lambda model, x: model(x)`."
            )
        self.predict = call if predict is None else predict
        self.whole = itself if whole is None else whole

    @property
    def n(self) -> int:
        """The number of training points, those of weight 0 included."""
        return self.weights.shape[0]

    def with_weights(self, weights: Float[Array, " n"]) -> "EmpiricalRisk":
        """The same risk under other data weights."""
        weights = _checked_weights(weights, self.data)
        return eqx.tree_at(lambda risk: risk.weights, self, weights)

    def output(self, model: Model, x: PyTree[Array]) -> PyTree[Array]:
        """The model's output for one input."""
        return self.predict(self.whole(model), x)

    def example_loss(self, model: Model, example: Example) -> Float[Array, ""]:
        """ℓ(z, θ) of one (input, target) pair."""
        x, y = example
        return self.loss(self.output(model, x), y)

    def losses(self, model: Model, data=None) -> Float[Array, " n"]:
        """ℓ(zᵢ, θ) of every training point, or of every example of `data`."""
        data = self.data if data is None else data
        return jax.vmap(lambda example: self.example_loss(model, example))(data)

    def mean(self, values: Float[Array, "n ..."], weights=None) -> Float[Array, "..."]:
        """(1/n) Σᵢ wᵢ vᵢ: the only average over training points there is."""
        weights = self.weights if weights is None else weights
        return jnp.tensordot(weights, values, axes=1, precision=jax.lax.Precision.HIGHEST) / self.n

    def regulariser(self, model: Model) -> Float[Array, ""]:
        """Ω(θ)."""
        theta, _ = ravel(model)
        return 0.5 * jnp.sum(self.l2_vector(model) * jnp.square(theta))

    def l2_vector(self, model: Model) -> Float[Array, " P"]:
        """The diagonal of ∇²Ω, in the order of `ravel(model)`."""
        params = eqx.filter(model, eqx.is_inexact_array)
        return ravel(jtu.tree_map(jnp.full_like, params, l2_tree(self.l2, params)))[0]

    def objective(self, model: Model, weights=None) -> Float[Array, ""]:
        """J(θ, w); `weights` defaults to the risk's own."""
        return self.mean(self.losses(model), weights) + self.regulariser(model)


def l2_tree(l2: PyTree[float], params: PyTree[Array]) -> PyTree[float]:
    """`l2`, a number or a prefix of `params`, as one number per parameter leaf."""
    try:
        tree = jtu.tree_map(
            lambda value, part: jtu.tree_map(lambda _: value, part),
            l2,
            params,
            is_leaf=lambda x: x is None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`l2` must be a number, or a pytree of numbers that is a prefix of the model's "
            f"parameters, {jtu.tree_structure(params)}; got {jtu.tree_structure(l2)}. For instance "
            "`jtu.tree_map(lambda p: 1e-2, eqx.filter(model, eqx.is_inexact_array))`."
        ) from error
    jtu.tree_map_with_path(_check_l2_shape, params, tree)
    return tree


def _check_l2_shape(path, param: Array, value) -> None:
    if value is None:
        raise ValueError(
            f"`l2` of the parameter {jtu.keystr(path)} is None: give every parameter a number, 0. for "
            "no penalty."
        )
    if np.shape(value) not in ((), param.shape):
        raise ValueError(
            f"`l2` of the parameter {jtu.keystr(path)} has shape {np.shape(value)}: give one number "
            f"for the leaf, or an array of its shape {param.shape}."
        )


def validate(risk: EmpiricalRisk, model: Model) -> None:
    """Everything about a risk and a model together that can be wrong before work starts.

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
    theta, _ = ravel(model)
    for path, leaf in jtu.tree_leaves_with_path(risk.data):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype != theta.dtype:
            raise ValueError(
                f"The parameters are {theta.dtype} but the data leaf {jtu.keystr(path)} is "
                f"{leaf.dtype}: convert one, e.g. `X.astype({theta.dtype})`."
            )
    l2_tree(risk.l2, eqx.filter(model, eqx.is_inexact_array))
    x, y = take(risk.data, 0)
    output = _traced(
        risk.output,
        model,
        x,
        what="The model cannot be called on the input",
        remedy="`predict(model, x)` sees one example, without the leading axis of examples.",
    )
    risk.loss.check(output, risk.data[1])
    value = _traced(
        risk.loss,
        output,
        y,
        what="The loss cannot be called on one output and the target",
        remedy="`loss(output, target)` sees one example, without the leading axis of examples.",
    )
    _check_scalar(value, theta.dtype)


def _traced(fn: Callable, *args, what: str, remedy: str) -> PyTree:
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


def check_queries(
    risk: EmpiricalRisk, model: Model, queries: PyTree[Array], what: str = "queries"
) -> None:
    """Queries are `(inputs, targets)` whose rows look like the training data's, which `validate` has
    seen, with targets that the loss takes."""
    _checked_data(queries, what)
    expected, got = (jtu.tree_structure(x) for x in (risk.data, tuple(queries)))
    rows = lambda tree: [(x.shape[1:], x.dtype) for x in jtu.tree_leaves(tree)]
    if expected != got or [r[0] for r in rows(risk.data)] != [r[0] for r in rows(queries)]:
        raise ValueError(
            "A query must look like a training point: rows of shapes "
            f"{[r[0] for r in rows(risk.data)]} in {expected}, got {[r[0] for r in rows(queries)]} "
            f"in {got}. For one query add a leading axis: `(x[None], y[None])`."
        )
    for (shape, want), (_, have) in zip(rows(risk.data), rows(queries)):
        if jnp.issubdtype(want, jnp.inexact) and want != have:
            raise ValueError(
                f"Query rows of shape {shape} are {have}, the training data's are {want}: "
                f"convert them, e.g. `.astype({want})`."
            )
    risk.loss.check(eqx.filter_eval_shape(risk.output, model, take(queries[0], 0)), queries[1])


def _checked_data(data, what: str = "data"):
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


def _checked_weights(weights, data) -> Float[Array, " n"]:
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


def _checked_l2(l2):
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
            "`jtu.tree_map(lambda p: p.astype(x.dtype) if eqx.is_inexact_array(p) else p, model)`."
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


def class_logits_shape(risk: EmpiricalRisk, model: Model) -> jax.ShapeDtypeStruct:
    """The shape of one example's class logits; `ValueError` where the loss is no classifier's."""
    of_input = lambda m, x: risk.loss.class_logits(risk.output(m, x))
    logits = eqx.filter_eval_shape(of_input, model, take(risk.data[0], 0))
    if len(getattr(logits, "shape", ())) != 1:
        raise ValueError(
            f"The class logits of one example must be a vector [C], got {logits}. "
            "Return one from `logits=`: for a binary output z that is `jnp.stack([0 * z, z])`."
        )
    return logits


def require_labels(risk: EmpiricalRisk) -> None:
    """Margins are those of one label per example."""
    labels = risk.data[1]
    if not isinstance(labels, jax.Array) or labels.size != risk.n:
        shapes = jtu.tree_map(jnp.shape, labels)
        raise ValueError(
            f"A margin is that of one label per example, and the targets have shapes {shapes}. Use "
            "`influx.measure(f, fn)` for a margin of your own."
        )
