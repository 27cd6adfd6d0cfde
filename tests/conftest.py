"""What holds for all tests."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests that need a GPU are never skipped silently."""
    skipped = [x for x in terminalreporter.stats.get("skipped", []) if "gpu" in getattr(x, "keywords", {})]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests were not run: no usable GPU (pytest -m gpu)")
