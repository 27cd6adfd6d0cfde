"""The methods' losses against their formulas, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdpd_kernels as gk
import toy
from gdpd.denoisers import MLPDenoiser
from gdpd.distillers import GDPD, KD, Base, Batch, build_distiller, distiller_names, hinton_loss
from gdpd.models import Classifier, build_model

TEACHER_DIM = 12


def student() -> Classifier:
    torch.manual_seed(0)
    return build_model("lstm", in_channels=1, num_classes=3, layers=1, hidden=8)


def batch(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        x_prefix=torch.randn(n, 1, 5, generator=generator),
        y=torch.arange(n) % 3,
        z_long=torch.randn(n, TEACHER_DIM, generator=generator),
        teacher_logits=torch.randn(n, 3, generator=generator),
    )


def gdpd(**options: Any) -> GDPD:
    return GDPD(student(), TEACHER_DIM, **{"warmup_epochs": 2, **options})


def test_base_is_cross_entropy() -> None:
    made, data = Base(student()), batch()
    loss, parts = made.loss(data, 0)
    torch.testing.assert_close(loss, F.cross_entropy(made.student(data.x_prefix)[1], data.y))
    assert set(parts) == {"ce"}
    assert not parts["ce"].requires_grad


def test_kd_adds_the_weighted_divergence() -> None:
    made, data = KD(student(), loss_ratio=0.5, temperature=3.0), batch()
    loss, parts = made.loss(data, 0)
    logits = made.student(data.x_prefix)[1]
    teacher, pupil = (data.teacher_logits / 3).softmax(1), (logits / 3).log_softmax(1)  # type: ignore[operator]
    divergence = 9 * (teacher * (teacher.log() - pupil)).sum(1).mean()
    torch.testing.assert_close(parts["kd"], divergence.detach())
    torch.testing.assert_close(loss, F.cross_entropy(logits, data.y) + 0.5 * divergence)


def test_hinton_loss_of_equal_logits_is_zero_and_otherwise_positive() -> None:
    logits = torch.randn(4, 3)
    assert float(hinton_loss(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(hinton_loss(logits, logits.flip(1), 2.0)) > 0


@pytest.mark.parametrize("hinton", [True, False])
def test_warmup_loss_is_the_weighted_sum_of_its_parts(hinton: bool) -> None:
    made = gdpd(loss_ratio=10.0, hinton=hinton)
    loss, parts = made.loss(batch(), 1)
    assert set(parts) == {"ce", "noise", "autoencoder"} | ({"kd"} if hinton else set())
    beside = sum((part for name, part in parts.items() if name != "ce"), torch.zeros(()))
    torch.testing.assert_close(loss.detach(), parts["ce"] + 10.0 * beside)


@pytest.mark.parametrize("hinton", [True, False])
def test_loss_after_the_warmup_is_the_weighted_sum_of_its_parts(hinton: bool) -> None:
    made = gdpd(loss_ratio=0.1, hinton=hinton)
    loss, parts = made.loss(batch(), 2)
    assert set(parts) == {"ce", "ce_hat", "alpha"} | ({"kd"} if hinton else set())
    beside = parts["ce_hat"] + (parts["kd"] if hinton else 0)
    torch.testing.assert_close(loss.detach(), parts["ce"] + 0.1 * beside)
    assert parts["alpha"].shape == (6, 1)


def test_sampled_cross_entropy_is_the_formula_written_out() -> None:
    made, data = gdpd(alpha=0.4, denoiser=MLPDenoiser(8, hidden=(16,)), hinton=False), batch()
    torch.manual_seed(5)
    _, parts = made.loss(data, 2)
    torch.manual_seed(5)
    z = made.trans(made.student(data.x_prefix)[0])
    z_hat = gk.reverse_sample(made.prior.denoiser, z, table=made.table, alpha=0.4, num_samples=1)[0]
    made.proj[1].reset_running_stats()
    logits = made.student.head(made.proj(z_hat))
    torch.testing.assert_close(parts["ce_hat"], F.cross_entropy(logits, data.y).detach())


def test_several_samples_average_their_losses() -> None:
    torch.manual_seed(0)
    made = gdpd(num_samples=3, alpha=0.4, denoiser=MLPDenoiser(8, hidden=(16,)), hinton=False)
    made.proj.eval()
    made.train = lambda mode=True: made  # type: ignore[method-assign, assignment]
    seen: list[Tensor] = []
    made.proj.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    _, parts = made.loss(batch(), 2)
    assert seen[0].shape == (18, 8)
    each = [F.cross_entropy(made.student.classify(part), batch().y) for part in seen[0].chunk(3)]
    torch.testing.assert_close(parts["ce_hat"], torch.stack(each).mean().detach())
    assert len({float(loss.detach()) for loss in each}) == 3


@pytest.mark.parametrize("alpha", ["per_sample", "per_dimension", 0.5])
@pytest.mark.parametrize("denoiser", ["bottleneck", "mlp"])
@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_after_the_warmup_reach_what_should_learn(alpha: str | float, denoiser: str, freeze: bool) -> None:
    made = gdpd(alpha=alpha, denoiser=denoiser, freeze_prior=freeze)
    made.loss(batch(), 2)[0].backward()

    def moves(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert moves(made.student)
    assert moves(made.trans)
    assert moves(made.proj)
    assert moves(made.fusion) == isinstance(alpha, str)
    assert moves(made.prior.denoiser) == (not freeze)
    assert made.prior.autoencoder is not None
    assert not moves(made.prior.autoencoder)


def test_frozen_prior_keeps_every_number_and_learns_again_in_a_new_warmup() -> None:
    made = gdpd(freeze_prior=True)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1, weight_decay=0.1)
    made.train()
    made.loss(batch(), 0)[0].backward()
    optimizer.step()
    before = {name: value.clone() for name, value in made.prior.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        made.train()  # as a training loop does at every epoch
        made.loss(batch(), 2)[0].backward()
        optimizer.step()
    for name, value in made.prior.state_dict().items():
        assert torch.equal(value, before[name]), name
    made.loss(batch(), 0)[0].backward()
    assert made.prior.denoiser.training
    assert any(p.grad is not None for p in made.prior.parameters())


def test_only_the_student_is_needed_to_predict() -> None:
    made = gdpd()
    called: list[str] = []
    for name, module in (("trans", made.trans), ("proj", made.proj), ("fusion", made.fusion)):
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    made.eval()
    made.student(batch().x_prefix)
    assert not called


def test_identity_space_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match=r"has 12 dimensions where the student's head reads 8"):
        gdpd(target_space="identity")
    same = GDPD(student(), 8, warmup_epochs=1, target_space="identity")
    data = batch()
    data.z_long = torch.randn(6, 8)
    assert set(same.loss(data, 0)[1]) == {"ce", "kd", "noise"}


@pytest.mark.parametrize(
    ("change", "epoch", "told"),
    [
        ({"z_long": None}, 0, r"batch.z_long is None.*\[6, 12\]"),
        ({"z_long": torch.zeros(6, 5)}, 0, r"batch.z_long is of shape \(6, 5\)"),
        ({"teacher_logits": None}, 0, "batch.teacher_logits is None"),
        ({"teacher_logits": torch.zeros(6, 4)}, 2, r"teacher's logits have shape \(6, 4\) and the student's \(6, 3\)"),
    ],
)
def test_missing_or_misshapen_teacher_outputs_are_named(change: dict[str, Any], epoch: int, told: str) -> None:
    data = batch()
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises(ValueError, match=told):
        gdpd().loss(data, epoch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_samples": 0}, "num_samples=0 is below 1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 is below 0"),
        ({"alpha": 2.0}, "alpha=2.0 is outside"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 501}, "501"),
        ({"denoiser": "unet"}, "unet"),
        ({"denoiser_options": {"reductoin": 2}}, "did you mean 'reduction'"),
        ({"window": "upper"}, "upper"),
    ],
)
def test_options_outside_their_limits_are_refused_when_the_module_is_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gdpd(**options)


def test_batch_of_one_in_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="batch"):
        gdpd().loss(batch(1), 2)


def test_a_loop_of_one_s_own_lowers_the_loss_in_both_stages() -> None:
    torch.manual_seed(0)
    X, y = (torch.from_numpy(array) for array in toy.series(12, classes=3))
    data = Batch(X, y, z_long=F.one_hot(y, TEACHER_DIM).float(), teacher_logits=4.0 * F.one_hot(y, 3))
    made = gdpd(warmup_epochs=40)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    seen = []
    for epoch in range(80):
        optimizer.zero_grad()
        loss, parts = made.loss(data, epoch)
        loss.backward()
        optimizer.step()
        seen.append({name: float(part.mean()) for name, part in parts.items()})
    assert seen[79]["ce"] < 0.5 * seen[0]["ce"]
    assert seen[79]["kd"] < 0.5 * seen[0]["kd"]
    assert seen[39]["autoencoder"] < 0.5 * seen[0]["autoencoder"]
    assert seen[79]["ce_hat"] < 0.5 * seen[40]["ce_hat"]


def test_trajectory_shows_the_way_and_changes_nothing() -> None:
    made = gdpd()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    states = made.trajectory(batch().x_prefix)
    assert states["z_k"].shape == (6, 6, 8)
    assert states["z_short"].shape == (6, 8)
    assert states["alpha"].shape == (6, 1)
    assert states["timesteps"].tolist() == [400, 300, 200, 100, 0]
    torch.testing.assert_close(states["z_hat"], states["z_k"][-1])
    assert made.training
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_method_is_made_by_name_and_takes_what_it_knows_of_a_run_s_options() -> None:
    shared = {"warmup_epochs": 3, "epochs": 6, "loss_ratio": 7.0, "dataset": "none of theirs"}
    for name in distiller_names():
        made = build_distiller(name, student(), TEACHER_DIM, shared)
        assert made.loss_ratio == (1.0 if name == "base" else 7.0)  # Base has nothing to weigh
        assert made.warmup_epochs == (3 if name in ("fits", "dt2w", "gdpd") else 0)


def test_unknown_method_and_unknown_option_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'gdpd'"):
        build_distiller("gpdp", student(), TEACHER_DIM)
    with pytest.raises(ValueError, match=r"method 'kd' has no option 'temprature' \(did you mean 'temperature'\?\)"):
        build_distiller("kd", student(), TEACHER_DIM, temprature=2.0)
