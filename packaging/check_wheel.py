"""`make wheel`: what holds of a wheel before anyone installs it, and that its kernels work from where pip puts them.

    python packaging/check_wheel.py dist/*.whl

Exit status 1, with a line for each thing that is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from installed import checked, install, use

MOST_BYTES = 5_000_000
HEAVY = {"torch", "numpy"}  # all that a plain install may ask for

# Forward, backward, and agreement with the reference.
SCRIPT = """
results = []
for z_hat in (sample("native"), sample("reference")):
    results.append([z_hat, *torch.autograd.grad(z_hat.square().sum(), [z, *denoiser.parameters()])])
for a, b in zip(*results):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""


def faults(wheel: Path) -> Iterator[str]:
    """What is wrong with the file itself."""
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        yield f"{size} bytes, more than {MOST_BYTES}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    native = [name for name in names if name.startswith("gdpd_kernels/_native.")]
    if len(native) != 1:
        yield f"compiled modules: {native or 'none'}; expected one"
    if sys.platform == "linux" and "manylinux" not in wheel.name:
        yield "the name is not that of a manylinux wheel: run auditwheel repair"
    stray = [name for name in names if not name.startswith(("gdpd/", "gdpd_kernels/", "gdpd_kernels-"))]
    stray += [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]
    if stray:
        yield f"does not belong there: {', '.join(stray)}"
    wanted = {line.split(";")[0] for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line}
    heavy = {line for line in wanted if not line.startswith(tuple(HEAVY))}
    if heavy:
        yield f"a plain install would bring {', '.join(sorted(heavy))}"


def smoke(wheel: Path) -> Iterator[str]:
    """What goes wrong when it is installed somewhere and used with the torch of this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = install(wheel, Path(folder), os.environ) or use(Path(folder), SCRIPT)
        if wrong:
            yield wrong


if __name__ == "__main__":
    sys.exit(checked(sys.argv[1:], "wheel", lambda path: [*faults(path), *smoke(path)]))
