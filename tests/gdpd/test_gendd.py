"""GenDD: its loss against the formula in float64 loops, its sampler, its options, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdpd_kernels as gk
import toy
from gdpd.distillers import Batch, GenDD, build_distiller
from gdpd.distillers.gendd import _beta, class_means
from gdpd.embedded import EmbeddedHead, embed_tokens
from gdpd.models import Classifier, build_model
from gdpd.probe import LinearProbe
from gdpd.training import run
from gdpd.variance import LearnedRange

TEACHER_DIM, CLASSES, ROWS = 12, 3, 5


def network(hidden: int) -> Classifier:
    torch.manual_seed(hidden)
    return build_model("lstm", in_channels=1, num_classes=CLASSES, layers=1, hidden=hidden).double()


def batch(n: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(1)
    z_long = torch.randn(n, TEACHER_DIM, generator=generator).double()
    return Batch(
        x_prefix=torch.randn(n, 1, 5, generator=generator).double(),
        y=torch.arange(n) % CLASSES,
        z_long=z_long,
        teacher_logits=network(TEACHER_DIM).classify(z_long).detach(),
    )


def gendd(**options: Any) -> GenDD:
    """A small one in float64 whose zero weights are as after some training."""
    torch.manual_seed(0)
    small = {"token_width": 4, "hidden": 16, "blocks": 1, "repeats": 2, "num_train_timesteps": 50, "sampling_steps": 6}
    made = GenDD(network(8), TEACHER_DIM, **{**small, **options}).double()
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    data = batch()
    made.prepare(network(TEACHER_DIM), data.z_long, data.y)  # type: ignore[arg-type]
    return made


def target_of(made: GenDD, data: Batch, i: int) -> Tensor:
    """x0 of series i, from the definition."""
    weight, y = network(TEACHER_DIM).head.weight.detach(), int(data.y[i])
    assert data.z_long is not None
    assert data.teacher_logits is not None
    if made.target == "none":
        return data.z_long[i]
    if made.target == "labels":
        drawn_to = weight[y]
    elif made.target == "means":
        drawn_to = torch.stack([z for z, label in zip(data.z_long, data.y, strict=True) if int(label) == y]).mean(0)
    else:
        proba = data.teacher_logits[i].exp() / data.teacher_logits[i].exp().sum()
        drawn_to = sum((proba[c] * weight[c] for c in range(CLASSES)), torch.zeros(TEACHER_DIM))
    return (1 - made.contraction) * data.z_long[i] + made.contraction * drawn_to


OPTIONS: list[dict[str, Any]] = [
    {},
    {"target": "soft", "labelled": False, "mixup": 0, "drop_condition": 0.0},
    {"target": "means", "contraction": 0.7, "drop_condition": 1.0},
    {"target": "none", "normalise": False, "loss_ratio": 10.0},
    {"variance": "posterior", "repeats": 3},
    {"token_width": 5, "pad_tokens": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_the_loss_is_the_formula_written_out(options: dict[str, Any]) -> None:
    made, data = gendd(**options), batch()
    torch.manual_seed(7)
    loss, parts = made.loss(data, 0)

    z_short = made.student(data.x_prefix)[0].detach()
    width, tokens = made.tokens.width, made.tokens.tokens
    scale = 1.0
    targets = [target_of(made, data, i) for i in range(ROWS)]
    torch.manual_seed(7)
    if made.normalise:
        scale = math.sqrt(sum(float(x) ** 2 for target in targets for x in target) / (ROWS * TEACHER_DIM))
    conditions = [(z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() for z in z_short]
    mixed = [(c, F.pad(x / scale, (0, width * tokens - TEACHER_DIM))) for c, x in zip(conditions, targets, strict=True)]
    if made.mixup:
        share, other = torch.rand((), dtype=torch.float64), torch.randperm(ROWS)
        mixed = [
            tuple(share * a + (1 - share) * b for a, b in zip(mixed[i], mixed[int(other[i])], strict=True))
            for i in range(ROWS)
        ]  # type: ignore[misc]
    rows = made.repeats * ROWS * tokens
    dropped = torch.rand(rows) < made.drop_condition
    t = torch.randint(50, (rows,))
    noise = torch.randn(rows, width, dtype=torch.float64)
    alpha_bar = gk.alphas_cumprod("cosine", 50)
    head, bound = made.denoiser.head, LearnedRange(alpha_bar)
    squares, variational = 0.0, 0.0
    for r in range(rows):
        c, x0 = mixed[r % (ROWS * tokens) // tokens]
        token = r % tokens
        ab = alpha_bar[t[r]]
        z_t = ab.sqrt() * x0[token * width : (token + 1) * width] + (1 - ab).sqrt() * noise[r]
        c = made.denoiser.no_condition if dropped[r] else c
        cond = head.condition(c[None], torch.tensor([token]))
        eps, v = head.noise_and_variance(z_t[None], t[r], cond).detach().chunk(2, dim=1)
        squares += float((eps[0] - noise[r]).square().mean()) / rows
        variational += float(bound.variational_term(noise[r][None], eps, v, t[r : r + 1])) / rows
    assert float(parts["noise"]) == pytest.approx(squares, rel=1e-10)
    expected = made.loss_ratio * squares
    if made.variance == "learned":
        assert float(parts["variational"]) == pytest.approx(variational, rel=1e-10)
        expected += made.loss_ratio * variational
    variance = z_short.var(0, unbiased=False)
    standard = (z_short - z_short.mean(0)) / (variance + 1e-4 * variance.mean() + 1e-12).sqrt()
    logits = standard @ made.probe.weight.T + made.probe.bias
    assert data.teacher_logits is not None
    taught_by = F.one_hot(data.y, CLASSES).double() if made.labelled else data.teacher_logits.softmax(1)
    probe = -float((taught_by * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean().detach())
    assert float(parts["ce" if made.labelled else "probe"]) == pytest.approx(probe, rel=1e-10)
    expected += probe
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    assert ("ce" in parts) == made.labelled != ("probe" in parts)


def test_cross_entropy_trains_the_probe_and_diffusion_the_feature() -> None:
    made, data = gendd(), batch()
    made.loss(data, 0)[0].backward()
    body = [p for name, p in made.student.named_parameters() if not name.startswith("head")]
    assert made.student.head.weight.grad is None
    assert made.probe.weight.grad is not None
    assert made.probe.weight.grad.any()
    assert all(p.grad is not None and bool(p.grad.any()) for p in body)
    without = gendd(drop_condition=1.0)  # nothing but the condition leads to the feature
    without.loss(data, 0)[0].backward()
    assert all(p.grad is None or not p.grad.any() for n, p in without.student.named_parameters() if "head" not in n)


def test_the_student_s_head_is_the_probe_of_the_last_call() -> None:
    made, data = gendd(), batch()
    made.loss(data, 0)
    data.x_prefix = 2 * data.x_prefix
    made.loss(data, 0)
    feature, logits = made.student(data.x_prefix)
    torch.testing.assert_close(logits, made.probe.eval()(feature))
    made.probe.requires_grad_(False).weight.zero_()
    made.probe.fold_into(made.student.head)
    torch.testing.assert_close(made.student(data.x_prefix)[1], made.probe.bias.expand(ROWS, -1))


def test_the_probe_standardises_by_the_batch_and_keeps_running_means_by_rows() -> None:
    probe = LinearProbe(3, 2).double()
    first, second = torch.randn(5, 3).double(), 7 + torch.randn(32, 3).double()
    probe(first)
    torch.testing.assert_close(probe.mean, first.mean(0))
    found = probe(second)
    share = 32 / (32 + 64)
    torch.testing.assert_close(probe.mean, (1 - share) * first.mean(0) + share * second.mean(0))
    expected = (1 - share) * first.var(0, unbiased=False) + share * second.var(0, unbiased=False)
    torch.testing.assert_close(probe.variance, expected)
    torch.testing.assert_close(found.mean(0), probe.bias)
    probe.eval()(first)
    torch.testing.assert_close(probe.variance, expected)


def test_a_probe_learns_on_features_of_any_scale() -> None:
    torch.manual_seed(0)
    y = torch.arange(40) % 2
    feature = 5 + 1e-4 * (torch.randn(40, 6) + 2 * y[:, None])
    probe, head = LinearProbe(6, 2), torch.nn.Linear(6, 2)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(probe(feature), y).backward()
        optimizer.step()
    probe.fold_into(head)
    assert float((head.double()(feature.double()).argmax(1) == y).double().mean()) > 0.9


def test_without_labels_none_is_read_and_the_probe_learns_the_teacher() -> None:
    made, data = gendd(labelled=False, target="none", two_stage=True, warmup_epochs=1), batch()
    losses = []
    for y in (data.y, 2 - data.y):
        torch.manual_seed(5)
        data.y = y
        losses.append([float(made.loss(data, epoch)[0].detach()) for epoch in (0, 1)])
    assert losses[0] == losses[1]
    optimizer = torch.optim.Adam(made.probe.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss, parts = made.loss(data, 1)
        loss.backward()
        optimizer.step()
    assert data.teacher_logits is not None
    entropy = torch.distributions.Categorical(logits=data.teacher_logits).entropy().mean()
    assert float(parts["probe"]) == pytest.approx(float(entropy), abs=1e-3)
    data.teacher_logits = None
    with pytest.raises(ValueError, match=r"batch\.teacher_logits is None"):
        made.loss(data, 1)


def test_two_stages_learn_the_feature_and_then_the_probe_alone() -> None:
    made, data = gendd(two_stage=True, warmup_epochs=2), batch()
    made.train()
    assert made.warmup_epochs == 2
    loss, parts = made.loss(data, 1)
    torch.testing.assert_close(loss.detach(), parts["noise"] + parts["variational"])
    loss, parts = made.loss(data, 2)
    assert set(parts) == {"ce"}
    loss.backward()
    reached = {name for name, p in made.named_parameters() if p.grad is not None}
    assert reached == {"probe.weight", "probe.bias"}
    assert not made.student.training
    made.loss(data, 0)
    assert made.student.training
    assert all(p.requires_grad for p in made.student.parameters())


def test_warmup_epochs_of_a_run_count_only_with_two_stages() -> None:
    shared = {"warmup_epochs": 3}
    assert build_distiller("gendd", network(8), TEACHER_DIM, shared).warmup_epochs == 0
    assert build_distiller("gendd", network(8), TEACHER_DIM, shared, two_stage=True).warmup_epochs == 3


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("variance", ["posterior", "learned"])
def test_samples_are_those_of_the_ancestral_loop(variance: str, guidance: float, samples: int) -> None:
    made, data = gendd(variance=variance, guidance=guidance, num_samples=samples), batch()
    z_hat, logits = made.sample(data.x_prefix, seed=11)
    z_short = made.student.eval()(data.x_prefix)[0]
    head, timesteps = made.denoiser.head, [40, 32, 24, 16, 8, 0]
    alpha_bar = [*gk.alphas_cumprod("cosine", 50)[timesteps].tolist(), 1.0]
    c = F.layer_norm(z_short, (8,))
    total = torch.zeros(ROWS, TEACHER_DIM, dtype=torch.float64)
    for sample in range(samples):

        def draw(step: int, sample: int = sample) -> Tensor:
            return gk.philox_normal(11, ROWS * 3, 4, step=step, sample=sample, dtype=torch.float64)

        z = draw(0)
        for k, t in enumerate(timesteps):
            ab, before = alpha_bar[k], alpha_bar[k + 1]
            beta = 1 - ab / before
            nothing = made.denoiser.no_condition.expand_as(c)
            (eps, v), (free, _) = (
                head.noise_and_variance(z, torch.tensor(t), head.condition_tokens(given)).chunk(2, dim=1)
                for given in (c, nothing)
            )
            x0 = (z - math.sqrt(1 - ab) * (free + guidance * (eps - free))) / math.sqrt(ab)
            z = (math.sqrt(before) * beta * x0 + math.sqrt(ab / before) * (1 - before) * z) / (1 - ab)
            posterior = (1 - before) / (1 - ab) * beta
            if posterior:
                share = 0.5 * (v + 1) if variance == "learned" else torch.zeros_like(v)
                z = z + draw(k + 1) * torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior)))
        total += z.view(ROWS, TEACHER_DIM).detach() / samples
    torch.testing.assert_close(z_hat, total * made.scale, rtol=1e-7, atol=1e-9)
    teacher = network(TEACHER_DIM)
    torch.testing.assert_close(logits, teacher.classify(z_hat).detach())


def test_sampling_changes_nothing_and_follows_torch_s_seed() -> None:
    made, data = gendd(), batch()
    made.train()
    before = copy.deepcopy(made.state_dict())
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(made.sample(data.x_prefix)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert made.student.training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_head_with_a_learned_variance_samples_by_the_operator_too() -> None:
    learned, fixed, x = gendd(), gendd(variance="posterior"), batch().x_prefix
    found, _ = learned.sample(x, seed=2, variance="posterior")
    torch.testing.assert_close(found, fixed.sample(x, seed=2)[0])
    assert not torch.allclose(found, learned.sample(x, seed=2)[0])
    with pytest.raises(ValueError, match="variance='learned': this head samples with 'posterior'"):
        fixed.sample(x, variance="learned")


def test_the_guided_head_runs_natively() -> None:
    made = gendd(variance="posterior").float()
    x = batch().x_prefix.float()
    plain, fused = copy.deepcopy(made), made
    plain.backend, fused.backend = "reference", "native"
    torch.testing.assert_close(fused.sample(x, seed=1)[0], plain.sample(x, seed=1)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["learned", "posterior"])
def test_the_loss_runs_natively_with_the_reference_s_gradients(variance: str) -> None:
    data, found = batch(), []
    for backend in ("reference", "native"):
        made = gendd(variance=variance, backend=backend, token_width=5, pad_tokens=True)
        torch.manual_seed(7)
        loss, _ = made.loss(data, 0)
        loss.backward()
        found.append([loss, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for native, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-9, atol=1e-12)


def test_conditions_are_embedded_once_and_given_to_every_token() -> None:
    made = gendd()
    head, free = made.denoiser.head, torch.randn(8).double()
    c, dropped = torch.randn(ROWS, 8).double(), torch.rand(2, ROWS, 3) < 0.4
    cond = head.condition_tokens(c).repeat(2, 1)
    cond = torch.cat([torch.where(dropped.flatten()[:, None], free, cond[:, :8]), cond[:, 8:]], dim=1)
    z, t = torch.randn(len(cond), 4).double(), torch.arange(len(cond)) % 50
    expected = head.noise_and_variance(z, t, cond)
    given = embed_tokens(head, c, free, dropped)
    torch.testing.assert_close(EmbeddedHead(head, variance=False)(z, t, given), expected[:, :4])
    state = torch.cat([z, torch.full_like(z, torch.nan)], dim=1)  # the second half is read by nobody
    torch.testing.assert_close(EmbeddedHead(head, variance=True)(state, t, given), expected)


def test_the_head_is_in_the_state_once_and_copies_have_their_own() -> None:
    made = gendd()
    made.loss(batch(), 0)
    assert not any("embedded" in name for name in made.state_dict())
    other = copy.deepcopy(made)
    assert other.embedded_head.head is other.denoiser.head is not made.denoiser.head
    assert made.embedded_head is made.embedded_head
    made.denoiser.head = copy.deepcopy(made.denoiser.head)
    assert made.embedded_head.head is made.denoiser.head


@pytest.mark.parametrize("variance", ["learned", "posterior"])
def test_under_autocast_the_loss_is_that_of_float32_to_rounding(variance: str) -> None:
    made, data = gendd(variance=variance).float(), batch()
    for name in ("x_prefix", "z_long", "teacher_logits"):
        setattr(data, name, getattr(data, name).float())
    losses = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, parts = made.loss(data, 0)
        loss.backward()
        losses.append(torch.stack([loss.detach().float(), *(part.float() for part in parts.values())]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.02)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())


def test_class_means_are_means_by_class_and_zero_without_series() -> None:
    features, y = torch.randn(6, 2), torch.tensor([0, 2, 0, 2, 2, 0])
    found = class_means(features, y, 4)
    torch.testing.assert_close(found[0], features[y == 0].mean(0))
    torch.testing.assert_close(found[2], features[y == 2].mean(0))
    assert not found[[1, 3]].any()


def test_the_share_of_a_mix_has_the_spread_of_its_beta() -> None:
    torch.manual_seed(0)
    like = torch.zeros(())
    peaked = torch.stack([_beta(50.0, like) for _ in range(200)])
    uniform = torch.stack([_beta(1.0, like) for _ in range(200)])
    assert float(peaked.std()) == pytest.approx(math.sqrt(1 / (4 * 101)), rel=0.2)
    assert float(uniform.std()) == pytest.approx(math.sqrt(1 / 12), rel=0.2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "label"}, r"target='label' is not known \(did you mean 'labels'\?\)"),
        ({"variance": "fixed"}, "variance='fixed' is not known"),
        ({"contraction": 1.5}, r"contraction=1.5 is outside \[0, 1\]"),
        ({"drop_condition": -0.1}, "drop_condition=-0.1 is outside"),
        ({"repeats": 0}, "repeats=0 is below 1"),
        ({"num_samples": 0}, "num_samples=0 is below 1"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"labelled": False}, "target='labels' reads labels, and labelled=False. Use target='none' or 'soft'"),
        ({"token_width": 5}, r"token_width=5 does not divide .* 12 numbers.*pad_tokens=True"),
        ({"sampling_steps": 51}, "51"),
        ({"hidden": 0}, "hidden=0"),
    ],
)
def test_options_outside_their_limits_are_refused_when_the_module_is_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gendd(**options)


def test_what_is_missing_in_a_batch_or_of_the_teacher_is_named() -> None:
    data = batch()
    with pytest.raises(RuntimeError, match=r"Call prepare\(teacher, z_long, y\)"):
        GenDD(network(8), TEACHER_DIM).loss(data, 0)
    with pytest.raises(ValueError, match=r"classifier is \[3, 6\] and this method was made for \[3, 12\]"):
        gendd().prepare(network(6), torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))
    made = gendd(target="soft")
    data.teacher_logits = None
    with pytest.raises(ValueError, match=r"batch.teacher_logits is None, and target='soft' reads them"):
        made.loss(data, 0)
    data.z_long = torch.zeros(ROWS, 7)
    with pytest.raises(ValueError, match=r"batch.z_long is of shape \(5, 7\)"):
        made.loss(data, 0)


def test_a_run_trains_by_it_and_scores_the_plain_student(tmp_path: Any) -> None:
    options = {"hidden": 16, "blocks": 1, "repeats": 2}
    config = toy.config(toy.folder(tmp_path), method="gendd", method_options=options)
    metrics = run(config, tmp_path / "run")
    assert 0 <= metrics["auc_prc"] <= 100
    assert not any("denoiser" in file.name for file in (tmp_path / "run").iterdir())
