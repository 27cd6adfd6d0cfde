"""DiffKD, the flow-matching prior and likelihood guidance: each against its formula written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdpd_kernels as gk
import toy
from gdpd.denoisers import MLPDenoiser, WideDenoiser
from gdpd.distillers import GDPD, Batch, DiffKD
from gdpd.likelihood import guided_reverse
from gdpd.models import Classifier, build_model
from gdpd.prior import FeaturePrior
from gdpd.training import run

TEACHER_DIM = 12


def student() -> Classifier:
    torch.manual_seed(0)
    return build_model("lstm", in_channels=1, num_classes=3, layers=1, hidden=8).double()


def batch(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        x_prefix=torch.randn(n, 1, 5, generator=generator).double(),
        y=torch.arange(n) % 3,
        z_long=torch.randn(n, TEACHER_DIM, generator=generator).double(),
        teacher_logits=torch.randn(n, 3, generator=generator).double(),
    )


def batch_norm(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("target_space", ["autoencoder", "identity"])
def test_diffkd_is_its_formula_written_out(target_space: str) -> None:
    width = 8 if target_space == "identity" else TEACHER_DIM
    made = DiffKD(student(), width, denoiser="mlp", target_space=target_space, loss_ratio=0.5).double()
    data = batch()
    assert data.z_long is not None
    data.z_long = data.z_long[:, :width]
    torch.manual_seed(3)
    loss, parts = made.loss(data, 0)

    torch.manual_seed(3)
    code, expected = data.z_long, {}
    if target_space == "autoencoder":
        auto = made.prior.autoencoder
        assert auto is not None
        code = batch_norm(auto.encoder[0](data.z_long), auto.encoder[1])  # type: ignore[arg-type]
        expected["autoencoder"] = (auto.decoder(code) - data.z_long).square().mean()
    t = torch.randint(1000, (6,))
    key = torch.randint(-(2**63), 2**63 - 1, ())
    noise = gk.philox_normal(key, 6, 8, dtype=torch.float64)
    ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    denoiser = made.prior.denoiser
    expected["noise"] = sum(
        (denoiser((ab[t[i]].sqrt() * code[i] + (1 - ab[t[i]]).sqrt() * noise[i])[None], t[i : i + 1]) - noise[i])
        .square().mean() / 6
        for i in range(6)
    )  # type: ignore[assignment]  # fmt: skip
    z_short, logits = made.student(data.x_prefix)
    z = made.trans(z_short)
    alpha = made.fusion(z)
    eps = gk.philox_normal(torch.randint(-(2**63), 2**63 - 1, ()), 6, 8, dtype=torch.float64)
    z = alpha * z + (1 - alpha) * eps
    levels = [*ab[[400, 300, 200, 100, 0]].tolist(), 1.0]
    for k, step in enumerate((400, 300, 200, 100, 0)):
        predicted = denoiser(z, torch.full((6,), step))
        x0 = (z - math.sqrt(1 - levels[k]) * predicted) / math.sqrt(levels[k])
        z = math.sqrt(levels[k + 1]) * x0 + math.sqrt(1 - levels[k + 1]) * predicted
    refined = batch_norm(made.proj[0](z), made.proj[1])  # type: ignore[arg-type]
    expected["distance"] = (refined - code).square().mean()
    total = F.cross_entropy(logits, data.y) + 0.5 * sum(expected.values())
    assert set(parts) == {"ce", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-12)


def test_diffkd_s_distance_moves_the_student_and_not_the_autoencoder() -> None:
    made = DiffKD(student(), TEACHER_DIM).double()
    data = batch()
    found = made.terms(data, made.run_student(data), 0)
    found["distance"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.student.lstm.parameters())  # type: ignore[union-attr]
    assert made.prior.autoencoder is not None
    assert all(p.grad is None for p in made.prior.autoencoder.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in made.prior.denoiser.parameters())


def test_the_wide_denoiser_is_diffkd_s_second() -> None:
    torch.manual_seed(0)
    net = WideDenoiser(6, num_train_timesteps=10).double()
    z, t = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 9, 3, 1])
    h = z + net.time_embedding.weight[t]
    first, norm1, _, second, norm2, third, norm3, _, last = net.body
    assert [layer.out_features for layer in (first, second, third, last)] == [24, 6, 24, 6]
    h = batch_norm(second(batch_norm(first(h), norm1).clamp_min(0)), norm2)  # type: ignore[arg-type]
    expected = last(batch_norm(third(h), norm3).clamp_min(0))  # type: ignore[arg-type]
    torch.testing.assert_close(net(z, t), expected)


def test_the_wide_denoiser_refuses_bad_arguments_and_batches_of_one() -> None:
    with pytest.raises(ValueError, match="expansion=0 must be 1 or more"):
        WideDenoiser(6, expansion=0)
    with pytest.raises(ValueError, match="norm='group'"):
        WideDenoiser(6, norm="group")
    with pytest.raises(ValueError, match="batch of one row"):
        WideDenoiser(6)(torch.randn(1, 6), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"z has shape \[2, 5\]"):
        WideDenoiser(6)(torch.randn(2, 5), torch.tensor([0, 0]))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_on_the_flow_schedule_is_euler_on_straight_paths(steps: int) -> None:
    """dz/dtau = u with u = eps - x, from tau = 1 to 0, in the flow's own scale."""
    torch.manual_seed(0)
    net = MLPDenoiser(4, hidden=(16,), num_train_timesteps=100).double()
    start = torch.randn(7, 4, dtype=torch.float64)
    table = gk.ddim_table(100, steps, "flow", prediction="v", timestep_spacing="trailing")
    assert table.timesteps[0] == 99
    found = gk.reverse_sample(net, start, table=table)
    z, taus = start, [*((t + 1) / 100 for t in table.timesteps), 0.0]
    for k, t in enumerate(table.timesteps):
        tau = taus[k]
        scale = math.sqrt((1 - tau) ** 2 + tau**2)
        signal, sigma = (1 - tau) / scale, tau / scale
        v = net(z / scale, torch.full((7,), t))
        x, eps = signal * z / scale - sigma * v, sigma * z / scale + signal * v
        z = z + (taus[k + 1] - tau) * (eps - x)
    torch.testing.assert_close(found, z.detach(), rtol=1e-9, atol=1e-9)


def test_the_flow_prior_s_loss_is_flow_matching_up_to_its_weight() -> None:
    """||u - u_hat||² of flow matching is ||v - v_hat||² / ((1 - tau)² + tau²): a weight from 1 to 2."""
    torch.manual_seed(0)
    net = MLPDenoiser(4, hidden=(16,), num_train_timesteps=100).double()
    x, eps, t = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.tensor([0, 9, 49, 60, 88, 99])
    ab = gk.alphas_cumprod("flow", 100)
    for i in range(6):
        tau = (int(t[i]) + 1) / 100
        square = (1 - tau) ** 2 + tau**2
        z = (1 - tau) * x[i] + tau * eps[i]
        v = net(z[None] / math.sqrt(square), t[i : i + 1])[0]
        # u = (eps - x) as the linear map of (z, v) that it is
        u = ((2 * tau - 1) * z / math.sqrt(square) + v) / math.sqrt(square)
        flow = (u - (eps[i] - x[i])).square().mean()
        loss = gk.prior_loss(
            net, x[i][None], alphas_cumprod=ab, timesteps=t[i : i + 1], noise=eps[i][None], prediction="v"
        )
        torch.testing.assert_close(flow * square, loss, rtol=1e-8, atol=1e-10)


def test_a_flow_prior_learns_to_sample_in_one_step() -> None:
    torch.manual_seed(0)
    prior = FeaturePrior(
        MLPDenoiser(2, hidden=(32,)), 2, 2, target_space="identity", prediction="v", beta_schedule="flow"
    )
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.01)
    target = torch.tensor([[3.0, -1.0]])
    for _ in range(150):
        optimizer.zero_grad()
        prior.losses(target.expand(64, -1))["noise"].backward()
        optimizer.step()
    table = gk.ddim_table(1000, 1, "flow", prediction="v", timestep_spacing="trailing")
    z_hat = gk.reverse_sample(prior.denoiser, torch.randn(50, 2), table=table)
    assert float((z_hat - target).square().mean()) < 0.1 * float((torch.randn(50, 2) - target).square().mean())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_guided_steps_are_dps_written_out(prediction: str) -> None:
    torch.manual_seed(0)
    net = MLPDenoiser(4, hidden=(16,)).double()
    evidence, noise = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    table = gk.ddim_table(1000, 4, prediction=prediction)
    found = guided_reverse(net, evidence, noise, table, 0.3)
    assert found.grad_fn is not None
    ab = [*gk.alphas_cumprod("linear", 1000)[[750, 500, 250, 0]].tolist(), 1.0]
    for i in range(3):
        z = noise[i]
        for k, t in enumerate((750, 500, 250, 0)):
            here, there = ab[k], ab[k + 1]

            def states(z: Tensor, t: int = t, here: float = here) -> tuple[Tensor, Tensor]:
                out = net(z[None], torch.tensor([t]))[0]
                if prediction == "x0":
                    return out, (z - math.sqrt(here) * out) / math.sqrt(1 - here)
                if prediction == "eps":
                    return (z - math.sqrt(1 - here) * out) / math.sqrt(here), out
                return math.sqrt(here) * z - math.sqrt(1 - here) * out, math.sqrt(1 - here) * z + math.sqrt(here) * out

            def distance(z: Tensor, i: int = i, states: Any = states) -> Tensor:
                return (evidence[i] - states(z)[0]).norm()

            slope = torch.autograd.functional.jacobian(distance, z)  # d ||r||² / ||r|| is twice that of ||r||
            x0, eps = states(z)
            z = (math.sqrt(there) * x0 + math.sqrt(1 - there) * eps - 0.3 * 2 * slope).detach()
        torch.testing.assert_close(found[i], z, rtol=1e-8, atol=1e-9)


def test_guidance_of_scale_zero_is_the_plain_sampler_and_more_comes_nearer() -> None:
    torch.manual_seed(0)
    net = MLPDenoiser(4, hidden=(16,)).double().requires_grad_(False)
    evidence, noise = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    table = gk.ddim_table(1000, 8, timestep_spacing="leading")
    plain = gk.reverse_sample(net, noise, table=table)
    torch.testing.assert_close(guided_reverse(net, evidence, noise, table, 0.0), plain)
    far = (plain - evidence).norm()
    assert (guided_reverse(net, evidence, noise, table, 0.1) - evidence).norm() < far


def test_guidance_is_differentiable_in_the_evidence() -> None:
    torch.manual_seed(0)
    net = MLPDenoiser(2, hidden=(5,)).double()
    evidence, noise = torch.randn(2, 2).double().requires_grad_(), torch.randn(2, 2).double()
    table = gk.ddim_table(1000, 2)
    assert torch.autograd.gradcheck(lambda y: guided_reverse(net, y, noise, table, 0.2), evidence)
    with torch.no_grad():
        assert not guided_reverse(net, evidence, noise, table, 0.2).requires_grad


def test_gdpd_takes_the_other_conditioning_and_prediction() -> None:
    options: dict[str, Any] = {"warmup_epochs": 1, "denoiser": "mlp"}
    guided = GDPD(student(), TEACHER_DIM, conditioning="guidance", window="full", num_samples=2, **options).double()
    loss, parts = guided.loss(batch(), 1)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in guided.trans.parameters())
    assert "ce_hat" in parts
    flow = GDPD(
        student(), TEACHER_DIM, beta_schedule="flow", prediction="v", num_inference_steps=1,
        timestep_spacing="trailing", **options,
    ).double()  # fmt: skip
    assert flow.table.timesteps == (499,)
    assert flow.prior.prediction == "v"
    flow.loss(batch(), 0)[0].backward()
    flow.loss(batch(), 1)[0].backward()
    assert flow.trajectory(batch().x_prefix)["z_k"].shape == (2, 6, 8)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("alpha", ["per_sample", 0.3])
def test_the_control_without_a_reverse_process_classifies_the_start(num_samples: int, alpha: str | float) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"conditioning": "start", "alpha": alpha, "num_samples": num_samples, "hinton": False}
    control, data = GDPD(student(), TEACHER_DIM, warmup_epochs=1, **options).double(), batch()
    torch.manual_seed(1)
    loss, parts = control.loss(data, 1)
    loss.backward()
    assert all(p.grad is None for p in control.prior.parameters())
    torch.manual_seed(1)
    z = control.trans(control.student(data.x_prefix)[0])
    mixed = control.fusion(z)
    eps = torch.randn(num_samples, *z.shape, dtype=z.dtype)
    logits = control.student.classify(control.proj((mixed * z + (1 - mixed) * eps).flatten(0, 1)))
    expected = torch.nn.functional.cross_entropy(logits, data.y.repeat(num_samples))
    torch.testing.assert_close(parts["ce_hat"], expected.detach())


def test_the_control_without_the_prior_s_losses_learns_from_labels_alone() -> None:
    control = GDPD(student(), TEACHER_DIM, warmup_epochs=1, learn_prior=False, hinton=False).double()
    loss, parts = control.loss(batch(), 0)
    loss.backward()
    assert set(parts) == {"ce"}
    torch.testing.assert_close(loss.detach(), parts["ce"])
    assert all(p.grad is None for p in control.prior.parameters())
    control.loss(batch(), 1)[0].backward()
    assert all(p.grad is not None for p in control.prior.sampler.parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learn_prior": False, "consistency_steps": 10}, "learn_prior=False with consistency_steps=10"),
        ({"conditioning": "guided"}, r"conditioning='guided' is not known \(did you mean 'guidance'\?\)"),
        ({"conditioning": "guidance"}, "window='lower', eta=0.0.*Use window='full' and eta=0"),
        ({"conditioning": "guidance", "window": "full", "consistency_steps": 10}, "consistency_steps=10: guidance"),
        ({"conditioning": "guidance", "window": "full", "eta": 0.5}, "eta=0.5"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"prediction": "noise"}, "prediction is 'noise'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"beta_schedule": "flow", "window": "full", "timestep_spacing": "trailing"}, "alpha_bar is 0 at t = 999"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GDPD(student(), TEACHER_DIM, warmup_epochs=1, **options)


def test_the_flow_schedule_is_the_straight_path_s() -> None:
    ab = gk.alphas_cumprod("flow", 4)
    expected = [(1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2) for tau in (0.25, 0.5, 0.75, 1.0)]
    torch.testing.assert_close(ab, torch.tensor(expected, dtype=torch.float64))


def test_runs_by_diffkd_keep_a_trajectory(tmp_path: Any) -> None:
    config = toy.config(toy.folder(tmp_path), method="diffkd", denoiser="wide")
    metrics = run(config, tmp_path / "run")
    assert 0 <= metrics["auc_prc"] <= 100
    assert (tmp_path / "run" / "trajectory.npz").is_file()


def test_a_step_of_guidance_leaves_the_denoiser_s_parameters_alone_when_frozen() -> None:
    net = MLPDenoiser(4, hidden=(16,)).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    evidence = torch.randn(3, 4, requires_grad=True)
    guided_reverse(net, evidence, torch.randn(3, 4), gk.ddim_table(1000, 2), 0.3).sum().backward()
    assert evidence.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
