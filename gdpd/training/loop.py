"""The training loop of every stage and method: epochs, batches, one forward, one backward, one step.

What differs between a teacher, a baseline and GDPD is the distiller's loss. All randomness of an epoch is drawn from
generators seeded with (seed, stage, epoch, rank), so an epoch does not depend on how training came to it: a run that
was killed and resumed ends with the same bits.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd import metrics
from gdpd.config import RunConfig
from gdpd.distillers import Distiller
from gdpd.training.checkpoint import Checkpoint, CheckpointStore
from gdpd.training.devices import Devices
from gdpd.training.graph import GraphedStep
from gdpd.training.history import History, Progress
from gdpd.training.selection import Selection
from gdpd.training.step import TrainingStep
from gdpd.training.tensors import Series, TrainingSet, batches, outputs
from gdpd_kernels.ranges import span

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message says where, and what to change."""


def fit(
    distiller: Distiller,
    train: TrainingSet,
    validation: Series,
    *,
    stage: str,
    epochs: int,
    selection: Selection,
    config: RunConfig,
    fabric: Devices,
    history: History,
    store: CheckpointStore | None = None,
    progress: Progress | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Train `distiller` for `epochs` epochs, from the newest checkpoint of `stage` if there is one.

    Args:
        distiller: trained in place; after the call it holds the weights of the last epoch.
        train: on the training device.
        validation: what `selection` is told the scores on; on the training device.
        stage: name in checkpoints and seeds, such as "student".
        epochs: epochs in all, those of a checkpoint included.
        selection: keeps the weights of the student that count.
        config: batch size, optimiser, learning rate, clipping, seed, checkpoint interval.
        fabric: launched.
        history: gets a record an epoch.
        store: where checkpoints are; None trains without.
        progress: told of every epoch.
        about: entries of every record beside those of the epoch, such as the stage's name.

    Raises:
        TrainingDiverged: the loss or a parameter is no longer finite.
    """
    step = TrainingStep(distiller, config, fabric, graphed=config.graph_step)
    call = GraphedStep(step) if config.graph_step else step
    found = store.load(stage) if store is not None else None
    if found is not None:
        _restore(found, distiller, step.optimizer, selection)
    start = 0 if found is None else found.epoch
    if fabric.is_global_zero:
        history.rewind(stage, start)
    if start >= epochs:
        return
    distiller.train()
    if progress is not None:
        progress.start(stage, epochs, start)
    try:
        for epoch in range(start, epochs):
            began = time.perf_counter()
            rate = learning_rate(config, epoch, epochs)
            step.set_learning_rate(rate)
            phase = "warmup" if epoch < distiller.warmup_epochs else "main"
            with span("stage", stage=stage, phase=phase, epoch=epoch):
                parts, distributions = _train_epoch(call, train, epoch, stage, config, fabric)
            with fabric.autocast():
                scores = scores_of(outputs(distiller.student, validation)[1], validation.y)
            if not all(math.isfinite(value) for value in (*parts.values(), scores["ce"])):
                raise TrainingDiverged(
                    f"stage {stage!r}, epoch {epoch}: the losses are {parts}, and {scores['ce']} on validation data. "
                    f"Lower learning_rate (now {config.learning_rate}) or loss_ratio ({config.loss_ratio}), or set "
                    f"gradient_clip (now {config.gradient_clip})."
                )
            selection.update(epoch, distiller.student, scores)
            record = {
                **(about or {}),
                "epoch": epoch,
                "phase": phase,
                "train": parts,
                **distributions,
                "val": scores,
                "lr": rate,
                "seconds": time.perf_counter() - began,
            }
            if fabric.is_global_zero:
                history.append(record)
                done = epoch + 1
                if store is not None and (done == epochs or done % config.checkpoint_every == 0):
                    store.save(_checkpoint(stage, done, distiller, step.optimizer, selection))
            if progress is not None:
                progress.epoch(record)
    finally:
        step.release()
        if progress is not None:
            progress.stop()


def _train_epoch(
    step: TrainingStep | GraphedStep, train: TrainingSet, epoch: int, stage: str, config: RunConfig, fabric: Devices
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """One pass over the training set; the means of the loss and its parts, and summaries of what is a distribution."""
    seed_device(fabric.device, derived_seed(config.seed, stage, epoch, fabric.global_rank))
    order = torch.Generator().manual_seed(derived_seed(config.seed, stage, epoch, "order"))
    device, rank, ranks = fabric.device, fabric.global_rank, fabric.world_size
    sizes: list[int] = []
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for rows in batches(len(train), config.batch_size, order, least=2 * ranks):
        with span("step", batch=len(rows)):
            with span("data"):
                batch = train.batch(rows if ranks == 1 else rows[rank::ranks])
            sizes.append(len(rows))
            for name, part in step(batch, epoch).items():
                seen[name].append(part)
    # Everything is looked at here, once an epoch: a look at a number waits for the device.
    scalars = {name: torch.stack(parts) for name, parts in seen.items() if not parts[0].dim()}
    weights = torch.tensor(sizes, device=device) / len(train)
    means = (torch.stack(list(scalars.values())).float() * weights).sum(dim=1).tolist()
    distributions = {name: summary(torch.cat(parts)) for name, parts in seen.items() if parts[0].dim()}
    return dict(zip(scalars, means, strict=True)), distributions


def summary(values: Tensor) -> dict[str, float]:
    """Mean and quantiles of a tensor, as floats: mean, q05, q25, q50, q75, q95."""
    values = values.flatten().float()
    values = values[:: 1 + len(values) // 10**6]  # a million of them say as much; torch.quantile takes 16 at most
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, device=values.device))
    mean, *rest = torch.cat([values.mean().view(1), quantiles]).tolist()
    return {"mean": mean, **{f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, rest, strict=True)}}


def scores_of(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Scores of logits [n, classes] for class numbers `y` [n].

    ce (nats), accuracy (0..1) and auc_prc (percent, over the classes that `y` holds); the last two are 0 where a logit
    is not finite.
    """
    ce = float(F.cross_entropy(logits, y))
    if not math.isfinite(ce):
        return {"ce": ce, "accuracy": 0.0, "auc_prc": 0.0}
    proba, labels = logits.softmax(1).cpu().numpy(), y.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class without validation series: the split has told of it
        area = metrics.auc_prc(labels, proba)
    return {"ce": ce, "accuracy": metrics.accuracy(labels, proba), "auc_prc": area}


def learning_rate(config: RunConfig, epoch: int, epochs: int) -> float:
    """Learning rate of epoch `epoch` (from 0) of `epochs`: by epochs, never by steps."""
    rate = config.learning_rate
    if config.lr_schedule == "multistep":
        rate *= config.lr_gamma ** sum(epoch >= milestone for milestone in config.lr_milestones)
    elif config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return rate


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that training on `device` draws from.

    `torch.manual_seed` seeds every kind of accelerator; for those not in use yet it keeps the call, with a traceback,
    for later: a millisecond an epoch, and memory that grows with each.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def derived_seed(*parts: Any) -> int:
    """A seed of 63 bits that is a function of `parts`, equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _checkpoint(
    stage: str, epoch: int, distiller: Distiller, optimizer: torch.optim.Optimizer, selection: Selection
) -> Checkpoint:
    tensors = {f"model.{name}": value for name, value in distiller.state_dict().items()}
    tensors.update({f"selected.{name}": value for name, value in selection.weights.items()})
    for index, entries in optimizer.state_dict()["state"].items():
        # cloned: parameters of a run share the tensor that counts their steps
        tensors.update({f"optimizer.{index}.{name}": value.clone() for name, value in entries.items()})
    return Checkpoint(stage, epoch, tensors, {"selection": selection.state()})


def _restore(found: Checkpoint, distiller: Distiller, optimizer: torch.optim.Optimizer, selection: Selection) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in found.tensors.items() if name.startswith(prefix)}

    distiller.load_state_dict(under("model."))
    device = next(distiller.parameters()).device
    selected = {name: value.to(device) for name, value in under("selected.").items()}
    selection.restore(selected, found.state["selection"])
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in under("optimizer.").items():
        index, entry = name.split(".", 1)
        state[int(index)][entry] = value
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
