"""Tables as rows of text: with columns aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Rows = list[Sequence[str]]  # the first is the header


def plain(rows: Rows) -> str:
    """Columns aligned with spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * min(sum(widths) + 2 * len(widths), 200), *lines[1:]])


def markdown(rows: Rows) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
