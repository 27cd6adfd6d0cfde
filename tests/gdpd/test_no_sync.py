"""The training step never waits for its device and has static shapes, so that a CUDA graph can hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from gdpd.distillers import Base, Batch, Distiller, build_distiller, distiller_names
from gdpd.models import LSTM, Classifier, build_model
from gdpd.training import graph, run
from gdpd.training.run_folder import training_context
from gdpd.training.step import TrainingStep
from gdpd_kernels import arguments, functional
from no_sync import HostSync, no_sync

ROWS, STEPS, FULL, WIDTH, TEACHER = 6, 10, 14, 8, 12


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's LSTM runs; ranges of values are not looked at, see `test_values_are_not_looked_at_off_the_cpu`."""
    monkeypatch.setattr(LSTM, "native", lambda *_: False)
    monkeypatch.setattr(Classifier, "_check_input", lambda *_: None)  # looks at lengths on the CPU alone
    for module in (arguments, functional):
        monkeypatch.setattr(module, "check_range", lambda *_: None)


def batch(seed: int, lengths: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(ROWS, 1, STEPS, generator=generator),
        torch.randint(2, (ROWS,), generator=generator),
        index=torch.arange(ROWS),
        lengths=torch.full((ROWS,), STEPS) if lengths else None,
        z_long=torch.randn(ROWS, TEACHER, generator=generator),
        teacher_logits=torch.randn(ROWS, 2, generator=generator),
        teacher_sequence=torch.randn(ROWS, FULL, TEACHER, generator=generator),
        teacher_lengths=torch.full((ROWS,), FULL) if lengths else None,
    )


def distiller(method: str, **options: Any) -> Distiller:
    torch.manual_seed(0)
    student = build_model("lstm", in_channels=1, num_classes=2, hidden=WIDTH, layers=1)
    teacher = build_model("lstm", in_channels=1, num_classes=2, hidden=TEACHER, layers=1)
    shared = {"warmup_epochs": 1, "epochs": 2, "backend": "reference", **options}
    made = build_distiller(method, student, TEACHER, shared).train()
    made.prepare(teacher, torch.randn(ROWS, TEACHER), torch.arange(ROWS) % 2)
    return made


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in distiller_names()),
    ("fits", {"align": "steps", "schedule": "joint", "lengths": True}),
    ("at", {"lengths": True}),
    ("dt2w", {"lengths": True}),
    ("gdpd", {"freeze_prior": True, "num_samples": 2, "eta": 0.5}),
    ("gdpd", {"denoiser": "mlp", "alpha": "per_dimension"}),
    ("gdpd", {"conditioning": "guidance", "window": "full"}),
    ("gdpd", {"conditioning": "start", "learn_prior": False}),
    ("gendd", {"variance": "posterior", "hidden": 16, "mixup": 0.5, "target": "soft"}),
    ("gendd", {"two_stage": True, "hidden": 16}),
]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(
    ("method", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_a_step_never_waits_and_has_static_shapes(method: str, options: dict[str, Any], epoch: int) -> None:
    options = dict(options)
    lengths = options.pop("lengths", False)
    with training_context(toy.config()) as fabric:
        step = TrainingStep(distiller(method, **options), toy.config(), fabric, graphed=True)
        for seed in range(2):
            step(batch(seed, lengths), epoch)  # what is made once: the capture of the denoiser, Adam's averages
        ran = []
        for seed in (2, 3):
            given = batch(seed, lengths)
            with no_sync() as operators:
                step.set_learning_rate(0.1 / (1 + seed))
                step(given, epoch)
            ran.append(list(operators))
    assert ran[0] == ran[1]
    assert any("adam" in name for name, *_ in ran[0])
    assert any("backward" in name or "grad" in name for name, *_ in ran[0])
    sampled = any(name == "reverse_sample_backward" for name, *_ in ran[0])
    fused = method == "diffkd" or (method == "gdpd" and epoch == 1)
    if method == "gendd":  # the head's prediction of noise and variance is one step of the operator
        fused = options.get("variance") != "posterior" and not (options.get("two_stage") and epoch == 1)
    assert sampled == (fused and "conditioning" not in options)


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.sum() if x.sum() > 0 else x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.unique(x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.detach().cpu(),
        lambda x: x.detach().numpy(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, torch.arange(len(x)), dim=0),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
    ],
)
def test_a_step_that_waits_is_found(sync: Callable[[Tensor], Any]) -> None:
    class Waiting(Base):
        """Looks at its logits."""

        def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
            """As Base."""
            loss, parts = super().loss(batch, epoch)
            sync(parts["ce"].detach().clone().view(1))
            return loss, parts

    with training_context(toy.config()) as fabric:
        step = TrainingStep(Waiting(distiller("base").student), toy.config(), fabric, graphed=True)
        step(batch(0), 0)
        given = batch(1)
        with pytest.raises(HostSync), no_sync():
            step(given, 0)


def test_a_wait_in_backward_is_found() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: gradient * float(gradient.sum()))
    with pytest.raises(HostSync), no_sync():
        y.sum().backward()


def test_values_are_not_looked_at_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    arguments.check_range("x", torch.full((2,), 9, device="meta"), 0, 1, "")
    with pytest.raises(ValueError, match="x has values"):
        arguments.check_range("x", torch.full((2,), 9), 0, 1, "")


def replayed(run: Callable[[], dict[str, Tensor]]) -> Any:
    """Stands for a CUDA graph: runs the function again at each replay, into the same tensors."""
    outputs: dict[str, Tensor] = {}

    def replay() -> None:
        for name, value in run().items():
            outputs.setdefault(name, value.clone()).copy_(value)

    recording = _Outputs(outputs)
    return replay, recording


class _Outputs(dict):  # type: ignore[type-arg]
    """Shows what is filled at the first replay."""

    def __init__(self, filled: dict[str, Tensor]) -> None:
        super().__init__()
        self.items = filled.items  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["base", "gdpd", "taid"])
def test_a_recorded_step_trains_as_the_step_itself(method: str) -> None:
    one = distiller(method)
    two = copy.deepcopy(one)
    with training_context(toy.config()) as fabric:
        plain = TrainingStep(one, toy.config(), fabric, graphed=True)
        made: list[Any] = []

        def record(run: Callable[[], dict[str, Tensor]]) -> Any:
            made.append(replayed(run))
            return made[-1]

        recorded = graph.GraphedStep(TrainingStep(two, toy.config(), fabric, graphed=True), record)
        shown = []
        for seed in range(12):
            epoch, given = seed // 6, batch(seed)
            losses = []
            for step in (plain, recorded):
                torch.manual_seed(seed)
                losses.append(step(given, epoch)["loss"])
            assert torch.equal(*losses)
            shown.append(losses[1])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert len(made) == (1 if method == "base" else 2)
    assert len(recorded._recordings) == 1  # those of the phase before are let go
    assert len({float(loss) for loss in shown}) == 12  # what is handed out is not overwritten by the next replay


def test_without_a_gpu_a_recording_is_refused_before_training(tmp_path: Any) -> None:
    config = toy.config(toy.folder(tmp_path), graph_step=True)
    with pytest.raises(ValueError, match=r"graph_step=True.*device 'cpu'.*Leave graph_step out"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
