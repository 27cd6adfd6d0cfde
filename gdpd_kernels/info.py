"""``python -m gdpd_kernels.info``: what is built, what is usable here, and the reason for each that is not.

The text is for bug reports; ``--json`` prints the same facts for programs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gdpd_kernels import __version__
from gdpd_kernels.backends import backends

_PACKAGES = ("numpy", "triton")
# What the kernels choose their code by, in the spelling of /proc/cpuinfo.
_FEATURES: tuple[str, ...] = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
)
_FEATURES += ("amx_bf16", "asimd", "sve", "bf16")
_SWITCHES = "GDPD_KERNELS_"


def collect() -> dict[str, Any]:
    """The facts as plain data.

    Returns:
        ``versions`` (None where a package is missing), ``machine``, ``built`` (compiled modules), ``backends`` (name,
        usable, reasons; fastest first) and ``switches`` (environment variables that are set).
    """
    return {
        "versions": {
            "gdpd_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the build, such as +cu130, which a wheel's name may lack
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": _machine(),
        "built": {"native": _native()},
        "backends": backends(),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SWITCHES)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    model, flags = _cpu()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cpu_features": [feature for feature in _FEATURES if feature in flags],
        "cores": len(usable),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
    }


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Model and feature flags of the processor, as far as the system tells."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown", frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown", frozenset(flags.split())


def _native() -> dict[str, Any]:
    """Whether the compiled module is there, and which of its instruction sets this processor runs."""
    try:
        module = importlib.import_module("gdpd_kernels._native")
    except ImportError as error:
        return {"present": False, "reason": str(error), "instruction_sets": {}}
    return {"present": True, "reason": None, "instruction_sets": dict(module.instruction_sets())}


def _text(facts: dict[str, Any]) -> str:
    machine, native = facts["machine"], facts["built"]["native"]
    lines = ["versions"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [
        "machine",
        f"  system        {machine['system']}",
        f"  cpu           {machine['cpu']}, {machine['cores']} cores usable",
        f"  features      {' '.join(machine['cpu_features']) or 'unknown'}",
        f"  torch         {machine['torch_threads']} threads, {machine['torch_cpu_capability']}",
        f"  gpus          {', '.join(machine['gpus']) or 'none'}",
        "built",
    ]
    if native["present"]:
        sets = [
            name if usable else f"{name} (not on this processor)" for name, usable in native["instruction_sets"].items()
        ]
        lines.append(f"  native        yes: {', '.join(sets)}")
    else:
        lines.append(f"  native        no: {native['reason']}")
    lines.append("backends, fastest first")
    for backend in facts["backends"]:
        lines.append(f"  {backend['name']:<13} {'usable' if backend['usable'] else 'not usable'}")
        lines += [f"    - {reason}" for reason in backend["reasons"]]
    if facts["switches"]:
        lines.append("environment switches")
        lines += [f"  {name}={value}" for name, value in facts["switches"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the facts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gdpd_kernels.info",
        description="Print versions, the machine, what is built, which backends are usable and why the others are not.",
    )
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    options = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else _text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
