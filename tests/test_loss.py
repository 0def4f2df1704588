"""The laws of losses, on one table: values against NumPy, Hessians against automatic differentiation,
Fisher matrices against sums over all targets, draws against probabilities, constants as inequalities.
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import influx as ix
from influx._loss import AbstractLoss, eigen_root
from influx.testing import BrokenLaw
from tests.helpers import linear_model

WEIGHTS = np.array([0.5, 2.0, 1.25])
SMOOTHING = 0.2
seeds = st.integers(0, 2**31 - 1)
# Logits from nearly equal to nearly certain; float64 softmax probabilities reach 1e-26 at 30.
spreads = st.sampled_from([1e-3, 0.5, 2.0, 8.0, 30.0])


# --- The oracle, in NumPy ------------------------------------------------------------------------


def softmax_value(output, target, *, weights=None, smoothing=0.0, mean=False):
    output = output - np.max(output, axis=-1, keepdims=True)
    logp = output - scipy.special.logsumexp(output, axis=-1, keepdims=True)
    C = output.shape[-1]
    q = (1 - smoothing) * np.eye(C)[target] + smoothing / C
    terms = -np.sum(q * logp, axis=-1) * (1.0 if weights is None else weights[target])
    return np.mean(terms) if mean else np.sum(terms)


def binary_value(output, target):
    return np.sum(np.logaddexp(0, output) - target * output)


def squared_value(output, target):
    return 0.5 * np.sum((output - target) ** 2)


def poisson_value(output, target):
    return np.sum(np.exp(output) - target * output)


def labels(output):
    """All targets of a softmax output [..., C], with their probabilities."""
    p = scipy.special.softmax(output, axis=-1).reshape(-1, output.shape[-1])
    for chosen in itertools.product(range(p.shape[1]), repeat=p.shape[0]):
        probability = np.prod(p[np.arange(p.shape[0]), chosen])
        yield probability, np.array(chosen).reshape(output.shape[:-1])


def bits(output):
    """All targets of independent binary outputs."""
    p = scipy.special.expit(output).reshape(-1)
    for chosen in itertools.product((0, 1), repeat=p.size):
        chosen = np.array(chosen)
        probability = np.prod(np.where(chosen == 1, p, 1 - p))
        yield probability, chosen.reshape(output.shape)


def gaussian(output):
    """Gauss–Hermite nodes of unit noise: exact for polynomials of degree up to 5 in each target."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / np.sqrt(2 * np.pi)
    for chosen in itertools.product(range(3), repeat=output.size):
        chosen = np.array(chosen)
        yield np.prod(weights[chosen]), output + nodes[chosen].reshape(output.shape)


class Row(eqx.Module):
    """A loss, the shape of its outputs, its value in NumPy, and all targets of an output."""

    loss: AbstractLoss
    shape: tuple[int, ...]
    value: object = eqx.field(static=True)
    targets: object = eqx.field(static=True)
    likelihood: bool = eqx.field(static=True, default=True)  # a plain negative log-likelihood


def softmax(shape, *, weights=None, smoothing=0.0, mean=False) -> Row:
    loss = ix.SoftmaxCrossEntropy(
        class_weights=weights, label_smoothing=smoothing, reduction="mean" if mean else "sum"
    )
    value = functools.partial(softmax_value, weights=weights, smoothing=smoothing, mean=mean)
    return Row(loss, shape, value, labels, weights is None and smoothing == 0 and not mean)


poisson = ix.CustomLoss(
    lambda o, y: jnp.sum(jnp.exp(o) - y.astype(o.dtype) * o),
    sample=lambda key, o: jr.poisson(key, jnp.exp(o), dtype=jnp.int32),
)
TABLE = {
    "softmax": softmax((4,)),
    "class weights": softmax((3,), weights=WEIGHTS),
    "smoothing": softmax((3,), smoothing=SMOOTHING),
    "weights and smoothing": softmax((3,), weights=WEIGHTS, smoothing=SMOOTHING),
    "sequence summed": softmax((2, 3)),
    "sequence averaged": softmax((2, 3), mean=True),
    "sequence weighted, summed": softmax((2, 3), weights=WEIGHTS, smoothing=SMOOTHING),
    "sequence weighted, averaged": softmax((2, 3), weights=WEIGHTS, smoothing=SMOOTHING, mean=True),
    "binary scalar": Row(ix.BinaryCrossEntropy(), (), binary_value, bits),
    "binary of one": Row(ix.BinaryCrossEntropy(), (1,), binary_value, bits),
    "binary of three": Row(ix.BinaryCrossEntropy(), (3,), binary_value, bits),
    "squared": Row(ix.SquaredError(), (2,), squared_value, gaussian),
    "squared matrix": Row(ix.SquaredError(), (2, 2), squared_value, gaussian),
    "custom": Row(poisson, (2,), poisson_value, None),
}
SUMMED = [name for name, row in TABLE.items() if row.targets is not None]
BOUNDED = [name for name in SUMMED if "averaged" not in name]


def drawn(name: str, seed: int, spread: float = 1.0):
    """An output of that spread, and a target."""
    row, rng = TABLE[name], np.random.default_rng(seed)
    output = spread * rng.normal(size=row.shape)
    if row.targets is labels:
        return output, rng.integers(0, row.shape[-1], row.shape[:-1])
    if row.targets is bits:
        return output, rng.integers(0, 2, row.shape)
    if row.targets is gaussian:
        return output, rng.normal(size=row.shape)
    return np.minimum(output, 5.0), rng.poisson(2.0, row.shape)


def flat(loss, shape, target):
    return lambda o: loss(o.reshape(shape), target)


@functools.cache
def compiled(name: str):
    """(value, gradient, Hessian, claimed Hessian) in the flattened output."""
    loss, shape = TABLE[name].loss, TABLE[name].shape

    @jax.jit
    def all_of(output, target):
        fn, at = flat(loss, shape, target), output.reshape(-1)
        value, gradient = jax.value_and_grad(fn)(at)
        return value, gradient, jax.hessian(fn)(at), loss.output_hessian(output, target)

    return lambda output, target: all_of(jnp.asarray(output), jnp.asarray(target))


# --- Values and derivatives -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
@given(seed=seeds, spread=spreads)
def test_value_and_output_hessian(name, seed, spread):
    output, target = drawn(name, seed, spread)
    value, _, found, claimed = compiled(name)(output, target)
    np.testing.assert_allclose(value, TABLE[name].value(output, target), rtol=1e-12, atol=1e-13)
    assert claimed.shape == (output.size, output.size)
    # Both lose 1 − p to rounding where the model is nearly certain.
    np.testing.assert_allclose(claimed, found, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", TABLE)
@given(seed=seeds, spread=spreads)
def test_a_root_of_the_output_hessian(name, seed, spread):
    output, target = drawn(name, seed, spread)
    *_, hessian = compiled(name)(output, target)
    rows = compiled_root(name)(output, target)
    assert rows.shape[1:] == output.shape
    root = np.asarray(rows).reshape(-1, output.size)
    size = max(1e-300, float(np.abs(hessian).max()))
    np.testing.assert_allclose(root.T @ root, hessian, rtol=0, atol=1e-14 + 1e-13 * size)
    if TABLE[name].targets is labels:  # a backward pass less than classes
        assert len(rows) == output.size - output.size // output.shape[-1]


@functools.cache
def compiled_root(name: str):
    root = jax.jit(lambda output, target: TABLE[name].loss.hessian_root(output, target))
    return lambda output, target: root(jnp.asarray(output), jnp.asarray(target))


def covariance(z: np.ndarray) -> np.ndarray:
    """diag p − ppᵀ of logits, without differences."""
    p = np.exp(np.asarray(z, np.longdouble) - np.max(z))
    p = p / p.sum()
    others = np.array([np.delete(p, j).sum() for j in range(len(p))])
    return -np.outer(p, p) * (1 - np.eye(len(p))) + np.diag(p * others)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, spread=st.sampled_from([0.1, 1.0, 8.0, 30.0]), signs=st.booleans())
def test_the_softmax_root_is_right_to_rounding(dtype, seed, spread, signs):
    z = spread * np.random.default_rng(seed).normal(size=6)
    z = (100 * np.sign(z) if signs else z).astype(dtype)
    truth, unit = covariance(z), np.finfo(dtype).eps
    fisher, hessian = (np.asarray(x, np.longdouble) for x in softmax_roots(jnp.asarray(z)))
    assert fisher.shape == hessian.shape == (5, 6)
    for root in (fisher, hessian):
        np.testing.assert_allclose(root.T @ root, truth, rtol=0, atol=4 * unit)
    # What a model is nearly certain of keeps its digits, but for those that exp(z) loses.
    size = np.diag(truth)
    kept = size > 1e-30
    error = np.abs(np.diag(hessian.T @ hessian) - size)[kept]
    assert np.all(error <= 4 * unit * (4 + np.ptp(z)) * size[kept])


@jax.jit
def softmax_roots(z):
    loss = ix.SoftmaxCrossEntropy()
    return loss.fisher_root(z), loss.hessian_root(z, jnp.asarray(0))


@pytest.mark.parametrize("shape", [(1,), (2, 1)])
def test_a_softmax_of_one_class_has_a_root_of_zeros(shape):
    loss, target = ix.SoftmaxCrossEntropy(), jnp.zeros(shape[:-1], int)
    for root in (loss.hessian_root(jnp.ones(shape), target), loss.fisher_root(jnp.ones(shape))):
        np.testing.assert_array_equal(root, jnp.zeros((shape[0], *shape)))


def test_a_loss_that_is_not_convex_has_no_root():
    loss = ix.CustomLoss(lambda o, t: jnp.sum(jnp.cos(o - t)))
    root = jax.jit(lambda output, target: loss.hessian_root(output, target))
    with pytest.raises(RuntimeError, match=r"not convex in its output.*sampled"):
        root(jnp.array([0.1, 3.0]), jnp.zeros(2))
    assert np.isfinite(root(jnp.array([3.0, 2.5]), jnp.zeros(2))).all()


@pytest.mark.parametrize("name", TABLE)
@given(seed=seeds)
def test_gradient_is_the_central_difference_of_numpy(name, seed):
    output, target = drawn(name, seed)
    direction = np.random.default_rng(seed + 1).normal(size=output.shape)
    step = 1e-5
    along = lambda s: TABLE[name].value(output + s * direction, target)
    _, gradient, _, _ = compiled(name)(output, target)
    expected = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose(
        np.vdot(gradient, direction), expected, rtol=1e-7, atol=1e-8 * np.linalg.norm(gradient)
    )


@pytest.mark.parametrize("name", [name for name in TABLE if name != "custom"])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_losses_do_not_overflow(name, size):
    output, target = drawn(name, 0)
    output = size * np.sign(output)
    value, gradient, _, hessian = compiled(name)(output, target)
    assert np.isfinite(gradient).all()
    assert np.isfinite(hessian).all()
    np.testing.assert_allclose(value, TABLE[name].value(output, target), rtol=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_the_dtype_is_that_of_the_output(name):
    output, target = drawn(name, 0)
    output, loss = jnp.asarray(output, jnp.float32), TABLE[name].loss
    target = jnp.asarray(target)
    target = target.astype(jnp.float32) if jnp.issubdtype(target.dtype, jnp.floating) else target
    assert loss(output, target).dtype == jnp.float32
    assert loss.output_hessian(output, target).dtype == jnp.float32
    if name in SUMMED:
        assert loss.output_fisher(output).dtype == jnp.float32


# --- The model's own distribution ------------------------------------------------------------------


@pytest.mark.parametrize("name", SUMMED)
@given(seed=seeds, spread=st.sampled_from([0.5, 2.0]))
def test_fisher_is_the_sum_over_all_targets(name, seed, spread):
    output, _ = drawn(name, seed, spread)
    row = TABLE[name]
    probabilities, targets = zip(*row.targets(output))
    assert sum(probabilities) == pytest.approx(1, rel=1e-12)
    gradients = np.stack([compiled(name)(output, target)[1] for target in targets])
    expected = gradients.T @ (np.array(probabilities)[:, None] * gradients)
    got = row.loss.output_fisher(jnp.asarray(output))
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)
    root = np.asarray(row.loss.fisher_root(jnp.asarray(output))).reshape(-1, got.shape[0])
    np.testing.assert_allclose(root.T @ root, got, rtol=1e-11, atol=1e-13)
    if row.likelihood:  # then the Fisher is the Gauss–Newton middle factor, whatever the target
        np.testing.assert_allclose(got, compiled(name)(output, targets[0])[3], rtol=0, atol=1e-13)


DRAWS, SIGMAS = 20_000, 5.0  # a two-sided normal tail of 6e-7 for each figure


def misses(name: str, at: np.ndarray, truth: np.ndarray) -> float:
    """How many standard errors the draws' figures at output `at` lie from those of `truth`, at worst.

    The figures are the frequencies of all targets, or means, variances and products where targets
    are real."""
    row = TABLE[name]
    keys = jr.split(jr.key(7), DRAWS)
    targets = np.asarray(jax.vmap(lambda key: row.loss.draw(key, jnp.asarray(at)))(keys))
    assert targets.shape[1:] == (row.shape[:-1] if row.targets is labels else row.shape)
    if row.targets in (labels, bits):
        assert np.issubdtype(targets.dtype, np.integer)
        probabilities, values = zip(*row.targets(truth))
        hits = [np.all(targets == v, axis=tuple(range(1, targets.ndim))) for v in values]
        p, frequencies = np.array(probabilities), np.mean(hits, axis=1)
        return np.max(np.abs(frequencies - p) / np.sqrt(p * (1 - p) / DRAWS))
    mean = np.exp(truth) if row.targets is None else truth
    noise = (targets - mean).reshape(DRAWS, -1)
    if row.targets is None:
        noise = noise / np.sqrt(np.exp(truth)).reshape(-1)
    products = noise[:, :, None] * noise[:, None, :] - np.eye(noise.shape[1])
    scaled = lambda x: np.abs(np.mean(x, axis=0)) / (np.std(x, axis=0) / np.sqrt(DRAWS))
    return max(scaled(noise).max(), scaled(products).max())


@pytest.mark.parametrize("name", TABLE)
def test_draws_follow_the_models_probabilities(name):
    output, _ = drawn(name, 3)
    assert misses(name, output, output) < SIGMAS
    assert misses(name, output, 0.7 * output) > SIGMAS  # it can fail


@pytest.mark.parametrize("name", ["softmax", "weights and smoothing", "sequence summed", "custom"])
def test_sampled_scores_have_the_fisher_as_their_second_moment(name):
    row = TABLE[name]
    output = jnp.asarray(drawn(name, 5)[0])

    def score(key):
        target = row.loss.draw(key, output)
        return jax.grad(flat(row.loss, row.shape, target))(output.reshape(-1))

    scores = np.asarray(jax.vmap(score)(jr.split(jr.key(11), DRAWS)))
    products = scores[:, :, None] * scores[:, None, :]
    error = np.std(products, axis=0) / np.sqrt(DRAWS)
    fisher = np.diag(np.exp(output)) if name == "custom" else row.loss.output_fisher(output)
    assert np.all(np.abs(products.mean(axis=0) - np.asarray(fisher)) <= SIGMAS * error + 1e-15)


# --- Constants ------------------------------------------------------------------------------------


def shape_of(name: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(TABLE[name].shape, jnp.float64)


@functools.cache
def third_derivative(name: str):
    row = TABLE[name]

    @jax.jit
    def along(output, target, u, v):
        fn = flat(row.loss, row.shape, target)
        push = lambda f, d: lambda o: jax.jvp(f, (o,), (d,))[1]
        return push(push(push(fn, u), u), v)(output.reshape(-1))

    return along


def figures(name: str, output, target, u, v):
    """‖∇ℓ‖, ‖∇²ℓ‖₂ and |D³ℓ[u, u, v]|/(‖u‖²‖v‖) at one output."""
    _, gradient, hessian, _ = compiled(name)(output, target)
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    third = third_derivative(name)(jnp.asarray(output), jnp.asarray(target), u, v)
    return np.linalg.norm(gradient), np.linalg.norm(hessian, 2), abs(float(third))


@pytest.mark.parametrize("name", BOUNDED)
@given(seed=seeds, spread=spreads)
def test_constants_bound_the_derivatives(name, seed, spread):
    output, target = drawn(name, seed, spread)
    u, v = np.random.default_rng(seed + 1).normal(size=(2, output.size))
    bounds = TABLE[name].loss.constants(shape_of(name))
    slope, curvature, third = figures(name, output, target, u, v)
    assert slope <= bounds.lipschitz
    assert curvature <= bounds.smoothness * (1 + 1e-12)
    assert third <= bounds.third + 1e-12
    hessian = compiled(name)(output, target)[3]
    assert np.linalg.eigvalsh(hessian)[0] >= -1e-13  # convex


def far(shape, label):
    """Nearly certain of another class than `label`."""
    output = np.zeros(shape)
    output[..., (label + 1) % shape[-1]] = 60.0
    return output


def two_classes(shape, gap=0.0, away=-60.0):
    """Two classes with a gap between their logits, the others impossible."""
    output = np.full(shape, away)
    output[..., 0], output[..., 1] = gap, 0.0
    return output


# Where σ'' is largest: σ = (1 + 1/√3)/2.
GAP = np.log((np.sqrt(3) + 1) / (np.sqrt(3) - 1))
WORST = {  # outputs and targets at which ‖∇ℓ‖, ‖∇²ℓ‖ and D³ℓ come near their bounds
    "softmax": (far((4,), 0), two_classes((4,)), two_classes((4,), GAP), np.array(0)),
    "class weights": (far((3,), 1), two_classes((3,)), two_classes((3,), GAP), np.array(1)),
    "sequence summed": (
        far((2, 3), 0),
        two_classes((2, 3)),
        two_classes((2, 3), GAP),
        np.array([0, 0]),
    ),
    "binary scalar": (np.array(60.0), np.array(0.0), np.array(GAP), np.array(0)),
    "binary of three": (np.full(3, 60.0), np.zeros(3), np.full(3, GAP), np.zeros(3, int)),
}


@pytest.mark.parametrize("name", WORST)
def test_constants_are_attained(name):
    """Lipschitz, smoothness and third are the least bounds."""
    steep, curved, bent, target = WORST[name]
    bounds = TABLE[name].loss.constants(shape_of(name))
    direction = np.zeros(steep.shape)
    if "binary" in name:
        direction.reshape(-1)[0] = 1.0
    else:
        direction.reshape(-1, steep.shape[-1])[0, :2] = 1.0, -1.0
    direction = direction.reshape(-1)
    at = lambda output: figures(name, output, target, direction, direction)
    assert at(steep)[0] == pytest.approx(float(bounds.lipschitz), rel=1e-12)
    assert at(curved)[1] == pytest.approx(float(bounds.smoothness), rel=1e-12)
    assert at(bent)[2] == pytest.approx(float(bounds.third), rel=1e-9)


def test_the_binary_curvature_keeps_its_digits_where_the_loss_is_flat():
    z = np.array([-700.0, -60.0, 0.3, 60.0, 700.0])
    curvature = jnp.diagonal(ix.BinaryCrossEntropy().output_hessian(jnp.asarray(z), None))
    np.testing.assert_allclose(curvature, 1 / (2 + 2 * np.cosh(z)), rtol=1e-12)


def test_the_squared_error_is_quadratic():
    bounds = ix.SquaredError().constants(shape_of("squared"))
    assert (bounds.smoothness, bounds.third) == (1.0, 0.0)
    assert np.isinf(bounds.lipschitz)
    steep = compiled("squared")(1e6 * np.ones(2), np.zeros(2))[1]
    assert np.linalg.norm(steep) > 1e6  # there is no global bound


HARD = {
    "softmax": True,
    "class weights": True,
    "smoothing": False,
    "weights and smoothing": False,
    "binary scalar": True,
    "binary of one": True,
}


@pytest.mark.parametrize("name", HARD)
@given(seed=seeds)
def test_hard_losses_fall_with_their_own_margin(name, seed):
    """ℓ = weight · log(1 + exp(−γ)) with hard targets, and only then: what P3's corollary needs."""
    row = TABLE[name]
    assert row.loss.constants(shape_of(name)).hard == HARD[name]
    output, target = drawn(name, seed)
    label = int(np.reshape(target, ()))
    z = np.asarray(row.loss.class_logits(jnp.asarray(output)))
    margin = z[label] - scipy.special.logsumexp(np.delete(z, label))
    weight = WEIGHTS[label] if "weights" in name else 1.0
    expected = weight * np.logaddexp(0, -margin)
    got = float(row.loss(jnp.asarray(output), jnp.asarray(target)))
    assert (abs(got - expected) <= 1e-12 * (1 + expected)) == HARD[name]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("sequence averaged", "No certificate for a loss averaged over a sequence"),
        ("custom", r"no known bounds.*Use SoftmaxCrossEntropy or BinaryCrossEntropy"),
    ],
)
def test_losses_without_bounds_say_so(name, match):
    with pytest.raises(ValueError, match=match):
        TABLE[name].loss.constants(shape_of(name))


# --- Class logits and targets ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "smoothing", "binary scalar", "binary of one"])
def test_class_logits_are_the_models_probabilities(name):
    output, _ = drawn(name, 1)
    got = scipy.special.softmax(TABLE[name].loss.class_logits(jnp.asarray(output)))
    expected = [p for p, _ in TABLE[name].targets(output)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["sequence summed", "binary of three", "squared", "custom"])
def test_outputs_that_are_no_single_classifier_are_refused(name):
    with pytest.raises(ValueError, match=r"(influx\.measure|logits=lambda)"):
        TABLE[name].loss.class_logits(jnp.asarray(drawn(name, 1)[0]))


@pytest.mark.parametrize("name", [name for name in SUMMED if TABLE[name].targets is not gaussian])
def test_labels_out_of_range_are_refused_with_their_examples(name):
    row = TABLE[name]
    targets = np.stack([drawn(name, seed)[1] for seed in range(8)])
    row.loss.check(shape_of(name), jnp.asarray(targets))
    classes = row.shape[-1] if row.targets is labels else 2
    for value in (-1, classes):
        wrong = np.array(targets)
        wrong[[2, 5]] = value
        with pytest.raises(ValueError, match=r"examples \[2, 5\] \(2 in all\)"):
            row.loss.check(shape_of(name), jnp.asarray(wrong))
    jax.jit(lambda t: row.loss.check(shape_of(name), t))(jnp.asarray(wrong))  # values unknown


# --- `testing.check` sees a wrong output Hessian ---------------------------------------------------


class WithHessian(AbstractLoss):
    """Another loss, but for its output Hessian."""

    loss: AbstractLoss
    hessian: object = eqx.field(static=True)
    root: object = eqx.field(static=True, default=None)

    @property
    def convex(self):
        return self.root is not None

    def __call__(self, output, target):
        return self.loss(output, target)

    def output_hessian(self, output, target):
        return self.hessian(self.loss, output, target)

    def hessian_root(self, output, target):
        if self.root is not None:
            return self.root(self.loss, output, target)
        return eigen_root(self.output_hessian(output, target)).reshape(-1, *output.shape)

    def output_fisher(self, output):
        return self.loss.output_fisher(output)

    def fisher_root(self, output):
        return self.loss.fisher_root(output)

    def draw(self, key, output):
        return self.loss.draw(key, output)

    def residuals(self, output):
        return self.loss.residuals(output)

    def class_logits(self, output):
        return self.loss.class_logits(output)

    def constants(self, output):
        return self.loss.constants(output)

    def check(self, output, targets):
        self.loss.check(output, targets)


def without_weights(loss, output, target):
    return ix.SoftmaxCrossEntropy().output_hessian(output, target)


def own_score(loss, output, target):
    """The empirical Fisher in place of the Hessian."""
    score = jax.grad(loss)(output, target)
    return score[:, None] * score[None, :]


MUTANTS = {
    "scaled": lambda loss, o, t: 1.001 * loss.output_hessian(o, t),
    "class weights left out": without_weights,
    "empirical Fisher": own_score,
    "diagonal only": lambda loss, o, t: jnp.diag(jnp.diag(loss.output_hessian(o, t))),
    "NaN": lambda loss, o, t: jnp.nan * loss.output_hessian(o, t),
}


WRONG_ROOTS = {
    "scaled": lambda loss, o, t: 1.001 * loss.hessian_root(o, t),
    "a row too few": lambda loss, o, t: loss.hessian_root(o, t)[1:],
    "the Fisher's": lambda loss, o, t: loss.fisher_root(o),
}


def weighted_problem(hessian, root=None):
    rng = np.random.default_rng(0)
    loss = WithHessian(ix.SoftmaxCrossEntropy(class_weights=WEIGHTS), hessian, root)
    return ix.EmpiricalRisk((rng.normal(size=(12, 4)), rng.integers(0, 3, 12)), loss, l2=0.05)


def test_check_holds_for_a_right_output_hessian():
    risk = weighted_problem(lambda loss, o, t: loss.output_hessian(o, t))
    report = ix.testing.check(risk, linear_model(), points=5)
    status = {law.name: law.status for law in report.laws}
    assert status["output Hessian"] == "holds"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_breaks_on_a_wrong_output_hessian(mutant):
    risk = weighted_problem(MUTANTS[mutant])
    with pytest.raises(BrokenLaw, match="BROKEN   output Hessian") as broken:
        ix.testing.check(risk, linear_model(), points=5)
    assert str(broken.value).count("BROKEN") == 1  # and nothing else is blamed


@pytest.mark.parametrize("mutant", WRONG_ROOTS)
def test_check_breaks_on_a_wrong_root_of_a_convex_loss(mutant):
    right = lambda loss, o, t: loss.output_hessian(o, t)
    with pytest.raises(BrokenLaw, match="BROKEN   Hessian root") as broken:
        ix.testing.check(weighted_problem(right, WRONG_ROOTS[mutant]), linear_model(), points=5)
    assert str(broken.value).count("BROKEN") == 1
