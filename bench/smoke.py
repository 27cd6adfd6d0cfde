"""`python -m bench.smoke`: runs every benchmark once at its smallest size, with every named variant, and prints times.

Not a measurement: it shows in seconds that the benchmarks still run, without asv's environments. Left out are classes
marked ``smoke = False``, which take minutes, and contenders that this machine cannot run.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import bench
from gdpd_kernels.benchmark.cases import Unavailable

_KINDS = ("time_", "peakmem_", "mem_", "track_")


def benchmarks() -> Iterator[tuple[str, type, str]]:
    """Every (module, class, method) that asv would find."""
    for found in pkgutil.iter_modules(bench.__path__):
        module = importlib.import_module(f"bench.{found.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and getattr(cls, "smoke", True):
                for name, _ in inspect.getmembers(cls, inspect.isfunction):
                    if name.startswith(_KINDS):
                        yield found.name, cls, name


def variants(cls: Any) -> Iterator[Iterator[tuple[Any, ...]]]:
    """For every combination of the named parameters, the values of all parameters, smallest numbers first."""
    params = getattr(cls, "params", ())
    if params and not isinstance(params[0], (list, tuple)):
        params = (params,)
    named = [isinstance(values[0], str) for values in params]
    for names in itertools.product(*(values for values, is_name in zip(params, named, strict=True) if is_name)):
        given = iter(names)
        sizes = [(next(given),) if is_name else sorted(values) for values, is_name in zip(params, named, strict=True)]
        yield itertools.product(*sizes)


def run_once(cls: Any, method: str, values: tuple[Any, ...]) -> float | None:
    """Seconds of one call after setup; None where the benchmark leaves this combination out.

    Raises:
        Unavailable: this machine cannot run it at any size.
    """
    instance = cls()
    try:
        if hasattr(instance, "setup"):
            instance.setup(*values)
    except Unavailable:
        raise
    except NotImplementedError:
        return None
    began = time.perf_counter()
    getattr(instance, method)(*values)
    seconds = time.perf_counter() - began
    if hasattr(instance, "teardown"):
        instance.teardown(*values)
    return seconds


def main() -> int:
    """Run every benchmark once; exit code 1 when none was found or a variant runs at no size."""
    ran = missing = 0
    for module, cls, method in benchmarks():
        name = f"{module}.{cls.__name__}.{method}"
        for sizes in variants(cls):
            timed = ((values, run_once(cls, method, values)) for values in sizes)
            try:
                values, seconds = next(((v, s) for v, s in timed if s is not None), (None, None))
            except Unavailable as reason:
                print(f"{name}: left out, {reason}")
                continue
            if seconds is None:
                print(f"{name}: a variant runs at no size", file=sys.stderr)
                missing += 1
                continue
            print(f"{name}{values}: {seconds * 1e3:.2f} ms")
            ran += 1
    print(f"{ran} benchmarks ran")
    return 0 if ran and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
