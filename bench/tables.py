"""Tables of results as rows of text, for the terminal and for docs/performance.md."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.figures import Figure
from bench.peak import Peak
from gdpd_kernels.backends import native_backend
from gdpd_kernels.benchmark import rivals
from gdpd_kernels.benchmark.clock import times
from gdpd_kernels.benchmark.measure import Measured
from gdpd_kernels.benchmark.tables import Rows, markdown, plain

__all__ = [
    "Rows",
    "figures",
    "floors",
    "grid",
    "losses",
    "machine",
    "markdown",
    "plain",
    "show_timings",
    "write_between_markers",
]

_LOSS = "**loss** "


def figures(found: Iterable[Figure]) -> Rows:
    verdicts = {True: "met", False: "missed", None: ""}
    rows: Rows = [("case", "against", "target", "measured", "", "median (20–80 %)")]
    return rows + [(f.what, f.against, f.target, f.value, verdicts[f.met], f.spread) for f in found]


def grid(found: Iterable[Measured], peak: Peak | None) -> Rows:
    """Native's time, its share of the peak, and every rival's time over it; below 1 is a loss."""
    rivals_shown = ("release", "eager", "compiled", "reference")
    rows: Rows = [("case", "native", "of peak", *(f"÷ {name}" for name in rivals_shown), "bf16 ÷ native", "refused")]
    for measured in found:
        native = measured.timings.get("native")
        share = "" if native is None or peak is None else f"{measured.case.flops / native.median / peak.flops:.0%}"
        refused = "; ".join(f"{how} {measured.refused[how]}" for how in sorted(measured.wrong))
        rows.append(
            (
                measured.case.name,
                "" if native is None else times(native),
                share,
                *(_ratio(measured.ratio(name)) for name in rivals_shown),
                _ratio(measured.ratio("native", "native_bf16")),
                refused,
            )
        )
    return rows


def floors(found: Iterable[Measured], peak: Peak) -> Rows:
    """What the arithmetic and the compulsory traffic of a case need at the machine's limits, and what that predicts."""
    rows: Rows = [
        ("case", "GFLOP", "MB", "arithmetic floor", "traffic floor", "native", "of floor", "best ÷ eager possible")
    ]
    for measured in found:
        case = measured.case
        arithmetic, traffic = case.flops / peak.flops, case.compulsory_bytes / peak.bytes
        floor = max(arithmetic, traffic)
        native, eager = measured.timings.get("native"), measured.timings.get("eager")
        rows.append(
            (
                case.name,
                f"{case.flops / 1e9:.3g}",
                f"{case.compulsory_bytes / 1e6:.3g}",
                f"{arithmetic * 1e6:.3g} µs",
                f"{traffic * 1e6:.3g} µs",
                "" if native is None else times(native),
                "" if native is None else f"{floor / native.median:.0%}",
                "" if eager is None else f"{eager.median / floor:.3g}×",
            )
        )
    return rows


def losses(found: Iterable[Measured]) -> Rows:
    """Every comparison in which the native backend is slower than a rival."""
    rows: Rows = [("case", "faster rival", "rival", "native", "native needs")]
    for measured in found:
        for name in ("release", "eager", "compiled", "reference"):
            ratio = measured.ratio(name)
            if ratio is not None and ratio < 1:
                mine, theirs = measured.timings["native"], measured.timings[name]
                rows.append((measured.case.name, name, times(theirs), times(mine), f"{1 / ratio:.2f}×"))
        ratio = measured.ratio("native", "native_bf16")
        if ratio is not None and ratio < 1:
            mine, theirs = measured.timings["native_bf16"], measured.timings["native"]
            rows.append(
                (measured.case.name, "native, over native_bf16", times(theirs), times(mine), f"{1 / ratio:.2f}×")
            )
    return rows


def machine(peak: Peak | None) -> Rows:
    """The machine and the versions, without names of folders or hosts."""
    rows: Rows = [
        ("", ""),
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()}"),
        ("instruction set in use", native_backend.instruction_set() or "none: no native backend"),
        ("torch, Python", f"{torch.__version__}, {platform.python_version()} on {platform.system()}"),
    ]
    if peak is not None:
        rows += [(f"float32, {way}", f"{rate / 1e9:.0f} GFLOP/s") for way, rate in peak.ways.items()]
        rows.append(("float32 peak used below", f"{peak.flops / 1e9:.0f} GFLOP/s ({peak.source})"))
        if peak.bf16_flops:
            rows.append(("bfloat16 dot products, compiled loop", f"{peak.bf16_flops / 1e9:.0f} GFLOP/s"))
        rows.append(("copy of 128 MiB, read and written", f"{peak.bytes / 1e9:.1f} GB/s"))
    return rows


def contenders() -> Rows:
    """The names used in the tables."""
    return [("name", "what it is"), *rivals.RIVALS.items()]


def show_timings(rows: Rows, cpu_time: bool, page: Path | None, name: str) -> None:
    """Print a table of times with the clock that they were taken by; into `page`, if any, between markers `name`."""
    kind = "processor time, one thread" if cpu_time else f"wall clock, {torch.get_num_threads()} threads"
    print(f"{kind}; median (20–80 %)\n{plain(rows)}")
    if page is not None:
        write_between_markers(page, name, f"{markdown(rows)}\n\n{kind.capitalize()}; medians (20–80 %).")
        print(f"wrote {page.name}")


def write_between_markers(page: Path, name: str, body: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; the page appears whole or not at all.

    Raises:
        ValueError: the page has no such pair of markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"{page.name}: expected one pair of markers {begin} ... {end}; put them where the table belongs"
        )
    replaced = pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=page.parent, delete=False) as beside:
        beside.write(replaced)
    os.chmod(beside.name, page.stat().st_mode)
    os.replace(beside.name, page)


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{_LOSS if value < 1 else ''}{value:.2f}×"


def _processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
