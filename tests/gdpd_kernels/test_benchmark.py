"""What `gdpd bench` measures: contenders compute one function, wrong results are refused, a record becomes a table."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gdpd_kernels.benchmark import cases, check, clock, report, rivals
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.measure import measure

SMALL = [Case("paper", 8, 12, 3, mode) for mode in cases.MODES] + [Case("mlp", 3, 7, 2, mode) for mode in cases.MODES]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["release", "stepwise", "eager"])
def test_rivals_compute_the_reference_in_float64(case, how):
    if cases.unavailable(how, case):
        pytest.skip(cases.unavailable(how, case))
    exact = cases.prepare(case, "reference", dtype=torch.float64)()
    found = [rivals.centre(tensor) for tensor in cases.prepare(case, how, dtype=torch.float64)()]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    largest = max(float(tensor.abs().max()) for tensor in exact)
    for mine, theirs in zip(found, exact, strict=True):
        # The releases' scheduler keeps alpha_bar in float32.
        assert (mine - theirs).abs().max() < (1e-11 if how == "eager" else 1e-5) * largest


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    case = SMALL[-1]
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: alpha * z + noise)
    assert not check.check(Case(case.network, 3, 7, 2, "forward"), "eager").ok


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr(rivals, "hoisted_sample", lambda module, z, noise, alpha, table: z * float("nan"))
    assert not check.check(Case("mlp", 3, 7, 2, "forward"), "eager").ok


@pytest.mark.parametrize("case", [*SMALL, *map(Case.parse, report.CASES)], ids=lambda case: case.name)
def test_names_lead_back_to_cases(case):
    assert Case.parse(case.name) == case


def test_a_name_that_is_no_case_is_refused_with_an_example():
    with pytest.raises(ValueError, match="paper-64x100-5-trainable"):
        Case.parse("paper-64-100")


def test_unknown_contenders_are_named():
    with pytest.raises(ValueError, match=r"'fast'.*known: release"):
        rivals.contender("fast", cases.denoiser(SMALL[0]), 3)


def test_the_grid_is_the_whole_product_without_single_rows_of_batchnorm():
    combinations = len(cases.BATCHES) * len(cases.WIDTHS) * len(cases.STEPS) * len(cases.MODES)
    assert len(cases.full_grid()) == 2 * combinations - combinations // len(cases.BATCHES)


def test_operations_are_counted_by_hand():
    case = Case("mlp", 5, 7, 3, "trainable")
    assert case.flops == 3 * 2 * 5 * 3 * (7 * 256 + 256 * 256 + 256 * 7)


def test_contenders_are_timed_in_turn():
    order = []
    timed = clock.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert set(timed) == {"a", "b"}
    assert timed["a"].low <= timed["a"].median <= timed["a"].high
    samples = "".join(order[6:])  # after the warm-up
    assert samples.count("ab") == timed["a"].samples == timed["b"].samples


def test_a_contender_that_cannot_run_says_why():
    assert cases.unavailable("graphed") == "CUDA graphs are of CUDA devices, not of cpu"
    assert cases.unavailable("native", device="cuda:0").endswith("it runs on cpu, not on cuda") or "native" in str(
        cases.unavailable("native")
    )
    measured = measure(SMALL[-1], ("graphed", "reference"), 0.0)
    assert set(measured.timings) == {"reference"}
    assert "CUDA graphs" in measured.refused["graphed"]
    assert not measured.wrong


@pytest.fixture(scope="module")
def record():
    return report.bench("cpu", ["mlp-3x7-2-frozen"], ["stepwise", "eager", "native", "reference", "graphed"], 0.0)


def test_a_run_is_a_record_for_json_and_a_table(record):
    assert json.loads(json.dumps(record)) == record
    results = record["cases"][0]["results"]
    for how in ("stepwise", "eager", "reference"):
        time = results[how]["time"]
        assert 0 < time["low"] <= time["median"] <= time["high"]
        assert "allowed" in results[how]["check"]
    text = report.table(record)
    assert text.count("| mlp-3x7-2-frozen |") == 5
    assert "| mlp-3x7-2-frozen | graphed | not timed |  | CUDA graphs" in text
    assert torch.__version__ in text
    assert not report.failed(record)


def test_a_contender_that_fails_is_not_timed_and_that_is_said(monkeypatch):
    monkeypatch.setattr(check, "check", lambda *_: check.Verdict(False, "z_hat: error 1, allowed 0"))
    found = report.bench("cpu", ["mlp-3x7-2-forward"], ["eager", "reference"], 0.0)
    assert "| reference | not timed |  | check failed, z_hat: error 1, allowed 0" in report.table(found)
    assert report.failed(found)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"device": "gpu"}, "device is 'gpu'; expected cpu, cuda or cuda:INDEX"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": "cuda"}, "device is 'cuda', but torch .*; use --device cpu"),
        ({"device": "cpu", "contenders": ["fast"]}, "contender is 'fast'; known: release"),
        ({"device": "cpu", "cases": ["small"]}, "case is 'small'"),
    ],
)
def test_bad_input_is_told(arguments, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=told):
        report.bench(**arguments)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert report.checked_device("cuda") == "cuda:0"
    assert report.checked_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="torch sees 2 GPU, numbered from 0"):
        report.checked_device("cuda:2")


def test_time_on_a_gpu_is_that_between_two_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            assert end is not self
            return 12.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clock.between_events(lambda: log.append("call"), 3) == pytest.approx(0.012)
    assert log == ["record", "call", "call", "call", "record", "synchronize"]


def test_a_graphed_call_is_warmed_up_on_another_stream_then_replayed(monkeypatch):
    log = []
    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: nullcontext())
    replay = cases._replayed(lambda: log.append("call") or ["result"])
    assert log == ["wait", "call", "call", "call", "wait", "call"]
    assert replay() == ["result"]
    assert log[-1] == "replay"
