"""The empirical risk: the one place for 1/n, sums over examples, data weights and l2."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._chunks import row_struct
from ._custom_types import Example, Model, Scalar
from ._data import checked_data, checked_l2, checked_weights
from ._linalg import ravel
from ._loss import AbstractLoss


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
    - `loss`: an `AbstractLoss`; `CustomLoss(fn)` for any function of (output, target).
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
        self.data = checked_data(data)
        if not isinstance(loss, AbstractLoss):
            raise ValueError(
                f"`loss` must be an influx loss such as SoftmaxCrossEntropy(), got {loss!r}. "
                "Wrap a function of (output, target) as `CustomLoss(fn)`."
            )
        self.loss = loss
        self.l2 = checked_l2(l2)
        self.weights = checked_weights(weights, self.data)
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
        weights = checked_weights(weights, self.data).astype(self.weights.dtype)
        return eqx.tree_at(lambda risk: risk.weights, self, weights)

    def output(self, model: Model, x: PyTree[Array]) -> PyTree[Array]:
        """The model's output for one input."""
        return self.predict(self.whole(model), x)

    def output_struct(self, model: Model) -> PyTree[jax.ShapeDtypeStruct]:
        """The shape and dtype of `output(model, x)` for a training input x: traced, not computed."""
        x = row_struct(self.data[0])
        return eqx.filter_eval_shape(_output, self.predict, self.whole, model, x)

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


@eqx.filter_jit
def _output(predict: Callable, whole: Callable, model: Model, x: PyTree[Array]) -> PyTree[Array]:
    """`risk.output(model, x)`, traced once for models and inputs of the same structure."""
    return predict(whole(model), x)


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
