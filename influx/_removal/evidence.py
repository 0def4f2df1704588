"""What the other points say about a point's class: scores of all classes, the point itself left out."""

import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, Int

from .._checks import check_held
from .._chunks import chunk_length, chunked_map, leading_length, take
from .._curvature import Hessian
from .._custom_types import Model
from .._engine import map_points
from .._influence import Influence, influence
from .._linalg import dot, ravel
from .._measurement.margin import margin
from .._response import require_steps
from .._risk import EmpiricalRisk
from .._taps import Layer, Rows, Watched
from .._train import Newton, fit

# Constants of the rule, fixed on other data than benchmarks/mislabelled.py reports (it says which).
_REFITS = 3
_KERNELS = 4  # arrays of n × n numbers alive at once
_RIDGES = tuple(3e-4 * 3**k for k in range(6))


class Evidence(eqx.Module):
    """`scores` of each class and `margin` of the given one, both without the point."""

    scores: Float[Array, "n C"]
    margin: Float[Array, " n"]


def by_model(risk: EmpiricalRisk, model: Model, labels: Int[Array, " n"]) -> Evidence:
    """Logits without each point by a Newton step (P10), points weighed by the chance that their label
    is right; an error naming the points without which there is no step."""
    trainer = Newton(tolerance=float(jnp.sqrt(jnp.finfo(risk.weights.dtype).eps)))

    def ask(start: Model, trusted: EmpiricalRisk) -> tuple[Model, Evidence]:
        fitted = fit(trusted, start, trainer)
        logits = logits_without(influence(trusted, fitted, Hessian()))
        return fitted, Evidence(logits, require_steps(jax.vmap(margin)(logits, labels)))

    model, found = ask(model, risk)
    for _ in range(_REFITS):
        right = _chance_right(found.margin, risk.weights, found.scores.shape[1])
        model, found = ask(model, risk.with_weights(risk.weights * right))
    return found


@eqx.filter_jit
def logits_without(f: Influence) -> Float[Array, "n C"]:
    """Those of each training point at θ̂₋ᵢ, one Newton step without the point."""
    theta, rebuild = ravel(f.model)

    def logits(step, x):
        return f.risk.loss.class_logits(f.risk.output(rebuild(theta + step), x))

    def block(indices):
        return jax.vmap(logits)(f.response.displace(indices), take(f.risk.data[0], indices))

    return map_points(block, f.risk.n, f.response.limits, theta.dtype)


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
    """Kernel ridge regression of the labels' indicators on the inputs of the first half of the model's
    linear layers, without each point; then once more, each point weighed by 1 + its margin in [0, 1]."""
    kernel = feature_kernel(risk, model)
    indicators = jnn.one_hot(labels, classes, dtype=kernel.dtype)
    targets, total = indicators - 1 / classes, jnp.sum(risk.weights)

    def ask(weights: Float[Array, " n"], ridge: Float[Array, ""]) -> Evidence:
        scores = 1 / classes + without_each(kernel, targets, weights, ridge)
        return Evidence(scores, score_margin(scores, labels))

    def error(ridge: Float[Array, ""]) -> Float[Array, ""]:
        wrong = jnp.square(ask(risk.weights, ridge).scores - indicators)
        return jnp.vdot(risk.weights, jnp.sum(wrong, axis=1))

    ridges = jnp.asarray(_RIDGES, kernel.dtype) * total
    ridge = ridges[jnp.argmin(jnp.stack([error(ridge) for ridge in ridges]))]
    first = ask(risk.weights, ridge)
    return ask(risk.weights * jnp.clip(1 + first.margin, 0, 1), ridge)


def score_margin(scores: Float[Array, "n C"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The score of the label minus the best of the others."""
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    is_own = jnn.one_hot(labels, scores.shape[1], dtype=bool)
    return own - jnp.max(jnp.where(is_own, -jnp.inf, scores), axis=1)


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
    """1 + the mean of exp(−‖aᵢ − aⱼ‖²) over the first half of the layers, in the order of the program: a
    the layer's input, centred and of mean square 1."""
    n = risk.n
    check_held(
        _KERNELS * n * n * risk.weights.dtype.itemsize,
        f'`evidence="features"` compares {n:,} training points pairwise, which',
        'Use `evidence="model"` where the outputs are affine in the parameters, or ask about fewer '
        "points at a time: an EmpiricalRisk of a part of the data.",
    )
    places = _places(risk, model)
    if not places:
        raise ValueError(
            "No layer of the model is linear in a parameter, so there are no features to compare points "
            'by. Where the outputs are affine in the parameters use `evidence="model"`; else restrict '
            "to a part that has such layers, e.g. `influx.restrict(risk, model, lambda m: m.layers)`."
        )
    first = places[: -(-len(places) // 2)]
    total = jnp.ones((), risk.weights.dtype)
    for place in first:
        total = total + _near(_features(risk, model, place), risk.weights) / len(first)
    return total


def _places(risk: EmpiricalRisk, model: Model) -> list[int]:
    """Those of the linear layers, in the order of the program; look-ups, whose inputs are the same or
    not but never near, only where there are no others."""
    watch, one = _watched(risk, model), take(risk.data[0], 0)
    rows = eqx.filter_eval_shape(lambda x: watch.rows(x, _no_cotangents)[1], one)
    order = sorted(
        (layer.taps[0][0], place) for place, layer in enumerate(watch.layers) if layer.taps
    )
    places = [place for _, place in order]
    return [place for place in places if not rows[place].indexed] or places


def _no_cotangents(output):
    return jnp.zeros((1, *output.shape), output.dtype)


def _watched(risk: EmpiricalRisk, model: Model) -> Watched:
    return Watched(lambda m, x: risk.output(m, x), model, take(risk.data[0], 0))


@eqx.filter_jit
def _features(risk: EmpiricalRisk, model: Model, place: int) -> Float[Array, "n d"]:
    """The inputs of one layer, of all training points."""
    watch = _watched(risk, model)

    def features(x):
        return _flat(watch.layers[place], watch.rows(x, _no_cotangents)[1][place])

    inputs = risk.data[0]
    width = jax.eval_shape(features, take(inputs, 0)).size
    chunk = min(leading_length(inputs), chunk_length(8 * width, risk.weights.dtype))
    return chunked_map(features, inputs, chunk)


@jax.jit
def _near(a: Float[Array, "n d"], weights: Float[Array, " n"]) -> Float[Array, "n n"]:
    """exp(−‖aᵢ − aⱼ‖²), a centred and of mean square 1."""
    share = weights / jnp.sum(weights)
    a = a - dot(share, a)[None]
    size = dot(share, jnp.sum(jnp.square(a), axis=1))
    products = dot(a, a.T) / jnp.where(size > 0, size, 1)
    squares = jnp.diagonal(products)
    distances = squares[:, None] + squares[None, :] - 2 * products
    return jnp.exp(-jnp.maximum(distances, 0))


def _flat(layer: Layer, rows: Rows) -> Float[Array, " d"]:
    """The layer's input as one vector, place after place."""
    if rows.indexed:
        return jnn.one_hot(rows.right, layer.shape[2]).reshape(-1)
    return rows.right.reshape(-1)
