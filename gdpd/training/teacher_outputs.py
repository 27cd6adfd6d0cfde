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
_kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()


def teacher_outputs(
    model: Classifier, series: Series, *, limit: int, home: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Features [n, feature_dim] and logits [n, classes] of every series, at least float32, in eval mode.

    Args:
        model: the teacher, on the device of `series`.
        series: full series.
        limit: largest size in bytes that is kept in memory, on the series' device. What is larger is a memory-mapped
            file, and on the host.
        home: folder of that file, for later runs to find; None: a temporary file that ends with the process.

    Raises:
        OSError: the file could not be written; nothing half-written is left.
    """
    key = _key(model, series)
    kept = _kept.get(key)
    if kept is not None:
        _kept.move_to_end(key)
        return kept
    columns = model.feature_dim + model.num_classes
    size = len(series) * columns * torch.promote_types(series.x.dtype, torch.float32).itemsize
    if size > limit:
        return _mapped(model, series, None if home is None else home / f"outputs-{key[:16]}.bin", columns)
    _kept[key] = outputs(model, series)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _mapped(model: Classifier, series: Series, path: Path | None, columns: int) -> tuple[Tensor, Tensor]:
    """Features and logits side by side in the rows of a file."""
    dtype = np.dtype(np.float64 if series.x.dtype == torch.float64 else np.float32)
    shape = (len(series), columns)
    if path is None:
        with tempfile.TemporaryFile() as file:
            rows = np.memmap(file, dtype, "w+", shape=shape)
        _fill(rows, model, series)
    else:
        if not (path.is_file() and path.stat().st_size == dtype.itemsize * shape[0] * shape[1]):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
            try:
                written = np.memmap(partial, dtype, "w+", shape=shape)
                _fill(written, model, series)
                written.flush()
                del written
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        rows = np.memmap(path, dtype, "c", shape=shape)  # copy on write: torch asks for memory that may be written
    known = torch.from_numpy(rows)
    return known[:, : model.feature_dim], known[:, model.feature_dim :]


def _fill(rows: np.memmap, model: Classifier, series: Series, part: int = 4096) -> None:
    for begin in range(0, len(series), part):
        some = slice(begin, begin + part)
        lengths = None if series.lengths is None else series.lengths[some]
        made = outputs(model, Series(series.x[some], series.y[some], lengths))
        rows[some] = torch.cat(made, dim=1).cpu().numpy()


def _key(model: Classifier, series: Series) -> str:
    digest = hashlib.sha256()
    inputs = {"x": series.x, "lengths": series.lengths}
    for name, value in (*model.state_dict().items(), *inputs.items()):
        digest.update(f"{name} {None if value is None else (value.dtype, tuple(value.shape), value.device)}".encode())
        if value is not None:
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    autocast = torch.is_autocast_enabled(series.x.device.type) and torch.get_autocast_dtype(series.x.device.type)
    digest.update(f"{type(model).__name__} {autocast}".encode())
    return digest.hexdigest()
