"""`find_mislabelled`: the rule's pieces against NumPy, its symmetries, known flips, and its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import influx as ix
from influx._removal.evidence import _chance_right, feature_kernel, without_each
from tests.helpers import alone, linear_model, problem

SEEDS = st.integers(0, 2**31 - 1)
FLIPPED = np.arange(5)


def network(seed: int = 0, outputs=3, inputs: int = 4) -> eqx.nn.MLP:
    return eqx.nn.MLP(inputs, outputs, 6, 1, activation=jax.nn.gelu, key=jr.key(seed))


def clusters(seed: int, n: int = 45, classes: int = 3):
    """Well separated classes, the first five labels wrong."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = 3 * np.eye(4)[:classes]
    X = centres[y] + 0.5 * rng.normal(size=(n, 4))
    wrong = y.copy()
    wrong[FLIPPED] = (y[FLIPPED] + rng.integers(1, classes, 5)) % classes
    return X, y, wrong


def found_by(evidence: str, X, labels, weights=None, loss=None, outputs=3):
    risk = ix.EmpiricalRisk((X, labels), loss or ix.SoftmaxCrossEntropy(), l2=1e-2, weights=weights)
    model = {"model": linear_model, "features": lambda outputs: network(outputs=outputs)}[evidence]
    return ix.find_mislabelled(risk, model(outputs=outputs), evidence=evidence)


@pytest.mark.parametrize("evidence", ["model", "features"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flips_of_separable_classes_come_first_with_the_right_class(evidence, seed):
    X, y, labels = clusters(seed)
    found = found_by(evidence, X, labels)
    order = np.argsort(-np.asarray(found.score))
    assert set(order[:5]) == set(FLIPPED)
    assert np.array_equal(np.asarray(found.suggested), y)
    assert np.all(np.asarray(found.reason)[5:] == 0)
    assert np.all(np.asarray(found.reason)[:5] > 0)


@pytest.mark.parametrize("evidence", ["model", "features"])
@pytest.mark.parametrize("outputs", ["scalar", 1])
def test_two_classes_of_one_output(evidence, outputs):
    X, y, labels = clusters(3, classes=2)
    targets = labels if outputs == "scalar" else labels[:, None]
    found = found_by(evidence, X, targets, loss=ix.BinaryCrossEntropy(), outputs=outputs)
    assert set(np.argsort(-np.asarray(found.score))[:5]) == set(FLIPPED)
    assert np.array_equal(np.asarray(found.suggested), y)


@given(seed=SEEDS)
def test_predictions_without_each_point_are_those_of_a_fit_without_it(seed):
    rng = np.random.default_rng(seed)
    x, targets = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    weights = np.array([1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0])
    kernel, ridge = x @ x.T, 0.7
    got = without_each(*map(jnp.asarray, (kernel, targets, weights, ridge)))
    for i in range(8):
        w = np.where(np.arange(8) == i, 0, weights)
        theta = np.linalg.solve(
            x.T @ (w[:, None] * x) + ridge * np.eye(3), x.T @ (w[:, None] * targets)
        )
        np.testing.assert_allclose(got[i], x[i] @ theta, rtol=1e-9, atol=1e-9)


def test_the_kernel_is_the_nearness_of_the_inputs_of_the_first_half_of_the_layers():
    X, _, labels = clusters(0)
    weights = np.where(np.arange(45) % 4 == 0, 0.0, 1.5)
    risk = ix.EmpiricalRisk((X, labels), ix.SoftmaxCrossEntropy(), weights=weights)
    model = eqx.nn.MLP(4, 3, 6, 2, activation=jax.nn.gelu, key=jr.key(0))
    W, b = (np.asarray(p) for p in (model.layers[0].weight, model.layers[0].bias))
    expected = 1.0
    for a in (X, np.asarray(jax.nn.gelu(jnp.asarray(X @ W.T + b[None])))):
        a = a - weights @ a / weights.sum()
        a = a / np.sqrt(weights @ (a**2).sum(1) / weights.sum())
        expected = expected + np.exp(-((a[:, None] - a[None]) ** 2).sum(2)) / 2
    np.testing.assert_allclose(feature_kernel(risk, model), expected, rtol=1e-10, atol=1e-12)


class Words(eqx.Module):
    """An embedding, read by two linear layers."""

    embed: eqx.nn.Embedding
    layers: list

    def __init__(self, key):
        a, b, c = jr.split(key, 3)
        self.embed = eqx.nn.Embedding(7, 3, key=a)
        self.layers = [eqx.nn.Linear(3, 5, key=b), eqx.nn.Linear(5, 3, key=c)]

    def __call__(self, ids):
        first, second = self.layers
        return second(jnp.tanh(first(jnp.mean(jax.vmap(self.embed)(ids), axis=0))))


def test_tokens_are_compared_by_what_their_embeddings_say():
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 7, (20, 4)), rng.integers(0, 3, 20)
    risk, model = ix.EmpiricalRisk((ids, labels), ix.SoftmaxCrossEntropy()), Words(jr.key(0))
    a = np.asarray(model.embed.weight)[ids].mean(axis=1)
    a = a - a.mean(axis=0)
    a = a / np.sqrt((a**2).sum(axis=1).mean())
    expected = 1 + np.exp(-((a[:, None] - a[None]) ** 2).sum(axis=2))
    np.testing.assert_allclose(feature_kernel(risk, model), expected, rtol=1e-10, atol=1e-12)


@given(seed=SEEDS)
def test_the_ridge_errs_least_without_each_point(seed):
    X, _, labels = clusters(seed)
    risk = ix.EmpiricalRisk((X, labels), ix.SoftmaxCrossEntropy())
    K, T = np.asarray(feature_kernel(risk, network())), np.eye(3)[labels]
    ask = lambda w, r: 1 / 3 + np.asarray(without_each(K, T - 1 / 3, w, r))
    lead = lambda s: (s * T).sum(1) - np.where(T > 0, -np.inf, s).max(1)
    ridges = 45 * 3e-4 * 3.0 ** np.arange(6)
    errors = [np.square(ask(np.ones(45), r) - T).sum() for r in ridges]
    best = ridges[int(np.argmin(errors))]
    again = ask(np.clip(1 + lead(ask(np.ones(45), best)), 0, 1), best)
    found = ix.find_mislabelled(risk, network())
    np.testing.assert_allclose(found.score, -lead(again), rtol=1e-8, atol=1e-9)


def test_the_share_of_wrong_labels_is_its_maximum_likelihood():
    rng = np.random.default_rng(0)
    margins, C = rng.normal(2, 2, 400), 4
    p = 1 / (1 + np.exp(-margins))
    shares = np.linspace(1e-3, 1 - 1 / C, 4000)[:, None]
    likelihood = np.log((1 - shares) * p + shares / (C - 1) * (1 - p)).sum(axis=1)
    best = shares[np.argmax(likelihood), 0]
    right = (1 - best) * p / ((1 - best) * p + best / (C - 1) * (1 - p))
    got = _chance_right(jnp.asarray(margins), jnp.ones(400), C)
    np.testing.assert_allclose(got, right, atol=5e-3)


@pytest.mark.parametrize("evidence", ["model", "features"])
@given(seed=SEEDS)
def test_permuting_the_points_permutes_what_is_found(evidence, seed):
    X, _, labels = clusters(1)
    order = np.random.default_rng(seed).permutation(len(X))
    found, moved = found_by(evidence, X, labels), found_by(evidence, X[order], labels[order])
    np.testing.assert_allclose(found.score[order], moved.score, rtol=1e-6, atol=1e-8)
    assert np.array_equal(found.suggested[order], moved.suggested)


@pytest.mark.parametrize("evidence", ["model", "features"])
def test_data_of_weight_zero_vouch_for_nothing(evidence):
    X, _, labels = clusters(2)
    weights = np.where(np.arange(45) < 40, 1.0, 0.0)
    other = np.where(weights == 0, 0, labels)
    one, two = (found_by(evidence, X, y, weights=weights) for y in (labels, other))
    np.testing.assert_allclose(one.score[:40], two.score[:40], rtol=1e-6, atol=1e-8)


def test_a_duplicate_is_weight_two_to_the_others():
    X, _, labels = clusters(2)
    weights = np.where(np.arange(45) == 20, 2.0, 1.0)
    twice = found_by("features", X, labels, weights=weights)
    both = found_by("features", np.vstack([X, X[20:21]]), np.append(labels, labels[20]))
    others = np.arange(45) != 20
    np.testing.assert_allclose(both.score[:45][others], twice.score[others], rtol=1e-8, atol=1e-9)


def test_the_table_lists_the_most_suspect_first():
    X, _, labels = clusters(0)
    found = found_by("model", X, labels)
    assert str(found) == found.table(10)
    head, *rows = found.table(5).splitlines()
    assert head.split() == ["index", "given", "suggested", "score", "reason"]
    for row in rows:
        i, label, suggested, score, *reason = row.split()
        assert int(i) in FLIPPED
        assert int(label) == labels[int(i)]
        assert int(suggested) == int(found.suggested[int(i)])
        assert float(score) == pytest.approx(float(found.score[int(i)]), abs=1e-3)
        assert " ".join(reason) == ix.REASONS[int(found.reason[int(i)])]
    assert len(rows) == 5


def test_what_cannot_be_answered_is_refused_by_name():
    _, risk, model, _ = problem("squared")
    with pytest.raises(ValueError, match="self_influence"):
        ix.find_mislabelled(risk, model)
    X, _, labels = clusters(0)
    risk = ix.EmpiricalRisk((X, labels), ix.SoftmaxCrossEntropy(), l2=1e-2)
    with pytest.raises(ValueError, match="not affine"):
        ix.find_mislabelled(risk, network(), evidence="model")
    with pytest.raises(ValueError, match='"features" or "model"'):
        ix.find_mislabelled(risk, network(), evidence="loss")
    with pytest.raises(ValueError, match="whole number"):
        ix.find_mislabelled(risk, network()).table(0)
    bias = lambda shift, x: x[:3] + shift
    elementwise = ix.EmpiricalRisk(risk.data, risk.loss, l2=1e-2, predict=bias)
    with pytest.raises(ValueError, match="No layer"):
        ix.find_mislabelled(elementwise, jnp.zeros(3), evidence="features")
    many = 2_000_000
    crowd = ix.EmpiricalRisk(
        (jnp.zeros((many, 1)), jnp.zeros(many, int)), ix.SoftmaxCrossEntropy(), l2=1e-2
    )
    head = eqx.nn.Linear(1, 2, key=jr.key(0))
    with pytest.raises(ValueError, match=r"2,000,000 training points pairwise.*fewer points"):
        ix.find_mislabelled(crowd, head)
    with pytest.raises(ValueError, match="Call it outside"):
        jax.jit(lambda x: ix.find_mislabelled(risk, x).score)(linear_model())


def test_points_without_which_there_is_no_step_are_named():
    risk, model = alone()
    with pytest.raises(
        RuntimeError, match=r"Without each of 1 of 7 points \(6\) the Hessian is not"
    ):
        ix.find_mislabelled(risk, model, evidence="model")
