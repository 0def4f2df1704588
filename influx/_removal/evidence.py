"""What the other points say about a point's class: scores of all classes, the point itself left out."""

import functools

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, Int

from .._chunks import chunk_length, chunked_map, leading_length, map_blocks, take
from .._curvature import Hessian
from .._custom_types import Model
from .._influence import Influence, influence
from .._linalg import dot, ravel
from .._measurement.margin import margin
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Watched
from .._train import Newton, fit

# Constants of the rule, fixed on other data than benchmarks/mislabelled.py reports (it says which).
_ROUNDS = 4
_RIDGE = 0.01
_CONTRADICTED = -0.2


class Evidence(eqx.Module):
    """`scores` of each class and `margin` of the given one, both without the point."""

    scores: Float[Array, "n C"]
    margin: Float[Array, " n"]


def by_model(risk: EmpiricalRisk, model: Model, labels: Int[Array, " n"]) -> Evidence:
    """Logits without each point by a Newton step (P10), points weighed by the chance that their label
    is right."""
    trainer = Newton(tolerance=float(jnp.sqrt(jnp.finfo(risk.weights.dtype).eps)))

    def ask(start: Model, trusted: EmpiricalRisk) -> tuple[Model, Evidence]:
        fitted = fit(trusted, start, trainer)
        logits = _logits_without(influence(trusted, fitted, Hessian()))
        return fitted, Evidence(logits, jax.vmap(margin)(logits, labels))

    model, found = ask(model, risk)
    for _ in range(_ROUNDS - 1):
        right = _chance_right(found.margin, risk.weights, found.scores.shape[1])
        model, found = ask(model, risk.with_weights(risk.weights * right))
    return found


@eqx.filter_jit
def _logits_without(f: Influence) -> Float[Array, "n C"]:
    theta, rebuild = ravel(f.model)

    def logits(step, x):
        return f.risk.loss.class_logits(f.risk.output(rebuild(theta + step), x))

    def block(indices):
        return jax.vmap(logits)(f.response.displace(indices), take(f.risk.data[0], indices))

    return map_blocks(block, f.risk.n, min(f.risk.n, chunk_length(8 * theta.size, theta.dtype)))


@eqx.filter_jit
def _chance_right(
    margins: Float[Array, " n"], weights: Float[Array, " n"], classes: int
) -> Float[Array, " n"]:
    """P(label right | label, x) where a share ε of labels was replaced by any other class:
    (1 − ε)p_y against ε(1 − p_y)/(C − 1). ε is found by EM, p staying as it is."""
    chance = lambda noise: jnn.sigmoid(margins + jnp.log((1 - noise) * (classes - 1) / noise))

    def step(_, noise):
        wrong = jnp.vdot(weights, 1 - chance(noise)) / jnp.sum(weights)
        return jnp.clip(wrong, 1e-3, 1 - 1 / classes)

    return chance(jax.lax.fori_loop(0, 50, step, jnp.full((), 0.1, margins.dtype)))


def by_features(
    risk: EmpiricalRisk, model: Model, labels: Int[Array, " n"], classes: int
) -> Evidence:
    """Ridge regression of the labels' indicators on the inputs of the model's linear layers, without
    each point and without all points that the round before contradicts."""
    kernel = feature_kernel(risk, model)
    indicators = jnn.one_hot(labels, classes, dtype=kernel.dtype)
    ridge = _RIDGE * jnp.sum(risk.weights)

    def ask(weights: Float[Array, " n"]) -> Evidence:
        scores = 1 / classes + without_each(kernel, indicators - 1 / classes, weights, ridge)
        return Evidence(scores, _lead(scores, indicators))

    found = ask(risk.weights)
    for _ in range(_ROUNDS - 1):
        found = ask(jnp.where(found.margin < _CONTRADICTED, 0, risk.weights))
    return found


def _lead(scores: Float[Array, "n C"], indicators: Float[Array, "n C"]) -> Float[Array, " n"]:
    """The given class's score less the largest other."""
    given = indicators > 0
    own = jnp.sum(jnp.where(given, scores, 0), axis=1)
    return own - jnp.max(jnp.where(given, -jnp.inf, scores), axis=1)


@jax.jit
def without_each(
    kernel: Float[Array, "n n"],
    targets: Float[Array, "n C"],
    weights: Float[Array, " n"],
    ridge: Float[Array, ""],
) -> Float[Array, "n C"]:
    """Kernel ridge predictions at each point, by all others: minimisers of ½ Σ wⱼ‖yⱼ − f(xⱼ)‖² +
    ½ ridge ‖f‖², exactly.

    With A = √w K √w + ridge, ŷ = K √w A⁻¹ √w y and leverages hᵢ = 1 − ridge (A⁻¹)ᵢᵢ it is
    (ŷᵢ − hᵢyᵢ)/(1 − hᵢ): P10 for quadratic J. At wᵢ = 0 hᵢ is 0, and the prediction as it stands.
    """
    root = jnp.sqrt(weights)[:, None]
    eye = jnp.eye(len(weights), dtype=weights.dtype)
    factor = jnp.linalg.cholesky(root * kernel * root.T + ridge * eye)
    fitted = dot(kernel, root * jsl.cho_solve((factor, True), root * targets))
    inverse = jsl.solve_triangular(factor, eye, lower=True)
    left = ridge * jnp.sum(jnp.square(inverse), axis=0)[:, None]  # 1 − h
    return (fitted - (1 - left) * targets) / left


def feature_kernel(risk: EmpiricalRisk, model: Model) -> Float[Array, "n n"]:
    """1 + the mean over layers of ⟨aᵢ, aⱼ⟩, a the layer's input, centred and of mean square 1."""
    watch = Watched(lambda m, x: risk.output(m, x), model, take(risk.data[0], 0))
    places = [place for place, layer in enumerate(watch.layers) if layer.taps]
    if not places:
        raise ValueError(
            "No layer of the model is linear in a parameter, so there are no features to compare points "
            'by. Where the outputs are affine in the parameters use `evidence="model"`; else restrict '
            "to a part that has such layers, e.g. `influx.restrict(risk, model, lambda m: m.layers)`."
        )
    kernels = [_layer_kernel(risk, model, place) for place in places]
    seen = sum(bool(jnp.any(kernel != 0)) for kernel in kernels)  # a constant input says nothing
    return 1 + functools.reduce(jnp.add, kernels) / max(1, seen)


@eqx.filter_jit
def _layer_kernel(risk: EmpiricalRisk, model: Model, place: int) -> Float[Array, "n n"]:
    watch = Watched(lambda m, x: risk.output(m, x), model, take(risk.data[0], 0))
    layer = watch.layers[place]

    def features(x):
        nothing = lambda output: jnp.zeros((1, *output.shape), output.dtype)
        return _flat(layer, watch.rows(x, nothing)[1][place])

    inputs = risk.data[0]
    width = jax.eval_shape(features, take(inputs, 0)).size
    chunk = min(leading_length(inputs), chunk_length(8 * width, risk.weights.dtype))
    a = chunked_map(features, inputs, chunk)
    share = risk.weights / jnp.sum(risk.weights)
    a = a - dot(share, a)[None]
    size = dot(share, jnp.sum(jnp.square(a), axis=1))
    return dot(a, a.T) / jnp.where(size > 0, size, 1)


def _flat(layer: Layer, rows: Rows) -> Float[Array, " d"]:
    """The layer's input as one vector, place after place."""
    if rows.indexed:
        return jnn.one_hot(rows.right, layer.shape[2]).reshape(-1)
    return rows.right.reshape(-1)
