"""A grid's YAML file and the command `gdpd grid`: read, checked before the first job, failures summed up."""

from __future__ import annotations

import io
import os
import re
import signal

import pytest
import yaml
from rich.console import Console

from gdpd.cli import main
from gdpd.experiments import Grid, grid_command, read_grid, read_results
from gdpd.experiments.preflight import preflight
from gdpd.experiments.progress import LiveProgress
from gdpd.experiments.runner import Outcome, Task
from made_grids import made_training

__all__ = ["made_training"]  # a fixture

FILE = {
    "datasets": ["ItalyPowerDemand", "Coffee"],
    "earliness": [0.2, 1],
    "seeds": [1, 24],
    "methods": {
        "kd": {"search": {"loss_ratio": [0.1, 1, 10]}},
        "gdpd-paper": {"method": "gdpd", "options": {"hinton": False}, "search": {"num_samples": [1, 2, 3]}},
    },
    "options": {"epochs": 4},
    "per_dataset": {"Coffee": {"epochs": 6}},
    "search_score": "ce",
}


def write(path, **changes):
    file = path / "grid.yaml"
    file.write_text(
        yaml.safe_dump({key: value for key, value in {**FILE, **changes}.items() if value is not None}, sort_keys=False)
    )
    return file


def test_a_file_says_what_the_grid_is(tmp_path):
    grid = read_grid(write(tmp_path))
    assert (grid.datasets, grid.earliness, grid.seeds) == (("ItalyPowerDemand", "Coffee"), (0.2, 1.0), (1, 24))
    assert grid.methods == ("kd", "gdpd-paper")
    assert grid.search_score == "ce"
    jobs = grid.jobs()
    assert len(jobs) == 2 * 2 * 2 * 2 * 3
    assert {job.config.epochs for job in jobs if job.key.dataset == "Coffee"} == {6}
    assert {job.config.num_samples for job in jobs if job.label == "gdpd-paper"} == {1, 2, 3}
    assert {job.config.hinton for job in jobs if job.label == "gdpd-paper"} == {False}


def test_methods_may_be_a_list_of_names(tmp_path):
    assert read_grid(write(tmp_path, methods=["base", "kd"])).methods == ("base", "kd")


BAD = [
    ({"dataset": ["A"]}, "unknown key 'dataset' .did you mean 'datasets'"),
    ({"seeds": None}, "seeds is missing"),
    ({"seeds": 1}, "seeds=1 is not a list of int"),
    ({"seeds": [True]}, "is not a list of int"),
    ({"earliness": ["half"]}, "is not a list of int or float"),
    ({"earliness": [1.5]}, "earliness=1.5 is outside"),
    ({"methods": ["gdp"]}, "method='gdp' is not known .did you mean 'gdpd'"),
    ({"methods": {"kd": {"option": {}}}}, "methods.kd has an unknown key 'option' .did you mean 'options'"),
    ({"methods": {"kd": ["search"]}}, "methods.kd holds a list"),
    ({"methods": {"kd": {"options": {"temprature": 3}}}}, "'temprature' .did you mean 'temperature'"),
    ({"methods": {"kd": {"search": {"loss_ratio": [1, -1]}}}}, "loss_ratio=-1"),
    ({"options": {"epoch": 3}}, "'epoch' .did you mean 'epochs'"),
    ({"options": {"epochs": "many"}}, "epochs='many'"),
    ({"per_dataset": {"Cofee": {}}}, "did you mean 'Coffee'"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_files_are_refused_with_what_is_wrong(tmp_path, capsys, changes, words):
    file = write(tmp_path, **changes)
    assert main(["grid", str(file)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert re.search(words, told), told
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b\n", "holds a list"), ("a: [", "is not valid YAML"), ("", "holds nothing, not lines")]
)
def test_what_is_no_mapping_is_refused(tmp_path, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"grid\.yaml.*{words}"):
        read_grid(tmp_path / "grid.yaml")


def test_a_data_set_that_is_not_there_is_found_before_any_job(tmp_path, capsys):
    file = write(tmp_path, datasets=["ItalyPowerDemand", "ItalyPower"], per_dataset=None)
    assert main(["grid", str(file), "--dry-run"]) == 2
    assert "close to it: ItalyPowerDemand" in capsys.readouterr().err


def test_sizes_that_do_not_fit_are_found_before_any_job(tmp_path):
    options = {"student_options": {"hidden": 6}, "student_model": "lstm", "method_options": {"nothing": 1}}
    grid = read_grid(
        write(tmp_path, options={**FILE["options"], **options}, datasets=["ItalyPowerDemand"], per_dataset=None)
    )
    with pytest.raises(ValueError, match=r"kd on ItalyPowerDemand: .*no option 'nothing'.*; gdpd-paper on Italy"):
        preflight(grid.jobs())


def test_features_that_do_not_divide_into_tokens_are_found_before_any_job(tmp_path):
    small = {"teacher_model": "lstm", "student_model": "lstm", "teacher_options": {"hidden": 10, "layers": 1}}
    methods = {"gendd": {"options": {"method_options": {"token_width": 4}}}}
    grid = read_grid(write(tmp_path, methods=methods, options=small, datasets=["ItalyPowerDemand"], per_dataset=None))
    with pytest.raises(ValueError, match=r"gendd on ItalyPowerDemand: token_width=4 does not divide"):
        preflight(grid.jobs())


def test_a_dry_run_says_what_is_left_and_does_nothing(tmp_path, made_training, capsys):
    assert main(["grid", str(write(tmp_path)), "--dry-run"]) == 0
    assert "jobs: 48; to be done in" in capsys.readouterr().out
    assert made_training.runs == []
    assert not (tmp_path / "grid").exists()


def test_a_file_without_an_ending_has_its_results_beside_it_too(tmp_path, made_training):
    file = write(tmp_path, datasets=["ItalyPowerDemand"], per_dataset=None).rename(tmp_path / "plain")
    assert main(["grid", str(file), "--workers", "0"]) == 0
    assert len(read_results(tmp_path / "plain-results")) == 24


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_the_table_and_sums_failures_up(tmp_path, made_training, capsys, monkeypatch, broken):
    monkeypatch.setattr("gdpd.cli.app._console", lambda: Console(width=120, highlight=False))
    if broken:
        made_training.broken.add("gdpd")
    assert main(["grid", str(write(tmp_path)), "--workers", "0"]) == (1 if broken else 0)
    told = capsys.readouterr().out
    assert len(read_results(tmp_path / "grid")) == (24 if broken else 48)
    assert ("24 of 48 jobs failed" in told) == broken
    assert told.count("no such luck") == (48 if broken else 0)  # as it happens, and in the summary
    assert "ItalyPowerDemand" in told
    made_training.runs.clear()
    made_training.broken.clear()
    assert main(["grid", str(write(tmp_path)), "--workers", "0"]) == 0
    assert len(made_training.runs) == (24 if broken else 0)
    assert "were in the table already" in capsys.readouterr().out


def test_the_live_view_tells_what_is_under_way_what_ended_and_how_long_it_takes(monkeypatch):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=140, color_system=None)
    jobs = Grid(("A", "B"), (0.5,), ("base", "kd"), (1,)).jobs()
    clock = [100.0]
    monkeypatch.setattr("gdpd.experiments.progress.time.monotonic", lambda: clock[0])

    def screen():
        start = len(shown.getvalue())
        progress._progress.refresh()
        return shown.getvalue()[start:]

    with LiveProgress(console) as progress:
        assert "checking" in screen()
        progress.planned(4)
        progress.ended(Outcome(jobs[0], "skipped"))
        teacher, task = Task(("A", 1)), Task(jobs[1].teacher, jobs[1])
        progress.started(teacher)
        assert "A, teacher, seed 1" in screen()
        progress.stopped(teacher, "worker died; it is run again")
        assert "A, teacher, seed 1: worker died; it is run again" in shown.getvalue()
        progress.started(task)
        assert "  A, 50 % read, kd, seed 1" in screen()
        clock[0] += 90
        progress.stopped(task)
        progress.ended(Outcome(jobs[1], "done"))
        assert "jobs (about 0:03:00 left)" in screen()
        assert "2/4" in screen()
        progress.ended(Outcome(jobs[2], "failed", "ValueError: no"))
        assert "jobs (1 failed, about 0:00:45 left)" in screen()
        progress.ended(Outcome(jobs[3], "done"))
        assert "jobs (1 failed) " in screen()
    assert "failed   B, 50 % read, base, seed 1: ValueError: no" in shown.getvalue()
    assert "1 job was in the table already" in shown.getvalue()


def test_a_terminated_grid_exports_its_table_and_goes_on(tmp_path, made_training, monkeypatch):

    plain, killed = made_training.run, []

    def run(*arguments, **options):
        if len(made_training.runs) == 7 and not killed:
            killed.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **options)

    monkeypatch.setattr("gdpd.training.run", run)
    before = signal.getsignal(signal.SIGTERM)
    arguments = {"workers": 0, "threads": 1, "ray": None, "keep_runs": False, "dry_run": False}
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        grid_command.run(read_grid(write(tmp_path)), tmp_path / "out", **arguments, console=console)
    assert signal.getsignal(signal.SIGTERM) is before
    (tmp_path / "out" / "results.sqlite").unlink()
    assert len(read_results(tmp_path / "out")) == 7
    assert grid_command.run(read_grid(write(tmp_path)), tmp_path / "out", **arguments, console=console)
    assert len(made_training.runs) == 48
