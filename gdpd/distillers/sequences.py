"""What methods that compare hidden sequences share: which steps count, and which step of the teacher's is meant.

A student reads a prefix and its sequence has as many steps; the teacher's has those of the full series.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENTS = ("stretch", "steps")


def check_alignment(align: str) -> str:
    """`align`, or a ValueError if it is not one of `ALIGNMENTS`."""
    if align not in ALIGNMENTS:
        raise ValueError(f"align={align!r} is not one of {', '.join(map(repr, ALIGNMENTS))}.")
    return align


def valid_steps(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Bool [batch, time], True inside each series of `sequence` [batch, time, width]."""
    steps = torch.arange(sequence.shape[1], device=sequence.device)
    if lengths is None:
        return torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
    return steps < lengths.to(sequence.device).unsqueeze(1)


def mean_over_steps(values: Tensor, lengths: Tensor | None) -> Tensor:
    """0-d mean of `values` [batch, time] or [batch, time, width] over the valid steps."""
    if lengths is None:
        return values.mean()
    valid = valid_steps(values, lengths)
    valid = valid if values.dim() == 2 else valid.unsqueeze(2)
    return values.where(valid, 0).sum() / (valid.sum() * values[0, 0].numel())


def aligned(
    teacher: Tensor, teacher_lengths: Tensor | None, student: Tensor, lengths: Tensor | None, align: str
) -> Tensor:
    """The teacher's sequence on the student's steps.

    Args:
        teacher: [batch, full time, width].
        teacher_lengths: int64 [batch], or None when all series have `full time` steps.
        student: [batch, time, any], of which the number of steps counts.
        lengths: int64 [batch], or None when all prefixes have `time` steps.
        align: "steps": step i is compared with step i, what the teacher knew at that time. "stretch": the teacher's
            sequence is read, by linear interpolation, at as many steps as the student has, so that the last step,
            which knows everything, is compared with the last. Where the run stretches the prefixes themselves to full
            length (prefix_mode="stretch") both are the same.

    Returns:
        [batch, time, width]; what stands past a prefix' end means nothing.

    Raises:
        ValueError: with "steps", a teacher's sequence that is shorter than the student's.
    """
    time, full = student.shape[1], teacher.shape[1]
    if align == "steps" or (time == full and lengths is None and teacher_lengths is None):
        if full < time:
            raise ValueError(
                f"the teacher's sequence has {full} steps and the student's {time}: with align='steps' the teacher "
                "must have read at least as many. Use align='stretch'."
            )
        return teacher[:, :time]

    def last(given: Tensor | None, steps: int) -> Tensor:  # [batch], the place of the last step
        whole = torch.full((len(teacher),), steps, device=teacher.device)
        return (whole if given is None else given.to(teacher.device)) - 1

    ends, own_ends = last(teacher_lengths, full), last(lengths, time)
    exact = torch.promote_types(teacher.dtype, torch.float32)
    step = ends.to(exact) / own_ends.clamp(min=1)
    places = torch.arange(time, device=teacher.device) * step.unsqueeze(1)  # [batch, time], fractional
    places = torch.minimum(places, ends.unsqueeze(1))
    low = places.floor()
    share = (places - low).to(teacher.dtype).unsqueeze(2)
    low = low.long()
    high = torch.minimum(low + 1, ends.unsqueeze(1))
    before, after = (teacher.gather(1, index.unsqueeze(2).expand(-1, -1, teacher.shape[2])) for index in (low, high))
    return before + share * (after - before)
