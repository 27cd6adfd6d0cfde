"""The run behind `gdpd bench`: cases and contenders on one device, as a record for JSON and as a table to paste."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gdpd_kernels.backends import native_backend
from gdpd_kernels.benchmark import rivals
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.clock import Timing, times
from gdpd_kernels.benchmark.measure import Measured, measure
from gdpd_kernels.benchmark.tables import Rows, markdown

CASES = ("paper-64x100-5-trainable", "mlp-64x100-10-frozen", "mlp-1024x100-10-trainable")
CONTENDERS = {
    "cpu": ("release", "stepwise", "eager", "compiled", "native", "native_bf16"),
    "cuda": ("release", "stepwise", "eager", "compiled", "graphed", "triton", "triton_bf16"),
}
OURS = {"cpu": "native", "cuda": "triton"}  # what ratios are to


def checked_device(name: str) -> str:
    """The device by its full name, such as "cuda:0".

    Raises:
        ValueError: it is not "cpu", "cuda" or "cuda:INDEX", or torch does not see it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in CONTENDERS:
        raise ValueError(f"device is {name!r}; expected cpu, cuda or cuda:INDEX")
    if device.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "sees no GPU"
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} {built}; use --device cpu")
    index, seen = device.index or 0, torch.cuda.device_count()
    if index >= seen:
        raise ValueError(f"device is {name!r}, but torch sees {seen} GPU, numbered from 0")
    return f"cuda:{index}"


def bench(
    device: str,
    cases: Sequence[str] = CASES,
    contenders: Sequence[str] = (),
    seconds: float = 5.0,
    tf32: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check and time contenders on one device.

    Args:
        device: "cpu", "cuda" or "cuda:INDEX".
        cases: names as in `cases.Case`, such as "paper-64x100-5-trainable".
        contenders: names from `rivals.RIVALS`; by default those that make sense on the device.
        seconds: spent on timing all contenders of a case together; checks and compilation come on top.
        tf32: float32 products on tensor cores, for every contender.
        tell: called with a line of text as the run goes on.

    Returns:
        What ran where, and of each case every contender's times in seconds or the reason why it has none; for JSON.

    Raises:
        ValueError: the device is not there, or a case or contender is unknown.
    """
    device = checked_device(device)
    kind = device.partition(":")[0]
    hows = tuple(contenders) or CONTENDERS[kind]
    if unknown := [how for how in hows if how not in rivals.RIVALS]:
        raise ValueError(f"contender is {unknown[0]!r}; known: {', '.join(rivals.RIVALS)}")
    parsed = [Case.parse(name) for name in cases]
    found = []
    with _products(tf32), _current(device):
        for case in parsed:
            tell(f"{case.name} ...")
            found.append(_record(measure(case, hows, seconds, device), hows))
    return {
        "device": _described(device),
        "float32 products": "tf32" if tf32 else "float32",
        "ratios to": OURS[kind],
        "contenders": {how: rivals.RIVALS[how] for how in hows},
        "cases": found,
    }


def failed(record: dict[str, Any]) -> bool:
    """Whether one of the library's own contenders did not pass its check."""
    return any(
        how in rivals.OWN and entry.get("wrong", False)
        for case in record["cases"]
        for how, entry in case["results"].items()
    )


def table(record: dict[str, Any]) -> str:
    """The record in Markdown, ready to paste."""
    device, ours = record["device"], record["ratios to"]
    rows: Rows = [("case", "contender", "median (20–80 %)", f"time ÷ {ours}", "check")]
    for case in record["cases"]:
        results = case["results"]
        base = results.get(ours, {}).get("time")
        for how, entry in results.items():
            if "time" not in entry:
                rows.append((case["case"], how, "not timed", "", entry["refused"]))
                continue
            ratio = f"{entry['time']['median'] / base['median']:.2f}×" if base else ""
            rows.append((case["case"], how, times(Timing(**entry["time"])), ratio, entry["check"]))
    about = "; ".join(f"{name} {value}" for name, value in device.items())
    names = "\n".join(f"- {how}: {what}" for how, what in record["contenders"].items())
    return f"{about}; float32 products in {record['float32 products']}\n\n{markdown(rows)}\n\n{names}"


def _record(measured: Measured, hows: Sequence[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for how in hows:
        if how in measured.timings:
            results[how] = {"time": asdict(measured.timings[how]), "check": measured.passed[how]}
        else:
            results[how] = {"refused": measured.refused[how], "wrong": how in measured.wrong}
    return {"case": measured.case.name, "flops": measured.case.flops, "results": results}


def _described(device: str) -> dict[str, str]:
    """The device and the versions, without names of folders or hosts."""
    found = {"device": device}
    if device == "cpu":
        found["instruction set"] = native_backend.instruction_set() or "no native backend"
        found["threads"] = str(torch.get_num_threads())
    else:
        seen = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{seen.name}, {seen.multi_processor_count} multiprocessors, {seen.total_memory / 2**30:.0f} GiB"
        found["CUDA or ROCm"] = str(torch.version.cuda or torch.version.hip)
        found["Triton"] = _version("triton")
    return found | {
        "torch": torch.__version__,
        "gdpd-kernels": _version("gdpd-kernels"),
        "Python": f"{platform.python_version()} on {platform.system()}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def _current(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    with torch.cuda.device(device):
        yield
