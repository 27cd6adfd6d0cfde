"""Finding and reading data sets: what is found where, what is refused, and that nothing goes to the network."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from gdpd.data import list_datasets, load_dataset
from gdpd.data.files import find_files, read_file, ts_header
from gdpd.data.packages import PACKAGES, package_folders, package_home
from gdpd.data.plain_files import read_plain_ts

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.data.FutureLeakWarning")

SERIES = {"up": [[0.0, 1.0, 2.5, 3.0], [0.5, 1.0, 2.0, 4.0]], "down": [[3.0, 2.0, 1.0, -0.5], [4.0, 2.0, 1.0, 0.0]]}


def write_ts(path: Path, rows: dict[str, list[list[float]]], header: str = "") -> Path:
    lines = ["@problemName x", "@timeStamps false", "@univariate true", header or "@equalLength true"]
    lines += [f"@classLabel true {' '.join(rows)}", "@data"]
    lines += [f"{','.join(map(str, values))}:{label}" for label, group in rows.items() for values in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tsv(path: Path, rows: dict[str, list[list[float]]]) -> Path:
    lines = ["\t".join(map(str, [label, *values])) for label, group in rows.items() for values in group]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_arff(path: Path, rows: dict[str, list[list[float]]]) -> Path:
    n = len(next(iter(rows.values()))[0])
    lines = ["@relation x", *(f"@attribute a{i} numeric" for i in range(n))]
    lines += [f"@attribute target {{{','.join(rows)}}}", "", "@data"]
    lines += [f"{','.join(map(str, values))},{label}" for label, group in rows.items() for values in group]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    import aeon.datasets._data_loaders as loaders

    for name in ("urlopen", "download_dataset", "_download_and_extract"):
        monkeypatch.setattr(loaders, name, refuse)


def test_gunpoint_has_its_published_shape_and_classes() -> None:
    data = load_dataset("GunPoint", resample_to=None)
    assert data.X_train.shape == (50, 1, 150)
    assert data.X_test.shape == (150, 1, 150)
    assert data.X_train.dtype == np.float32
    assert data.y_train.dtype == np.int64
    assert data.classes.tolist() == [1, 2]
    assert data.equal_length
    assert (data.n_channels, data.n_classes, data.length) == (1, 2, 150)
    assert data.meta["source"] == "aeon"
    # first value of the first series in the file, whose label there is 2
    assert data.X_train[0, 0, 0] == pytest.approx(-0.6478854, abs=1e-6)
    assert data.classes[data.y_train[0]] == 2


def test_every_listed_set_loads_as_listed_without_network(no_network: None) -> None:
    rows = list_datasets()
    assert {"GunPoint", "ItalyPowerDemand", "JapaneseVowels", "BasicMotions"} <= {row.name for row in rows}
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    for row in rows:
        if row.length > 1000:
            continue  # ACSF1: two seconds of parsing, nothing of its own to show
        data = load_dataset(row.name, resample_to=None)
        found = (len(data.y_train), len(data.y_test), data.n_channels, data.length, data.n_classes)
        assert found == tuple(row[2:]), row.name


def test_regression_and_time_stamped_sets_are_not_listed_and_are_refused() -> None:
    names = {row.name for row in list_datasets()}
    assert not names & {"Covid3Month", "CardanoSentiment", "UnitTestTimeStamps"}
    with pytest.raises(ValueError, match="regression set"):
        load_dataset("Covid3Month")
    with pytest.raises(ValueError, match="time stamps"):
        load_dataset("UnitTestTimeStamps")


def test_the_three_formats_give_the_same_arrays(tmp_path: Path) -> None:
    loaded = []
    rows = {"1": SERIES["up"], "2": SERIES["down"]}
    for write, extension in ((write_ts, "ts"), (write_tsv, "tsv"), (write_arff, "arff")):
        folder = tmp_path / extension / "Mine"
        folder.mkdir(parents=True)
        for split in ("TRAIN", "TEST"):
            write(folder / f"Mine_{split}.{extension}", rows)
        loaded.append(load_dataset(folder))
    for data in loaded[1:]:
        np.testing.assert_array_equal(data.X_train, loaded[0].X_train)
        np.testing.assert_array_equal(data.y_test, loaded[0].y_test)
        assert data.classes.tolist() == loaded[0].classes.tolist() == [1, 2]


def test_bundled_multivariate_arff_agrees_with_its_ts_file() -> None:
    bundled = package_home("aeon") / "datasets" / "data"
    from_ts, labels_ts = read_file(bundled / "BasicMotions" / "BasicMotions_TRAIN.ts")
    from_arff, labels_arff = read_file(bundled / "BasicMotions" / "BasicMotions_TRAIN.arff")
    np.testing.assert_allclose(from_ts, from_arff)
    assert [label.lower() for label in labels_arff] == labels_ts.tolist()


def test_a_set_is_found_by_name_by_folder_and_by_either_file(tmp_path: Path) -> None:
    train = write_ts(tmp_path / "Mine" / "Mine_TRAIN.ts", SERIES)
    test = write_ts(tmp_path / "Mine" / "Mine_TEST.ts", SERIES)
    for found in (
        find_files("Mine", tmp_path),
        find_files(tmp_path / "Mine"),
        find_files(str(tmp_path / "Mine")),
        find_files(train),
        find_files(test),
    ):
        assert (found.name, found.train, found.test) == ("Mine", train, test)
    assert find_files("GunPoint", tmp_path).source == "aeon"


def test_a_folder_of_the_user_goes_before_the_bundled_set_of_that_name(tmp_path: Path) -> None:
    for split in ("TRAIN", "TEST"):
        write_ts(tmp_path / "GunPoint" / f"GunPoint_{split}.ts", SERIES)
    assert load_dataset("GunPoint", data_dir=tmp_path).length == 4
    row = next(row for row in list_datasets(tmp_path) if row.name == "GunPoint")
    assert row == ("GunPoint", str(tmp_path / "GunPoint"), 4, 4, 1, 4, 2)


def test_a_pair_of_splits_goes_before_a_lone_train_file_of_a_preferred_format(tmp_path: Path) -> None:
    write_ts(tmp_path / "Mine_TRAIN.ts", SERIES)
    for split in ("TRAIN", "TEST"):
        write_tsv(tmp_path / f"Mine_{split}.tsv", SERIES)
    assert find_files("Mine", tmp_path).train.suffix == ".tsv"


def test_a_folder_named_otherwise_than_its_only_set_is_fine_and_two_sets_are_not(tmp_path: Path) -> None:
    write_ts(tmp_path / "A_TRAIN.ts", SERIES)
    assert find_files(tmp_path).name == "A"
    write_ts(tmp_path / "B_TRAIN.ts", SERIES)
    with pytest.raises(ValueError, match=r"several data sets \(A, B\)"):
        find_files(tmp_path)


def test_one_file_is_split_here_with_a_warning_and_the_same_way_each_time(tmp_path: Path) -> None:
    rows = {label: [[float(i), 1.0, sign * i] for i in range(10)] for label, sign in (("a", 1.0), ("b", -1.0))}
    path = write_ts(tmp_path / "whole.ts", rows)
    with pytest.warns(UserWarning, match=r"whole: one file only.*14 train and 6 test.*seed 0"):
        first = load_dataset(path)
    with pytest.warns(UserWarning, match="one file only"):
        again = load_dataset(path)
    with pytest.warns(UserWarning, match="seed 1"):
        other = load_dataset(path, split_seed=1)
    assert (np.bincount(first.y_train).tolist(), np.bincount(first.y_test).tolist()) == ([7, 7], [3, 3])
    np.testing.assert_array_equal(first.X_test, again.X_test)
    assert not np.array_equal(first.X_test, other.X_test)
    assert first.meta["test_split"] == {"fraction": 0.3, "seed": 0}
    together = np.concatenate([first.X_train, first.X_test])[:, 0, [0, 2]]
    assert len(np.unique(together, axis=0)) == 19  # (0, 0) is in both classes, every other series once


def test_a_lone_single_class_file_is_refused_before_it_is_split(tmp_path: Path) -> None:
    path = write_ts(tmp_path / "one.ts", {"a": SERIES["up"]})
    with pytest.raises(ValueError, match="only the class a"):
        load_dataset(path)


def test_missing_files_are_told_with_what_was_looked_for_where_and_names_close_by(
    tmp_path: Path, no_network: None
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_dataset("GunPiont", data_dir=tmp_path)
    message = str(error.value)
    assert message.splitlines()[:2] == ["no files of a data set for 'GunPiont'.", "Names close to it: GunPoint."]
    assert "Tried GunPiont_TRAIN.ts, .tsv, .arff, .txt and GunPiont.ts, .tsv, .arff, .npz, in each of" in message
    assert f"in the folders in it: {tmp_path}, " in message
    assert all(str(folder) in message for folder, _ in package_folders())
    assert "nothing is ever downloaded" in message
    assert len(message) < 1000 + sum(len(str(folder)) for folder, _ in package_folders())
    with pytest.raises(FileNotFoundError, match="There is no folder and no file nowhere/GunPoint"):
        load_dataset("nowhere/GunPoint")


def test_a_folder_without_files_and_a_missing_data_dir_are_named(tmp_path: Path) -> None:
    (tmp_path / "Empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.ts.*Empty\. Tried Empty_TRAIN\.ts, \.tsv, \.arff"):
        load_dataset(tmp_path / "Empty")
    for call in (lambda: load_dataset("GunPoint", data_dir=tmp_path / "nowhere"), lambda: list_datasets("nowhere")):
        with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
            call()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"extension '\.txt'"):
        load_dataset(tmp_path / "notes.txt")
    (tmp_path / "cut.ts").write_text("@problemName x\n@classLabel true a b\n")
    with pytest.raises(ValueError, match=r"cut\.ts has no @data line"):
        load_dataset(tmp_path / "cut.ts")
    ragged = write_ts(tmp_path / "ragged.ts", {"a": [[1.0, 2.0]], "b": [[1.0, 2.0, 3.0]]})
    with pytest.raises(ValueError, match=r"could not read .*ragged\.ts"):
        load_dataset(ragged)
    (tmp_path / "bare.ts").write_text("@problemName x\n@data\n1,2,3\n")
    with pytest.raises(ValueError, match="no class labels"):
        load_dataset(tmp_path / "bare.ts")
    (tmp_path / "empty.ts").write_text("@problemName x\n@classLabel true a b\n@data\n")
    with pytest.raises(ValueError, match="0 series"):
        load_dataset(tmp_path / "empty.ts")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone.ts")


def test_a_broken_file_is_left_out_of_the_list_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "Broken_TRAIN.ts").write_text("@classLabel true a b\n")
    (tmp_path / "Odd_TRAIN.arff").write_text("@relation x\n@data\n7\n")
    (tmp_path / "Void_TRAIN.tsv").write_text("")
    write_arff(tmp_path / "Good_TRAIN.arff", SERIES)
    with pytest.warns(UserWarning, match="left out of the list") as record:
        names = {row.name for row in list_datasets(tmp_path)}
    assert "Good" in names
    assert not names & {"Broken", "Odd", "Void"}
    assert sorted(str(w.message).split("'")[1] for w in record) == ["Broken", "Odd", "Void"]


def test_multivariate_arff_is_listed_as_it_loads(tmp_path: Path) -> None:
    bundled = package_home("aeon") / "datasets" / "data"
    text = (bundled / "BasicMotions" / "BasicMotions_TRAIN.arff").read_text()
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"Motions_{split}.arff").write_text(text)
    row = next(row for row in list_datasets(tmp_path) if row.name == "Motions")
    data = load_dataset("Motions", data_dir=tmp_path)
    assert row[2:] == (40, 40, 6, 100, 4)
    assert data.X_train.shape == (40, 6, 100)
    assert data.classes.tolist() == ["Badminton", "Running", "Standing", "Walking"]


def test_plain_ts_files_are_read_as_aeon_reads_them(tmp_path: Path) -> None:
    from aeon.datasets import load_from_ts_file

    plain = []
    for path in sorted((package_home("aeon") / "datasets" / "data").glob("*/*_TRAIN.ts")):
        found = read_plain_ts(path, ts_header(path))
        if found is None:
            continue
        plain.append(path.stem)
        for mine, theirs in zip(found, load_from_ts_file(str(path)), strict=True):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)
    assert {"GunPoint_TRAIN", "ItalyPowerDemand_TRAIN", "BasicMotions_TRAIN"} <= set(plain)
    assert "JapaneseVowels_TRAIN" not in plain  # series of several lengths


@pytest.mark.parametrize(
    ("before", "after"),
    [("@missing false", "@missing true"), ("1.0", "?"), ("1.0", "nan"), ("1.0", "one"), ("1.0,", ""), ("1.0", "1.0:2")],
)
def test_what_is_not_plain_is_left_to_aeon(tmp_path: Path, before: str, after: str) -> None:
    lines = ["@timeStamps false", "@missing false", "@univariate true", "@equalLength true", "@classLabel true a b"]
    path = tmp_path / "x.ts"
    path.write_text("\n".join([*lines, "@data", "1.0,2.0,3.0:A", "4.0,5.0,6.0:b"]) + "\n")
    values, labels = read_plain_ts(path, ts_header(path)) or ((), ())
    assert np.array_equal(values, [[[1, 2, 3]], [[4, 5, 6]]])
    assert list(labels) == ["a", "b"]
    path.write_text(path.read_text().replace(before, after, 1))
    assert read_plain_ts(path, ts_header(path)) is None


def test_a_folder_with_one_unsplit_file_is_that_set(tmp_path: Path) -> None:
    path = write_ts(tmp_path / "all.ts", SERIES)
    assert find_files(tmp_path).train == path
    with pytest.warns(UserWarning, match="one file only"):
        data = load_dataset(tmp_path)
    assert data.name == "all"
    assert len(data.y_train) + len(data.y_test) == 4


def test_without_aeon_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ts(tmp_path / "x.ts", SERIES)
    for name in [name for name in sys.modules if name == "aeon" or name.startswith("aeon.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "gdpd-kernels\[data\]"'):
        load_dataset(path)
    with pytest.raises(FileNotFoundError, match="aeon is not installed"):
        load_dataset("GunPoint")
    assert list_datasets() == []


def test_bad_options_are_refused_before_any_file_is_opened() -> None:
    with pytest.raises(ValueError, match="normalisation='zscore' is not one of"):
        load_dataset("does not exist", normalisation="zscore")
    with pytest.raises(ValueError, match="resample_to=1 must be 2 or more"):
        load_dataset("does not exist", resample_to=1)


def test_splits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = {"a": [[1.0, 2.0, 4.0]], "b": [[3.0, 2.0, 0.0]]}
    write_ts(tmp_path / "New_TRAIN.ts", rows)
    write_ts(tmp_path / "New_TEST.ts", {**rows, "c": [[0.0, 0.0, 1.0]]})
    with pytest.raises(ValueError, match=r"in test that no training series has: c \(1 test series\)"):
        load_dataset("New", data_dir=tmp_path)
    write_ts(tmp_path / "Wide_TRAIN.ts", rows)
    lines = [
        "@univariate false",
        "@equalLength true",
        "@classLabel true a b",
        "@data",
        "1,2,3:1,2,3:a",
        "1,2,3:1,2,3:b",
    ]
    (tmp_path / "Wide_TEST.ts").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="1 channels in train and 2 in test"):
        load_dataset("Wide", data_dir=tmp_path)
    write_ts(tmp_path / "Mono_TRAIN.ts", {"a": SERIES["up"]})
    write_ts(tmp_path / "Mono_TEST.ts", {"a": SERIES["up"]})
    with pytest.raises(ValueError, match="only the class a"):
        load_dataset("Mono", data_dir=tmp_path)


def test_nan_in_a_file_is_named_by_series_and_step_or_filled(tmp_path: Path) -> None:
    rows = {"a": [[1.0, float("nan"), 4.0]], "b": [[3.0, 2.0, 0.0]]}
    for split in ("TRAIN", "TEST"):
        write_ts(tmp_path / f"Gap_{split}.ts", rows)
    with pytest.raises(ValueError, match=r"Gap train series 0 has a missing value .* channel 0 at step 1"):
        load_dataset("Gap", data_dir=tmp_path)
    data = load_dataset("Gap", data_dir=tmp_path, missing="interpolate")
    assert data.X_train[0, 0].tolist() == [1.0, 2.5, 4.0]
    assert data.meta["missing_filled"] == 2


def test_trailing_nan_is_variable_length(tmp_path: Path) -> None:
    rows = {"1": [[1.0, 2.0, float("nan")]], "2": [[3.0, 2.0, 0.5]]}
    for split in ("TRAIN", "TEST"):
        write_tsv(tmp_path / f"Var_{split}.tsv", rows)
    data = load_dataset("Var", data_dir=tmp_path)
    assert data.lengths_train.tolist() == [2, 3]
    assert data.X_train[0, 0].tolist() == [1.0, 2.0, 0.0]
    assert not data.equal_length
