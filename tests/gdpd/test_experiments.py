"""Tables and the demo: what finished runs left, in rows by data set, earliness and method."""

from __future__ import annotations

import io
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gdpd.experiments import find_runs, paired_differences, read_run, summarise
from gdpd.experiments.demo import SEEDS, demo_grid, run_demo
from gdpd.experiments.summary import Spread, best_methods, table
from gdpd.methods import method_order
from made_grids import made_training
from made_runs import make_grid, make_run

__all__ = ["made_training"]  # a fixture


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
    assert "GunPoint, 20 % read, gdpd, seed 1" in text
    assert "One seed." in text
    assert (tmp_path / "demo" / "report.html").is_file()
    assert len(made_training.runs) == 12
    assert run_demo(tmp_path / "demo", seeds=1, workers=0, threads=1, console=console)
    assert len(made_training.runs) == 12


def test_a_demo_with_failed_runs_says_so(tmp_path, made_training):
    made_training.broken.add("base")
    made_training.broken.add("kd")
    made_training.broken.add("gdpd")
    console = Console(width=100, record=True, file=io.StringIO())
    assert not run_demo(tmp_path, seeds=1, workers=0, threads=1, console=console)
    assert "ValueError: no such luck" in console.export_text()
    assert list((tmp_path / "runs").rglob("metrics.json")) == []
