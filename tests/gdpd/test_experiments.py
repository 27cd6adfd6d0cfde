"""Grids of runs: paired by seed, resumable, a failed run stops nothing, and tables say what the folders say."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gdpd.training
from gdpd.config import RunConfig
from gdpd.experiments import Grid, find_runs, paired_differences, read_run, run_grid, run_name, summarise
from gdpd.experiments.demo import SEEDS, demo_grid, run_demo
from gdpd.experiments.summary import Spread, best_methods, table
from gdpd.methods import method_order
from made_runs import make_grid, make_run

GRID = Grid(("GunPoint", "ItalyPowerDemand"), (0.2, 0.5), ("base", "gdpd"), (1, 2), {"epochs": 3})


@pytest.fixture
def made_training(monkeypatch):
    """Stands in for training within this process; the list holds the names of the runs carried out."""
    carried_out = []

    def run(config, folder, *, resume=False, progress=None):
        assert resume
        carried_out.append(folder.name)
        if config.method == "gdpd" and config.seed == 666:
            raise ValueError("no such luck")
        shutil.rmtree(folder, ignore_errors=True)
        assert make_run(folder.parent, **config.to_dict()) == folder
        return {}

    monkeypatch.setattr(gdpd.training, "run", run)
    return carried_out


def test_a_grid_is_every_combination_with_one_teacher_per_dataset_and_seed(tmp_path):
    runs = GRID.runs(tmp_path)
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 2 * 2
    assert {run.teacher for run in runs} == {(d, s) for d in GRID.datasets for s in GRID.seeds}
    assert {run.config.teacher_dir for run in runs} == {str(tmp_path / "teachers")}
    assert all(run.config.epochs == 3 for run in runs)


def test_options_of_one_dataset_win_over_common_ones(tmp_path):
    grid = Grid(("A", "B"), (0.5,), ("base",), (1,), {"epochs": 3}, {"B": {"epochs": 4}})
    assert [run.config.epochs for run in grid.runs(tmp_path)] == [3, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seeds": ()}, "seeds is empty"), ({"earliness": (0.2, 0.2)}, "twice")],
)
def test_an_empty_or_doubled_axis_is_refused(changes, words):
    axes = {"datasets": ("A",), "earliness": (0.5,), "methods": ("base",), "seeds": (1,), **changes}
    with pytest.raises(ValueError, match=words):
        Grid(**axes)


def test_a_bad_option_is_found_before_any_run(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        Grid(("A",), (0.5,), ("base",), (1,), {"epoch": 3}).runs(tmp_path)


def test_run_names_of_paths_are_the_dataset_alone():
    assert run_name(RunConfig(dataset="some/where/Wafer", earliness=0.25)) == "Wafer-e0.25-gdpd-s1"


def test_a_grid_goes_on_where_it_stopped(tmp_path, made_training):
    runs = GRID.runs(tmp_path)
    run_grid(runs[:5], tmp_path, workers=0)
    made_training.clear()
    outcomes = run_grid(runs, tmp_path, workers=0)
    assert made_training == [run.name for run in runs[5:]]
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 5 + ["done"] * 11
    assert [outcome.run for outcome in outcomes] == runs


def test_a_failed_run_stops_no_other_and_keeps_its_reason(tmp_path, made_training):
    grid = Grid(("A",), (0.5,), ("base", "gdpd", "kd"), (666,), {"epochs": 3})
    heard = []
    outcomes = run_grid(grid.runs(tmp_path), tmp_path, workers=0, on_outcome=heard.append)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].reason == "ValueError: no such luck"
    assert heard == outcomes


def test_a_finished_run_with_other_options_is_not_taken_for_ours(tmp_path, made_training):
    run_grid(GRID.runs(tmp_path), tmp_path, workers=0)
    other = Grid(GRID.datasets, GRID.earliness, GRID.methods, GRID.seeds, {"epochs": 5})
    with pytest.raises(ValueError, match="epochs is 3 there and 5 now"):
        run_grid(other.runs(tmp_path), tmp_path, workers=0)


@pytest.mark.parametrize("bad", [{"workers": -1}, {"threads": 0}])
def test_worker_and_thread_counts_are_checked(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run_grid(GRID.runs(tmp_path), tmp_path, **bad)


def test_worker_processes_train_with_pinned_threads_and_share_teachers(tmp_path):
    options = {"hidden": 4, "layers": 1}
    grid = Grid(
        ("ItalyPowerDemand",), (0.5,), ("base", "gdpd"), (1,),
        {
            "epochs": 2, "teacher_epochs": 2, "teacher_retries": 0, "teacher_model": "lstm", "student_model": "lstm",
            "teacher_options": options, "student_options": options, "resample_to": None,
        },
    )  # fmt: skip
    before = os.environ.get("OMP_NUM_THREADS")
    outcomes = run_grid(grid.runs(tmp_path), tmp_path, workers=2, threads=1)
    assert [outcome.status for outcome in outcomes] == ["done", "done"], outcomes
    assert os.environ.get("OMP_NUM_THREADS") == before
    records = [read_run(outcome.folder) for outcome in outcomes]
    assert {record.versions["threads"] for record in records} == {1}
    assert len({(record.folder / "teacher.safetensors").read_bytes() for record in records}) == 1
    again = run_grid(grid.runs(tmp_path), tmp_path, workers=2)
    assert [outcome.status for outcome in again] == ["skipped", "skipped"]


def _die(config, folder):
    os._exit(9)


def test_a_worker_that_dies_fails_its_runs_and_ends(tmp_path, monkeypatch):
    from gdpd.experiments import runner

    monkeypatch.setattr(runner, "_carry_out", _die)
    grid = Grid(("A",), (0.5,), ("base", "kd"), (1,))
    outcomes = run_grid(grid.runs(tmp_path), tmp_path, workers=1)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert "worker died" in outcomes[0].reason
    assert "not started" in outcomes[1].reason


def test_rows_are_means_over_seeds_and_teachers_count_once(tmp_path):
    rows = {(r.dataset, r.earliness, r.method): r for r in summarise(find_runs([make_grid(tmp_path)]))}
    row = rows["GunPoint", 0.2, "gdpd"]
    assert row.seeds == (1, 2, 3)
    assert row.auc_prc.values == pytest.approx((73, 74, 75))
    assert (row.auc_prc.mean, row.auc_prc.std) == pytest.approx((74, 1))
    assert row.accuracy.mean == pytest.approx(69)
    assert row.fidelity.mean == pytest.approx(64)
    assert row.seconds.mean == pytest.approx(5)
    teacher = rows["GunPoint", 1.0, "teacher"]
    assert teacher.seeds == (1, 2, 3)
    assert teacher.fidelity is None


def test_differences_are_paired_by_seed(tmp_path):
    make_grid(tmp_path)
    shutil.rmtree(tmp_path / "GunPoint-e0.2-base-s2")
    found = {(d.dataset, d.earliness, d.baseline): d for d in paired_differences(summarise(find_runs([tmp_path])))}
    assert found["GunPoint", 0.2, "base"].seeds == (1, 3)
    assert found["GunPoint", 0.2, "kd"].seeds == (1, 2, 3)
    assert found["GunPoint", 0.2, "kd"].points.values == pytest.approx((2, 2, 2))


def test_differences_without_a_common_seed_are_none(tmp_path):
    make_run(tmp_path, method="base", seed=1)
    make_run(tmp_path, method="gdpd", seed=2)
    assert paired_differences(summarise(find_runs([tmp_path]))) == []


def test_only_a_block_of_several_students_has_a_best(tmp_path):
    make_run(tmp_path, earliness=0.5)
    make_run(tmp_path, earliness=0.2)
    make_run(tmp_path, earliness=0.2, method="base")
    assert best_methods(summarise(find_runs([tmp_path]))) == {("GunPoint", 0.2, "gdpd")}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_spread_shows_a_deviation_only_for_several_seeds(values):
    spread = Spread.of(values)
    assert min(values) - 1e-6 <= spread.mean <= max(values) + 1e-6
    assert (spread.std is None) == (len(values) == 1)
    assert ("±" in str(spread)) == (len(values) > 1)


def test_methods_stand_in_the_order_of_the_paper():
    names = ["own", "gdpd", "fits", "kd", "base", "teacher"]
    assert sorted(names, key=method_order) == ["teacher", "base", "kd", "fits", "gdpd", "own"]


def test_the_table_fits_a_terminal_of_eighty_columns(tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(summarise(find_runs([make_grid(tmp_path)])), title="Title"))
    text = console.export_text()
    assert "…" not in text
    for word in ("Title", "ItalyPowerDemand", "20 %", "Base-KD", "74.0 ± 1.0", "3 seeds", "Teacher"):
        assert word in text


def test_a_run_without_scores_is_refused(tmp_path):
    folder = make_run(tmp_path)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="no auc_prc"):
        summarise(find_runs([tmp_path]))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_names_itself(tmp_path, text):
    folder = make_run(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_run(folder)


def test_an_unfinished_run_is_told_how_to_go_on(tmp_path):
    folder = make_run(tmp_path)
    (folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="--resume"):
        read_run(folder)


def test_the_demo_is_what_the_readme_says():
    grid = demo_grid(3)
    assert (grid.datasets, grid.earliness) == (("GunPoint", "ItalyPowerDemand"), (0.2, 0.5))
    assert grid.methods == ("base", "kd", "gdpd")
    assert grid.seeds == SEEDS[:3]
    with pytest.raises(ValueError, match="seeds=6"):
        demo_grid(6)


def test_the_demo_prints_its_table_and_writes_its_report(tmp_path, made_training):
    console = Console(width=100, record=True, file=io.StringIO())
    assert run_demo(tmp_path / "demo", seeds=1, workers=0, threads=1, console=console)
    text = console.export_text()
    assert "GunPoint, 20 % read, GDPD, seed 1" in text
    assert "One seed." in text
    assert (tmp_path / "demo" / "report.html").is_file()
    assert len(made_training) == 12


def test_a_demo_with_failed_runs_says_so(tmp_path, monkeypatch):
    def run(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(gdpd.training, "run", run)
    console = Console(width=100, record=True, file=io.StringIO())
    assert not run_demo(tmp_path, seeds=1, workers=0, threads=1, console=console)
    assert "ValueError: broken" in console.export_text()
    assert json.dumps(sorted(tmp_path.iterdir()), default=str) == "[]"
