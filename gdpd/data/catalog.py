"""The list of data sets at hand, from file headers and line counts, without parsing the values."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from gdpd.data.files import iter_files, search_roots, ts_header, ts_unusable
from gdpd.data.labels import canonical_labels
from gdpd.data.packages import PACKAGES
from gdpd.data.plain_files import read_npz


class DatasetInfo(NamedTuple):
    """One row of `list_datasets`.

    Attributes:
        name: name to give to `gdpd.data.load_dataset`.
        source: the package that it lies in, such as ``"aeon"``, or the folder.
        n_train: number of training series.
        n_test: number of test series; 0 when there is one file only.
        channels: number of channels.
        length: time steps of the longest series, before any resampling.
        classes: number of classes.
    """

    name: str
    source: str
    n_train: int
    n_test: int
    channels: int
    length: int
    classes: int


def list_datasets(data_dir: str | os.PathLike[str] | None = None) -> list[DatasetInfo]:
    """The classification sets in ``data_dir`` and inside installed packages, sorted by name.

    Files are scanned (header, number of lines, number of separators), not parsed, and no package is imported.
    Sets that cannot be classified (regression, time-stamped) are left out; a broken file is left out with a
    warning. A set in ``data_dir`` hides a package's set of the same name, as it does in ``load_dataset``.

    Args:
        data_dir: folder with data sets, each in a folder of its own or directly; None for the bundled ones only.

    Raises:
        FileNotFoundError: ``data_dir`` is not a folder.
    """
    rows: dict[str, DatasetInfo] = {}
    for root, source in search_roots(data_dir):
        for files in iter_files(root, source):
            if files.name in rows:
                continue
            try:
                splits = {"train": files.train, "test": files.test}
                scans = [_scan(path, split) for split, path in splits.items() if path is not None]
            except (OSError, ValueError) as error:
                warnings.warn(f"data set {files.name!r} left out of the list: {error}", UserWarning, stacklevel=2)
                continue
            if any(scan is None for scan in scans):
                continue
            train, *test = [scan for scan in scans if scan is not None]
            rows[files.name] = DatasetInfo(
                files.name,
                source if source in PACKAGES else os.fspath(files.train.parent),
                len(train.labels),
                sum(len(scan.labels) for scan in test),
                train.channels,
                max(scan.length for scan in (train, *test)),
                len(set(canonical_labels(train.labels)[0])),
            )
    return [rows[name] for name in sorted(rows)]


class _Scan(NamedTuple):
    channels: int
    length: int
    labels: list[str]


def _scan(path: Path, split: str) -> _Scan | None:
    """Count what one file holds; None when it is no classification set."""
    if path.suffix == ".npz":
        series, found = read_npz(path, split)
        return _Scan(len(series[0]), max(item.shape[1] for item in series), [str(label) for label in found])
    multivariate = False
    if path.suffix == ".ts" and ts_unusable(ts_header(path)) is not None:
        return None
    channels, length, labels = 0, 0, []
    in_data = path.suffix in (".tsv", ".txt")
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            line = line.strip()
            if not in_data:
                multivariate |= line.lower().startswith("@attribute") and "relational" in line.lower()
                in_data = line.lower().startswith("@data")
                continue
            if not line:
                continue
            if path.suffix == ".ts":
                *values, label = line.lower().split(":")
            elif path.suffix == ".tsv":
                label, _, rest = line.partition("\t")
                values = [rest.replace("\t", ",")]
            elif path.suffix == ".txt":
                label, *numbers = line.replace(",", " ").split()
                values = [",".join(numbers)]
            elif multivariate:
                rest, _, label = line.rpartition("',")
                values = rest.split("\\n")
            else:
                rest, _, label = line.rpartition(",")
                values = [rest]
            if not (values and all(values) and label):
                raise ValueError(f"{path} has a line without values or without a label: {line[:60]!r}")
            labels.append(label.strip())
            channels = max(channels, len(values))
            length = max(length, values[0].count(",") + 1)
    if not labels:
        raise ValueError(f"{path} has no series after its header")
    return _Scan(channels, length, labels)
