"""The results table of a grid: one row per finished job, in SQLite while it grows and in CSV where it is kept.

A grid's folder holds

- `results.sqlite`, to which each job's row is added in one transaction as the job ends: a grid that is killed loses
  nothing, and others may read while it runs;
- `results.csv`, the same rows sorted by key, written when a grid ends or is stopped: the file to commit. Floats are
  written so that they read back exactly. A grid that finds it without the database goes on from it;
- `grid.json`, the options that all rows share. A row's own options are what differs from these.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sqlite3
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from gdpd.experiments.records import RunRecord

DATABASE, TABLE, RECIPE = "results.sqlite", "results.csv", "grid.json"
VALIDATION_SCORES = ("auc_prc", "accuracy", "ce")


class Key(NamedTuple):
    """What makes a job another job: `options` is the JSON of the options that differ from the grid's."""

    dataset: str
    earliness: float
    method: str
    seed: int
    options: str


@dataclass(frozen=True)
class Result:
    """One finished job of a grid. Scores are of the test series unless they are called val.

    Attributes:
        dataset: name of the data set, without folders.
        earliness: share of each series that the student reads, in (0, 1].
        method: the method's name in the grid (a grid may hold variants of one method under names of their own).
        seed: seed of split, weights, batch order and noise; methods are paired by it.
        options: the options of this job that differ from the grid's common ones, overrides and searched ones alike.
        auc_prc: macro mean over classes of the area under the precision-recall curve, percent.
        accuracy, roc_auc, calibration_error, fidelity: 0..1; fidelity is the agreement with the teacher.
        kl: mean KL divergence from the teacher's predictions, nats.
        val_ce, val_accuracy, val_auc_prc: scores on the validation series (nats, 0..1, percent).
        selected_epoch: epoch whose weights were kept, counted from 0.
        teacher_auc_prc, teacher_accuracy: the teacher on full test series (percent, 0..1).
        teacher_val_ce, teacher_val_auc_prc: the teacher on full validation series.
        teacher_p_chance: p of the test whether the teacher is better than chance on them.
        parameters: of the student.
        n_train, n_validation, n_test: series.
        seconds: wall-clock training time of the student; other work on the machine is in it.
        seconds_per_epoch: median over its epochs, wall clock.
        cpu_seconds: processor time of the whole job, all threads: data, training, evaluation; not the teacher's.
            None for a job that was stopped and went on.
        peak_memory: largest resident size of the worker during the job, MiB; None where it cannot be measured.
        parts: parts of the training loss in the last epoch of each phase, named phase.part, and alpha's mean.
        teacher_sha256, student_sha256: of the weights.
        software: versions that the numbers depend on.
    """

    dataset: str
    earliness: float
    method: str
    seed: int
    options: dict[str, Any]
    auc_prc: float
    accuracy: float
    roc_auc: float | None
    calibration_error: float
    fidelity: float
    kl: float
    val_ce: float
    val_accuracy: float
    val_auc_prc: float
    selected_epoch: int | None
    teacher_auc_prc: float
    teacher_accuracy: float
    teacher_val_ce: float
    teacher_val_auc_prc: float
    teacher_p_chance: float
    parameters: int
    n_train: int
    n_validation: int
    n_test: int
    seconds: float
    seconds_per_epoch: float
    cpu_seconds: float | None
    peak_memory: float | None
    parts: dict[str, float]
    teacher_sha256: str
    student_sha256: str
    software: str

    @property
    def key(self) -> Key:
        """What the table holds once."""
        return Key(self.dataset, self.earliness, self.method, self.seed, canonical(self.options))

    def validation_rank(self, score: str) -> tuple[float, ...]:
        """Sort key, best first, by a validation score; ties go to the lower cross-entropy."""
        if score not in VALIDATION_SCORES:
            raise ValueError(f"search_score={score!r} is not known. One of: {', '.join(VALIDATION_SCORES)}.")
        return (self.val_ce,) if score == "ce" else (-float(getattr(self, f"val_{score}")), self.val_ce)


def canonical(options: dict[str, Any]) -> str:
    """Options as JSON that is equal for equal options."""
    return json.dumps(options, sort_keys=True, separators=(",", ":"))


def choose(results: Iterable[Result], score: str = "auc_prc") -> list[Result]:
    """Of the trials of each (data set, earliness, method, seed) the best on validation data, never by a test score.

    Args:
        results: rows of a table, with as many trials as there are.
        score: "auc_prc", "accuracy" or "ce"; ties go to the lower cross-entropy, then to the first by options.
    """
    best: dict[tuple[str, float, str, int], Result] = {}
    for result in sorted(results, key=lambda result: result.key):
        held = best.get(result.key[:4])
        if held is None or result.validation_rank(score) < held.validation_rank(score):
            best[result.key[:4]] = result
    return list(best.values())


class ResultsTable:
    """The table in a grid's folder, open for adding rows. Use it as a context manager, or call `close`.

    Rows that `results.csv` has and the database lacks are taken over when it is opened.

    Args:
        folder: the grid's folder; made if need be.

    Raises:
        ValueError: a table there that this version cannot read; names the file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        kept = _read_csv(folder / TABLE)
        columns = ", ".join(f"{name} {_affinity(hint)}" for name, hint in _COLUMNS.items())
        self._database = sqlite3.connect(folder / DATABASE)
        try:
            self._database.execute(f"CREATE TABLE IF NOT EXISTS results ({columns}, UNIQUE ({', '.join(Key._fields)}))")
            _check_columns(_columns_of(self._database), folder / DATABASE)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{folder / DATABASE} is not a results table ({error}). Move it away.") from error
        except ValueError:
            self._database.close()
            raise
        for result in kept:
            self._insert(result, "OR IGNORE")
        self._database.commit()

    def add(self, result: Result) -> None:
        """Add one row, durably.

        Raises:
            ValueError: the table has a row of that key.
        """
        try:
            with self._database:
                self._insert(result)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"the table in {self.folder} has a row for {result.key} already.") from error

    def results(self) -> list[Result]:
        """Every row, sorted by key."""
        return _rows_of(self._database)

    def export(self) -> Path:
        """Write `results.csv` and return its path."""
        from gdpd.training.atomic import write_bytes

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(_written(result) for result in self.results())
        write_bytes(self.folder / TABLE, text.getvalue().encode())
        return self.folder / TABLE

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def __enter__(self) -> ResultsTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _insert(self, result: Result, conflict: str = "") -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        self._database.execute(f"INSERT {conflict} INTO results VALUES ({marks})", _written(result))


def read_results(folder: Path) -> list[Result]:
    """Every row of the table in `folder`, from the database and the CSV file, whichever there are, sorted by key.

    Nothing is written, and a grid may be running.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file that is no results table.
    """
    database, table = folder / DATABASE, folder / TABLE
    if not database.is_file() and not table.is_file():
        raise FileNotFoundError(f"{folder} holds neither {DATABASE} nor {TABLE}. `gdpd grid` makes them.")
    found = {result.key: result for result in _read_csv(table)}
    if database.is_file():
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
        try:
            _check_columns(_columns_of(connection), database)
            found.update((result.key, result) for result in _rows_of(connection))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{database} is not a results table ({error}).") from error
        finally:
            connection.close()
    return [found[key] for key in sorted(found)]


def read_recipe(folder: Path) -> dict[str, Any]:
    """`grid.json` of a grid's folder: "options", by name, that all rows share, and "search_score".

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged.
    """
    from gdpd.training.atomic import read_json

    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE}. `gdpd grid` writes it beside its results.")
    return read_json(folder / RECIPE)


def result_records(folder: Path) -> list[RunRecord]:
    """The chosen rows of the table in `folder` (see `choose`) as run records, for summaries and reports.

    A record's `method` is the method's name in the grid; its folder may not exist, and its history is empty.

    Raises:
        FileNotFoundError, ValueError: as `read_results` and `read_recipe`.
    """
    recipe = read_recipe(folder)
    chosen = choose(read_results(folder), recipe["search_score"])
    return [_record(result, folder, recipe["options"]) for result in chosen]


def _record(result: Result, folder: Path, options: dict[str, Any]) -> RunRecord:
    row = dataclasses.asdict(result)
    own = ("dataset", "earliness", "method", "seed")
    config = {**options, **result.options, **{name: row.pop(name) for name in own}}
    teacher = {name.removeprefix("teacher_"): row.pop(name) for name in list(row) if name.startswith("teacher_")}
    validation = {name.removeprefix("val_"): row.pop(name) for name in list(row) if name.startswith("val_")}
    name = f"{result.dataset}-e{result.earliness:g}-{result.method}-s{result.seed}"
    metrics = {**row, "validation": validation, "teacher": teacher}
    return RunRecord(folder / "runs" / name, config, metrics, {"software": result.software}, [])


_COLUMNS = typing.get_type_hints(Result)


def _affinity(hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    return "INTEGER" if int in kinds else "REAL" if float in kinds and hint != dict[str, float] else "TEXT"


def _written(result: Result) -> list[Any]:
    values = [getattr(result, name) for name in _COLUMNS]
    return [canonical(value) if isinstance(value, dict) else value for value in values]


def _parse(name: str, value: Any) -> Any:
    """A value of the database or, as text, of the CSV file, in the type of its column."""
    hint = _COLUMNS[name]
    if value is None or (value == "" and type(None) in typing.get_args(hint)):
        return None
    if typing.get_origin(hint) is dict:
        return json.loads(value)
    kinds = typing.get_args(hint) or (hint,)
    return int(value) if int in kinds else float(value) if float in kinds else str(value)


def _result(values: Iterable[Any]) -> Result:
    return Result(**{name: _parse(name, value) for name, value in zip(_COLUMNS, values, strict=True)})


def _rows_of(database: sqlite3.Connection) -> list[Result]:
    rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM results").fetchall()
    return sorted((_result(row) for row in rows), key=lambda result: result.key)


def _columns_of(database: sqlite3.Connection) -> list[str]:
    return [row[1] for row in database.execute("PRAGMA table_info(results)")]


def _check_columns(columns: list[str], path: Path) -> None:
    if columns != list(_COLUMNS):
        odd = sorted(set(columns) ^ set(_COLUMNS)) or ["their order"]
        raise ValueError(f"{path} has other columns than this version's tables: {', '.join(odd)}.")


def _read_csv(path: Path) -> list[Result]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    _check_columns(header, path)
    try:
        return [_result(row) for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds a row that cannot be read: {error}") from error
