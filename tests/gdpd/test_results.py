"""The results table: rows survive a killed process, read back exactly, and trials are chosen on validation alone."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpd.experiments.results import DATABASE, TABLE, ResultsTable, choose, read_results, result_records
from gdpd.training.atomic import write_json
from made_results import made_result

ROWS = [
    made_result(),
    made_result(method="base", peak_memory=None, roc_auc=None, selected_epoch=None),
    made_result(earliness=0.1 + 0.2, options={"loss_ratio": 0.1, "alpha": "per, sample\n"}, auc_prc=1 / 3),
]


def test_rows_read_back_exactly_from_both_files(tmp_path):
    with ResultsTable(tmp_path) as table:
        for row in ROWS:
            table.add(row)
        expected = sorted(ROWS, key=lambda row: row.key)
        assert table.results() == expected
        assert read_results(tmp_path) == expected  # while it is open
        table.export()
    (tmp_path / DATABASE).unlink()
    assert read_results(tmp_path) == expected


def test_a_database_is_made_anew_from_the_committed_table_and_goes_on(tmp_path):
    with ResultsTable(tmp_path) as table:
        table.add(ROWS[0])
        first = table.export().read_bytes()
    (tmp_path / DATABASE).unlink()
    with ResultsTable(tmp_path) as table:
        assert table.results() == ROWS[:1]
        assert table.export().read_bytes() == first
        table.add(ROWS[1])
        assert len(table.results()) == 2


def test_a_key_is_held_once(tmp_path):
    with ResultsTable(tmp_path) as table:
        table.add(ROWS[0])
        with pytest.raises(ValueError, match="already"):
            table.add(dataclasses.replace(ROWS[0], auc_prc=1.0))
        assert table.results() == ROWS[:1]


def test_a_process_that_is_killed_loses_no_row(tmp_path):
    text = (
        "import os\nfrom pathlib import Path\nfrom made_results import made_result\n"
        "from gdpd.experiments.results import ResultsTable\n"
        f"table = ResultsTable(Path({str(tmp_path)!r}))\n"
        "table.add(made_result())\ntable._insert(made_result(seed=2))\nos._exit(9)\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(os.path.dirname(here))])
    ended = subprocess.run([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert ended.returncode == 9
    assert read_results(tmp_path) == [made_result()]  # the second was never committed


@pytest.mark.parametrize(
    ("score", "best"), [("auc_prc", 0.1), ("accuracy", 1.0), ("ce", 10.0)]
)  # each trial is the best by one score, the first of all by its test score
def test_trials_are_chosen_by_the_validation_score_alone(score, best):
    trials = [
        made_result(options={"loss_ratio": 0.1}, val_auc_prc=90.0, val_accuracy=0.5, val_ce=0.5),
        made_result(options={"loss_ratio": 1.0}, val_auc_prc=80.0, val_accuracy=0.9, val_ce=0.6),
        made_result(options={"loss_ratio": 10.0}, val_auc_prc=70.0, val_accuracy=0.5, val_ce=0.1),
        made_result(options={"loss_ratio": 3.0}, val_auc_prc=80.0, val_accuracy=0.5, val_ce=0.9, auc_prc=100.0),
    ]
    (chosen,) = choose(trials, score)
    assert chosen.options == {"loss_ratio": best}


def test_equal_trials_go_to_the_lower_cross_entropy():
    trials = [made_result(options={"loss_ratio": r}, val_ce=ce) for r, ce in ((1.0, 0.5), (2.0, 0.4), (3.0, 0.6))]
    assert [row.options for row in choose(trials)] == [{"loss_ratio": 2.0}]
    with pytest.raises(ValueError, match="search_score='test'"):
        choose(trials, "test")


def test_records_say_what_the_table_says(tmp_path):
    write_json(tmp_path / "grid.json", {"options": {"epochs": 7, "loss_ratio": 1.0}, "search_score": "ce"})
    with ResultsTable(tmp_path) as table:
        table.add(made_result(method="gdpd-paper", options={"loss_ratio": 10.0}, val_ce=0.1))
        table.add(made_result(method="gdpd-paper", options={}, val_ce=0.2))
    (record,) = result_records(tmp_path)
    assert (record.dataset, record.earliness, record.method, record.seed) == ("GunPoint", 0.2, "gdpd-paper", 1)
    assert record.config["epochs"] == 7
    assert record.config["loss_ratio"] == 10.0
    assert record.metrics["auc_prc"] == 81.25
    assert record.metrics["validation"] == {"ce": 0.1, "accuracy": 0.75, "auc_prc": 79.0}
    assert record.teacher["auc_prc"] == 95.0


@pytest.mark.parametrize(("name", "content"), [(DATABASE, b"no database at all" * 99), (TABLE, b"a,b\n1,2\n")])
def test_a_file_that_is_no_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for call in (lambda: ResultsTable(tmp_path), lambda: read_results(tmp_path)):
        with pytest.raises(ValueError, match=name):
            call()


def test_a_damaged_row_is_refused_and_no_table_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="gdpd grid"):
        read_results(tmp_path)
    with ResultsTable(tmp_path) as table:
        table.add(ROWS[0])
        path = table.export()
    with path.open(newline="") as file:
        header, row = csv.reader(file)
    row[header.index("seed")] = "one"
    path.write_text(",".join(header) + "\n" + ",".join(f'"{value}"' for value in row).replace('{"', '{""') + "\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives_the_csv_file(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("table")
    with ResultsTable(folder) as table:
        table.add(made_result(auc_prc=value))
        table.export()
    (folder / DATABASE).unlink()
    assert read_results(folder)[0].auc_prc == value
