"""The profile of a step: parts add up, backward time goes to whoever caused it, and tools can read the files."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from gdpd.cli import main
from gdpd.training.nvtx_ranges import nvtx_ranges
from gdpd.training.profile import profile
from gdpd.training.stopwatch import Stopwatch
from gdpd_kernels.ranges import listening, span

FORWARD = ["data", "student", "fusion", "sampler", "losses"]


class Slow(torch.autograd.Function):
    """The identity, which takes the given seconds forward and twice as many backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """Wait, and pass on."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Wait twice as long."""
        time.sleep(2 * ctx.seconds)
        return gradient, None


def test_time_goes_to_the_part_that_took_it_forward_and_backward() -> None:
    watch = Stopwatch()
    with listening(watch):
        weight = torch.ones(3, requires_grad=True)
        with span("first"):
            x = Slow.apply(weight, 0.02)
            with span("within"):
                x = Slow.apply(x, 0.01)
        with span("second"):
            x = Slow.apply(x, 0.04)
        loss = Slow.apply(x, 0.01).sum()
        watch.backward(loss, loss.backward)
    found = watch.lap()
    expected = {
        "first": 0.03, "second": 0.04,
        "backward: first": 0.06, "backward: second": 0.08, "backward: other": 0.02,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, seconds in expected.items():
        assert seconds <= found[name] < seconds + 0.015, name
    assert weight.grad is not None
    assert watch.lap() == {}


def test_a_stopwatch_leaves_nothing_on_the_graph() -> None:
    watch = Stopwatch()
    with listening(watch), span("a"):
        loss = torch.ones(3, requires_grad=True).square().sum()
    for _ in range(2):
        watch.backward(loss, lambda: loss.backward(retain_graph=True))
    counted = watch.lap()
    loss.backward()
    assert watch.lap() == {}
    assert counted


def test_a_profile_has_every_part_and_a_trace_for_each_phase(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), teacher_epochs=1)
    found = profile(config, steps=3, trace=tmp_path / "trace.json")
    assert json.loads(json.dumps(found)) == found
    warmup, main_phase = found["phases"]
    assert [warmup["phase"], main_phase["phase"]] == ["warmup", "main"]
    names = [part["name"] for part in main_phase["parts"]]
    assert names == [
        *FORWARD, "backward: other", "backward: losses", "backward: sampler", "backward: fusion", "backward: student",
        "optimizer", "other",
    ]  # fmt: skip
    assert {"prior", "backward: prior"} <= {part["name"] for part in warmup["parts"]}
    for phase in found["phases"]:
        assert sum(part["share"] for part in phase["parts"]) == pytest.approx(1)
        assert all(part["seconds"] >= 0 for part in phase["parts"])
        assert phase["step"] > 0
        assert phase["timed"] > 0
    for name, phase in zip(found["traces"], found["phases"], strict=True):
        assert phase["phase"] in name
        events = json.loads(Path(name).read_text())["traceEvents"]
        told = {event["name"] for event in events if event.get("ph") == "X"}
        assert {"step", "data", "student", "losses", "backward", "optimizer"} <= told
        assert ({"sampler", "reverse_sample"} if phase["phase"] == "main" else {"prior", "prior_loss"}) <= told
    assert sorted(path.name for path in tmp_path.glob("trace*")) == ["trace-main.json", "trace-warmup.json"]


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy.config(toy.folder(tmp_path), method="kd")
    (tmp_path / "run.yaml").write_text(json.dumps(config.to_dict()))
    common = ["profile", "--config", str(tmp_path / "run.yaml"), "--steps", "2", "--trace"]
    assert main([*common, str(tmp_path / "deep" / "trace.json")]) == 0
    told = capsys.readouterr().out
    for words in ("Phase main", "student", "backward: student", "optimizer", "%", "Without the stopwatch"):
        assert words in told
    assert (tmp_path / "deep" / "trace.json").is_file()
    assert main([*common, "", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["traces"] == []
    assert main(["profile", "--steps", "0", "--trace", ""]) == 2
    assert "steps=0" in capsys.readouterr().err


def test_nvtx_hears_the_names_in_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def annotate(message: str, domain: str, category: str | None, payload: int | None) -> Iterator[None]:
        heard.append((message, domain, category, payload))
        yield

    module = types.ModuleType("nvtx")
    module.annotate, module.enabled = annotate, lambda: True  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "nvtx", module)
    with nvtx_ranges(), span("sampler"), span("sampler forward", batch=64, steps=5, backend="native"):
        pass
    module.enabled = lambda: False  # type: ignore[attr-defined]
    with nvtx_ranges(), span("sampler"):
        pass
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with nvtx_ranges(), span("sampler"):
        pass
    assert heard == [("sampler", "gdpd", None, None), ("sampler forward, steps 5", "gdpd", "native", 64)]
