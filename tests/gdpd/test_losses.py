"""The loss of each method against its formula, written out in loops over series, classes and steps, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers import Batch, Distiller
from gdpd.distillers.lelp import LELP
from gdpd.distillers.taid import TAID
from gdpd.distillers.vid import VID
from gdpd.models import build_model
from lessons import CLASSES, FULL, STEPS, TEACHER_DIM, batch, in_float64, method

MAIN = 30  # an epoch after every warm-up and ramp


def of_student(made: Distiller, data: Batch) -> tuple[Tensor, Tensor]:
    return made.student(data.x_prefix, data.lengths)  # type: ignore[no-any-return]


def given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    gap = (a - b).abs()
    return 0.5 * gap * gap if gap < 1 else gap - 0.5


def softened(logits: Tensor, temperature: float) -> list[Tensor]:
    powers = [torch.exp(value / temperature) for value in logits]
    total = sum(powers[1:], powers[0])
    return [value / total for value in powers]


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return torch.stack([a * (a / b).log() for a, b in zip(p, q, strict=True)]).sum()


def kd(teacher: Tensor, pupil: Tensor, temperature: float) -> Tensor:
    """T² KL, mean over the rows."""
    rows = [kl(softened(t, temperature), softened(s, temperature)) for t, s in zip(teacher, pupil, strict=True)]
    return temperature**2 * torch.stack(rows).mean()


def at(made: Distiller, data: Batch) -> dict[str, Tensor]:
    def attention(rows: Tensor) -> Tensor:
        power = torch.stack([sum(value * value for value in row) / len(row) for row in rows])  # type: ignore[misc]
        return power / power.pow(2).sum().sqrt()

    sequence = made.student(data.x_prefix, data.lengths, sequence=True)[2]
    squares = []
    for i in range(len(data.y)):
        own = STEPS if data.lengths is None else int(data.lengths[i])
        full = FULL if data.teacher_lengths is None else int(data.teacher_lengths[i])
        places = np.arange(own) * (full - 1) / max(own - 1, 1)
        rows = given(data.teacher_sequence)[i, :full].numpy()
        columns = [np.interp(places, np.arange(full), rows[:, c]) for c in range(rows.shape[1])]
        met = torch.from_numpy(np.stack(columns, axis=1))
        squares.extend((attention(sequence[i, :own]) - attention(met)).pow(2).unbind())
    return {"at": torch.stack(squares).mean()}


def rkd(made: Distiller, data: Batch) -> dict[str, Tensor]:
    found = {}
    for name, z in (("s", of_student(made, data)[0]), ("t", given(data.z_long))):
        n = len(z)
        distance = {(i, j): (z[i] - z[j]).pow(2).sum().sqrt() for i in range(n) for j in range(n) if i != j}
        mean = torch.stack(list(distance.values())).mean()

        def cosine(i: int, j: int, k: int, z: Tensor = z) -> Tensor:
            if i in (j, k):
                return torch.zeros((), dtype=torch.float64)
            a, b = z[j] - z[i], z[k] - z[i]
            return (a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt()

        found[name] = ({pair: value / mean for pair, value in distance.items()}, cosine, n)
    (d_s, c_s, n), (d_t, c_t, _) = found["s"], found["t"]
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return {
        "distance": torch.stack([smooth_l1(d_s[pair], d_t[pair]) for pair in d_s]).sum() / n**2,
        "angle": torch.stack([smooth_l1(c_s(*one), c_t(*one)) for one in triples]).mean(),
    }


def pkt(made: Distiller, data: Batch) -> dict[str, Tensor]:
    def chances(z: Tensor) -> list[list[Tensor]]:
        rows = []
        for a in z:
            kernel = [((a @ b) / (a.norm() * b.norm()) + 1) / 2 for b in z]
            total = sum(kernel[1:], kernel[0])
            rows.append([value / total for value in kernel])
        return rows

    p_s, p_t = chances(of_student(made, data)[0]), chances(given(data.z_long))
    return {"pkt": torch.stack([kl(t, s) for t, s in zip(p_t, p_s, strict=True)]).sum() / len(data.y) ** 2}


def vid(made: Distiller, data: Batch) -> dict[str, Tensor]:
    assert isinstance(made, VID)
    mean, logs = made.mean(of_student(made, data)[0]), []
    for i in range(len(data.y)):
        for d in range(TEACHER_DIM):
            v = torch.log1p(made.scale[d].exp()) + 1e-5
            normal = torch.distributions.Normal(mean[i, d], v.sqrt())
            logs.append(-normal.log_prob(given(data.z_long)[i, d]) - 0.5 * math.log(2 * math.pi))
    return {"vid": torch.stack(logs).mean()}


def dkd(made: Distiller, data: Batch) -> dict[str, Tensor]:
    temperature, logits = 2.0, of_student(made, data)[1]
    target, others = [], []
    for i, y in enumerate(data.y.tolist()):
        p, q = softened(given(data.teacher_logits)[i], temperature), softened(logits[i], temperature)
        target.append(kl([p[y], 1 - p[y]], [q[y], 1 - q[y]]))
        rest = [c for c in range(len(p)) if c != y]
        others.append(kl([p[c] / (1 - p[y]) for c in rest], [q[c] / (1 - q[y]) for c in rest]))
    return {"tckd": 4 * torch.stack(target).mean(), "nckd": 4 * torch.stack(others).mean()}


def dt2w(made: Distiller, data: Batch) -> dict[str, Tensor]:
    sequence = made.student(data.x_prefix, data.lengths, sequence=True)[2]
    values = []
    for i in range(len(data.y)):
        own = STEPS if data.lengths is None else int(data.lengths[i])
        full = FULL if data.teacher_lengths is None else int(data.teacher_lengths[i])
        values.append(soft_dtw_by_cells(made.regressor(sequence[i, :own]), given(data.teacher_sequence)[i, :full], 1.2))
    return {"dtw": torch.stack(values).mean()}


def soft_dtw_by_cells(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Algorithm 1 of arXiv 1703.01541, cell by cell."""
    r: dict[tuple[int, int], Tensor] = {(-1, -1): torch.zeros((), dtype=x.dtype)}
    for i in range(len(x)):
        for j in range(len(y)):
            before = [r[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in r]
            least = -gamma * torch.logsumexp(torch.stack(before) / -gamma, dim=0)
            r[i, j] = (x[i] - y[j]).pow(2).sum() + least
        if i == 0:
            del r[-1, -1]
    return r[len(x) - 1, len(y) - 1]


def tekap(made: Distiller, data: Batch) -> dict[str, Tensor]:
    l_t, logits = given(data.teacher_logits), of_student(made, data)[1]
    noise = torch.randn(3, *l_t.shape, dtype=torch.float64)  # the test seeds both alike
    perturbed = [kd(0.9 * l_t + 0.1 * eps, logits, 2.0) for eps in noise]
    return {"kd": kd(l_t, logits, 2.0), "perturbed": torch.stack(perturbed).sum()}


def ttm(made: Distiller, data: Batch, weighted: bool = False) -> dict[str, Tensor]:
    logits, rows = of_student(made, data)[1], []
    for l_t, l_s in zip(given(data.teacher_logits), logits, strict=True):
        powers = [p**0.1 for p in softened(l_t, 1)]
        total = sum(powers[1:], powers[0])
        rows.append(kl([p / total for p in powers], softened(l_s, 1)) * (total if weighted else 1))
    return {"ttm": torch.stack(rows).mean()}


def wttm(made: Distiller, data: Batch) -> dict[str, Tensor]:
    return ttm(made, data, weighted=True)


def pld(made: Distiller, data: Batch) -> dict[str, Tensor]:
    rows = []
    for l_t, l_s, y in zip(given(data.teacher_logits), of_student(made, data)[1], data.y.tolist(), strict=True):
        left = [y, *sorted((c for c in range(CLASSES) if c != y), key=lambda c: -float(l_t[c]))]
        row, q = torch.zeros((), dtype=torch.float64), softened(l_t, 1)
        while left:
            chances = softened(l_s[left], 1)
            row = row - q[left[0]] * chances[0].log()
            left.pop(0)
        rows.append(row)
    return {"pld": torch.stack(rows).mean()}


def taid(made: Distiller, data: Batch) -> dict[str, Tensor]:
    logits = of_student(made, data)[1]
    return {"taid": kd(logits.detach(), logits, 2.0) if made.end == 0 else kd(given(data.teacher_logits), logits, 2.0)}


def lelp(made: Distiller, data: Batch) -> dict[str, Tensor]:
    """By the joint distribution over all subclasses, where the module sums two terms."""
    assert isinstance(made, LELP)
    z, logits = of_student(made, data)
    inner, rows = made.head(z).view(len(z), CLASSES, -1), []
    scores = made.subclass_logits(given(data.z_long))
    for i in range(len(z)):
        joint = []
        for classes, within in ((given(data.teacher_logits)[i], scores[i]), (logits[i], inner[i])):
            p = softened(classes, 2.0)
            joint.append([p[c] * value for c in range(CLASSES) for value in softened(within[c], 1)])
        rows.append(kl(*joint))
    whole, classes_alone = 4 * torch.stack(rows).mean(), kd(given(data.teacher_logits), logits, 2.0)
    return {"kd": classes_alone, "subclasses": whole - classes_alone}


FORMULAS: dict[str, Callable[[Distiller, Batch], dict[str, Tensor]]] = {
    "at": at, "rkd": rkd, "pkt": pkt, "vid": vid, "dkd": dkd, "dt2w": dt2w, "tekap": tekap, "ttm": ttm, "wttm": wttm,
    "pld": pld, "lelp": lelp, "taid": taid,
}  # fmt: skip
WEIGHTS = {
    "at": {"at": 1000.0}, "rkd": {"distance": 25.0, "angle": 50.0}, "pkt": {"pkt": 30000.0}, "vid": {"vid": 1.0},
    "dkd": {"tckd": 1.0, "nckd": 8.0}, "dt2w": {"dtw": 0.01}, "tekap": {"kd": 1.0, "perturbed": 0.8},
    "ttm": {"ttm": 45.0}, "wttm": {"ttm": 45.0}, "pld": {"pld": 1.0}, "lelp": {"kd": 1.0, "subclasses": 1.0},
    "taid": {"taid": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_those_of_the_formula(name: str, lengths: bool) -> None:
    made, data = method(name, loss_ratio=2.0), in_float64(batch(lengths=lengths))
    torch.manual_seed(7)
    loss, parts = made.loss(data, MAIN)
    torch.manual_seed(7)
    terms = FORMULAS[name](made, data)
    ce = F.cross_entropy(of_student(made, data)[1], data.y)
    expected = 2.0 * sum(WEIGHTS[name][key] * term for key, term in terms.items())
    if name != "pld":
        expected = expected + ce
    assert set(parts) == {"ce", *terms}
    for key, term in terms.items():
        torch.testing.assert_close(parts[key], term.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    learned = [p for p in made.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(value, learned, allow_unused=True) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()) + 1e-12)


def test_dkd_of_two_classes_is_kd_and_its_other_part_zero() -> None:
    made, data = method("dkd", classes=2, ramp_epochs=0), in_float64(batch(classes=2))
    loss, parts = made.loss(data, 0)
    assert float(parts["nckd"]) == 0.0
    expected = kd(given(data.teacher_logits), of_student(made, data)[1], 2.0)
    torch.testing.assert_close(parts["tckd"], expected.detach())
    torch.testing.assert_close(loss.detach(), parts["ce"] + parts["tckd"])
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in made.student.parameters() if p.grad is not None)


def test_dkd_stays_finite_for_a_certain_student_and_teacher() -> None:
    made, data = method("dkd"), in_float64(batch())
    data.teacher_logits = 500.0 * F.one_hot(data.y, CLASSES).double()
    made.student.head.weight.data.mul_(1e4)
    loss, _ = made.loss(data, MAIN)
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in made.student.parameters() if p.grad is not None)


def test_dkd_s_weight_grows_over_the_ramp() -> None:
    made, data = method("dkd", ramp_epochs=4), in_float64(batch())
    shares = [float(made.loss(data, epoch)[1]["tckd"] / made.loss(data, MAIN)[1]["tckd"]) for epoch in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert [made.phase(epoch) for epoch in range(5)] == ["ramp0", "ramp1", "ramp2", "main", "main"]


@pytest.mark.parametrize("name", ["rkd", "pkt", "lelp"])
def test_autocast_does_not_coarsen_what_is_told_by_small_differences(name: str) -> None:
    made = method(name).float()
    data = batch()
    data.z_long = given(data.z_long) + 30.0
    run = made.run_student(data)
    expected = made.terms(data, run, MAIN)
    with torch.autocast("cpu", torch.bfloat16):
        found = made.terms(data, run, MAIN)
    for key, term in expected.items():
        if key != "subclasses":  # the student's part of it is a layer, which is meant to run in bfloat16
            assert torch.equal(found[key], term)
    if name == "lelp":
        assert isinstance(made, LELP)
        scores = made.subclass_logits(data.z_long)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made.subclass_logits(data.z_long), scores)


@pytest.mark.parametrize("name", ["rkd", "pkt", "at"])
def test_features_that_coincide_or_vanish_give_finite_losses_and_gradients(name: str) -> None:
    for rows in (torch.zeros(6, TEACHER_DIM), torch.ones(6, TEACHER_DIM)):
        made, data = method(name), in_float64(batch())
        data.z_long = rows.double()
        data.teacher_sequence = rows.double().unsqueeze(1).expand(-1, FULL, -1)
        data.x_prefix[1] = data.x_prefix[0]
        loss, _ = made.loss(data, MAIN)
        loss.backward()
        assert bool(loss.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in made.student.parameters() if p.grad is not None)


def test_a_batch_of_one_has_no_relations() -> None:
    for name in ("rkd", "pkt"):
        made = method(name)
        parts = made.loss(in_float64(batch(1)), MAIN)[1]
        assert all(float(part) == 0.0 for key, part in parts.items() if key != "ce")


def test_vid_starts_at_the_variance_that_was_asked_for() -> None:
    for variance in (5.0, 0.1, 300.0):
        made = method("vid", initial_variance=variance)
        assert isinstance(made, VID)
        torch.testing.assert_close(F.softplus(made.scale.data) + 1e-5, torch.full_like(made.scale.data, variance))


def test_tekap_draws_new_teachers_in_every_step_from_torchs_generator() -> None:
    made, data = method("tekap"), in_float64(batch())
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(float(made.loss(data, 0)[1]["perturbed"]))
    assert seen[0] == seen[1] != seen[2]
    still = method("tekap", noise_share=0.0, perturbations=2).loss(data, 0)[1]
    scaled = method("kd").loss(data, 0)[1]["kd"]
    torch.testing.assert_close(still["perturbed"], 2 * scaled)


def test_taid_moves_from_start_to_end_at_least_with_the_epochs_and_faster_while_the_loss_falls() -> None:
    made, data = method("taid", epochs=11, start=0.2, end=0.9, step_size=0.1, momentum=0.5), in_float64(batch())
    assert isinstance(made, TAID)
    t, average, before = 0.2, 0.0, None
    for epoch in (0, 0, 3, 10, 10):
        t = max(t, 0.2 + 0.7 * epoch / 10)
        logits = of_student(made, data)[1].detach()
        between = (1 - t) * logits + t * given(data.teacher_logits)
        expected = float(kd(between, logits, 2.0))
        assert float(made.loss(data, epoch)[1]["taid"]) == pytest.approx(expected)
        average = 0.5 * average + 0.5 * (0.0 if before is None else (before - expected) / before)
        t = min(0.9, t + 0.1 / (1 + math.exp(-average)) * (1 - t))
        before = expected
        assert float(made.t) == pytest.approx(t)
    assert t == 0.9
    state = made.state_dict()
    assert {"t", "average", "before"} <= set(state)  # a resumed run goes on where it was
    made.eval()
    made.loss(data, 0)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_pld_of_a_teacher_certain_of_the_label_is_cross_entropy() -> None:
    made, data = method("pld"), in_float64(batch())
    data.teacher_logits = 1e3 * F.one_hot(data.y, CLASSES).double()
    loss, parts = made.loss(data, 0)
    torch.testing.assert_close(loss.detach(), parts["ce"])
    both = method("pld", cross_entropy=0.5).loss(data, 0)[0]
    torch.testing.assert_close(both.detach(), 1.5 * parts["ce"])


def test_lelp_s_directions_are_the_principal_ones_outside_the_classifier_of_variance_one() -> None:
    made = method("lelp", subclasses=3)
    assert isinstance(made, LELP)
    teacher = build_model("lstm", in_channels=1, num_classes=CLASSES, layers=1, hidden=TEACHER_DIM).double()
    generator = torch.Generator().manual_seed(2)
    z, y = torch.randn(200, TEACHER_DIM, generator=generator).double() + 3, torch.arange(200) % CLASSES
    made.prepare(teacher, z, y)
    span = torch.linalg.qr(teacher.head.weight.T.detach())[0]
    for c in range(CLASSES):
        rows = z[y == c]
        inside = rows - rows @ span @ span.T
        variances = torch.linalg.eigvalsh(torch.cov(inside.T, correction=0)).flip(0)
        scores = made.subclass_logits(rows)[:, c]
        torch.testing.assert_close(torch.cov(scores.T, correction=0), torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(scores.mean(0), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(made.directions[c].norm(dim=1), 1 / variances[:3].sqrt())
        moved = rows + teacher.head.weight[1].detach()  # along what the classifier reads: other classes, not subclasses
        torch.testing.assert_close(made.subclass_logits(moved)[:, c], scores)


def test_lelp_of_classes_with_few_or_equal_series_has_equal_subclasses_there() -> None:
    made = method("lelp", subclasses=4)
    assert isinstance(made, LELP)
    teacher = build_model("lstm", in_channels=1, num_classes=CLASSES, layers=1, hidden=TEACHER_DIM).double()
    z = torch.randn(9, TEACHER_DIM).double()
    z[4:7] = z[4]
    made.prepare(teacher, z, torch.tensor([0, 0, 0, 1, 2, 2, 2, 0, 0]))
    assert [int(rows.any(1).sum()) for rows in made.directions] == [4, 0, 0]
    data = in_float64(batch())
    assert bool(made.loss(data, 0)[0].isfinite())
    fresh = LELP(made.student, TEACHER_DIM)
    with pytest.raises(RuntimeError, match="Call prepare"):
        fresh.double().loss(data, 0)
    with pytest.raises(ValueError, match=r"z_long has shape \(9, 4\)"):
        made.prepare(teacher, z[:, :4], data.y)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("at", {"align": "none"}, "align='none' is not one of"),
        ("vid", {"initial_variance": 0.0}, "initial_variance=0.0 is not a finite number above"),
        ("dkd", {"ramp_epochs": -1}, "ramp_epochs=-1 is below 0"),
        ("dt2w", {"gamma": 0.0}, "gamma=0.0 is not above 0"),
        ("tekap", {"perturbations": 0}, "perturbations=0 is below 1"),
        ("tekap", {"noise_share": 1.5}, r"noise_share=1.5 is outside \[0, 1\]"),
        ("ttm", {"gamma": -1.0}, "gamma=-1.0 is not above 0"),
        ("pld", {"ranking_temperature": 0.0}, "ranking_temperature=0.0 is not above 0"),
        ("lelp", {"subclasses": 1}, "subclasses=1"),
        ("lelp", {"classes": TEACHER_DIM}, "12 classes span all 12 dimensions"),
        ("taid", {"start": 0.9, "end": 0.5}, "start=0.9, end=0.5"),
        ("taid", {"momentum": 1.0}, "momentum=1.0"),
        ("rkd", {"distance_wieght": 1.0}, r"did you mean 'distance_weight'"),
        ("wttm", {"gama": 1.0}, r"did you mean 'gamma'"),
    ],
)
def test_options_outside_their_limits_are_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        method(name, **options)
