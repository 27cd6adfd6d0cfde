"""The results page says what the committed tables say, and its tables what any table says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gdpd_variants
from bench import results as page
from gdpd.experiments import Result, ResultsTable, result_records
from gdpd.experiments.comparison import compare
from gdpd.training.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_committed_tables_give():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    made = page.all_tables()
    assert set(re.findall(r"<!-- begin (\w+) -->", text)) == set(made)
    for name in made:
        written = text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
        assert written.strip() == made[name], f"{name}: run `python -m bench.results`"


SCORES = {"base": 60.0, "kd": 70.0, "gdpd": 75.0}


def result(dataset: str, earliness: float, method: str, seed: int, **changes: object) -> Result:
    place = int(dataset[-1])
    values = {
        "dataset": dataset, "earliness": earliness, "method": method, "seed": seed, "options": {},
        "auc_prc": SCORES[method] + place + seed, "accuracy": 0.8, "roc_auc": 0.9, "calibration_error": 0.1,
        "fidelity": 0.7, "kl": 0.2, "val_ce": 0.5, "val_accuracy": 0.7, "val_auc_prc": 70.0, "selected_epoch": 1,
        "teacher_auc_prc": 95.0, "teacher_accuracy": 0.9, "teacher_val_ce": 0.1, "teacher_val_auc_prc": 95.0,
        "teacher_p_chance": 0.01, "parameters": 10, "n_train": 30 + place**2, "n_validation": 8, "n_test": 50,
        "seconds": 1.0, "seconds_per_epoch": 0.1, "cpu_seconds": 1.0, "peak_memory": None, "parts": {},
        "teacher_sha256": "a", "student_sha256": "b", "software": "none",
    }  # fmt: skip
    return Result(**{**values, **changes})


@pytest.fixture
def grid(tmp_path):
    """Six data sets, two seeds; GDPD's gain over Base-KD grows with the training set; one job is missing."""
    file = tmp_path / "grid.yaml"
    names = [f"Set{place}" for place in range(6)]
    file.write_text(f"datasets: [{', '.join(names)}]\nearliness: [0.2]\nseeds: [1, 2]\nmethods: [base, kd, gdpd]\n")
    write_json(tmp_path / "grid" / "grid.json", {"options": {}, "search_score": "auc_prc"})
    with ResultsTable(tmp_path / "grid") as table:
        for name in names:
            for seed in (1, 2):
                for method in SCORES:
                    row = result(name, 0.2, method, seed)
                    if method == "gdpd":
                        place = int(name[-1])
                        learned = 1 - place / 10 if place < 5 else 2.0
                        parts = {"warmup.noise": learned, "warmup.autoencoder": 0.01, "main.alpha": 0.9}
                        row = replace(row, auc_prc=row.auc_prc + place, parts=parts)
                    if (name, method, seed) != ("Set5", "gdpd", 2):
                        table.add(row)
    return file


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, below its header."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_tables_say_what_ran_how_methods_stand_and_what_goes_with_a_gain(grid):
    made = {name: table(text) for name, text in page.tables(grid, grid.with_suffix("")).items()}
    assert made["progress"] == [["1", "20%", *["6/6"] * 3], ["2", "20%", "6/6", "6/6", "5/6"]]
    base, kd, gdpd = made["standings"]
    seeds = (5 * 1.5 + 1) / 6  # the mean over the seeds that all methods have
    assert gdpd[2:] == ["GDPD", f"**{seeds + 75 + 2 * 2.5:.2f}**", "1.00", "6", "73.83"]
    assert base[2:6] == ["Base", f"{seeds + 60 + 2.5:.2f}", "3.00", "0"]
    assert kd[2] == "Base-KD"
    base, kd = made["pairs"]
    assert (base[1], base[2], base[4]) == ("Base", "+17.50", "6–0–0")
    assert (kd[1], kd[2], kd[4]) == ("Base-KD", "+7.50", "6–0–0")
    assert [row[:2] for row in made["runs"]] == [["Base", "11"], ["Base-KD", "11"]]
    assert made["cells"][-1][:3] == ["Set5", "20%", "1"]
    assert made["teachers"][3] == ["Set3", "39", "8", "95.0", "95.0", "0 of 2", "64.5", "0 of 6"]
    assert made["prior"][0] == ["Set4", "0.60", "0.0100", "0.90", "+19.0", "+9.0"]
    assert [row[0] for row in made["prior"]] == ["Set4", "Set3", "Set2", "Set1", "Set0", "Set5"]
    assert made["by_teacher"] == [
        ["Base", "above Base", "11", "+17.00", "11–0–0"],
        ["Base-KD", "above Base", "11", "+7.00", "11–0–0"],
    ]
    told = {row[1]: row[2:4] for row in made["reasons"]}
    assert made["reasons"][0][0] == "Base"
    assert told["training series"] == ["6", "+1.00"]


def test_the_search_is_told_by_validation_scores_over_the_cells_that_all_trials_have(tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(
        "datasets: [Set1, Set2, Set3]\nearliness: [0.4]\nseeds: [1]\n"
        "methods: {kd: {search: {loss_ratio: [0.1, 1, 10]}}, fits: {search: {loss_ratio: [0.1, 1, 10]}}}\n"
    )
    scores = {0.1: (80.0, 0.5), 1.0: (90.0, 0.7), 10.0: (90.0, 0.4)}  # a tie, which the cross-entropy decides
    with ResultsTable(tmp_path / "search") as rows:
        for name in ("Set1", "Set2"):
            for ratio, (auc_prc, ce) in scores.items():
                options = {} if ratio == 1 else {"loss_ratio": ratio}
                row = result(name, 0.4, "kd", 1, options=options, val_auc_prc=auc_prc + int(name[-1]), val_ce=ce)
                rows.add(replace(row, auc_prc=100.0 if ratio == 0.1 else 0.0))  # test scores say otherwise
        rows.add(result("Set3", 0.4, "kd", 1, val_auc_prc=0.0))  # a cell without its other trials
    assert table(page.search(file)) == [
        ["Base-KD", "loss_ratio = 0.1", "2", "81.50", "0.500"],
        ["", "loss_ratio = 1", "2", "91.50", "0.700"],
        ["", "**loss_ratio = 10**", "2", "91.50", "0.400"],
    ]


def test_variants_of_a_method_have_tables_of_their_own(grid):
    told = grid.read_text().replace("[base, kd, gdpd]", "{base: {}, kd: {}, gdpd: {}, gdpd-x: {method: gdpd}}")
    grid.write_text(told)
    before = page.tables(grid, grid.with_suffix(""))
    assert before["variants"] == "No variant has run."
    with ResultsTable(grid.with_suffix("")) as rows:
        for row in rows.results():
            if row.method == "gdpd":
                rows.add(replace(row, method="gdpd-x", options={"method": "gdpd"}, auc_prc=row.auc_prc + 1))
    made = page.tables(grid, grid.with_suffix(""))
    assert made["standings"] == before["standings"]
    pairs, covered, standings, titled, priors = made["variants"].split("\n\n")
    (row,) = table(pairs)
    means = [float(cell) for cell in row[3:5]]
    assert row[:3] == ["`gdpd-x`", "20%", "11"]
    assert means[0] - means[1] == pytest.approx(1.0)
    assert (row[5], row[7], row[8]) == ("-1.00", "0–0–6", "0.031")
    assert covered == "All of them together, 6 of 6 cells, 11 runs of each method:"
    assert [row[2] for row in table(standings)] == ["Base", "Base-KD", "GDPD", "gdpd-x"]
    assert titled == "The prior of `gdpd-x`:"
    assert table(priors)[0][0] == "Set4"
    assert table(priors)[0][-1] == "+1.0"  # over GDPD


def test_two_protocols_are_told_side_by_side_on_what_both_have(grid):
    ours = result_records(grid.with_suffix(""))
    theirs = [
        replace(run, metrics={**run.metrics, "auc_prc": run.metrics["auc_prc"] - (20 if run.method == "gdpd" else 0)})
        for run in ours
        if run.dataset != "Set0"
    ]
    base, kd, gdpd = [[cell.strip() for cell in row] for row in page.protocols(ours, theirs)[1:]]
    assert base[:4] == ["20%", "5", "9", "Base"]
    assert kd[3:6] == ["Base-KD", kd[4], f"**{kd[4]}**"]
    assert float(gdpd[4].strip("*")) - float(gdpd[5]) == pytest.approx(20)
    assert gdpd[6] == "73.83"
    assert page.protocols(ours, []) == page.protocols([], theirs) == [page.protocols(ours, theirs)[0]]


def test_what_has_not_begun_is_one_row(grid):
    grid.write_text(grid.read_text().replace("earliness: [0.2]", "earliness: [0.4, 0.2, 0.8]"))
    made = table(page.tables(grid, grid.with_suffix(""))["progress"])
    assert [row[:3] for row in made] == [["1", "20%", "6/6"], ["2", "20%", "6/6"], ["the rest", "", "0/24"]]


def test_a_method_that_has_just_begun_has_tables_of_its_own(grid):
    before = page.tables(grid, grid.with_suffix(""))
    assert before["late"] == "All methods are in the tables above."
    with ResultsTable(grid.with_suffix("")) as rows:
        rows.add(replace(result("Set3", 0.2, "kd", 1), method="fits", auc_prc=99.0))
    made = page.tables(grid, grid.with_suffix(""))
    for name in ("standings", "pairs", "cells"):
        assert made[name] == before[name]
    assert made["late"].startswith("Fits, 1 of 6 cells, 1 runs of each method:")
    assert "**99.00**" in made["late"]
    with ResultsTable(grid.with_suffix("")) as rows:
        rows.add(replace(result("Set9", 0.2, "kd", 1), method="gendd"))
    made = page.tables(grid, grid.with_suffix(""))
    assert made["late"].startswith("Fits, 1 of 6 cells")
    assert made["late"].endswith("GenDD: no cell yet that all methods have.")


def test_tables_go_between_the_markers_of_the_page(grid, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "page.md"
    names = page.tables(grid, grid.with_suffix(""))  # of a grid that is not the page's: without its search
    copy.write_text("".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in names))
    monkeypatch.setattr("sys.argv", ["results", str(grid), "--page", str(copy)])
    page.main()
    assert "old" not in copy.read_text()
    assert "| GDPD |" in copy.read_text()
    assert str(copy) in capsys.readouterr().out


def test_the_table_of_gdpd_s_variants_is_that_of_their_committed_runs():
    text = gdpd_variants.PAGE.read_text(encoding="utf-8")
    written = text.split(f"<!-- begin {gdpd_variants.MARKER} -->")[1].split("<!-- end")[0]
    assert written.strip() == gdpd_variants.table(gdpd_variants.GRID), "run `python -m bench.gdpd_variants`"


def test_a_variant_is_told_by_its_gain_over_gdpd_and_its_time(grid):
    runs = [
        replace(run, metrics={**run.metrics, "cpu_seconds": 3.0}) if run.method == "kd" else run
        for run in result_records(grid.with_suffix(""))
    ]
    found = compare(runs)
    header, base, kd, gdpd = gdpd_variants.rows(found, ["base", "kd", "gdpd"])
    assert header[1:8] == (*(f"Set{place}" for place in range(6)), "mean")
    assert base[8] == "-17.5"
    assert (kd[0], kd[10], base[10]) == ("Base-KD", "3.00", "1.00")
    assert (gdpd[0], gdpd[8], gdpd[9]) == ("GDPD", "", "")
    assert float(gdpd[7]) - float(base[7]) == pytest.approx(17.5, abs=0.11)
    assert gdpd_variants.spread(found) == pytest.approx(0.5**0.5)  # a set with one seed has none
