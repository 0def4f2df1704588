"""Figures of what influx finds (matplotlib, `pip install 'influx[demo]'`).

Functions of one plot take `ax=` and return it; functions that lay out a page take `figure=` (a
figure or subfigure) and return it. Colours are Okabe & Ito's, told apart in every common form of
colour blindness, and never the only mark.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._agreement import agreement
from ._extras import missing_extras
from ._memorization import LABELS, Memorization
from ._top_k import TopK

if _missing := missing_extras("matplotlib"):
    raise ImportError(_missing)

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

BLUE, VERMILLION, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8C8C8C"
# One colour and one marker per memorization label, in the order of `influx.LABELS`.
_LABEL_MARKS = ((BLUE, "o"), (GREEN, "D"), (VERMILLION, "^"))

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.dpi": 100,
}


def style() -> Any:
    """A context manager: `with influx.plot.style(): ...` draws as the demo's figures are drawn."""
    return mpl.rc_context(STYLE)


def predicted_vs_actual(
    predicted,
    actual,
    *,
    ax: Axes | None = None,
    title: str = "",
    quantity: str = "change on removal",
    largest: int = 20_000,
) -> Axes:
    """Predicted against actual changes, with the identity; Pearson and slope stand in the title.

    **Arguments:** `predicted`, `actual`: arrays of one shape, e.g. `removal(f)(queries)[:, idx]` and
    the differences that `leave_one_out` finds. `quantity` names them on the axes, with its unit.
    `largest`: of more pairs than this an even subset is drawn; the figures in the title are of all.

    **Raises:** `ValueError` for shapes that differ or entries that are not finite.
    """
    found = agreement(predicted, actual)
    x, y = np.ravel(predicted), np.ravel(actual)
    some = slice(None, None, -(-x.size // largest))
    ax = plt.subplots()[1] if ax is None else ax
    end = 1.05 * max(np.max(np.abs(x)), np.max(np.abs(y)))
    ax.plot([-end, end], [-end, end], color=GREY, lw=1, zorder=1)
    ax.scatter(x[some], y[some], s=9, color=BLUE, alpha=0.35, lw=0, zorder=2, rasterized=True)
    ax.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
    ax.set(xlabel=f"predicted {quantity}", ylabel=f"actual {quantity}")
    ax.set_title(
        f"{title}\n".lstrip("\n") + f"Pearson {found.pearson:.5f}   slope {found.slope:.3f}"
    )
    return ax


def margins(
    memorization: Memorization, *, marked=None, marked_name: str = "marked", ax: Axes | None = None
) -> Axes:
    """What the others give a point against what training on it adds, one mark a training point.

    Across: γᵢ(θ̂₋ᵢ), the log-odds margin without the point (right of 0 the others explain it).
    Upwards, on a log scale: γᵢ(θ̂) − γᵢ(θ̂₋ᵢ), which is never negative for hard labels (P3; predictions
    below the plot's floor are drawn on it). Memorized points lie between 0 and the grey curve on which
    the two add up to 0; points that are not fitted lie beyond it.

    **Arguments:** `marked`: a mask [n] of points to ring, such as labels known to be wrong, called
    `marked_name` in the legend.
    """
    without = np.asarray(memorization.margin_without)
    added = np.asarray(memorization.margin) - without
    label = np.asarray(memorization.label)
    ax = plt.subplots()[1] if ax is None else ax
    positive = added[added > 0]
    floor = np.quantile(positive, 0.001) / 2 if positive.size else 1e-12
    drawn = np.maximum(added, floor)
    for c, (name, (colour, marker)) in enumerate(zip(LABELS, _LABEL_MARKS)):
        here = label == c
        ax.scatter(
            without[here], drawn[here], s=30 if c == 1 else 14, color=colour, marker=marker,
            alpha=0.9 if c == 1 else 0.6, lw=0, zorder=3 if c == 1 else 2,
            label=f"{name} ({here.sum()})",
        )  # fmt: skip
    if marked is not None:
        _ring(ax, without, drawn, marked, marked_name)
    edge = np.geomspace(floor, drawn.max(), 200)
    ax.plot(-edge, edge, color=GREY, lw=1.2, zorder=1)
    ax.annotate(
        "margin with it = 0 ", (-edge[-1], edge[-1]), color="#555555", ha="right", va="center"
    )
    ax.axvline(0, color=GREY, lw=1.2, zorder=1)
    ax.set_yscale("log")
    ax.set_ylim(floor / 1.5, drawn.max() * 1.6)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="margin without the point (log-odds of its label)")
    ax.set(ylabel="margin that training on it adds (log-odds)")
    ax.legend(loc="lower left", handletextpad=0.3)
    return ax


def margins_by_class(
    memorization: Memorization,
    labels,
    *,
    marked=None,
    marked_name: str = "marked",
    ax: Axes | None = None,
) -> Axes:
    """The margin without each point by its given class, coloured by memorization label.

    **Arguments:** `labels`: the given classes [n]. `marked`, `marked_name`: as in `margins`.
    """
    without, given = np.asarray(memorization.margin_without), np.asarray(labels)
    ax = plt.subplots()[1] if ax is None else ax
    jitter = np.random.default_rng(0).uniform(-0.32, 0.32, given.size)
    for c, (name, (colour, marker)) in enumerate(zip(LABELS, _LABEL_MARKS)):
        here = np.asarray(memorization.label) == c
        ax.scatter(
            without[here], (given + jitter)[here], s=30 if c == 1 else 14, color=colour,
            marker=marker, alpha=0.9 if c == 1 else 0.6, lw=0, zorder=3 if c == 1 else 2,
            label=f"{name} ({here.sum()})",
        )  # fmt: skip
    if marked is not None:
        _ring(ax, without, given + jitter, marked, marked_name)
    ax.axvline(0, color=GREY, lw=1.2, zorder=1)
    ax.set(xlabel="margin without the point (log-odds of its label)", ylabel="given label")
    ax.set_yticks(np.unique(given))
    return ax


def _ring(ax: Axes, x, y, marked, name: str) -> None:
    marked = np.asarray(marked, bool)
    ax.scatter(
        x[marked], y[marked], s=46, facecolor="none", edgecolor=BLACK, lw=0.8, zorder=4,
        label=f"{name} ({marked.sum()})",
    )  # fmt: skip


def image_sheet(
    images,
    captions: Sequence[str],
    *,
    columns: int = 10,
    title: str = "",
    colours: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """A sheet of images [k, height, width], each above its caption.

    **Arguments:** `colours`: of the captions, one an image.
    """
    rows = -(-len(images) // columns)
    if figure is None:
        figure = plt.figure(figsize=(1.15 * columns, 1.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    colours = [BLACK] * len(images) if colours is None else colours
    for ax in grid.flat:
        ax.set_axis_off()
    for ax, image, caption, colour in zip(grid.flat, images, captions, colours):
        _image(ax, image, caption, colour)
    if title:
        figure.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    return figure


def image_pairs(
    queries,
    training,
    top: TopK,
    *,
    query_captions: Sequence[str],
    caption: Callable[[int, float], str],
    title: str = "",
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Each query beside the training images that help it most and those that harm it most.

    **Arguments:** `queries` [m, height, width] and `training` [n, height, width]; `top`: of plain
    influence on the queries' loss, so that the lowest values help and the highest harm;
    `caption(i, value)` of training point i with that influence.
    """
    m, k = np.asarray(top.lowest.indices).shape
    if figure is None:
        figure = plt.figure(figsize=(1.2 * (2 * k + 2), 1.75 * m + 0.7), layout="constrained")
    widths = [1, *[1] * k, 0.12, *[1] * k]
    grid = figure.subplots(m, 2 * k + 2, squeeze=False, width_ratios=widths)
    for ax in grid.flat:
        ax.set_axis_off()
    sides = ((top.lowest, 1, BLUE), (top.highest, k + 2, VERMILLION))
    for row in range(m):
        _image(grid[row, 0], queries[row], query_captions[row], BLACK, frame=BLACK)
        for extremes, first, colour in sides:
            pairs = zip(np.asarray(extremes.indices)[row], np.asarray(extremes.values)[row])
            for j, (i, value) in enumerate(pairs):
                text = caption(int(i), float(value))
                _image(grid[row, first + j], training[i], text, BLACK, frame=colour)
    heads = ((0, "query", BLACK), (1, "helpful: lower its loss", BLUE))
    for column, text, colour in (*heads, (k + 2, "harmful: raise its loss", VERMILLION)):
        grid[0, column].set_title(text, loc="left", color=colour, fontweight="bold", pad=8)
    if title:
        figure.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    return figure


def _image(ax: Axes, image, caption: str, colour: str, frame: str | None = None) -> None:
    ax.set_axis_on()
    ax.imshow(image, cmap="gray_r", interpolation="nearest")
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, color=frame or "#CCCCCC", linewidth=1.8 if frame else 0.8)
    ax.set_xlabel(caption, color=colour, fontsize=9, labelpad=3)
