"""Figures: what is drawn is what was given, and the figures in titles are NumPy's and SciPy's."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import linregress

import influx as ix
from influx import _extras, plot
from influx._agreement import agreement


@pytest.fixture
def pairs():
    rng = np.random.default_rng(1)
    predicted = rng.normal(size=(7, 5))
    return predicted, 1.3 * predicted + 0.1 + 0.2 * rng.normal(size=(7, 5))


@pytest.fixture(autouse=True)
def _no_open_figures():
    yield
    plt.close("all")


def memorization(n=40):
    rng = np.random.default_rng(2)
    margin = np.linspace(-3.0, 3.0, n) + 0.01
    without = margin - rng.uniform(0.05, 0.4, n)
    label = np.where(margin <= 0, 2, np.where(without <= 0, 1, 0))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    score = sigmoid(margin) - sigmoid(without)
    return ix.Memorization(*map(jnp.asarray, (margin, without, score, margin > 0, label)))


def test_agreement_is_that_of_linear_regression(pairs):
    x, y = (a.ravel() for a in pairs)
    found, expected = agreement(*pairs), linregress(x, y)
    assert found.pearson == pytest.approx(expected.rvalue, rel=1e-12)
    assert found.slope == pytest.approx(expected.slope, rel=1e-12)
    assert found.largest_error == np.abs(x - y).max()
    assert found.largest_actual == np.abs(y).max()


def test_agreement_is_undefined_where_nothing_varies():
    assert np.isnan(agreement(np.ones(3), np.arange(3.0)).slope)
    assert np.isnan(agreement(np.arange(3.0), np.ones(3)).pearson)
    assert agreement(np.arange(3.0), np.ones(3)).slope == 0


@pytest.mark.parametrize(
    ("predicted", "actual", "match"),
    [
        (np.ones(3), np.ones(4), "one shape"),
        (np.ones(1), np.ones(1), "at least two"),
        (np.array([1.0, np.nan]), np.ones(2), "finite"),
    ],
)
def test_agreement_refuses(predicted, actual, match):
    with pytest.raises(ValueError, match=match):
        agreement(predicted, actual)


def test_predicted_vs_actual_draws_the_pairs_and_the_identity(pairs):
    given = plt.subplots()[1]
    ax = plot.predicted_vs_actual(*pairs, ax=given, title="Trial", quantity="loss (nats)")
    assert ax is given
    drawn = ax.collections[0].get_offsets()
    np.testing.assert_array_equal(drawn, np.stack([pairs[0].ravel(), pairs[1].ravel()], axis=1))
    line = ax.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert line.get_xdata()[1] >= max(np.abs(pairs[0]).max(), np.abs(pairs[1]).max())
    expected = linregress(pairs[0].ravel(), pairs[1].ravel())
    title = ax.get_title()
    assert f"{expected.rvalue:.5f}" in title
    assert f"{expected.slope:.3f}" in title
    assert title.startswith("Trial\n")
    assert "loss (nats)" in ax.get_xlabel()
    assert "loss (nats)" in ax.get_ylabel()


def test_predicted_vs_actual_draws_a_subset_but_judges_all(pairs):
    ax = plot.predicted_vs_actual(*pairs, largest=10)
    assert len(ax.collections[0].get_offsets()) <= 10
    assert f"{agreement(*pairs).pearson:.5f}" in ax.get_title()


@pytest.mark.parametrize("by_class", [False, True])
def test_margins_draw_every_point_once_under_its_label(by_class):
    found = memorization()
    marked = np.arange(40) % 5 == 0
    if by_class:
        ax = plot.margins_by_class(found, np.arange(40) % 3, marked=marked)
    else:
        ax = plot.margins(found, marked=marked)
    counts = [len(c.get_offsets()) for c in ax.collections]
    assert counts == [*np.bincount(np.asarray(found.label), minlength=3), marked.sum()]
    across = np.concatenate([np.asarray(c.get_offsets())[:, 0] for c in ax.collections[:3]])
    np.testing.assert_allclose(np.sort(across), np.sort(np.asarray(found.margin_without)))
    names = [c.get_label() for c in ax.collections[:3]]
    assert names == [f"{name} ({k})" for name, k in zip(ix.LABELS, counts)]


def test_margins_keep_points_whose_predicted_addition_is_negative():
    found = memorization()
    odd = ix.Memorization(
        found.margin, found.margin_without.at[3].set(0.0), found.score, found.correct, found.label
    )
    ax = plot.margins(odd)
    assert sum(len(c.get_offsets()) for c in ax.collections) == 40
    low, _ = ax.get_ylim()
    heights = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in ax.collections])
    assert (heights > low).all()


def test_image_sheet_captions_each_image():
    images = np.random.default_rng(0).uniform(size=(7, 8, 8))
    figure = plot.image_sheet(images, [f"image {i}" for i in range(7)], columns=3, title="Sheet")
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_xlabel() for ax in shown] == [f"image {i}" for i in range(7)]
    for ax, image in zip(shown, images):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)


def test_image_pairs_put_helpful_before_harmful():
    rng = np.random.default_rng(0)
    training, queries = rng.uniform(size=(9, 4, 4)), rng.uniform(size=(2, 4, 4))
    scores = rng.normal(size=(2, 9))
    order = np.argsort(scores, axis=1)
    extremes = lambda idx: type("Extremes", (), {
        "indices": idx, "values": np.take_along_axis(scores, idx, axis=1)
    })  # fmt: skip
    top = type("Top", (), {"lowest": extremes(order[:, :3]), "highest": extremes(order[:, :-4:-1])})
    page = Figure()
    figure = plot.image_pairs(
        queries, training, top, query_captions=["a", "b"],
        caption=lambda i, value: f"{i}:{value:.3f}", figure=page,
    )  # fmt: skip
    assert figure is page
    captions = [ax.get_xlabel() for ax in figure.axes if ax.images]
    for row, first in enumerate((0, 7)):
        points = [*order[row, :3], *order[row, :-4:-1]]
        expected = ["ab"[row], *(f"{i}:{scores[row, i]:.3f}" for i in points)]
        assert captions[first : first + 7] == expected


def test_style_leaves_the_settings_as_they_were():
    before = dict(matplotlib.rcParams)
    with plot.style():
        assert matplotlib.rcParams["axes.grid"]
    assert dict(matplotlib.rcParams) == before


def test_influx_alone_imports_no_extra():
    code = (
        "import sys, influx; "
        "print(sorted({'matplotlib', 'sklearn', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == "matplotlib" else 1)
    message = _extras.missing_extras("matplotlib")
    assert "matplotlib" in message
    assert "pip install 'influx[demo]'" in message
    assert "\n" not in message
    assert _extras.missing_extras("rich") is None
    monkeypatch.delitem(sys.modules, "influx.plot")
    with pytest.raises(ImportError, match=r"pip install 'influx\[demo\]'"):
        __import__("influx.plot")
