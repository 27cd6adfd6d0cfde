"""Where training runs: Lightning Fabric, or one CPU, for which Fabric's import of three seconds would buy nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gdpd.config import RunConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class OneCpu:
    """What training uses of ``Fabric(accelerator="cpu", devices=1, precision="32-true")``, with the same effect."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.world_size = 1
        self.global_rank = 0
        self.is_global_zero = True

    def setup_module(self, module: nn.Module) -> nn.Module:
        """The module, on the device."""
        return module.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing is rounded."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss."""
        loss.backward()

    def barrier(self) -> None:
        """There is nobody to wait for."""


Devices: TypeAlias = "Fabric | OneCpu"


def launch(config: RunConfig) -> Devices:
    """The devices that a configuration asks for, ready for use.

    Raises:
        ValueError, RuntimeError: as Fabric's, for what this machine does not have.
    """
    if (config.accelerator, config.devices, config.precision) == ("cpu", 1, "32-true"):
        return OneCpu()
    from lightning_fabric import Fabric

    # The optional parts of a method have no gradient in one of the two stages.
    strategy = "ddp_find_unused_parameters_true" if config.devices > 1 else "auto"
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=strategy,
        precision=config.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric
