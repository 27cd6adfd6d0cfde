"""Self-contained HTML pages about finished runs; nothing is trained here.

`build_report` shows each run: curves, alpha, trajectories. `build_comparison` sets methods against each other over data
sets, and writes its tables for LaTeX and as CSV too.
"""

from gdpd.report.comparison import build_comparison
from gdpd.report.page import build_report

__all__ = ["build_comparison", "build_report"]
