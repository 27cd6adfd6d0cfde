"""Which weights a stage keeps: the best on validation data, the last, or an average over the last epochs.

Validation sets of a few series are noisy judges: of six series, one more or less right moves accuracy by 17 points.
`average` does not ask them at all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gdpd.options import nearest

KINDS = ("best_val", "last", "average")
METRICS = ("ce", "auc_prc", "accuracy")


class Selection:
    """Weights kept so far, updated once per epoch.

    Args:
        kind: "best_val": the epoch with the best `metric` on validation data, the first of equals; "last": the last
            epoch; "average": the mean of the weights after each of the last `average_epochs` epochs (averages of
            BatchNorm's running statistics included; counters are taken from the last).
        epochs: epochs of the stage.
        metric: "ce" (lowest cross-entropy), "auc_prc" or "accuracy" (highest; ties go to the lower cross-entropy).
        first_epoch: epochs before this one are never kept (a warm-up).
        average_epochs: see `kind`; at most the epochs from `first_epoch` on.
    """

    def __init__(
        self,
        kind: str,
        epochs: int,
        *,
        metric: str = "ce",
        first_epoch: int = 0,
        average_epochs: int = 20,
    ) -> None:
        for name, value, known in (("selection", kind, KINDS), ("selection_metric", metric, METRICS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known{nearest(value, known)}. One of: {', '.join(known)}.")
        self.kind = kind
        self.metric = metric
        self.first_epoch = {
            "best_val": first_epoch,
            "last": epochs - 1,
            "average": max(first_epoch, epochs - average_epochs),
        }[kind]
        self.weights: dict[str, Tensor] = {}
        self.epoch: int | None = None
        self.scores: dict[str, float] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, epoch: int, model: nn.Module, scores: dict[str, float]) -> None:
        """Consider the weights of `model` after epoch `epoch`, whose validation scores are `scores`."""
        if epoch < self.first_epoch:
            return
        state = model.state_dict()
        if self.kind == "average" and self.count:
            for name, mean in self.weights.items():
                if mean.is_floating_point():
                    mean.add_((state[name] - mean) / (self.count + 1))
                else:
                    mean.copy_(state[name])
        elif self.kind != "best_val" or not self.weights or self._key(scores) < self._key(self.scores):
            self.weights = {name: value.clone() for name, value in state.items()}
        else:
            return
        self.count += 1
        self.epoch, self.scores = epoch, scores

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside `weights`."""
        return {"epoch": self.epoch, "scores": self.scores, "count": self.count}

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up a checkpoint's `weights` and `state`."""
        self.weights = weights
        self.epoch, self.scores, self.count = state["epoch"], state["scores"], state["count"]

    def _key(self, scores: dict[str, float]) -> tuple[float, ...]:
        ce = scores["ce"] if math.isfinite(scores["ce"]) else math.inf
        return (ce,) if self.metric == "ce" else (-scores[self.metric], ce)
