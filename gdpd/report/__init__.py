"""One self-contained HTML page about one or many finished runs: `build_report`. Reads run folders, trains nothing."""

from gdpd.report.page import build_report

__all__ = ["build_report"]
