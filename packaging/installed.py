"""A package file installed by pip into a folder of its own and used from there, for the checks beside this module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

CLONE = str(Path(__file__).resolve().parents[1])

# Begins every script that `use` runs: nothing may come from the clone, where an editable install would look for the
# compiled module that an installed package lacks.
BEGINNING = f"""
import sys
sys.meta_path[:] = [x for x in sys.meta_path if not getattr(x, "__module__", "").startswith("__editable__")]
import torch, gdpd_kernels as gk
assert not gk.__file__.startswith({CLONE + os.sep!r}), gk.__file__
class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8))
    def forward(self, z, t):
        return self.net(z)
torch.manual_seed(0)
denoiser, z = Denoiser(), torch.randn(37, 8, requires_grad=True)
def sample(backend):
    return gk.reverse_sample(denoiser, z, table=gk.ddim_table(), alpha=0.5, seed=1, backend=backend)
"""


def install(source: Path, folder: Path, environment: Mapping[str, str]) -> str:
    """Install `source` into `folder` as pip does it, building it where it is an sdist; "" or what pip complained of."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
    done = subprocess.run(pip, env=dict(environment), capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def use(folder: Path, script: str) -> str:
    """Run `script` with what lies in `folder` and the torch of this interpreter; "" or what went wrong."""
    away = ["-P"] if sys.version_info >= (3, 11) else []
    done = subprocess.run(
        [sys.executable, *away, "-c", BEGINNING + script],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip() if done.returncode else ""


def checked(paths: list[str], kind: str, faults: Callable[[Path], Iterable[str]]) -> int:
    """Look for faults in every file and tell them; 1 if there is any, or no file."""
    wrong = [] if paths else [f"no {kind} given"]
    for path in map(Path, paths):
        found = list(faults(path))
        wrong += [f"{path.name}: {fault}" for fault in found]
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {len(found)} faults")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0
