"""`make wheel`: what pip makes of the sdist where no wheel fits, with a C++ compiler and without one.

    python packaging/check_sdist.py dist/*.tar.gz

Exit status 1, with a line for each thing that is wrong. The wheel is built from this sdist with all instruction sets;
here one is enough, to see that pip's own build has what it needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from installed import checked, install, use

NATIVE = """
assert list(gk.info.collect()["built"]["native"]["instruction_sets"]) == ["baseline"], "another module was found"
torch.testing.assert_close(sample("native"), sample("reference"), rtol=1e-4, atol=1e-4)
"""

# Says why the kernels are missing, refuses them when asked for by name, and computes without them.
PURE = """
import contextlib, io
said = io.StringIO()
with contextlib.redirect_stdout(said):
    gk.info.main()
assert "the compiled module is missing" in said.getvalue(), said.getvalue()
try:
    sample("native")
except gk.BackendError as error:
    assert "install with a C++17 compiler" in str(error), error
else:
    raise AssertionError("ran on a compiled module that should not be there")
z_hat = sample("auto")
assert torch.equal(z_hat, sample("reference"))
(gradient,) = torch.autograd.grad(z_hat.square().sum(), z)
assert gradient.isfinite().all() and gradient.count_nonzero(), gradient
"""


def faults(sdist: Path) -> Iterator[str]:
    """What goes wrong in either case."""
    # What a user has who never heard of these switches.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GDPD_KERNELS_")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nothing = folder / "nothing"
        nothing.mkdir()
        bare = plain | {"PATH": str(nothing), "CC": str(nothing / "cc"), "CXX": str(nothing / "c++")}
        one = plain | {"GDPD_KERNELS_ONLY": "baseline", "GDPD_KERNELS_BUILD": "1"}
        for case, environment, script in (("compiler", one, NATIVE), ("no compiler", bare, PURE)):
            target = folder / case
            wrong = install(sdist, target, environment) or use(target, "import gdpd_kernels.info\n" + script)
            if wrong:
                yield f"{case}: {wrong}"


if __name__ == "__main__":
    sys.exit(checked(sys.argv[1:], "sdist", faults))
