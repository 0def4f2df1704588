"""`prune` and `train_with_removal`: what is recorded is what happened, and what harms goes."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import influx as ix
from influx._removal.evidence import score_margin
from influx._removal.prune import _points
from influx._removal.ridge_head import RIDGE, ridge_head

HEAD = lambda m: m.layers[-1]


def data(n: int, seed: int, flips: int = 0):
    """Three Gaussian classes in the plane; the first `flips` labels are wrong."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    X = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])[y] + 0.7 * rng.normal(size=(n, 2))
    y[:flips] = (y[:flips] + 1) % 3
    return jnp.asarray(X), jnp.asarray(y)


def linear():
    return jax.tree_util.tree_map(jnp.zeros_like, eqx.nn.Linear(2, 3, key=jr.key(0)))


def pruned(flips=12, **options):
    risk = ix.EmpiricalRisk(data(80, 0, flips), ix.SoftmaxCrossEntropy(), l2=1e-2)
    return risk, ix.prune(risk, linear(), ix.Newton(), heldout=data(200, 1), **options)


def network(key: int = 0):
    return eqx.nn.MLP(2, 3, 8, 1, key=jr.key(key))


def trainer(key: int = 0, epochs: int = 40) -> ix.SGD:
    return ix.SGD(optax.sgd(0.1, momentum=0.9), batch_size=8, epochs=epochs, key=jr.key(key))


def trained(flips: int = 12, sgd=None, **options):
    risk = ix.EmpiricalRisk(data(80, 0, flips), ix.SoftmaxCrossEntropy(), l2=1e-3)
    settings = {"heldout": data(60, 1), "head": HEAD, **options}
    return risk, ix.train_with_removal(risk, network(), sgd or trainer(), **settings)


def test_planted_flips_are_pruned_and_the_loss_on_fresh_data_falls():
    risk, found = pruned()
    removed = np.flatnonzero(~np.asarray(found.kept))
    assert sorted(np.asarray(found.removed.index)) == list(removed)
    assert np.isin(np.arange(12), removed).mean() > 0.8
    assert (removed < 12).mean() > 0.6
    fresh = data(400, 2)
    before = ix.fit(risk, linear(), ix.Newton())
    loss = lambda m: float(jnp.mean(risk.losses(m, fresh)))
    assert loss(found.model) < 0.9 * loss(before)
    suggested = np.asarray(found.removed.suggested)[np.asarray(found.removed.index) < 12]
    given = np.asarray(found.removed.given)[np.asarray(found.removed.index) < 12]
    assert (suggested == (given + 2) % 3).mean() > 0.8


def test_what_prune_records_is_what_refitting_gives():
    """The first step is recomputed: choice, prediction and actual change, by public parts."""
    risk, found = pruned(step=0.05)
    V = data(200, 1)
    even, odd = ((V[0][i::2], V[1][i::2]) for i in (0, 1))
    before = ix.fit(risk, linear(), ix.Newton())
    G = np.asarray(ix.value(ix.influence(risk, before), even).value)
    chosen = np.argsort(G)[:4]
    history = found.history
    assert int(history.removed[0]) == 4
    np.testing.assert_allclose(history.promised[0], G[chosen].sum() / 80, rtol=1e-8)
    after = ix.fit(risk.with_weights(risk.weights.at[chosen].set(0)), linear(), ix.Newton())
    difference = np.asarray(risk.losses(after, odd) - risk.losses(before, odd))
    np.testing.assert_allclose(history.actual[0], difference.mean(), rtol=1e-6)
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    np.testing.assert_allclose(history.standard_error[0], error, rtol=1e-6)
    np.testing.assert_allclose(history.predicted[0], difference.mean(), rtol=0.25)
    assert abs(history.predicted[0] / history.actual[0] - 1) > 1e-6  # a prediction, not a refit


def test_the_history_adds_up():
    _, found = pruned()
    history, accepted = found.history, np.asarray(found.history.outcome) == 0
    sizes = np.asarray(history.removed)
    np.testing.assert_array_equal(history.total, np.cumsum(sizes * accepted))
    assert int(history.total[-1]) == int((~found.kept).sum()) == found.removed.index.size
    assert (np.asarray(history.actual)[accepted] < 0).all()
    assert (np.asarray(history.ratio)[accepted] >= 0.25).all()
    assert (np.diff(history.gradients) > 0).all()
    assert history.spent >= float(history.gradients[-1])
    assert len(str(history).splitlines()) == sizes.size + 2


def test_gradients_are_those_that_batches_read():
    """Two runs of 3 epochs on 4 full batches of 18 points; |V| = 100 + 100, a third a forward pass."""
    risk = ix.EmpiricalRisk(data(80, 0, 12), ix.SoftmaxCrossEntropy(), l2=1e-2)
    sgd = ix.SGD(optax.sgd(0.5), batch_size=18, epochs=3, key=jr.key(0))
    history = ix.prune(risk, linear(), sgd, heldout=data(200, 1), rounds=1).history
    run, valuation, prediction, check = 3 * 4 * 18, 80 + 100, 80, 2 * 100 / 3
    spent = run + valuation + prediction + check + run
    np.testing.assert_allclose(history.gradients, [spent])
    again = valuation if int(history.outcome[0]) == 0 else 0
    assert history.spent == pytest.approx(spent + again)


@pytest.mark.parametrize("budget", [0.05, 0.1])
def test_the_budget_is_kept(budget):
    _, found = pruned(budget=budget)
    assert int((~found.kept).sum()) == int(budget * 80)
    assert found.history.end == "the budget is spent"


def test_a_step_that_leaves_the_trust_region_is_refused_by_name():
    """Training that stops far from a minimum does not follow the Newton step that predicts it."""
    risk = ix.EmpiricalRisk(data(80, 0, 12), ix.SoftmaxCrossEntropy(), l2=1e-2)
    short = ix.SGD(optax.sgd(1e-3), batch_size=80, epochs=1, key=jr.key(0))
    found = ix.prune(risk, linear(), short, heldout=data(200, 1), step=0.1)
    refused = np.asarray(found.history.outcome) == 2
    ratio, sizes = np.asarray(found.history.ratio), np.asarray(found.history.removed)
    assert refused.any()
    assert (ratio[refused] < 0.25).all()
    assert all(sizes[i + 1] == sizes[i] // 2 for i in np.flatnonzero(refused[:-1]))
    assert "left the trust region" in str(found.history)
    assert bool(found.kept.all())
    assert found.history.end == "every step was refused, down to a single point"


def test_clean_data_are_left_alone():
    _, found = pruned(flips=0)
    assert int((~found.kept).sum()) <= 4  # 5 %: within the noise of 100 held-out points


def test_prune_leaves_absent_points_absent_and_the_callers_data_untouched():
    X, y = data(80, 0, 12)
    weights = jnp.ones(80).at[20:30].set(0)
    risk = ix.EmpiricalRisk((X, y), ix.SoftmaxCrossEntropy(), l2=1e-2, weights=weights)
    copies = [np.array(a) for a in jax.tree_util.tree_leaves(risk)]
    found = ix.prune(risk, linear(), ix.Newton(), heldout=data(200, 1))
    for a, b in zip(copies, jax.tree_util.tree_leaves(risk), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(found.kept)[20:30].any()
    assert not np.isin(np.asarray(found.removed.index), np.arange(20, 30)).any()


def test_prune_takes_losses_without_classes():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 2))
    w = np.array([[1.0, -1.0]])
    noise = lambda x: 0.1 * rng.normal(size=(len(x), 1))
    y = X @ w.T + noise(X)
    y[:5] += 3
    Xh = rng.normal(size=(60, 2))
    risk = ix.EmpiricalRisk((X, y), ix.SquaredError(), l2=1e-3)
    model = eqx.nn.Linear(2, 1, key=jr.key(0))
    found = ix.prune(risk, model, ix.Newton(), heldout=(jnp.asarray(Xh), jnp.asarray(Xh @ w.T)))
    assert np.isin(np.arange(5), np.asarray(found.removed.index)).sum() >= 4
    assert found.removed.suggested.shape == found.removed.given.shape


def test_the_closed_form_head_equals_retrained_ones():
    """Margins without each point by refitting in NumPy; values by differences in the data weights."""
    rng = np.random.default_rng(3)
    n, d, C, m = 12, 4, 3, 5
    F, Fh = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    y, yh, w = rng.integers(0, C, n), rng.integers(0, C, m), rng.uniform(0.5, 2, n)
    w[2] = 0
    centred = lambda labels: np.eye(C)[labels] - 1 / C
    mu = RIDGE * np.trace((F * w[:, None]).T @ F / n) / d

    def fit(w):
        A = (F * w[:, None]).T @ F / n + mu * np.eye(d)
        return np.linalg.solve(A, (F * w[:, None]).T @ centred(y) / n).T

    args = (jnp.asarray(a) for a in (F, y, w))
    head = ridge_head(*args, (jnp.asarray(Fh), jnp.asarray(yh)), C)
    for i in range(n):
        without = w.copy()
        without[i] = 0
        np.testing.assert_allclose(head.without[i], fit(without) @ F[i], rtol=1e-8, atol=1e-10)
        e = np.zeros(n)
        e[i] = 1e-5
        score = lambda w: np.mean(np.sum(centred(yh) * (Fh @ fit(w).T), axis=1))
        slope = n * (score(w + e) - score(w - e)) / 2e-5
        np.testing.assert_allclose(head.value[i], slope, rtol=1e-5, atol=1e-8)
    scores = np.asarray(head.without)
    others = np.where(np.eye(C, dtype=bool)[y], -np.inf, scores).max(axis=1)
    expected = scores[np.arange(n), y] - others
    np.testing.assert_allclose(score_margin(head.without, jnp.asarray(y)), expected)


def test_training_with_removal_drops_the_flips():
    _, found = trained()
    removed = np.asarray(found.removed.index)
    assert np.isin(np.arange(12), removed).mean() > 0.8
    assert (removed < 12).mean() > 0.6
    np.testing.assert_array_equal(np.sort(removed), np.flatnonzero(~np.asarray(found.kept)))
    X, y = data(400, 2)
    correct = lambda m: float(jnp.mean(jnp.argmax(jax.vmap(m)(X), axis=1) == y))
    assert correct(found.model) > 0.9


def test_gradients_are_counted_exactly():
    """By counting the rows that an optimiser's steps saw, and the rule for valuations and checks."""
    _, found = trained()
    history = found.history
    trained_on, valued = np.asarray(history.trained), np.asarray(history.valued)
    assert (trained_on % 8 == 0).all()
    np.testing.assert_array_equal(np.flatnonzero(valued), np.arange(6, valued.size, 3))
    expected = np.cumsum(trained_on + valued * (80 + 30) + 30 / 3)
    np.testing.assert_allclose(history.gradients, expected)
    assert history.plain == 40 * 80
    assert float(history.gradients[-1]) <= 0.5 * history.plain
    assert (trained_on[:6] == 80).all()
    assert trained_on[6:].max() < 80
    after = np.asarray(history.harmful)[6:]
    assert (trained_on[6:] <= 80 - after).all()


def test_a_step_is_taken_for_each_batch_that_is_counted():
    """An optimiser that counts its own steps."""
    counting = optax.GradientTransformation(
        lambda p: jnp.zeros((), int),
        lambda g, s, p: (jax.tree_util.tree_map(lambda x: s + 1.0 + 0 * x, g), s + 1),
    )
    sgd = ix.SGD(counting, batch_size=8, epochs=4, key=jr.key(0))
    risk = ix.EmpiricalRisk(data(80, 0), ix.SoftmaxCrossEntropy())
    first = lambda m: m.layers[0].weight[0, 0]
    settings = {"heldout": data(20, 1), "head": HEAD, "budget": 0.9, "warmup": 1, "every": 9}
    found = ix.train_with_removal(risk, network(), sgd, watch=first, **settings)
    steps = np.cumsum(np.asarray(found.history.trained) // 8)
    moved = np.asarray(found.history.watched) - float(first(network()))
    np.testing.assert_allclose(moved, steps * (steps + 1) / 2)


@pytest.mark.parametrize("kind", [float, bool])
def test_yes_or_no_labels_may_be_of_any_kind(kind):
    def found(kind):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(80, 4))
        y = (x[:, :1] + 0.5 * rng.normal(size=(80, 1)) > 0).astype(kind)
        risk = ix.EmpiricalRisk((x[:60], y[:60]), ix.BinaryCrossEntropy(), l2=1e-2)
        heldout = x[60:], y[60:]
        model = eqx.nn.Linear(4, 1, key=jax.random.key(0))
        settings = {"head": lambda m: m, "budget": 0.9, "warmup": 1, "every": 2}
        run = ix.train_with_removal(risk, model, trainer(epochs=3), heldout=heldout, **settings)
        fitted = ix.fit(risk, model, ix.Newton())
        suspects = ix.find_mislabelled(risk, fitted, evidence="model")
        label = ix.memorization(ix.influence(risk, fitted)).label
        return run.history.heldout, suspects.margin_without, label

    for got, wanted in zip(found(kind), found(int)):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


@pytest.mark.parametrize("watched", [lambda m: "a", lambda m: m])
def test_what_cannot_be_stacked_is_refused_before_training(watched):
    with pytest.raises(ValueError, match=r"leaves of type \w+.*eqx\.filter"):
        trained(watch=watched)


def test_a_budget_of_no_point_is_refused():
    with pytest.raises(ValueError, match=r"of 80 points is none.*single point is the share 1 / 80"):
        pruned(budget=0.005)
    assert all(_points(k / n, n) == k for n in range(5, 300) for k in (1, 2, n - 1))


@pytest.mark.parametrize("budget", [0.22, 0.3, 0.45])
def test_removals_are_those_that_an_epoch_trained_without(budget):
    """Of 40 epochs of 80 gradients; what is left of them buys no valuation, and a batch after it."""
    _, found = trained(budget=budget)
    history = found.history
    spent = float(history.gradients[-1])
    assert budget * history.plain - (80 + 30 + 10 + 8) < spent <= budget * history.plain
    assert int(history.harmful[-1]) == int((~found.kept).sum()) == len(found.removed.index)
    first = np.flatnonzero(np.asarray(history.valued))[0]
    assert np.asarray(history.harmful)[first] > 0


def test_too_few_points_for_a_batch_is_an_error():
    x, y = np.zeros((40, 2)), np.arange(40) % 3  # nothing tells the classes apart
    risk = ix.EmpiricalRisk((x, y), ix.SoftmaxCrossEntropy(), l2=1e-3)
    whole = ix.SGD(optax.sgd(0.1), batch_size=40, epochs=40, key=jr.key(0))
    with pytest.raises(RuntimeError, match="Of 40 points fewer than `batch_size=40` are left"):
        ix.train_with_removal(risk, network(), whole, heldout=data(60, 1), head=HEAD)


def test_the_warm_up_is_the_trainers_own_run():
    """With the same batches: the model after 3 warm-up epochs is `fit`'s after 3."""
    weight = lambda m: m.layers[0].weight
    risk, found = trained(watch=weight)
    for epochs in (1, 3):
        model = ix.fit(risk, network(), trainer(epochs=epochs))
        np.testing.assert_allclose(found.history.watched[epochs - 1], weight(model), rtol=1e-9)


def test_the_same_key_gives_the_same_run():
    (_, a), (_, b), (_, c) = trained(), trained(), trained(sgd=trainer(1))
    same = eqx.tree_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array))
    assert bool(same)
    assert not bool(jnp.array_equal(a.history.heldout[:3], c.history.heldout[:3]))


def test_absent_points_are_never_trained_on():
    X, y = data(80, 0, 12)
    poisoned = X.at[:12].set(1e3)
    weights = jnp.ones(80).at[:12].set(0)
    runs = [
        ix.train_with_removal(
            ix.EmpiricalRisk((inputs, y), ix.SoftmaxCrossEntropy(), weights=weights),
            network(),
            trainer(),
            heldout=data(60, 1),
            head=HEAD,
        )
        for inputs in (X, poisoned)
    ]
    np.testing.assert_array_equal(runs[0].history.heldout, runs[1].history.heldout)
    assert not np.asarray(runs[0].kept)[:12].any()


def test_the_last_epoch_within_a_standard_error_of_the_best_is_returned():
    deciding = tuple(a[1::2] for a in data(60, 1))

    def p(m):
        probabilities = jax.nn.softmax(jax.vmap(m)(deciding[0]), axis=1)
        return jnp.take_along_axis(probabilities, deciding[1][:, None], axis=1)[:, 0]

    _, found = trained(watch=p)
    watched, returned = np.asarray(found.history.watched), found.history.returned
    np.testing.assert_allclose(watched.mean(axis=1), found.history.heldout, rtol=1e-9)
    np.testing.assert_allclose(p(found.model), watched[returned])
    good = []
    for e in range(len(watched)):
        best = watched[: e + 1][np.argmax(watched[: e + 1].mean(axis=1))]
        fall = best - watched[e]
        good.append(fall.mean() <= fall.std(ddof=1) / np.sqrt(fall.size))
    assert returned == np.flatnonzero(good)[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout": None}, "missing"),
        ({"heldout": (jnp.zeros((3, 2)), jnp.zeros(3, int))}, "at least 4"),
        ({"heldout": (jnp.zeros((9, 5)), jnp.zeros(9, int))}, "look like a training point"),
        ({"budget": 1.0}, "between 0 and 1"),
        ({"budget": 0}, "between 0 and 1"),
        ({"step": 2.0}, "between 0 and 1"),
        ({"trust": -1.0}, "between 0 and 1"),
        ({"rounds": 0}, "`rounds`"),
        ({"curvature": "Hessian"}, "curvature"),
    ],
)
def test_prune_refuses(change, words):
    risk = ix.EmpiricalRisk(data(80, 0), ix.SoftmaxCrossEntropy(), l2=1e-2)
    with pytest.raises(ValueError, match=words):
        ix.prune(risk, linear(), ix.Newton(), **{"heldout": data(20, 1), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout": None}, "missing"),
        ({"budget": 1.5}, "between 0 and 1"),
        ({"budget": 0.1}, "Raise `budget`"),
        ({"head": lambda m: m.layers[0]}, "last linear layer"),
        ({"head": lambda m: m.nothing}, "select a part"),
        ({"warmup": 0}, "whole number"),
        ({"sgd": ix.Newton()}, "use `prune`"),
    ],
)
def test_train_with_removal_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        trained(**change)


def test_fewer_points_than_a_batch_are_refused_by_name():
    weights = jnp.zeros(80).at[:5].set(1)
    risk = ix.EmpiricalRisk(data(80, 0), ix.SoftmaxCrossEntropy(), l2=1e-3, weights=weights)
    with pytest.raises(ValueError, match=r"only 5 training points .* batch_size=5"):
        ix.train_with_removal(risk, network(), trainer(), heldout=data(40, 1), head=HEAD)


def test_train_with_removal_is_for_classifiers():
    X, _ = data(80, 0)
    risk = ix.EmpiricalRisk((X, jnp.zeros((80, 3))), ix.SquaredError())
    with pytest.raises(ValueError, match="class"):
        ix.train_with_removal(
            risk, network(), trainer(), heldout=(X, jnp.zeros((80, 3))), head=HEAD
        )


def test_a_diverging_run_says_so():
    sgd = dataclasses.replace(trainer(), optimiser=optax.sgd(1e200))
    with pytest.raises(RuntimeError, match="diverged"):
        trained(sgd=sgd)
