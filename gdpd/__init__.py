"""Two-stage distillation of early time-series classifiers, on top of the fused samplers of `gdpd_kernels`.

Names are imported when first used, so that `import gdpd` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdpd.classifier import PrefixClassifier
    from gdpd.config import RunConfig
    from gdpd.training import evaluate, run

__version__ = "0.1.0"

_HOME = {
    "PrefixClassifier": "gdpd.classifier",
    "RunConfig": "gdpd.config",
    "evaluate": "gdpd.training",
    "run": "gdpd.training",
}

__all__ = ["PrefixClassifier", "RunConfig", "__version__", "evaluate", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gdpd' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("gdpd", "gdpd_kernels"):
            raise
        told = f'gdpd.{name} needs {error.name}, which is not installed: pip install "gdpd-kernels[train]"'
        raise ImportError(told, name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)
