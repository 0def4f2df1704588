"""The demo: facts of a smaller problem against scikit-learn, its files, and the command line."""

import csv
import functools
import io
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import influx as ix
from influx import _extras, cli
from influx._demo import compute, files, problem, report, words
from influx._demo.app import app

SIZES = {"train": 300, "heldout": 60, "test": 60}


@pytest.fixture(scope="module")
def stages():
    return []


@pytest.fixture(scope="module")
def results(stages):
    return compute.run(problem.Config(seed=3, retrain=8, **SIZES), stages.append)


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "new" / "folder"
    files.write(results, path)
    return path


def probabilities(results, x, without=None):
    """scikit-learn's minimiser of the same J, with or without a point; l2 on biases included."""
    data, labels = (np.asarray(part) for part in results.problem.risk.data)
    keep = np.arange(len(labels)) != (-1 if without is None else without)
    ones = lambda a: np.column_stack([a, np.ones(len(a))])
    C = 1 / (results.config.l2 * len(labels))
    oracle = LogisticRegression(C=C, fit_intercept=False, tol=1e-12, max_iter=5000)
    oracle.fit(ones(data[keep]), labels[keep])
    assert (oracle.classes_ == np.arange(10)).all()
    return oracle.predict_proba(ones(np.asarray(x)))


def test_stages_are_announced_in_order(results, stages):
    assert tuple(stages) == compute.STAGES


def test_flips_are_of_the_share_asked_for(results):
    p = results.problem
    assert p.flipped.sum() == 30
    assert set(np.unique(p.given)) <= set(range(10))
    assert (p.given[~p.flipped] == p.true[~p.flipped]).all()
    assert len(p.heldout[1]) == len(p.test[1]) == 60


def test_parts_share_no_digit(results):
    p = results.problem
    rows = np.concatenate([np.asarray(part[0]) for part in (p.risk.data, p.heldout, p.test)])
    assert len(np.unique(rows, axis=0)) == len(rows) == 420


def test_labels_are_a_partition(results):
    m = results.memorization
    assert np.bincount(np.asarray(m.label), minlength=3).sum() == 300
    expected = np.where(m.margin <= 0, 2, np.where(m.margin_without <= 0, 1, 0))
    np.testing.assert_array_equal(m.label, expected)
    cross = results.label_against_value()
    np.testing.assert_array_equal(cross.sum(axis=1), np.bincount(expected, minlength=3))
    assert cross[:, 1].sum() == int((np.asarray(results.value.value) <= 0).sum())


def test_retraining_is_that_of_scikit_learn(results):
    r, (x, y) = results.retraining, results.problem.heldout
    rows = np.arange(len(y)), np.asarray(y)
    before = probabilities(results, x)[rows]
    for k, i in enumerate(r.points[:3]):
        after = probabilities(results, x, without=i)[rows]
        logit = lambda p: np.log(p) - np.log1p(-p)
        np.testing.assert_allclose(
            r.changes["actual", "loss"][:, k], np.log(before) - np.log(after), atol=2e-6
        )
        np.testing.assert_allclose(
            r.changes["actual", "margin"][:, k], logit(after) - logit(before), atol=5e-6
        )
        own = probabilities(results, results.problem.risk.data[0][i][None], without=i)[0]
        expected = logit(own[results.problem.given[i]])
        assert r.margin_without[k] == pytest.approx(expected, abs=1e-5)


def test_a_newton_step_is_nearer_to_retraining_than_first_order(results):
    for measurement in ("loss", "margin"):
        first, newton = (
            results.retraining.agreement(method, measurement)
            for method in ("first-order", "newton")
        )
        assert first.pearson > 0.99
        assert newton.pearson > 0.998
        assert newton.largest_error < first.largest_error < first.largest_actual
        assert abs(newton.slope - 1) < abs(first.slope - 1)


def test_certified_labels_agree_with_retraining(results):
    c, r = results.certificate, results.retraining
    assert results.certificate_contains_retrained().all()
    margin = np.asarray(results.memorization.margin)[r.points]
    truth = np.where(margin <= 0, 2, np.where(r.margin_without <= 0, 1, 0))
    certified = np.asarray(c.certified)[r.points]
    assert certified.any()
    np.testing.assert_array_equal(np.asarray(c.label)[r.points][certified], truth[certified])


def test_suggested_labels_are_those_of_models_that_never_saw_the_point(results):
    np.testing.assert_allclose(results.others.sum(axis=1), 1, rtol=1e-12)
    own = results.others[np.arange(300), results.problem.given]
    margin = np.asarray(results.memorization.margin_without)
    np.testing.assert_allclose(own, 1 / (1 + np.exp(-margin)), rtol=1e-8)
    for i in results.retraining.points[:3]:
        x = results.problem.risk.data[0][i][None]
        np.testing.assert_allclose(results.others[i], probabilities(results, x, i)[0], atol=5e-3)


def test_examples_are_the_extremes_of_all_scores(results):
    e, p = results.examples, results.problem
    truth = np.asarray(p.test[1])[e.indices]
    wrong = e.predicted != truth
    assert wrong[0]
    assert not wrong[-1]
    f = ix.influence(p.risk, p.model)
    scores = np.asarray(f((p.test[0][e.indices], p.test[1][e.indices])))
    k = e.top.lowest.values.shape[1]
    np.testing.assert_allclose(e.top.lowest.values, np.sort(scores, axis=1)[:, :k], rtol=1e-8)
    np.testing.assert_allclose(e.top.highest.values, -np.sort(-scores, axis=1)[:, :k], rtol=1e-8)


def test_flipped_labels_stand_first(results):
    ranking, flipped = results.ranking, results.problem.flipped
    assert ranking.first == (30, 36)
    order = sorted(range(300), key=lambda i: float(results.memorization.margin_without[i]))
    assert ranking.by_margin_without == tuple(sum(flipped[order[:k]]) for k in (30, 36))
    assert ranking.by_chance == pytest.approx((3.0, 3.6))
    assert ranking.by_margin_without[0] > 5 * ranking.by_chance[0]


def test_ranks_end_at_the_last_point():
    margin = np.arange(10.0)
    found = ix.Memorization(margin, margin, margin, margin > 0, margin.astype(int))
    ranking = compute.rank_flipped(found, np.arange(10) < 9)
    assert ranking.first == (9, 10)
    assert ranking.by_margin_without == (9, 9)
    assert ranking.by_chance == pytest.approx((8.1, 9.0))


def test_only_harmful_points_are_removed(results):
    after, before = results.qualities["after"], results.qualities["before"]
    G, error = np.asarray(results.value.value), np.asarray(results.value.standard_error)
    np.testing.assert_array_equal(after.removed, np.flatnonzero(G <= -2 * error))
    assert after.removed.size > 0
    assert after.heldout_loss < before.heldout_loss
    assert results.qualities["at random"].removed.size == after.removed.size
    x, y = results.problem.test
    p = probabilities(results, x)[np.arange(60), np.asarray(y)]
    assert before.test_loss == pytest.approx(-np.log(p).mean(), abs=1e-5)
    change, _ = after.loss_change(before)
    assert change == pytest.approx(after.test_loss - before.test_loss)


def test_the_removal_reads_neither_test_digits_nor_flips(results):
    p = results.problem
    blind = replace(p, test=(p.test[0], (p.test[1] + 1) % 10), true=(p.true + 1) % 10)
    again = compute.remove_and_refit(blind, results.value, results.config)
    np.testing.assert_array_equal(again["after"].removed, results.qualities["after"].removed)
    assert again["after"].heldout_loss == results.qualities["after"].heldout_loss


def test_scores_are_a_row_a_point(results, folder):
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == files.COLUMNS
    assert [int(row["id"]) for row in rows] == list(range(300))
    for i in (0, 17, 299, *np.flatnonzero(results.problem.flipped)[:3]):
        row, m, v = rows[i], results.memorization, results.value
        assert int(row["given label"]) == results.problem.given[i]
        assert int(row["suggested label"]) == results.others[i].argmax()
        assert float(row["margin"]) == pytest.approx(float(m.margin[i]), rel=1e-5)
        assert float(row["margin without"]) == pytest.approx(float(m.margin_without[i]), rel=1e-5)
        assert row["label"] == ix.LABELS[int(m.label[i])]
        assert float(row["value"]) == pytest.approx(float(v.value[i]), rel=1e-5)
        assert float(row["standard error"]) == pytest.approx(float(v.standard_error[i]), rel=1e-5)
        assert row["verdict"] == ix.VERDICTS[int(v.verdict[i])]
        assert row["certified"] == ("yes" if results.certificate.certified[i] else "no")


def test_a_reason_stands_exactly_where_something_is_to_be_seen(results):
    for i in range(300):
        looked_at = (
            results.suggested[i] != results.problem.given[i]
            or int(results.memorization.label[i]) == 1
            or int(results.value.verdict[i]) == 1
        )
        assert bool(files.reason(results, i)) == looked_at


def test_figures_are_pictures(folder):
    assert {path.name for path in folder.iterdir()} == {"scores.csv", *files.FIGURES}
    for name in files.FIGURES:
        pixels = matplotlib.image.imread(folder / name)
        assert min(pixels.shape[:2]) > 500
        assert pixels[..., :3].std() > 0.05
        shades = np.rint(pixels[..., :3] * 255) @ [1, 256, 65536]
        assert np.unique(shades).size > 20


def test_the_report_fits_a_terminal_and_states_its_units(results):
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(results, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "Negative = helpful" in " ".join(text.split())
    for name in ("nats", "log-odds", "generalized upon", "memorized", "not fitted", "newton"):
        assert name in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(46.0, "+46.0"), (-723.4, "−723"), (-2816, "−2.82e+03"), (0.0123456, "+0.0123")],
)
def test_numbers_keep_their_sign_and_three_digits(value, text):
    assert words.signed(value) == text


def flat(output):
    """Words without the box that Rich draws around an error."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", output).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flip", "0.9"], "--flip must be a share of at least 0 and below 0.9; got 0.9"),
        (["--flip", "-0.1"], "--flip must be a share"),
        (["--flip", "nan"], "--flip must be a share"),
        (["--l2", "0"], "--l2 must be between 1e-6 and 1e6; got 0.0"),
        (["--l2", "inf"], "--l2 must be between"),
        (["--l2", "nan"], "--l2 must be between"),
        (["--retrain", "1"], "--retrain must be between 2 and 1500"),
        (["--retrain", "1501"], "--retrain must be between 2 and 1500"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(compute, "run", lambda *_: pytest.fail("work was started"))
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert message in flat(result.output)
    assert "Traceback" not in result.output


def test_sizes_must_fit_the_digits():
    with pytest.raises(ValueError, match="at most 1797"):
        problem.Config(train=1700)


def test_the_whole_command_without_flips(tmp_path, monkeypatch):
    monkeypatch.setattr(problem, "Config", functools.partial(problem.Config, **SIZES))
    options = ["--out", str(tmp_path / "out"), "--flip", "0", "--retrain", "8", "--no-figures"]
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.output
    assert "0 labels flipped" in flat(result.output)
    assert "flipped labels stand first" not in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]


def test_quiet_prints_nothing(results, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "run", lambda config, on_stage: results)
    options = ["--out", str(tmp_path), "--quiet", "--no-figures"]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0
    assert result.output == ""
    assert (tmp_path / "scores.csv").exists()


def test_help_explains_every_option():
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    for option in ("--out", "--flip", "--seed", "--l2", "--retrain", "--no-figures", "--quiet"):
        assert option in result.output


def test_python_m_influx_is_the_same_program():
    command = [sys.executable, "-m", "influx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == CliRunner().invoke(app, ["--version"]).output
    assert re.fullmatch(r"influx \d+\.\d+\.\d+\S*\n", done.stdout)


def test_missing_extras_are_one_line_and_no_traceback(monkeypatch):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == "sklearn" else 1)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value) == "influx needs scikit-learn for this: pip install 'influx[demo]'"
