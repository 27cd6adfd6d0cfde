"""A student, and batches with everything that a teacher can say about them, for tests of the methods."""

from __future__ import annotations

from typing import Any

import torch

from gdpd.distillers import Batch, Distiller, build_distiller
from gdpd.models import Classifier, build_model

TEACHER_DIM, WIDTH, CLASSES, STEPS, FULL = 12, 8, 3, 5, 9
RUN: dict[str, Any] = {"warmup_epochs": 2, "epochs": 4, "backend": "reference", "teacher_sequence_dim": TEACHER_DIM}


def student(classes: int = CLASSES, name: str = "lstm") -> Classifier:
    """A small network; the same weights at every call."""
    torch.manual_seed(0)
    options = {"layers": 1, "hidden": WIDTH} if name == "lstm" else {"widths": (WIDTH,), "kernel_sizes": (3,)}
    return build_model(name, in_channels=1, num_classes=classes, **options)


def batch(n: int = 6, *, classes: int = CLASSES, lengths: bool = False, seed: int = 1) -> Batch:
    """Prefixes of STEPS of FULL steps, of varying lengths if asked for."""
    generator = torch.Generator().manual_seed(seed)
    full = FULL - torch.arange(n) % 4
    made = Batch(
        x_prefix=torch.randn(n, 1, STEPS, generator=generator),
        y=torch.arange(n) % classes,
        index=torch.arange(n),
        z_long=torch.randn(n, TEACHER_DIM, generator=generator),
        teacher_logits=torch.randn(n, classes, generator=generator),
        teacher_sequence=torch.randn(n, FULL, TEACHER_DIM, generator=generator),
    )
    if lengths:
        assert made.teacher_sequence is not None
        made.lengths, made.teacher_lengths = STEPS - torch.arange(n) % 4, full
        steps = torch.arange(FULL)
        made.teacher_sequence *= (steps < full[:, None])[:, :, None]
        made.x_prefix *= (torch.arange(STEPS) < made.lengths[:, None])[:, None, :]
    return made


def in_float64(data: Batch) -> Batch:
    """The same in float64."""
    return Batch(
        **{
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in vars(data).items()
        }
    )


def method(name: str, *, classes: int = CLASSES, network: str = "lstm", **options: Any) -> Distiller:
    """A method by name around that student, in float64, that has met its teacher."""
    made = build_distiller(name, student(classes, network), TEACHER_DIM, RUN, **options).double()
    teacher = build_model("lstm", in_channels=1, num_classes=classes, layers=1, hidden=TEACHER_DIM).double()
    known = in_float64(batch(30, classes=classes))
    assert known.z_long is not None
    made.prepare(teacher, known.z_long, known.y)
    return made
