"""Every file of examples/ runs, learns something, and stays short; two processes train as one with the joined batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gdpd_kernels as gk
from gdpd.denoisers import MLPDenoiser

FOLDER = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_short() -> None:
    tested = {"cross_validation", "diffusers_model", "distiller", "lightning_module", "onnx_export", "plain_loop"}
    assert {path.stem for path in FILES} == tested
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name


def test_plain_loop_learns_both_stages() -> None:
    for losses in load("plain_loop").main(steps=80):
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.filterwarnings("ignore")
def test_lightning_module_learns() -> None:
    module, metrics = load("lightning_module").main(epochs=12, enable_progress_bar=False, enable_model_summary=False)
    assert metrics["classification"] < 0.5  # chance is log 4
    assert metrics["prior or denoised"] < 0.5
    assert module.current_epoch == 12


def test_a_model_of_diffusers_passes_gradients() -> None:
    losses = load("diffusers_model").main(steps=12, width=16)
    assert losses[-1] < losses[0]


def test_a_distiller_trains_every_part() -> None:
    example = load("distiller")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            feat = self.conv(image).relu().mean(dim=(2, 3), keepdim=True)
            return self.head(feat.flatten(1)), feat

    torch.manual_seed(0)
    student, teacher = Net(), Net()
    distiller = example.DenoisingKD(student, teacher, channels=8)
    logits, losses = distiller.forward_train(torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    assert logits.shape == (6, 5)
    losses["loss_kd"].backward(retain_graph=True)
    reached = [name for name, p in distiller.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name in reached} == {"student", "denoiser", "adapter"}
    assert not any(name.startswith("student.head") for name in reached)
    sum(losses.values()).backward()  # type: ignore[attr-defined]
    assert student.head.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_cross_validation_scores_and_searches() -> None:
    scores, search = load("cross_validation").main(epochs=30, cases=36)
    assert scores.shape == (3,)
    assert scores.mean() > 0.7
    assert search.best_params_["earliness"] in (0.2, 0.5)
    assert search.best_estimator_.predict_proba(load("cross_validation").series(4)[0]).shape == (4, 2)


def test_the_student_as_an_onnx_file_gives_the_same_probabilities(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    found, expected = load("onnx_export").main(str(tmp_path / "student.onnx"), epochs=4)
    assert found.shape == expected.shape == (40, 2)
    assert found.std() > 1e-4  # not one and the same for all
    torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


# --- two processes --------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """A student whose feature goes through the sampler; the noise of every row is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.denoiser, self.head = nn.Linear(5, 6), MLPDenoiser(6, hidden=(16,)), nn.Linear(6, 3)
        self.table = gk.ddim_table(num_inference_steps=5, window="lower")

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.head(gk.reverse_sample(self.denoiser, self.student(x), table=self.table, alpha=0.6, noise=noise))


def joined_batch() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return Student().double(), torch.randn(8, 5).double(), torch.randn(8, 6).double(), torch.arange(8) % 3


def gradients(model: nn.Module, x: Tensor, noise: Tensor, y: Tensor) -> list[Tensor]:
    nn.functional.cross_entropy(model(x, noise), y).backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def one_of_two(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, *data = joined_batch()
    mine = [x[4 * rank : 4 * rank + 4] for x in data]
    torch.save(gradients(DistributedDataParallel(model), *mine), f"{results}{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path / "rendezvous"), str(tmp_path / "gradients")), nprocs=2)
    expected = gradients(*joined_batch())
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"gradients{rank}"), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
