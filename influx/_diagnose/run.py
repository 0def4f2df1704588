"""Whether an influence through a training run can be trusted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._chunks import take
from .._influence import Influence
from .._response import TrainingRun
from .base import Finding, finding, judge

_ERASED, _DIRECTIONS, _WATCHED = 0.05, 2, 500


def of_run(f: Influence) -> tuple[Finding, ...]:
    """The findings of an unrolled response."""
    return (_metasmoothness(f),)


def _metasmoothness(f: Influence) -> Finding:
    r"""The mean cosine between v ↦ ∂h(θ_T(w))·v and h(θ_T(w + v)) − h(θ_T(w)), where v erases a random
    twentieth of the training points and h are the outputs on (at most 500) training inputs.

    It tends to 1 as v gets small where the run is differentiable and the prediction is not 0; that it be
    near 1 for a v of the size at which groups are removed is what is asked here. Where a run passes
    kinks (ReLU, max pooling) single removals can be foreseen worse than a twentieth's: for leave-one-out
    repeat the run without a few points.

    **Source:** Engstrom et al., "Optimizing ML Training with Metagradient Descent", arXiv:2503.13751,
    call a training algorithm metasmooth whose finite differences at neighbouring points agree; here the
    derivative itself is compared with one, so that it is judged by what it predicts.
    """
    predicted, actual = (np.asarray(x, np.float64) for x in _changes(f))
    sizes = [np.linalg.norm(x, axis=1) for x in (predicted, actual)]
    with np.errstate(all="ignore"):
        cosine = float(np.mean(np.sum(predicted * actual, axis=1) / (sizes[0] * sizes[1])))
        ratio = float(np.mean(sizes[0] / sizes[1]))
    return finding(
        "metasmoothness",
        f"cosine {cosine:.2f}, predicted over actual size {ratio:.2f}",
        judge(1 - cosine, 0.1, 0.3),
        f"How the outputs change when {_ERASED:.0%} of the points are erased, as the derivative "
        "predicts it and as a repeated run finds it. Far below 1 the run is not smooth in its data "
        "weights, and no derivative foresees a removal.",
        "Do not use these numbers. Train more smoothly: a smaller step, larger batches, a warm-up, "
        "less momentum, fewer epochs; a smooth activation such as jax.nn.gelu, average pooling in "
        "place of max. A curvature at the trained model, `influence(risk, f.model, EKFAC())`, is about "
        "the average of many such runs, and foresees this one no better."
        + (" Where the cosine is nan, Adam may lack an `eps_root`." if np.isnan(cosine) else ""),
    )


@eqx.filter_jit
def _changes(f: Influence) -> tuple[Float[Array, "d h"], Float[Array, "d h"]]:
    """The change of all outputs along each direction: predicted, and actual."""
    response, risk = f.response, f.risk
    assert isinstance(response, TrainingRun)
    inputs = take(risk.data[0], jr.permutation(jr.key(1), risk.n)[:_WATCHED])
    state = response.trainer.init(risk, response.start, risk.weights)

    def outputs(weights):
        model, _ = response.trainer.train(state, risk, response.start, weights)
        found = jax.vmap(lambda x: risk.output(model, x))(inputs)
        return jnp.concatenate([jnp.ravel(x) for x in jtu.tree_leaves(found)])

    def along(v):
        return jax.jvp(outputs, (risk.weights,), (v,))

    directions = jax.vmap(lambda key: _erasure(risk.weights, key))(jr.split(jr.key(0), _DIRECTIONS))
    before, predicted = jax.vmap(along, out_axes=(None, 0))(directions)
    after = jax.vmap(lambda v: outputs(risk.weights + v))(directions)
    return predicted, after - before[None]


def _erasure(weights: Float[Array, " n"], key) -> Float[Array, " n"]:
    """The change of the weights that erases a random twentieth of those above 0."""
    order = jnp.where(weights > 0, jr.uniform(key, weights.shape), jnp.inf)
    present = jnp.sum(weights > 0, dtype=weights.dtype)
    count = jnp.maximum(1, jnp.round(_ERASED * present).astype(int))
    rank = jnp.argsort(jnp.argsort(order))
    return jnp.where(rank < count, -weights, 0)
