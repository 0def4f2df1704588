"""Convolutions and sums in loops: the same numbers, in the form that XLA for CPUs is fast at."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params

import influx as ix
from influx._chunks import chunked_map, chunked_sum
from influx._equations import CHECKPOINTS
from influx._loop_body import channels_last, loop_body
from influx._response.reverse import _back
from influx._truth import retrain as retraining

ORDERS = [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("CNHW", "IHWO", "HNWC")]
SETTINGS = {
    "plain": {},
    "strides": {"window_strides": (2, 1)},
    "dilated": {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2)},
    "groups": {"feature_group_count": 2},
    "batch groups": {"batch_group_count": 2},
}


def convolutions(program) -> list:
    found = [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    inner = [jaxprs_in_params(e.params) for e in program.eqns]
    return found + [c for programs in inner for p in programs for c in convolutions(p)]


def is_last(equation) -> bool:
    lhs, rhs, out = equation.params["dimension_numbers"]
    last = len(lhs) - 1
    space = tuple(range(1, last))
    return (lhs, out) == ((0, last, *space),) * 2 and rhs == (last, last - 1, *range(last - 1))


def laid_out(x, letters: str, names: str):
    """x, whose axes are `letters` in order, in the order of `names`."""
    return jnp.transpose(x, [letters.index(name) for name in names])


@given(
    seed=st.integers(0, 2**31 - 1), order=st.sampled_from(ORDERS), kind=st.sampled_from([*SETTINGS])
)
def test_a_convolution_is_the_same_in_any_order_of_its_axes(seed, order, kind):
    a, b = jr.split(jr.key(seed))
    settings = {"window_strides": (1, 1), "padding": ((1, 0), (0, 2))} | SETTINGS[kind]
    groups = settings.get("feature_group_count", 1)
    image = laid_out(jr.normal(a, (4, 4, 6, 5)), "NCHW", order[0])
    kernel = laid_out(jr.normal(b, (6, 4 // groups, 3, 2)), "OIHW", order[1])

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=order, **settings)

    np.testing.assert_allclose(
        loop_body(convolve)(image, kernel), convolve(image, kernel), rtol=1e-9, atol=1e-9
    )
    assert all(map(is_last, convolutions(jax.make_jaxpr(loop_body(convolve))(image, kernel).jaxpr)))


class Network(eqx.Module):
    layers: list

    def __init__(self, space: int):
        kinds = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}
        back = {1: eqx.nn.ConvTranspose1d, 2: eqx.nn.ConvTranspose2d, 3: eqx.nn.ConvTranspose3d}
        self.layers = [
            kinds[space](2, 3, 3, padding=1, key=jr.key(0)),
            back[space](3, 2, 2, stride=2, key=jr.key(1)),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.gelu(eqx.filter_jit(layer)(x))  # a program inside the program
        return jnp.sum(x**2)


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("kind", ["per example", "sum", "tangent"])
def test_blocks_convolve_with_channels_last_and_answer_the_same(space, kind):
    params, static = eqx.partition(Network(space), eqx.is_inexact_array)
    x = jr.normal(jr.key(2), (6, 2, *(4,) * space))
    loss = lambda p, z: eqx.combine(p, static)(z)
    of_all = lambda p, xs: jnp.sum(jax.vmap(lambda z: loss(p, z))(xs))
    ways = {
        "per example": lambda p, chunk: chunked_map(lambda z: jax.grad(loss)(p, z), x, chunk),
        "sum": lambda p, chunk: chunked_sum(lambda xs: jax.grad(of_all)(p, xs), x, chunk),
        "tangent": lambda p, chunk: chunked_map(
            lambda z: jax.jvp(lambda q: loss(q, z), (p,), (p,))[1], x, chunk
        ),
    }
    at = lambda chunk: jax.make_jaxpr(lambda p: ways[kind](p, chunk))(params)
    leaves = jax.tree_util.tree_leaves(params)
    whole, blocks = (jaxpr_as_fun(at(chunk))(*leaves) for chunk in (6, 4))
    for one, other in zip(whole, blocks):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert not all(map(is_last, convolutions(at(6).jaxpr)))
    loops = [e for e in at(4).jaxpr.eqns if e.primitive.name == "scan"]
    inside = [c for e in loops for p in jaxprs_in_params(e.params) for c in convolutions(p)]
    assert inside
    assert all(map(is_last, inside))


@pytest.fixture(scope="module")
def images():
    class Classifier(eqx.Module):
        convolution: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __call__(self, x):
            z = jax.nn.gelu(self.convolution(x))
            return self.head(jnp.mean(z, axis=(1, 2)))

    model = Classifier(eqx.nn.Conv2d(1, 2, 3, key=jr.key(0)), eqx.nn.Linear(2, 3, key=jr.key(1)))
    X, y = jr.normal(jr.key(2), (8, 1, 5, 4)), jr.randint(jr.key(3), (8,), 0, 3)
    return ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy(), l2=1e-2), model


TRAINER = ix.SGD(optax.sgd(0.1, momentum=0.9), batch_size=4, epochs=3, key=jr.key(4))


def test_training_convolves_with_channels_last_and_differentiates_the_same(images):
    """Against a run of the same batches written out by hand."""
    risk, model = images
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def by_hand(weights):
        state = TRAINER.start(params)
        for epoch in range(3):
            for batch in TRAINER.batches(8, jnp.asarray(epoch)):
                batch_risk = ix.EmpiricalRisk(
                    (risk.data[0][batch], risk.data[1][batch]), risk.loss, l2=1e-2,
                    weights=weights[batch],
                )  # fmt: skip
                loss = lambda p, r: r.objective(eqx.combine(p, static))
                state = TRAINER.update(jax.grad(loss)(state[0], batch_risk), state)
        return eqx.combine(state[0], static)

    trained, _ = TRAINER.train(None, risk, model, risk.weights)
    want = by_hand(risk.weights)
    for got, leaf in zip(*map(jax.tree_util.tree_leaves, (trained, want))):
        np.testing.assert_allclose(got, leaf, rtol=1e-9, atol=1e-12)
    queries = risk.data[0][:2] + 1, risk.data[1][:2]
    losses = lambda w: risk.losses(by_hand(w), queries)
    scores = ix.influence(risk, model, ix.Unrolled(TRAINER))(queries)
    derivative = risk.n * jax.jacrev(losses)(risk.weights)
    np.testing.assert_allclose(scores, derivative, rtol=1e-7, atol=1e-9)
    train = lambda w: eqx.filter(TRAINER.train(None, risk, model, w)[0], eqx.is_inexact_array)
    steps = [
        e for e in jax.make_jaxpr(train)(risk.weights).jaxpr.eqns if e.primitive.name == "scan"
    ]
    start = TRAINER.start(params)
    back = lambda carry: _back(TRAINER, risk, static, carry, start, jnp.arange(4))
    backwards = jax.make_jaxpr(back)((start, jnp.zeros(8))).jaxpr
    for programs in ([p for e in steps for p in jaxprs_in_params(e.params)], [backwards]):
        inside = [c for p in programs for c in convolutions(p)]
        assert inside
        assert all(map(is_last, inside))


def test_networks_with_convolutions_are_retrained_one_after_another(images, monkeypatch):
    risk, model = images
    masks = 1 - jnp.eye(8)[:3]
    asked, program = [], retraining._program
    watched = lambda *args: asked.append(args[-1]) or program(*args)
    monkeypatch.setattr(retraining, "_program", watched)
    ways = [
        ix.leave_subset_out(risk, model, TRAINER, masks=masks, chunk_size=size)
        for size in (None, 3)
    ]
    np.testing.assert_allclose(*ways, rtol=1e-9, atol=1e-12)
    one = 1 if jax.default_backend() == "cpu" else 25
    assert asked == [one, 3]
    dense = eqx.nn.Linear(20, 3, key=jr.key(5))
    flat = ix.EmpiricalRisk((risk.data[0].reshape(8, 20), risk.data[1]), risk.loss)
    assert retraining.most_lanes(flat, dense) == 25
    assert retraining.most_lanes(*ix.restrict(risk, model, lambda m: m.convolution)) == one
    # A frozen kernel is one for all lanes.
    assert retraining.most_lanes(*ix.restrict(risk, model, lambda m: m.head)) == 25


def test_what_is_to_be_computed_again_stays_so(images):
    _, model = images
    x = jr.normal(jr.key(6), (1, 5, 4))
    again = jax.checkpoint(lambda kernel: jnp.sum(jnp.tanh(model.convolution(x) * kernel) ** 2))
    fn = jax.grad(lambda k: again(k) ** 2)
    kernel = jnp.asarray(0.7)
    program = jax.make_jaxpr(channels_last(fn))(kernel).jaxpr
    inside = [
        p
        for e in program.eqns
        if e.primitive.name in CHECKPOINTS
        for p in jaxprs_in_params(e.params)
    ]
    assert inside
    found = [c for p in inside for c in convolutions(p)]
    assert found
    assert all(map(is_last, convolutions(program)))
    np.testing.assert_allclose(channels_last(fn)(kernel), fn(kernel), rtol=1e-9)


def test_what_has_no_convolution_is_trained_as_it_is_written():
    fn = lambda x: jnp.sum(x**2, axis=0)
    x = jnp.ones((3, 2))
    assert str(jax.make_jaxpr(channels_last(fn))(x)) == str(jax.make_jaxpr(fn)(x))
    assert str(jax.make_jaxpr(loop_body(fn))(x)) != str(jax.make_jaxpr(fn)(x))


def sums(program) -> list:
    found = [e for e in program.eqns if e.primitive.name == "reduce_sum"]
    inner = [jaxprs_in_params(e.params) for e in program.eqns]
    return found + [c for programs in inner for p in programs for c in sums(p)]


@given(
    seed=st.integers(0, 2**31 - 1),
    axes=st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple),
    dtype=st.sampled_from([jnp.float64, jnp.float32, jnp.int32]),
)
def test_a_sum_is_the_same_as_a_product_with_ones(seed, axes, dtype):
    x = jr.randint(jr.key(seed), (2, 3, 1, 4), -9, 9).astype(dtype)
    fn = lambda x: jnp.sum(x, axis=axes)
    got = loop_body(fn)(x)
    assert got.dtype == fn(x).dtype
    np.testing.assert_array_equal(got, fn(x))
    beside = axes[-1] - axes[0] < len(axes)
    left = bool(sums(jax.make_jaxpr(loop_body(fn))(x).jaxpr))
    assert left == (dtype == jnp.int32 or not beside)


def test_blocks_sum_by_products_and_answer_the_same():
    norm = eqx.nn.LayerNorm(6)
    x = jr.normal(jr.key(0), (7, 5, 6))
    loss = lambda norm, z: jnp.sum(eqx.filter_jit(jax.vmap(norm))(z) ** 3)
    at = lambda chunk: lambda norm: chunked_map(lambda z: jax.grad(loss)(norm, z), x, chunk)
    for one, other in zip(*(jax.tree_util.tree_leaves(at(chunk)(norm)) for chunk in (7, 3))):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    params, static = eqx.partition(norm, eqx.is_array)
    program = lambda chunk: (
        jax.make_jaxpr(lambda p: at(chunk)(eqx.combine(p, static)))(params).jaxpr
    )
    assert sums(program(7))
    assert not sums(program(3))
