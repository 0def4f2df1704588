"""The folder that the demo writes: one table and four figures."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import influx as ix
from influx import plot

from .compute import Results
from .words import signed

COLUMNS = (
    "id", "given label", "suggested label", "margin", "margin without", "label", "certified",
    "value", "standard error", "verdict", "reason",
)  # fmt: skip
FIGURES = ("helpful_harmful.png", "retraining.png", "margins.png", "suspects.png")


def write(results: Results, folder: Path, *, figures: bool = True) -> list[Path]:
    """Write scores.csv and, unless told not to, the figures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "scores.csv"]
    write_scores(results, paths[0])
    if not figures:
        return paths
    drawn = (helpful_harmful, retraining, margins, suspects)
    with plot.style():
        for name, draw in zip(FIGURES, drawn):
            paths.append(folder / name)
            draw(results).savefig(paths[-1])
    return paths


def write_scores(results: Results, path: Path) -> None:
    """A row a training point. Margins are log-odds; the value is Gᵢ, positive = helpful."""
    m, v = results.memorization, results.value
    number = "{:.6g}".format
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, given in enumerate(results.problem.given):
            writer.writerow((
                i,
                given,
                results.suggested[i],
                number(m.margin[i]),
                number(m.margin_without[i]),
                ix.LABELS[int(m.label[i])],
                "yes" if results.certificate.certified[i] else "no",
                number(v.value[i]),
                number(v.standard_error[i]),
                ix.VERDICTS[int(v.verdict[i])],
                reason(results, i),
            ))  # fmt: skip


def reason(results: Results, i: int) -> str:
    """Why training point i is worth a look, in a sentence; empty where nothing is."""
    given, suggested = results.problem.given[i], results.suggested[i]
    believed = results.others[i]
    parts = []
    if suggested != given:
        parts.append(
            f"the other points say {suggested} (probability {believed[suggested]:.2f}), "
            f"not {given} ({believed[given]:.2f})"
        )
    if int(results.memorization.label[i]) == 1:
        parts.append("only training on it carries its own label above probability one half")
    if int(results.value.verdict[i]) == 1:
        parts.append("training on it raises the held-out loss beyond two standard errors")
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def _page(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _given(results: Results, i: int) -> str:
    """The given label, with the true one where the demo flipped it."""
    given, true = results.problem.given[i], results.problem.true[i]
    return f"label {given}" if given == true else f"label {given} (true {true})"


def helpful_harmful(results: Results) -> Figure:
    """Test digits with the training images that help and harm them most."""
    e, problem = results.examples, results.problem
    truth = np.asarray(problem.test[1])[e.indices]
    k = e.top.lowest.indices.shape[1]
    figure = _page(1.25 * (2 * k + 2), 1.72 * len(e.indices) + 0.6)
    plot.image_pairs(
        np.asarray(problem.test[0])[e.indices].reshape(-1, 8, 8),
        problem.images,
        e.top,
        query_captions=[
            f"{y} read as {p}\nloss {loss:.2f}" for y, p, loss in zip(truth, e.predicted, e.losses)
        ],
        caption=lambda i, value: f"{_given(results, i)}\n{signed(value)}",
        title="Influence of training images on the loss of test digits, n · ∂loss/∂weight (nats)",
        figure=figure,
    )
    return figure


def retraining(results: Results) -> Figure:
    """Predicted against retrained changes of the held-out losses, first order and Newton."""
    figure = _page(9.4, 5.2)
    axes = figure.subplots(1, 2)
    r = results.retraining
    titles = {"first-order": "First order (influence)", "newton": "One Newton step"}
    for ax, (method, title) in zip(axes, titles.items()):
        plot.predicted_vs_actual(
            r.changes[method, "loss"],
            r.changes["actual", "loss"],
            ax=ax,
            title=title,
            quantity="change of loss (nats)",
        )
    m, k = r.changes["actual", "loss"].shape
    axes[1].set_ylabel("")
    figure.suptitle(f"{k} training points removed one at a time: {m} held-out losses each")
    return figure


def margins(results: Results) -> Figure:
    """Margins without each point by class, and against what training on it adds."""
    figure = _page(11.5, 5.4)
    left, right = figure.subplots(1, 2)
    flipped = results.problem.flipped if results.problem.flipped.any() else None
    rings = {"marked": flipped, "marked_name": "label flipped"}
    plot.margins_by_class(results.memorization, results.problem.given, **rings, ax=left)
    plot.margins(results.memorization, **rings, ax=right)
    left.set_title("Do the other points explain this label?")
    right.set_title("What training on the point adds")
    return figure


def suspects(results: Results, count: int = 20) -> Figure:
    """The most memorized images, and those whose labels the others believe least."""
    m, given = results.memorization, results.problem.given
    suggested, flipped = results.suggested, results.problem.flipped
    count = min(count, given.size)
    figure = _page(11.5, 7.1)
    sheets = (
        (np.argsort(-np.asarray(m.score), kind="stable")[:count],
         "Most memorized: given → suggested label, and the drop of p(given) without the point",
         lambda i: f"{m.score[i]:.3f}"),
        (np.argsort(np.asarray(m.margin_without), kind="stable")[:count],
         "Most suspicious: given → suggested label, and the margin without the point (log-odds)",
         lambda i: signed(m.margin_without[i])),
    )  # fmt: skip
    for part, (points, title, figures) in zip(figure.subfigures(2, 1, squeeze=False).flat, sheets):
        plot.image_sheet(
            results.problem.images[points],
            [
                f"{given[i]} → {suggested[i]}{' *' if flipped[i] else ''}\n{figures(i)}"
                for i in points
            ],
            title=title + ("   (* flipped)" if flipped.any() else ""),
            colours=[plot.VERMILLION if flipped[i] else plot.BLACK for i in points],
            figure=part,
        )
    return figure
