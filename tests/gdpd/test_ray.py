"""Grids on Ray: on a cluster of this machine where Ray is installed, and against a small stand-in everywhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

from gdpd.cli import main
from gdpd.experiments import Grid, read_results, run_grid, runner
from gdpd.experiments.job import Done, carry_out
from gdpd.experiments.ray_workers import RayWorkers
from gdpd.experiments.workers import WorkerLost
from made_grids import made_training

__all__ = ["made_training"]  # a fixture

TINY = {
    "epochs": 2, "teacher_epochs": 2, "teacher_retries": 0, "teacher_model": "lstm", "student_model": "lstm",
    "teacher_options": {"hidden": 4, "layers": 1}, "student_options": {"hidden": 4, "layers": 1}, "resample_to": None,
}  # fmt: skip
HERE = Path(__file__).resolve().parent


def _carry_out_or_die(config, teacher, folder, keep):
    mark = Path(os.environ["GDPD_TEST_MARK"])
    if config.method == "kd" and not mark.exists():
        mark.touch()
        os._exit(9)
    return carry_out(config, teacher, folder, keep)


def test_on_a_real_cluster_a_lost_workers_job_is_run_again_and_nothing_twice(tmp_path, monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: the same is tested against a stand-in alone")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE), *sys.path]))
    monkeypatch.setenv("GDPD_TEST_MARK", str(tmp_path / "died"))
    monkeypatch.setattr(runner, "carry_out", _carry_out_or_die)
    grid = Grid(("ItalyPowerDemand",), (0.5,), ("base", "kd"), (1,), TINY)
    outcomes = run_grid(grid, tmp_path / "out", workers=RayWorkers("local", 1))
    assert (tmp_path / "died").is_file()
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("done", ""), ("done", "")]
    rows = read_results(tmp_path / "out")
    assert len({row.teacher_sha256 for row in rows}) == 1
    assert all("threads 1" in row.software for row in rows)
    assert not (tmp_path / "out" / "runs").exists()
    assert [outcome.status for outcome in run_grid(grid, tmp_path / "out", workers=0)] == ["skipped", "skipped"]


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class Reference:
    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


class StandIn(types.ModuleType):
    """As much of Ray's interface as is used; `losses` tasks are lost first."""

    def __init__(self, cpus: int = 4, losses: int = 0) -> None:
        super().__init__("ray")
        self.cpus, self.losses, self.events = cpus, losses, []
        self.exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def is_initialized(self):
        return False

    def init(self, address, **options):
        if address == "nowhere":
            raise ConnectionError("Could not find any running Ray instance.\nDetails.")
        self.events.append(("init", address, options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]))

    def shutdown(self):
        self.events.append("shutdown")

    def cluster_resources(self):
        return {"CPU": float(self.cpus)}

    def remote(self, **options):
        assert options["max_retries"] == 0
        return lambda function: types.SimpleNamespace(remote=lambda *arguments: Reference(function, arguments))

    def wait(self, handles, num_returns):
        return handles[:num_returns], handles[num_returns:]

    def get(self, handle):
        if self.losses:
            self.losses -= 1
            raise RayError("The node died.\nDetails.")
        try:
            return handle.function(*handle.arguments)
        except Exception as error:
            raise RayTaskError(f"Traceback\n{type(error).__name__}: {error}") from error


@pytest.fixture
def ray(monkeypatch):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def test_the_command_runs_a_grid_on_the_cluster_at_an_address(tmp_path, monkeypatch, ray, made_training, capsys):
    ray.losses = 2
    file = tmp_path / "grid.yaml"
    file.write_text("datasets: [A, B]\nearliness: [0.5]\nseeds: [1]\nmethods: [base, kd]\n")
    assert main(["grid", str(file), "--ray", "ray://there:1", "--threads", "1"]) == 0
    assert ray.events == [("init", "ray://there:1", "1"), "shutdown"]
    assert len(read_results(tmp_path / "grid")) == len(made_training.runs) == 4
    assert len(made_training.teachers) == 2
    assert "The node died.; it is run again" in capsys.readouterr().out


def test_what_a_task_raises_is_a_failure_and_what_ray_raises_a_loss(ray):
    def refuse():
        raise ModuleNotFoundError("No module named 'gdpd'")

    workers = RayWorkers("auto", 3)
    assert workers.capacity == 1
    (ended,) = workers.wait([workers.submit(refuse)])
    assert ended[1] == Done(reason="ModuleNotFoundError: No module named 'gdpd'")
    ray.losses = 1
    (ended,) = workers.wait([workers.submit(refuse)])
    assert isinstance(ended[1], WorkerLost)
    assert str(ended[1]) == "RayError: The node died."


def test_a_cluster_that_is_too_small_and_one_that_cannot_be_asked_for_are_refused(ray, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="threads=5: the cluster at auto has 4 CPUs"):
        RayWorkers("auto", 5)
    assert ray.events[-1] == "shutdown"
    with pytest.raises(ConnectionError, match=r"--ray nowhere leads to no cluster \(Could not .*'local' starts one"):
        RayWorkers("nowhere")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "gdpd-kernels\[ray\]"'):
        RayWorkers("auto")
