"""Grids: paired by seed, resumable from the table alone, nothing is done twice, a failed job stops nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

from gdpd.config import RunConfig
from gdpd.experiments import Grid, Listener, Variant, read_results, run_grid, run_name
from gdpd.experiments.job import Done, carry_out
from gdpd.experiments.results import DATABASE
from gdpd.experiments.runner import plan
from gdpd.experiments.workers import LocalProcesses, ThisProcess, WorkerLost
from made_grids import made_training

__all__ = ["made_training"]  # a fixture

GRID = Grid(("GunPoint", "Coffee"), (0.2, 0.5), ("base", "gdpd"), (1, 2), {"epochs": 3})
SEARCH = {"loss_ratio": [0.1, 10.0]}


def test_a_grid_is_every_combination_with_one_teacher_per_dataset_and_seed():
    jobs = GRID.jobs()
    assert len({job.key for job in jobs}) == len({job.name for job in jobs}) == len(jobs) == 2 * 2 * 2 * 2
    assert {job.teacher for job in jobs} == {(d, s) for d in GRID.datasets for s in GRID.seeds}
    assert all(job.config.epochs == 3 and job.options == {} for job in jobs)
    searched = Grid(*_axes(GRID), {}, {}, {label: Variant(label, {}, SEARCH) for label in GRID.methods}).jobs()
    assert len({job.key for job in searched}) == len({job.name for job in searched}) == 32
    assert searched[0].name == "GunPoint-e0.2-base-s1-loss_ratio=0.1"


def test_a_grid_that_stops_anywhere_has_compared_all_methods_on_the_same_cells():
    jobs = Grid(("A", "B"), (0.2, 0.5), ("base", "kd", "gdpd"), (1, 2)).jobs()
    assert [job.config.seed for job in jobs] == sorted(job.config.seed for job in jobs)
    for end in range(0, len(jobs), 3):
        cells = Counter((*job.key[:2], job.key.seed) for job in jobs[:end])
        assert set(cells.values()) <= {3}


def test_options_of_one_dataset_and_of_one_method_win_over_common_ones():
    variants = {"kd": Variant("kd", {"temperature": 4.0}), "paper": Variant("gdpd", {"hinton": False})}
    grid = Grid(("A", "B"), (0.5,), ("kd", "paper"), (1,), {"epochs": 3}, {"B": {"epochs": 4}}, variants)
    assert [job.options for job in grid.jobs()] == [
        {"temperature": 4.0},
        {"method": "gdpd", "hinton": False},
        {"temperature": 4.0, "epochs": 4},
        {"method": "gdpd", "hinton": False, "epochs": 4},
    ]
    assert [job.config.method for job in grid.jobs()] == ["kd", "gdpd"] * 2
    assert [job.label for job in grid.jobs()] == ["kd", "paper"] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": ()}, "seeds is empty"),
        ({"earliness": (0.2, 0.2)}, "twice"),
        ({"per_dataset": {"Gunpoint": {}}}, "'Gunpoint', not one of the data sets .did you mean 'GunPoint'"),
        ({"search_score": "auc"}, "search_score='auc' is not known .did you mean 'auc_prc'"),
        ({"common": {"seed": 3}}, "options sets seed"),
        ({"variants": {"base": Variant("base", {"learning_rate": 0.1})}}, "base sets learning_rate: the teacher"),
        ({"variants": {"base": Variant("base", {}, {"teacher_epochs": [1, 2]})}}, "base sets teacher_epochs"),
        ({"variants": {"base": Variant("base", {}, {"loss_ratio": [0.1, 1]})}}, r"base 2, gdpd 1 trials"),
        ({"variants": {"base": Variant("base", {}, {"loss_ratio": 3})}}, "search of loss_ratio=3 is not a list"),
        ({"variants": {"base": Variant("base", {"hinton": True}, {"hinton": [True]})}}, "searched as well as set"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, words):
    axes = {"datasets": ("GunPoint",), "earliness": (0.5,), "methods": ("base", "gdpd"), "seeds": (1,), **changes}
    with pytest.raises(ValueError, match=words):
        Grid(**axes)


def test_run_names_of_paths_are_the_dataset_alone():
    assert run_name(RunConfig(dataset="some/where/Wafer", earliness=0.25)) == "Wafer-e0.25-gdpd-s1"


class StopAfter(Listener):
    """Stops a grid after so many jobs, as the interrupt key would."""

    def __init__(self, jobs: int) -> None:
        self.left = jobs

    def ended(self, outcome) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("from_the_committed_table", [False, True])
def test_a_grid_goes_on_where_it_stopped_and_repeats_nothing(tmp_path, made_training, from_the_committed_table):
    with pytest.raises(KeyboardInterrupt):
        run_grid(GRID, tmp_path, workers=0, listener=StopAfter(5))
    assert len(read_results(tmp_path)) == 5
    if from_the_committed_table:
        for name in ("runs", "teachers"):
            shutil.rmtree(tmp_path / name)
        (tmp_path / DATABASE).unlink()
    assert len(plan(GRID, tmp_path)) == 11
    outcomes = run_grid(GRID, tmp_path, workers=0)
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 5 + ["done"] * 11
    assert [outcome.job.key for outcome in outcomes] == [job.key for job in GRID.jobs()]
    assert made_training.runs == [tuple(job.key[:4]) for job in GRID.jobs()]  # each once, in order
    if not from_the_committed_table:
        assert len(made_training.teachers) == len(set(made_training.teachers)) == 4
    assert len(read_results(tmp_path)) == 16
    assert run_grid(GRID, tmp_path, workers=0)[0].status == "skipped"
    assert len(made_training.runs) == 16


def test_methods_and_trials_that_are_added_run_alone(tmp_path, made_training):
    run_grid(GRID, tmp_path, workers=0)
    made_training.runs.clear()
    more = Grid(GRID.datasets, GRID.earliness, ("base", "kd", "gdpd"), GRID.seeds, GRID.common)
    run_grid(more, tmp_path, workers=0)
    assert [run[2] for run in made_training.runs] == ["kd"] * 8
    made_training.runs.clear()
    tried = {"loss_ratio": [0.1, 1.0]}  # the second is the default, which is in the table
    variants = {label: Variant(label, {}, tried) for label in more.methods}
    run_grid(Grid(*_axes(more), more.common, {}, variants), tmp_path, workers=0)
    assert len(made_training.runs) == 24


def _axes(grid):
    return grid.datasets, grid.earliness, grid.methods, grid.seeds


def test_a_failed_job_stops_no_other_keeps_its_reason_and_is_tried_again(tmp_path, made_training):
    made_training.broken.add("gdpd")
    outcomes = run_grid(GRID, tmp_path, workers=0)
    assert {(outcome.job.label, outcome.status) for outcome in outcomes} == {("base", "done"), ("gdpd", "failed")}
    assert {outcome.reason for outcome in outcomes} == {"", "ValueError: no such luck"}
    made_training.broken.clear()
    made_training.runs.clear()
    assert {outcome.status for outcome in run_grid(GRID, tmp_path, workers=0)} == {"skipped", "done"}
    assert {run[2] for run in made_training.runs} == {"gdpd"}


def test_without_a_teacher_its_jobs_fail_and_it_is_tried_once(tmp_path, made_training):
    made_training.broken.add("teacher")
    outcomes = run_grid(GRID, tmp_path, workers=0)
    assert {outcome.reason for outcome in outcomes} == {"no teacher: ValueError: nothing to learn"}
    assert len(made_training.teachers) == 4
    assert made_training.runs == []


def test_run_folders_go_unless_they_are_asked_for(tmp_path, made_training):
    run_grid(GRID, tmp_path / "a", workers=0)
    assert list((tmp_path / "a" / "runs").iterdir()) == []
    run_grid(GRID, tmp_path / "b", workers=0, keep_runs=True)
    assert {path.name for path in (tmp_path / "b" / "runs").iterdir()} == {job.name for job in GRID.jobs()}


@pytest.mark.parametrize(
    ("common", "variants", "words"),
    [
        ({"epochs": 5}, {}, "epochs is 3 there and 5 now"),
        ({"epochs": 3}, {"gdpd": Variant("gdpd", {"hinton": False})}, "hinton is True there and False now for gdpd"),
    ],
)
def test_a_folder_of_another_grid_is_refused_with_the_first_difference(
    tmp_path, made_training, common, variants, words
):
    run_grid(GRID, tmp_path, workers=0)
    with pytest.raises(ValueError, match=words):
        run_grid(Grid(*_axes(GRID), common, {}, variants), tmp_path, workers=0)


def test_an_option_that_is_newer_than_the_table_counts_as_at_its_default(tmp_path, made_training):
    run_grid(GRID, tmp_path, workers=0)
    recipe = json.loads((tmp_path / "grid.json").read_text())
    del recipe["options"]["num_samples"]
    (tmp_path / "grid.json").write_text(json.dumps(recipe))
    assert {outcome.status for outcome in run_grid(GRID, tmp_path, workers=0)} == {"skipped"}
    (tmp_path / "grid.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="num_samples is 1 there and 2 now"):
        run_grid(Grid(*_axes(GRID), {"epochs": 3, "num_samples": 2}), tmp_path, workers=0)
    (tmp_path / "grid.json").unlink()
    with pytest.raises(ValueError, match=r"without grid\.json"):
        run_grid(GRID, tmp_path, workers=0)


class SecondGrid(Listener):
    """Starts the same grid again while it runs."""

    def __init__(self, folder) -> None:
        self.folder, self.refused = folder, 0

    def started(self, task) -> None:
        with pytest.raises(ValueError, match="another process carries out a grid in"):
            run_grid(GRID, self.folder, workers=0)
        self.refused += 1


def test_one_process_at_a_time_carries_out_a_grid(tmp_path, made_training):
    second = SecondGrid(tmp_path)
    outcomes = run_grid(GRID, tmp_path, workers=0, listener=second)
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert second.refused == 16 + 4
    assert run_grid(GRID, tmp_path, workers=0)[0].status == "skipped"


@pytest.mark.parametrize("bad", [{"workers": -1}, {"threads": 0}])
def test_worker_and_thread_counts_are_checked(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run_grid(GRID, tmp_path, **bad)


class Unreliable(ThisProcess):
    """Loses each task so many times before it runs."""

    capacity = 3
    shares_files = False

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.lost: Counter[str] = Counter()

    def submit(self, function, *arguments):
        key = str(arguments[0])
        if self.lost[key] < self.losses:
            self.lost[key] += 1
            future: Future = Future()
            future.set_result(WorkerLost("the worker died"))
            return future
        return super().submit(function, *arguments)


def test_a_lost_workers_tasks_are_run_again_and_given_up_in_the_end(tmp_path, made_training):
    workers = Unreliable(2)
    outcomes = run_grid(GRID, tmp_path / "a", workers=workers)
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert set(workers.lost.values()) == {2}
    assert Counter(made_training.runs).most_common(1)[0][1] == 1
    assert Counter(made_training.teachers).most_common(1)[0][1] == 1
    outcomes = run_grid(GRID, tmp_path / "b", workers=Unreliable(3))
    assert {outcome.reason for outcome in outcomes} == {"no teacher: tried 3 times: the worker died"}


TINY = {
    "epochs": 2, "teacher_epochs": 2, "teacher_retries": 0, "teacher_model": "lstm", "student_model": "lstm",
    "teacher_options": {"hidden": 4, "layers": 1}, "student_options": {"hidden": 4, "layers": 1}, "resample_to": None,
}  # fmt: skip


def _carry_out_or_die(config, teacher, folder, keep):
    """Dies at the first try of one job: what a worker does that runs out of memory."""
    mark = os.path.join(os.path.dirname(os.path.dirname(folder)), "died")
    if config.method == "gdpd" and not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(9)
    return carry_out(config, teacher, folder, keep)


def test_worker_processes_share_a_teacher_and_one_that_dies_is_replaced(tmp_path, monkeypatch):
    from gdpd.experiments import runner

    monkeypatch.setattr(runner, "carry_out", _carry_out_or_die)
    grid = Grid(("ItalyPowerDemand",), (0.5,), ("base", "gdpd"), (1,), TINY)
    before = os.environ.get("OMP_NUM_THREADS")
    outcomes = run_grid(grid, tmp_path, workers=2, threads=1)
    assert (tmp_path / "died").is_file()
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("done", ""), ("done", "")]
    assert os.environ.get("OMP_NUM_THREADS") == before
    rows = read_results(tmp_path)
    assert len({row.teacher_sha256 for row in rows}) == 1
    assert all("threads 1" in row.software for row in rows)
    assert {row.method: sorted(row.parts) for row in rows}["gdpd"] == [
        "main.alpha", "main.ce", "main.ce_hat", "main.kd", "main.loss",
        "warmup.autoencoder", "warmup.ce", "warmup.kd", "warmup.loss", "warmup.noise",
    ]  # fmt: skip


def _until(mark):
    deadline = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Done({"mark": mark.exists()})


def _die(number):
    os.kill(os.getpid(), number)


def test_a_task_that_takes_its_worker_down_takes_no_other_along(tmp_path):
    workers = LocalProcesses(2, 1)
    try:
        innocent = workers.submit(_until, tmp_path / "mark")
        for number, told in ((signal.SIGKILL, "died of SIGKILL (often: no memory left)"), (signal.SIGTERM, "SIGTERM")):
            deadly = workers.submit(_die, number)
            ((handle, came),) = workers.wait([innocent, deadly])
            assert handle is deadly
            assert isinstance(came, WorkerLost)
            assert told in str(came)
        (tmp_path / "mark").touch()
        assert workers.wait([innocent]) == [(innocent, Done({"mark": True}))]
    finally:
        workers.close()


_SCRIPT = """
import json, os, sys, time
from pathlib import Path
from gdpd.experiments import Grid, run_grid, runner
from gdpd.experiments.job import carry_out

def slow(config, teacher, folder, keep):
    home = Path(folder)
    if config.method == "gdpd":
        (home.parent.parent / "worker").write_text(str(os.getpid()))
        import gdpd.training
        plain = gdpd.training.run

        class Slow:
            def start(self, stage, epochs, done): pass
            def stop(self): pass
            def epoch(self, record): time.sleep(0.5)

        gdpd.training.run = lambda *arguments, **options: plain(*arguments, **options, progress=Slow())
    return carry_out(config, teacher, folder, keep)

if __name__ == "__main__":
    runner.carry_out = slow
    grid = Grid(("ItalyPowerDemand",), (0.5,), ("base", "gdpd"), (1,), json.loads(sys.argv[1]))
    run_grid(grid, Path(sys.argv[2]), workers=1, threads=1)
"""


def _alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks for processes in /proc")
def test_a_killed_grid_leaves_no_worker_behind_and_goes_on_with_the_run_it_was_at(tmp_path):
    script, folder, options = tmp_path / "killed.py", tmp_path / "out", {**TINY, "epochs": 40, "checkpoint_every": 1}
    script.write_text(_SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, str(script), json.dumps(options), str(folder)], env=environment)
    history = folder / "runs" / "ItalyPowerDemand-e0.5-gdpd-s1" / "history.jsonl"
    deadline = time.monotonic() + 120
    while not (history.is_file() and history.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int((folder / "worker").read_text())
    assert _alive(worker)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = history.read_text().splitlines()[:2]
    assert [row.method for row in read_results(folder)] == ["base"]
    other = Grid(
        ("ItalyPowerDemand",),
        (0.5,),
        ("base", "gdpd"),
        (1,),
        options,
        variants={"gdpd": Variant("gdpd", {"hinton": False})},
    )
    with pytest.raises(ValueError, match=r"gdpd-s1 was begun with other options: hinton is True there and False now"):
        run_grid(other, folder, workers=0)
    grid = Grid(("ItalyPowerDemand",), (0.5,), ("base", "gdpd"), (1,), options)
    config = history.parent / "config.json"
    written = config.read_text()
    config.write_text(written.replace('"epochs"', '"epoch"'))
    with pytest.raises(ValueError, match=r"gdpd-s1 was begun by another version \(unknown option 'epoch'"):
        run_grid(grid, folder, workers=0)
    config.write_text(written)
    outcomes = run_grid(grid, folder, workers=0, keep_runs=True)
    assert [outcome.status for outcome in outcomes] == ["skipped", "done"]
    assert history.read_text().splitlines()[:2] == before  # their times are in them
    assert {row.method: row.cpu_seconds is None for row in read_results(folder)} == {"base": False, "gdpd": True}


def test_a_failing_job_hands_back_its_reason_as_text(tmp_path):
    done = carry_out(RunConfig(dataset="NoSuchSet"), {"teacher.safetensors": b"", "teacher.json": b"{}"})
    assert done == Done(reason=done.reason)
    assert "NoSuchSet" in done.reason
