"""Which package may import which, checked by parsing every import (also those inside functions) without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("reference", "native", "triton", "cuda")


def modules(package: str) -> dict[str, Path]:
    """Dotted names of the modules of `package`, with their files."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that `source` imports; `from a import b` gives both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def imported_by(package: str) -> Iterator[tuple[str, str]]:
    for module, path in modules(package).items():
        for target in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            yield module, target


def inside(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def backend_of(module: str) -> str | None:
    """The backend that a module below gdpd_kernels.backends belongs to: `native`, `native_plans`, `triton.walk`, ..."""
    if not module.startswith("gdpd_kernels.backends."):
        return None
    first = module.split(".")[2]
    return next((name for name in BACKENDS if first == name or first.startswith(name + "_")), None)


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("import gdpd.prior as p", "gdpd_kernels.ops", False, "gdpd.prior"),
        ("def f():\n    from gdpd import prior", "gdpd_kernels.ops", False, "gdpd.prior"),
        ("from ..native import walk", "gdpd_kernels.backends.triton.plans", False, "gdpd_kernels.backends.native"),
        ("from . import native", "gdpd_kernels.backends", True, "gdpd_kernels.backends.native"),
        ("import importlib\nimportlib.import_module('gdpd')", "gdpd_kernels.info", False, "gdpd"),
    ],
)
def test_the_parser_sees_every_form_of_import(source, module, is_package, expected):
    assert expected in set(imports(source, module, is_package))


def test_both_packages_are_found():
    assert "gdpd_kernels.program" in modules("gdpd_kernels")
    assert "gdpd.cli.app" in modules("gdpd")


def test_kernels_import_nothing_of_the_thin_layer():
    against = [(m, t) for m, t in imported_by("gdpd_kernels") if inside(t, "gdpd")]
    assert not against, f"gdpd_kernels must not know gdpd: {against}"


def test_kernels_need_nothing_but_torch_and_numpy():
    allowed = {"torch", "numpy", "triton", "gdpd_kernels", *sys.stdlib_module_names}
    against = [(m, t) for m, t in imported_by("gdpd_kernels") if t.split(".")[0] not in allowed]
    assert not against, f"pip install gdpd-kernels brings torch and numpy only: {against}"


def test_backends_never_import_each_other():
    against = [
        (module, target)
        for module, target in imported_by("gdpd_kernels")
        if backend_of(module) and backend_of(target) and backend_of(module) != backend_of(target)
    ]
    assert not against, f"each backend stands alone: {against}"


def test_arrays_come_in_without_torch():
    against = [(m, t) for m, t in imported_by("gdpd") if inside(m, "gdpd.data") and inside(t, "torch")]
    assert not against, f"gdpd.data hands out arrays: {against}"


@pytest.mark.parametrize("outer", ["gdpd.cli", "gdpd.report", "gdpd.experiments"])
def test_the_library_does_not_import_its_front_ends(outer):
    fronts = ("gdpd.cli", "gdpd.report", "gdpd.experiments")
    against = [
        (module, target)
        for module, target in imported_by("gdpd")
        if inside(target, outer) and not any(inside(module, front) for front in fronts)
    ]
    assert not against, f"training and models know no command line and no report: {against}"
