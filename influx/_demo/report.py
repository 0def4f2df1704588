"""The demo's results as Rich tables: every header states sign and unit."""

from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import influx as ix

from .compute import Results
from .words import signed


def show(results: Results, console: Console) -> None:
    """Print every finding."""
    width = min(console.width, 100)
    c, flips = results.config, int(results.problem.flipped.sum())
    console.print(
        f"\n[bold]Digits[/]: {c.train} training images ({flips} labels flipped), {c.heldout} "
        f"held-out, {c.test} test. Multinomial logistic regression, l2 = {c.l2:g}, fitted by Newton.",
        width=width,
    )
    tables = [behind_table(results), labels_table(results), retraining_table(results)]
    if flips:
        tables.append(ranking_table(results))
    for section in (*tables, removal_table(results)):
        console.print()
        console.print(section.title, style="bold", highlight=False)
        console.print(section.note, style="dim", highlight=False, width=width)
        console.print()
        console.print(section.table)
    console.print()
    console.print(conclusion(results), highlight=False, width=width)


@dataclass(frozen=True)
class Section:
    """A table, its title, and the note that states sign and unit."""

    title: str
    note: str
    table: Table


def _table(title: str, note: str, *columns: str) -> Section:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return Section(title, note, table)


def behind_table(results: Results, k: int = 3) -> Section:
    """The most helpful and harmful training points of a few test digits."""
    e, problem = results.examples, results.problem
    section = _table(
        "1  Training points behind test digits",
        "Influence on the test digit's loss, I = n · ∂loss/∂wᵢ, in nats. Negative = helpful: "
        "training more on the point lowers the loss. Positive = harmful. Erasing the point changes "
        "the loss by about −I/n.",
        "test digit:\nlabel", "most helpful\npoint: label", "I (nats)",
        "most harmful\npoint: label", "I (nats)",
    )  # fmt: skip

    def point(i):
        given, true = problem.given[i], problem.true[i]
        return f"#{i}: {given}" + (f" [red](true {true})[/]" if given != true else "")

    truth = np.asarray(problem.test[1])[e.indices]
    low, high = e.top.lowest, e.top.highest
    for row, (index, y, p, loss) in enumerate(zip(e.indices, truth, e.predicted, e.losses)):
        names = [f"#{index}: {y}", f"[{'red' if p != y else 'green'}]read as {p}[/]"]
        names.append(f"loss {loss:.2f}")
        for j in range(k):
            section.table.add_row(
                names[j] if j < len(names) else "",
                point(int(low.indices[row, j])),
                signed(low.values[row, j]),
                point(int(high.indices[row, j])),
                signed(high.values[row, j]),
                end_section=j == k - 1,
            )
    return section


def labels_table(results: Results) -> Section:
    """Memorization label against the sign of the value."""
    label = np.asarray(results.memorization.label)
    certified = np.asarray(results.certificate.certified)
    verdict = np.asarray(results.value.verdict)
    inside = results.certificate_contains_retrained()
    section = _table(
        "2  Memorization (a point, given the others) × value (the others, given it)",
        "Labels: does the log-odds margin stay above 0 without the point? Certified: the label is "
        "proven without retraining; of the enclosures that were checked by retraining, "
        f"{int(inside.sum())} of {inside.size} hold the truth. G = −I(i; held-out loss), in nats; "
        "undecided: |G| below two standard errors.",
        "label", "points", "certified", "helpful\nG > 0", "of which\nundecided", "harmful\nG ≤ 0",
        "of which\nundecided",
    )  # fmt: skip
    cross = results.label_against_value()
    harmful = np.asarray(results.value.value) <= 0
    rows = [(ix.LABELS[c], label == c, cross[c]) for c in range(3)]
    rows.append(("all", np.ones(label.size, bool), cross.sum(axis=0)))
    for name, here, signs in rows:
        open_ = [int(np.sum(here & (verdict == 2) & (harmful == s))) for s in (False, True)]
        numbers = (here.sum(), (here & certified).sum(), signs[0], open_[0], signs[1], open_[1])
        section.table.add_row(name, *map(str, numbers), end_section=name == ix.LABELS[-1])
    return section


def retraining_table(results: Results) -> Section:
    """Predictions against retraining."""
    r = results.retraining
    m, k = r.changes["actual", "loss"].shape
    section = _table(
        f"3  Predicted against retrained: {k} single removals, {m} held-out digits",
        "Change when the point is erased: loss in nats, margin in log-odds. Slope: of actual "
        "on predicted, 1 is unbiased in size. Retrained to ‖∇J‖ < 1e-10.",
        "measurement", "prediction", "Pearson", "slope", "largest error", "largest change",
    )  # fmt: skip
    for measurement in ("loss", "margin"):
        for method in ("first-order", "newton"):
            a = r.agreement(method, measurement)
            section.table.add_row(
                measurement,
                method,
                f"{a.pearson:.6f}",
                f"{a.slope:.4f}",
                f"{a.largest_error:.1e}",
                f"{a.largest_actual:.1e}",
            )
    return section


def ranking_table(results: Results) -> Section:
    """Flipped labels found by rank."""
    r, flips = results.ranking, int(results.problem.flipped.sum())
    section = _table(
        f"4  How many of the {flips} flipped labels stand first, lowest margin first",
        "Neither order knows which labels were flipped.",
        "order", *(f"among the first {k}" for k in r.first),
    )  # fmt: skip
    section.table.add_row("margin without the point", *map(str, r.by_margin_without))
    section.table.add_row("margin, trained on the point", *map(str, r.by_margin))
    section.table.add_row("random order, expected", *(f"{x:.0f}" for x in r.by_chance))
    return section


def removal_table(results: Results) -> Section:
    """The model before and after harmful points are removed."""
    q = results.qualities
    section = _table(
        "5  Removing the harmful points",
        "Removed where the verdict is harmful: G < 0 beyond two standard errors, on held-out digits "
        "alone. Their own loss flatters the choice; the test digits had no part in it. The last "
        "rows are references, and only the demo knows which labels were flipped.",
        "removed", "points", "held-out\nloss", "held-out\naccuracy", "test\nloss", "test\naccuracy",
    )  # fmt: skip
    names = {
        "before": "nothing",
        "after": "verdict harmful",
        "at random": "as many at random",
        "flipped": "exactly the flipped",
    }
    for key, name in names.items():
        if key == "flipped" and not results.problem.flipped.any():
            continue
        section.table.add_row(
            name,
            str(q[key].removed.size),
            f"{q[key].heldout_loss:.4f}",
            f"{q[key].heldout_accuracy:.1%}",
            f"{q[key].test_loss:.4f}",
            f"{q[key].test_accuracy:.1%}",
            end_section=key == "after",
        )
    return section


def conclusion(results: Results) -> str:
    """What the last table allows one to say, and what it does not."""
    before, after = results.qualities["before"], results.qualities["after"]
    if not after.removed.size:
        return "No point is harmful beyond two standard errors: nothing was removed."
    change, error = after.loss_change(before)
    gained = int((after.test_correct & ~before.test_correct).sum())
    lost = int((before.test_correct & ~after.test_correct).sum())
    hits = int(results.problem.flipped[after.removed].sum())
    clear = "beyond" if abs(change) > 2 * error else "within"
    return (
        f"Of the {after.removed.size} points removed, {hits} had a flipped label. Test loss "
        f"{change:+.3g} ± {error:.2g} (paired standard error), {clear} two standard errors. "
        f"Test digits newly right {gained}, newly wrong {lost}: "
        + (
            "too few to call a change of accuracy."
            if abs(gained - lost) <= 2 * np.sqrt(gained + lost)
            else "a change of accuracy beyond chance."
        )
    )
