"""The info command: the same facts as text and as JSON, with a reason for everything that is not usable."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gdpd_kernels
from gdpd_kernels import info


def test_json_holds_versions_machine_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["gdpd_kernels"] == gdpd_kernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["torch_threads"] == torch.get_num_threads()
    assert facts["backends"] == gdpd_kernels.backends()
    assert facts["backends"][-1] == {"name": "reference", "usable": True, "reasons": []}


def test_text_names_every_backend_and_every_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        {"name": "fast", "usable": False, "reasons": ["no compiler", "no luck"]},
        {"name": "reference", "usable": True, "reasons": []},
    ]
    monkeypatch.setattr(info, "backends", lambda: found)
    monkeypatch.setenv("GDPD_KERNELS_ISA", "avx2")
    assert info.main() == 0
    printed = capsys.readouterr().out
    assert "fast          not usable\n    - no compiler\n    - no luck\n  reference     usable" in printed
    assert "GDPD_KERNELS_ISA=avx2" in printed
    assert f"torch         {torch.__version__}" in printed


@pytest.mark.parametrize("present", [True, False])
def test_the_compiled_module_is_told_with_its_instruction_sets_or_the_reason(
    present: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Native:
        @staticmethod
        def instruction_sets() -> list[tuple[str, bool]]:
            return [("baseline", True), ("avx1024", False)]

    def load(name: str) -> object:
        if not present:
            raise ImportError("no module of that name")
        return Native

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(info, "backends", list)
    info.main()
    printed = capsys.readouterr().out
    if present:
        assert "native        yes: baseline, avx1024 (not on this processor)" in printed
    else:
        assert "native        no: no module of that name" in printed


def test_processor_is_read_where_the_system_tells(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some Processor\nflags\t\t: fma avx2 other\n")
    assert info._cpu(cpuinfo) == ("Some Processor", frozenset({"fma", "avx2", "other"}))
    cpuinfo.write_text("processor : 0\nFeatures : asimd\n")
    assert "asimd" in info._cpu(cpuinfo)[1]
    model, flags = info._cpu(tmp_path / "missing")
    assert model
    assert flags == frozenset()


def test_a_package_that_is_missing_has_no_version() -> None:
    assert info._version("no-such-package-as-this") is None


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gdpd_kernels.info"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "backends, fastest first" in done.stdout


def test_unknown_options_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        info.main(["--yaml"])
    assert "--yaml" in capsys.readouterr().err
