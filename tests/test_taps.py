"""Layers read from a program: every parameter once, and gradients that are reverse mode's."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from influx._taps import Watched

KEY = jr.key(0)


class Uses(eqx.Module):
    """Parameters, and a function that uses them."""

    parameters: object
    fn: object = eqx.field(static=True)

    def __call__(self, x):
        return self.fn(self.parameters, x)


def linear(inputs=3, outputs=2, **kwargs):
    return eqx.nn.Linear(inputs, outputs, key=KEY, **kwargs)


def normal(*shape):
    return jr.normal(jr.key(1), shape)


def every(layer, x):
    return jax.vmap(layer)(x)


def recurrent(cell, xs):
    start = jnp.zeros(2)
    start = (start, start) if isinstance(cell, eqx.nn.LSTMCell) else start
    state, _ = jax.lax.scan(lambda h, x: (cell(x, h), None), start, xs)
    return state[0] if isinstance(state, tuple) else state


STACK = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(jr.split(KEY, 4))


def scanned(layers, x):
    arrays, static = eqx.partition(layers, eqx.is_array)
    step = lambda h, one: (jnp.tanh(eqx.combine(one, static)(h)), None)
    return jax.lax.scan(step, x, arrays)[0]


def recurrent_layers(layers, xs):
    """Each layer of a stack is a recurrent one: a scan in a scan."""
    arrays, static = eqx.partition(layers, eqx.is_array)

    def layer(h, one):
        step = lambda c, t: (jnp.tanh(eqx.combine(one, static)(c + t)), c)
        return jax.lax.scan(step, jnp.zeros(3), h)[1], None

    return jax.lax.scan(layer, xs, arrays)[0]


def ensemble(layers, x):
    each = eqx.filter_vmap(lambda layer, row: layer(row))(layers, x)
    return jnp.sum(jnp.tanh(each), axis=0)


def twice(layer, x):
    y = layer(x)
    return layer(jnp.concatenate([y, y[:1]]))


def shared(pair, x):
    embed, head = pair()
    return jax.vmap(head)(jax.vmap(embed)(x))


def table(**kwargs):
    return eqx.nn.Embedding(7, 3, key=KEY, **kwargs)


TIED = eqx.nn.Shared(
    (table(), linear(3, 7, use_bias=False)),
    lambda pair: pair[1].weight,
    lambda pair: pair[0].weight,
)
TOKENS = jnp.array([3, 1, 3, 6])
ATTENTION = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=KEY)
KRONECKER, EXACT, ONE_HOT = "Kronecker", "exact", "Kronecker, one-hot input"

POOLED = [eqx.nn.Conv2d(2, 3, 3, padding=1, key=KEY), eqx.nn.Conv2d(3, 2, 2, key=KEY)]
POOL = [KRONECKER] * 2


def pooled(window, **kwargs):
    """A convolution, a pool of its values rounded (so that windows tie), a convolution."""
    pool = eqx.nn.MaxPool2d(window, **kwargs)

    def fn(layers, x):
        z = layers[0](x)
        return layers[1](pool(z + jax.lax.stop_gradient(jnp.round(z) - z)))

    return fn


def behind(layer, front=None):
    """A layer whose cotangents reach another convolution through it."""
    one = eqx.nn.Conv2d(2, 2, 1, key=KEY) if front is None else front
    return Uses([one, layer], lambda layers, x: layers[1](jnp.tanh(layers[0](x))))


def other_axes(p, x):
    """Convolutions of inputs [height, N, channels, width] and kernels [in, height, out, width]."""
    orders = jax.lax.ConvDimensionNumbers((1, 2, 0, 3), (2, 0, 1, 3), (3, 1, 0, 2))
    # Outputs are [height, channels, width, N].
    one = lambda x, w, strides: jax.lax.conv_general_dilated(
        x, w, strides, ((1, 0), (0, 2)), dimension_numbers=orders, rhs_dilation=(1, 2)
    )
    z = jnp.tanh(one(x, p["first"], (1, 1)))
    return one(z.transpose(0, 3, 1, 2), p["second"], (2, 1))


# model, input, and the treatment of each of its layers
PROGRAMS = {
    "MLP": (eqx.nn.MLP(3, 2, 5, 2, key=KEY), normal(3), [KRONECKER] * 3),
    "a bias in one use of two": (
        Uses(linear(), lambda p, x: (lambda z: jnp.tanh(z + p.bias) * jnp.sin(z))(p.weight @ x)),
        normal(3),
        [KRONECKER, EXACT],
    ),
    "no bias": (linear(use_bias=False), normal(3), [KRONECKER]),
    "scalar in and out": (linear("scalar", "scalar"), normal(), [KRONECKER]),
    "vmap": (Uses(linear(), every), normal(5, 3), [KRONECKER]),
    "vmap of vmap": (
        Uses(linear(), lambda p, x: jax.vmap(jax.vmap(p, in_axes=1, out_axes=1), in_axes=2)(x)),
        normal(3, 5, 4),
        [KRONECKER],
    ),
    "right product": (
        Uses({"w": normal(3, 2)}, lambda p, x: x @ p["w"]),
        normal(5, 3),
        [KRONECKER],
    ),
    "einsum of heads": (
        Uses({"w": normal(3, 2, 2)}, lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"])),
        normal(5, 3),
        [KRONECKER],
    ),
    "Conv1d": (eqx.nn.Conv1d(2, 4, 3, stride=2, padding=1, key=KEY), normal(2, 7), [KRONECKER]),
    "Conv2d groups": (
        eqx.nn.Conv2d(2, 4, 3, stride=2, groups=2, key=KEY),
        normal(2, 6, 6),
        [KRONECKER],
    ),
    "Conv2d dilated": (
        eqx.nn.Conv2d(2, 4, 3, dilation=2, padding="SAME", key=KEY),
        normal(2, 6, 7),
        [KRONECKER],
    ),
    "Conv3d": (eqx.nn.Conv3d(2, 2, 2, key=KEY), normal(2, 3, 3, 3), [KRONECKER]),
    "ConvTranspose2d": (
        eqx.nn.ConvTranspose2d(2, 4, 3, stride=2, key=KEY),
        normal(2, 4, 4),
        [KRONECKER],
    ),
    "Conv2d vmapped": (
        Uses(eqx.nn.Conv2d(2, 4, 3, key=KEY), every),
        normal(3, 2, 6, 7),
        [KRONECKER],
    ),
    "Conv1d behind another": (
        behind(
            eqx.nn.Conv1d(2, 4, 3, stride=2, padding=1, key=KEY), eqx.nn.Conv1d(2, 2, 1, key=KEY)
        ),
        normal(2, 7),
        POOL,
    ),
    "Conv2d groups behind another": (
        behind(eqx.nn.Conv2d(2, 4, 3, stride=2, padding=(1, 0), groups=2, key=KEY)),
        normal(2, 6, 7),
        POOL,
    ),
    "Conv2d dilated behind another": (
        behind(eqx.nn.Conv2d(2, 3, 3, dilation=2, padding="SAME", key=KEY)),
        normal(2, 6, 7),
        POOL,
    ),
    "Conv3d behind another": (
        behind(eqx.nn.Conv3d(2, 2, 2, key=KEY), eqx.nn.Conv3d(2, 2, 1, key=KEY)),
        normal(2, 3, 3, 3),
        POOL,
    ),
    "ConvTranspose2d behind another": (
        behind(eqx.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, key=KEY)),
        normal(2, 4, 4),
        POOL,
    ),
    "convolutions of other axes": (
        Uses({"first": normal(2, 2, 3, 2), "second": normal(3, 3, 2, 2)}, other_axes),
        normal(5, 1, 2, 6),
        POOL,
    ),
    "MaxPool2d": (Uses(POOLED, pooled((2, 2), stride=2)), normal(2, 8, 8), POOL),
    "MaxPool2d overlapping, padded": (
        Uses(POOLED, pooled((3, 2), stride=(2, 1), padding=(1, 0))),
        normal(2, 8, 7),
        POOL,
    ),
    "MaxPool2d ceiling": (
        Uses(POOLED, pooled((2, 2), stride=2, use_ceil=True)),
        normal(2, 7, 7),
        POOL,
    ),
    "MaxPool2d too large to take apart": (
        Uses(POOLED, pooled((9, 8), stride=1)),
        normal(2, 11, 10),
        POOL,
    ),
    "Embedding": (table(), jnp.array(3), [ONE_HOT]),
    "Embedding vmapped": (Uses(table(), every), TOKENS, [ONE_HOT]),
    "take": (
        Uses({"w": normal(7, 3)}, lambda p, i: jnp.take(p["w"], i, axis=0, mode="clip")),
        jnp.array([2, 9, 2]),
        [ONE_HOT],
    ),
    "tied": (Uses(TIED, shared), TOKENS, [KRONECKER]),
    "tied, the product first": (
        Uses({"w": normal(7, 3)}, lambda p, i: jnp.sin(p["w"] @ jnp.ones(3))[:4, None] * p["w"][i]),
        TOKENS,
        [KRONECKER],
    ),
    "LayerNorm": (eqx.nn.LayerNorm(4), normal(4), [EXACT] * 2),
    "RMSNorm": (eqx.nn.RMSNorm(4), normal(4), [EXACT] * 2),
    "GroupNorm": (eqx.nn.GroupNorm(2, 4), normal(4, 3), [EXACT] * 2),
    "MultiheadAttention": (Uses(ATTENTION, lambda p, x: p(x, x, x)), normal(5, 4), [KRONECKER] * 4),
    "GRUCell": (
        Uses(eqx.nn.GRUCell(3, 2, key=KEY), recurrent),
        normal(5, 3),
        [KRONECKER, KRONECKER, EXACT],
    ),
    "LSTMCell": (
        Uses(eqx.nn.LSTMCell(3, 2, key=KEY), recurrent),
        normal(5, 3),
        [KRONECKER, KRONECKER, EXACT],
    ),
    "scanned layers": (Uses(STACK, scanned), normal(3), [KRONECKER]),
    "ensemble": (Uses(STACK, ensemble), normal(4, 3), [KRONECKER]),
    "scan in a scan": (Uses(STACK, recurrent_layers), normal(5, 3), [KRONECKER]),
    "called twice": (Uses(linear(), twice), normal(3), [KRONECKER]),
    "checkpoint and jit": (
        Uses(linear(), lambda p, x: jax.checkpoint(lambda z: eqx.filter_jit(p)(z))(x)),
        normal(3),
        [KRONECKER],
    ),
    "positions": (
        Uses({"p": normal(300, 5), "l": linear(5)}, lambda p, x: every(p["l"], x + p["p"])),
        normal(300, 5),
        [KRONECKER, ONE_HOT],
    ),
    "small and used otherwise": (
        Uses({"p": normal(3, 5)}, lambda p, x: jax.nn.softmax(p["p"]) @ x),
        normal(5),
        [EXACT],
    ),
    "unused": (
        Uses({"p": normal(3, 5), "q": normal(4)}, lambda p, x: p["p"] @ x),
        normal(5),
        [KRONECKER, "unused"],
    ),
    "both ways in a product": (
        Uses({"w": normal(40, 30)}, lambda p, x: p["w"] @ (p["w"].T @ (p["w"] @ x))),
        normal(30),
        [KRONECKER],
    ),
    "in a loop": (
        Uses(
            {"w": normal(40, 30)},
            lambda p, x: jax.lax.fori_loop(0, 2, lambda _, z: p["w"].T @ jnp.tanh(p["w"] @ z), x),
        ),
        normal(30),
        [KRONECKER],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_layers_hold_every_parameter_once_with_the_gradient_of_reverse_mode(name):
    model, x, treatments = PROGRAMS[name]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    watch = Watched(lambda m, example: m(example), model, x)
    assert not watch.uncovered
    assert [layer.treatment for layer in watch.layers] == treatments
    out = model(x)
    U = jr.normal(jr.key(2), (2, *out.shape))
    value, rows = jax.jit(lambda example: watch.rows(example, lambda o: U))(x)
    np.testing.assert_allclose(value, out, rtol=1e-12)
    assert [layer.rank_one for layer in watch.layers] == [row.is_rank_one for row in rows]

    def gradient(u):
        along = lambda p: jnp.sum(u * eqx.combine(p, static)(x))
        return jtu.tree_leaves(jax.grad(along)(params))

    truth = [gradient(u) for u in U]
    for layer, row in zip(watch.layers, rows):
        right = jax.nn.one_hot(row.right, layer.shape[2]) if row.indexed else row.right
        right = jnp.broadcast_to(right, (2, *right.shape[1:]))
        got = jnp.einsum("kstl,kstr->kslr", row.left, right)
        want = jnp.stack([layer.matrix(leaves) for leaves in truth])
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    numbers = iter(range(10**6))
    counted = [
        jnp.asarray([next(numbers) for _ in range(p.size)]).reshape(p.shape) for p in truth[0]
    ]
    held = np.concatenate([np.ravel(layer.matrix(counted)) for layer in watch.layers])
    np.testing.assert_array_equal(np.sort(held), np.arange(next(numbers)))


def test_a_convolution_that_adds_up_in_more_digits_than_it_reads_is_left_as_it_is():
    def half(w, x):
        narrow = (x.astype(jnp.bfloat16)[None], w.astype(jnp.bfloat16))
        return jax.lax.conv(*narrow, (1, 1), "VALID", preferred_element_type=jnp.float32)[0]

    w, x = normal(3, 40, 3, 3), normal(40, 5, 5)
    value, _ = Watched(lambda m, z: m(z), Uses(w, half), x).rows(x, lambda o: o[None])
    np.testing.assert_array_equal(value, half(w, x))


def test_a_bias_stands_with_its_weight_where_it_is_only_added_to_what_that_makes():
    names = lambda model, x: [w.paths for w in Watched(lambda m, z: m(z), model, x).layers]
    assert names(linear(), normal(3)) == [(".weight", ".bias")]
    assert names(Uses(linear(), every), normal(5, 3)) == [
        (".parameters.weight", ".parameters.bias")
    ]
    elsewhere = Uses(linear(), lambda p, x: p(x) * p.bias)
    assert names(elsewhere, normal(3)) == [(".parameters.weight",), (".parameters.bias",)]
    bare = Uses(linear(), lambda p, x: jnp.tanh(p(x)) + p.weight @ x)
    assert names(bare, normal(3)) == [(".parameters.weight",), (".parameters.bias",)]
    both = Uses(linear(), lambda p, x: (lambda z: jnp.tanh(z + p.bias) + z)(p.weight @ x))
    assert names(both, normal(3)) == [(".parameters.weight",), (".parameters.bias",)]
    permuted = Uses(linear(), lambda p, x: p.weight @ x + p.bias[::-1])
    assert names(permuted, normal(3)) == [(".parameters.weight",), (".parameters.bias",)]


LARGE = normal(40, 30)
UNREADABLE = {
    "a function of it": lambda p, x: jnp.tanh(p["w"]) @ x,
    "a part of it": lambda p, x: p["w"][:, :10] @ x[:10],
    "in two ways": lambda p, x: p["w"] @ x + jnp.sum(p["w"], axis=1),
    "behind a custom derivative": lambda p, x: custom(p["w"], x),
    "with itself": lambda p, x: p["w"] @ p["w"].T @ x[:1].repeat(40),
    "in a branch": lambda p, x: jax.lax.cond(x[0] > 0, lambda: p["w"] @ x, lambda: -p["w"] @ x),
    "carried by a scan": lambda p, x: jax.lax.scan(
        lambda w, _: (2 * w, w @ x), p["w"], None, length=2
    )[1],
}


@jax.custom_jvp
def custom(w, x):
    return w @ x


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0] @ primals[1]))


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_said_and_never_skipped(name):
    watch = Watched(lambda m, z: m(z), Uses({"w": LARGE}, UNREADABLE[name]), normal(30))
    assert [u.path for u in watch.uncovered] == [".parameters['w']"]
    assert not watch.layers
