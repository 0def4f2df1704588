"""The demo's problem: digits, some training labels flipped, and a linear softmax classifier."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import influx as ix

CLASSES = 10
DIGITS = 1797


@dataclass(frozen=True)
class Config:
    """What a run of the demo depends on; equal configurations give equal results.

    `flip` is the share of training labels flipped, `retrain` the number of points retrained
    without, and `train`, `heldout`, `test` how many digits each part gets.
    """

    flip: float = 0.1
    seed: int = 0
    l2: float = 1e-2
    retrain: int = 60
    train: int = 1500
    heldout: int = 148
    test: int = 149

    def __post_init__(self):
        _require(0 <= self.flip < 0.9, "--flip", "a share of at least 0 and below 0.9", self.flip)
        _require(self.seed >= 0, "--seed", "at least 0", self.seed)
        # Retraining stops at ‖∇J‖ < 1e-10, and so within 1e-10/l2 of the minimiser.
        _require(1e-6 <= self.l2 <= 1e6, "--l2", "between 1e-6 and 1e6", self.l2)
        _require(
            2 <= self.retrain <= self.train,
            "--retrain",
            f"between 2 and {self.train}, the number of training points",
            self.retrain,
        )
        parts = self.train + self.heldout + self.test
        if min(self.heldout, self.test) < 2 or parts > DIGITS:
            raise ValueError(
                f"train + heldout + test must be at most {DIGITS} and each at least 2, got "
                f"{self.train} + {self.heldout} + {self.test}."
            )


def _require(holds: bool, option: str, what: str, got) -> None:
    if not holds:
        raise ValueError(f"{option} must be {what}; got {got}.")


@dataclass(frozen=True)
class Problem:
    """The risk with the labels as given, its minimiser, and what the minimiser never saw.

    `true` are the training labels before flipping. They serve to *judge* what was found, never to
    find it.
    """

    risk: ix.EmpiricalRisk
    model: eqx.nn.Linear
    heldout: tuple
    test: tuple
    true: np.ndarray

    @property
    def given(self) -> np.ndarray:
        return np.asarray(self.risk.data[1])

    @property
    def flipped(self) -> np.ndarray:
        return self.given != self.true

    @property
    def images(self) -> np.ndarray:
        return np.asarray(self.risk.data[0]).reshape(-1, 8, 8)


def load(config: Config) -> Problem:
    """Digits as float64 in [0, 1], shuffled and flipped by `seed`; the model fitted by Newton."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(y))
    x, y = x[order] / 16, y[order].astype(np.int64)
    ends = np.cumsum([config.train, config.heldout, config.test])
    true = np.asarray(y[: ends[0]])
    data = jnp.asarray(x[: ends[0]]), jnp.asarray(_flip(true, config.flip, rng))
    risk = ix.EmpiricalRisk(data, ix.SoftmaxCrossEntropy(), l2=config.l2)
    part = lambda a, b: (jnp.asarray(x[a:b]), jnp.asarray(y[a:b]))
    model = ix.fit(risk, zero_model(), ix.Newton())
    return Problem(risk, model, part(*ends[:2]), part(*ends[1:]), true)


def _flip(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """`share` of the labels replaced by another class, each of the nine equally likely."""
    count = round(share * labels.size)
    chosen = rng.choice(labels.size, count, replace=False)
    flipped = labels.copy()
    flipped[chosen] = (flipped[chosen] + rng.integers(1, CLASSES, count)) % CLASSES
    return flipped


def zero_model() -> eqx.nn.Linear:
    """The classifier that gives every class the same probability."""
    linear = eqx.nn.Linear(64, CLASSES, key=jr.key(0))
    return jtu.tree_map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, linear)
