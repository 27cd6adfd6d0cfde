"""The published numbers of GDPD (arXiv 2605.11414), to be set beside one's own.

Twelve univariate UCR sets, LSTM3-100 for teacher and student, macro AUC-PRC in percent, mean of five seeds. Which
twelve sets, is not known; so these are no target that a run could reach or miss, and nothing is computed from them.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 2605.11414"
MODEL = "lstm3-100"  # of teacher and student
DATASETS, SEEDS = 12, 5


class Published(NamedTuple):
    """Average AUC-PRC in percent, average rank and number of first places; None where unknown."""

    auc_prc: float
    rank: float | None = None
    first_places: float | None = None


METHODS = ("base", "kd", "fits", "gdpd")  # that the ranks are among
PUBLISHED: dict[float, dict[str, Published]] = {
    0.2: {
        "base": Published(63.64, 3.50, 0),
        "kd": Published(69.23, 2.42, 2),
        "fits": Published(67.47, 2.92, 0),
        "gdpd": Published(73.83, 1.17, 10),
    },
    0.4: {
        "base": Published(70.44),
        "kd": Published(78.03),
        "fits": Published(75.36),
        "gdpd": Published(81.70),
    },
    0.6: {
        "base": Published(76.79),
        "kd": Published(83.70),
        "fits": Published(81.15),
        "gdpd": Published(86.00),
    },
    0.8: {
        "base": Published(77.79, 3.67, 0),
        "kd": Published(84.78, 2.42, 0),
        "fits": Published(82.74, 2.83, 1),
        "gdpd": Published(89.02, 1.08, 11),
    },
}


class AmongMany(NamedTuple):
    """GDPD among more methods at one earliness, of which the ranks alone are known."""

    earliness: float
    others: int
    rank: float
    next_rank: float  # no other's is near it


AMONG_MANY = AmongMany(0.5, 10, 2.25, 4.0)
