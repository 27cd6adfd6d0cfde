"""What a teacher makes of a data set, computed once: kept in memory, or in a memory-mapped file where it is large.

Found again by content, not by name: the key is a checksum of the teacher's weights and of the series as the teacher
reads them, so that another teacher, other data or another transform of them never meets old features. These features
are the prior's stage-one targets as well; their code in the autoencoder's space is not kept, since it is learned.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdpd.models import Classifier
from gdpd.training.tensors import Series, outputs

_MOST_KEPT = 4  # sets in memory, each at most of the size that a run allows
_PART = 2**28  # bytes of a file's rows that are computed at a time
_kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()


def teacher_outputs(
    model: Classifier, series: Series, *, limit: int, home: Path | None = None, sequence: bool = False
) -> tuple[Tensor, ...]:
    """Features [n, feature_dim] and logits [n, classes] of every series, at least float32, in eval mode.

    With `sequence`, the hidden sequences [n, time, sequence_dim] as well.

    Args:
        model: the teacher, on the device of `series`.
        series: full series.
        limit: largest size in bytes that is kept in memory, on the series' device. What is larger is a memory-mapped
            file, and on the host.
        home: folder of that file, for later runs to find; None: a temporary file that ends with the process.
        sequence: whether hidden sequences are asked for.

    Raises:
        OSError: the file could not be written; nothing half-written is left.
    """
    key = _key(model, series, sequence)
    kept = _kept.get(key)
    if kept is not None:
        _kept.move_to_end(key)
        return kept
    columns = model.feature_dim + model.num_classes + sequence * series.x.shape[2] * model.sequence_dim
    size = len(series) * columns * torch.promote_types(series.x.dtype, torch.float32).itemsize
    if size > limit:
        path = None if home is None else home / f"outputs-{key[:16]}.bin"
        return _mapped(model, series, path, columns, sequence)
    _kept[key] = outputs(model, series, **_asked(sequence))
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _asked(sequence: bool) -> dict[str, bool]:
    return {"sequence": True} if sequence else {}


def _mapped(model: Classifier, series: Series, path: Path | None, columns: int, sequence: bool) -> tuple[Tensor, ...]:
    """Features, logits and sequences side by side in the rows of a file."""
    dtype = np.dtype(np.float64 if series.x.dtype == torch.float64 else np.float32)
    shape = (len(series), columns)
    if path is None:
        with tempfile.TemporaryFile() as file:
            rows = np.memmap(file, dtype, "w+", shape=shape)
        _fill(rows, model, series, sequence)
    else:
        if not (path.is_file() and path.stat().st_size == dtype.itemsize * shape[0] * shape[1]):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
            try:
                written = np.memmap(partial, dtype, "w+", shape=shape)
                _fill(written, model, series, sequence)
                written.flush()
                del written
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        rows = np.memmap(path, dtype, "c", shape=shape)  # copy on write: torch asks for memory that may be written
    widths = [model.feature_dim, model.num_classes]
    features, logits, rest = torch.from_numpy(rows).split([*widths, columns - sum(widths)], dim=1)
    return (features, logits, rest.unflatten(1, (-1, model.sequence_dim))) if sequence else (features, logits)


def _fill(rows: np.memmap, model: Classifier, series: Series, sequence: bool) -> None:
    part = max(1, min(4096, _PART // rows[0].nbytes))
    for begin in range(0, len(series), part):
        some = slice(begin, begin + part)
        lengths = None if series.lengths is None else series.lengths[some]
        made = outputs(model, Series(series.x[some], series.y[some], lengths), **_asked(sequence))
        rows[some] = torch.cat([values.flatten(1) for values in made], dim=1).cpu().numpy()


def _key(model: Classifier, series: Series, sequence: bool) -> str:
    digest = hashlib.sha256()
    inputs = {"x": series.x, "lengths": series.lengths}
    for name, value in (*model.state_dict().items(), *inputs.items()):
        digest.update(f"{name} {None if value is None else (value.dtype, tuple(value.shape), value.device)}".encode())
        if value is not None:
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    autocast = torch.is_autocast_enabled(series.x.device.type) and torch.get_autocast_dtype(series.x.device.type)
    digest.update(f"{type(model).__name__} {autocast}{' sequence' if sequence else ''}".encode())
    return digest.hexdigest()
