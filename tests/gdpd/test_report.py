"""The report: one page that stands alone, says what the runs say, and never clashes with itself."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from gdpd.experiments import find_runs
from gdpd.report import build_report, gather, svg
from made_runs import make_grid, make_run
from page import Page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = make_grid(tmp_path_factory.mktemp("runs"))
    return Page(build_report([root], root / "report.html").read_text())


def test_the_page_needs_nothing_from_outside(page):
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    text = "".join(page.text)
    assert "url(http" not in text
    assert "@import" not in text


def test_ids_are_unique_and_references_resolve(page):
    assert len(page.ids) == len(set(page.ids))
    missing = {link[1:] for link in page.links if link.startswith("#")} - set(page.ids)
    assert not missing


def test_one_page_shows_every_chart(page):
    # per dataset: one over earliness; per earliness: path, training curves, alpha, losses; and the differences
    assert page.tags.count("svg") == 2 * (1 + 2 * 4) + 1
    text = " ".join(page.text)
    assert "AUC-PRC over earliness" in text
    for heading in ("First 20 % read", "From z_short to z_hat", "Training curves", "alpha over time", "GDPD's losses"):
        assert heading in text


def test_colours_follow_light_and_dark(page):
    css = next(text for text in page.text if "prefers-color-scheme" in text)
    for variable in svg._VARIABLES.values():
        assert css.count(f"{variable}:") == 2, variable


def test_scores_and_settings_stand_in_the_page(page):
    text = " ".join(" ".join(page.text).split())
    assert "ItalyPowerDemand, first 20 % read" in text
    assert "68.0 ± 1.0" in text.replace(" ±", " ±")
    assert "against Base: higher in 12 of 12 pairs, +6.0 points on average" in text
    assert "epochs 40" in text  # a setting that differs from its default


def test_a_name_cannot_break_out_of_the_page(tmp_path):
    folder = make_run(tmp_path, dataset="<b>&x")
    text = build_report([folder], tmp_path / "r.html", title="<script>alert(1)</script>").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    Page(text)


@pytest.mark.parametrize("method", ["base", "gdpd"])
def test_a_single_run_makes_a_page(tmp_path, method):
    folder = make_run(tmp_path, method=method)
    page = Page(build_report([folder], folder / "report.html").read_text())
    assert page.tags.count("svg") == (2 if method == "base" else 5)
    assert "What GDPD gains" not in " ".join(page.text)


def test_a_run_without_history_or_trajectory_still_makes_a_page(tmp_path):
    folder = make_run(tmp_path)
    for name in ("history.jsonl", "trajectory.npz", "versions.json"):
        (folder / name).unlink()
    page = Page(build_report([folder], folder / "report.html").read_text())
    assert page.tags.count("svg") == 1


def test_nothing_is_left_when_the_page_cannot_be_written(tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    from gdpd.training import atomic

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="disk is full"):
        build_report([folder], folder / "report.html")
    assert not list(folder.glob("*report*"))
    assert not list(folder.glob(".*"))


def test_no_run_found_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        build_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        build_report([tmp_path / "absent"], tmp_path / "r.html")


def test_alpha_bands_are_nested_and_outermost_first(tmp_path):
    runs = find_runs([make_run(tmp_path, seed=1), make_run(tmp_path, seed=2)])
    epochs, mean, bands = gather.alpha_history(runs)
    assert epochs[0] == 21  # counted from 1; alpha starts when the warm-up has ended
    assert len(bands) == 2
    (outer_low, outer_high), (low, high) = bands
    assert np.all(outer_low <= low)
    assert np.all(low <= mean)
    assert np.all(mean <= high)
    assert np.all(high <= outer_high)


def test_curves_of_seeds_that_stopped_at_different_epochs_are_padded(tmp_path):
    runs = find_runs([make_run(tmp_path, method="base", epochs=n, seed=n) for n in (5, 8)])
    [curve] = gather.validation_curves(runs, "auc_prc")
    assert curve.values.shape == (2, 8)
    assert np.isnan(curve.values[0, 5:]).all()


def test_paths_take_turns_between_classes(tmp_path):
    [run] = find_runs([make_run(tmp_path)])
    found = gather.trajectory(run, most_paths=4)
    assert found.z_short.shape[0] == 4
    assert sorted(found.path_labels) == [0, 0, 1, 1]


def test_the_same_runs_make_the_same_page(tmp_path):
    folder = make_run(tmp_path)
    first = build_report([folder], tmp_path / "a.html").read_text()
    assert build_report([folder], tmp_path / "b.html").read_text() == first


def test_null_scores_in_the_history_are_gaps(tmp_path):
    folder = make_run(tmp_path)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    lines[3]["val"]["auc_prc"] = None
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = build_report([folder], tmp_path / "r.html").read_text()
    assert not re.search(r"\bnan\b", text)
