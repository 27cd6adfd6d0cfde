"""One step of training, the same for every method: loss, backward, clipping, update. Nothing in it waits for a device.

What a step returns stays on the device; the loop looks at it once an epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdpd.config import RunConfig
from gdpd.distillers import Batch, Distiller
from gdpd.training.adam import FlatAdam
from gdpd.training.devices import Devices
from gdpd_kernels.ranges import span


class TrainingStep:
    """The step of a distiller and its optimizer.

    Args:
        distiller: trained in place; put on its device and into its precision.
        config: learning rate, weight decay, clipping.
        fabric: launched.
        graphed: keep all that a step reads on the device, so that it can be recorded (`gdpd.training.graph`).
    """

    def __init__(self, distiller: Distiller, config: RunConfig, fabric: Devices, *, graphed: bool = False) -> None:
        self.fabric = fabric
        self.distiller = distiller
        self.max_norm = config.gradient_clip
        wrapped = fabric.setup_module(distiller)
        # Fabric's wrapper looks through every tensor of a batch; only the gradients of several devices need it.
        self.module: nn.Module = wrapped if fabric.world_size > 1 else distiller
        self.optimizer = build_optimizer(distiller, config, graphed=graphed)

    def __call__(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Train on a batch; the loss and its parts, detached, see `Distiller.loss`."""
        self.optimizer.zero_grad()
        with self.fabric.autocast():
            loss, parts = self.module(batch, epoch)
        self.backward(loss)
        with span("optimizer"):
            if self.max_norm is not None and not isinstance(self.optimizer, FlatAdam):
                for group in self.optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], self.max_norm)
            self.optimizer.step()
        return {"loss": loss.detach(), **parts}

    def backward(self, loss: Tensor) -> None:
        """The gradients of a step's loss."""
        with span("backward"):
            self.fabric.backward(loss)

    def set_learning_rate(self, rate: float) -> None:
        """Go on with another learning rate."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def release(self) -> None:
        """Leave the distiller's parameters as tensors of their own; the step is of no use afterwards."""
        if isinstance(self.optimizer, FlatAdam):
            self.optimizer.release()


def build_optimizer(distiller: Distiller, config: RunConfig, *, graphed: bool = False) -> torch.optim.Optimizer:
    """Adam over the student and, as a group of its own, whatever the method trains beside it.

    Two groups, because gradients are clipped by group: how far the student is clipped must not depend on the method.
    """
    student = list(distiller.student.parameters())
    known = {id(parameter) for parameter in student}
    beside = [parameter for parameter in distiller.parameters() if id(parameter) not in known]
    groups = [group for group in (student, beside) if group]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if graphed:
        rate = torch.tensor(config.learning_rate, device=student[0].device)
        options.update(lr=rate, capturable=True)
        return torch.optim.Adam([{"params": group} for group in groups], fused=True, **options)
    kinds = {(parameter.dtype, parameter.device.type) for group in groups for parameter in group}
    if len(kinds) == 1 and kinds.pop()[1] == "cpu":
        return FlatAdam(groups, max_norm=config.gradient_clip, **options)
    return torch.optim.Adam([{"params": group} for group in groups], fused=True, **options)
