"""The options and versions of a report's runs, as its last section lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gdpd.config import RunConfig
from gdpd.experiments.records import RunRecord


def settings(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Options with one value in all runs or the several that occur, those that differ from the defaults first."""
    listed = []
    for option in RunConfig.describe():
        name = option["name"]
        values = list(dict.fromkeys(_text(run.config[name]) for run in runs if name in run.config))
        changed = values != [_text(option["default"])]
        if values and name not in ("teacher_dir", "data_dir"):
            listed.append({"name": name, "values": values, "changed": changed, "help": option["help"]})
    return sorted(listed, key=lambda row: not row["changed"])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def versions(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Plain entries of versions.json that the runs share; several values of one entry stand side by side."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in run.versions.items():
            if isinstance(value, (str, int, float)):
                found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}
