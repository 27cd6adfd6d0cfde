"""DKD against mmrazor's, which `make` installs (`pip install --no-deps mmrazor`: one file of it is read, alone)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from lessons import batch, in_float64, method


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its DKDLoss, without the packages that the rest of mmrazor imports: a registry is all that the file asks for."""
    try:
        found = importlib.metadata.distribution("mmrazor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("optional: pip install --no-deps mmrazor compares DKD with its own")
    registry = types.ModuleType("mmrazor.registry")
    registry.MODELS = types.SimpleNamespace(register_module=lambda: lambda cls: cls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmrazor", types.ModuleType("mmrazor"))
    monkeypatch.setitem(sys.modules, "mmrazor.registry", registry)
    spec = importlib.util.spec_from_file_location(
        "mmrazor_dkd", str(found.locate_file("mmrazor/models/losses/decoupled_kd.py"))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DKDLoss


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("classes", [3, 7])
def test_dkd(theirs: Any, classes: int) -> None:
    made, data = method("dkd", classes=classes, ramp_epochs=0), in_float64(batch(9, classes=classes))
    loss, parts = made.loss(data, 0)
    logits = made.student(data.x_prefix)[1].detach()

    def of(target: float, others: float) -> torch.Tensor:
        module = theirs(tau=2.0, alpha=target, beta=others, reduction="batchmean")
        return module(logits, data.teacher_logits, data.y)  # type: ignore[no-any-return]

    torch.testing.assert_close(parts["tckd"], of(1.0, 0.0))
    torch.testing.assert_close(parts["nckd"], of(0.0, 1.0))
    torch.testing.assert_close(loss.detach(), parts["ce"] + of(1.0, 8.0))
