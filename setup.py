"""Builds the optional compiled module gdpd_kernels._native; everything else is in pyproject.toml.

GDPD_KERNELS_BUILD=0 leaves the module out, =1 makes a failed build an error. Unset, a machine without a C++ compiler
gets the pure-Python package, which runs on the reference backend and says so in `python -m gdpd_kernels.info`; a
compiler that fails at one instruction set, the module without that one.
GDPD_KERNELS_SANITIZE=1 builds with the address and undefined-behaviour sanitizers, GDPD_KERNELS_ONLY=avx2 (say) for one
instruction set alone: for the test that wants that, which would wait for the rest.
"""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

BUILD = os.environ.get("GDPD_KERNELS_BUILD", "")
SANITIZE = os.environ.get("GDPD_KERNELS_SANITIZE", "") == "1"
ONLY = os.environ.get("GDPD_KERNELS_ONLY", "")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=fast: multiply and add become one rounding where the instruction set has it. Nothing else is relaxed.
# -g0: Python's own flags ask for debugging information, which takes longer than the kernels and is thrown away.
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# One source per instruction set, each with flags of its own; the choice is made at run time.
PER_SOURCE = {
    "csrc/kernels_baseline.cpp": [],
    "csrc/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/kernels_avx512.cpp": AVX512,
    "csrc/kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
PER_SOURCE |= {source.replace("kernels_", "lstm_"): flags for source, flags in PER_SOURCE.items()}
SHARED = [f"csrc/{name}.cpp" for name in ("bindings", "bindings_lstm", "dispatch", "memory", "parallel", "plan")]
WANTED = f"_{ONLY}.cpp" if ONLY else ".cpp" if X86 else "_baseline.cpp"
KERNELS = [source for source in PER_SOURCE if source.endswith(WANTED)]


def instruction_set(source):
    """The instruction set that a source of `PER_SOURCE` is for."""
    return source.split("_", 1)[1].removesuffix(".cpp")


class BuildNative(build_ext):
    """Compiles each source with its own flags, in parallel, and survives a missing compiler unless told otherwise."""

    def build_extension(self, ext):
        try:
            self._build(ext)
        except (BaseError, CCompilerError, ImportError, OSError) as error:  # the second is no subclass of the first
            if BUILD == "1":
                raise
            print(f"gdpd_kernels: building without the native CPU kernels: {error}", file=sys.stderr)

    def _build(self, ext):
        if self.compiler.compiler_type == "msvc":
            raise CompileError(
                "the kernels are written in vector extensions of GCC and Clang, for systems with 64-bit long; MSVC has "
                "neither. On Windows, WSL has both"
            )
        from concurrent.futures import ThreadPoolExecutor

        import pybind11

        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZE else []
        debug = ["-fno-omit-frame-pointer", "-O1", "-g1"] if SANITIZE else []
        defined = [f"-DGK_ONLY=kernels_{ONLY}"] if ONLY else []

        left_out = set()

        def compile_one(source):
            flags = [*COMMON, *PER_SOURCE.get(source, []), *defined, *sanitize, *debug]
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[pybind11.get_include(), *self.compiler.include_dirs],
                extra_postargs=flags,
                depends=ext.depends,
            )

        def compile_kernels(source):
            try:
                return compile_one(source)
            except CompileError as error:
                if BUILD == "1" or ONLY or source.endswith("_baseline.cpp"):
                    raise
                name = instruction_set(source)
                print(f"gdpd_kernels: building without the instruction set {name}: {error}", file=sys.stderr)
                defined.append(f"-DGK_WITHOUT_{name.upper()}")
                left_out.add(name)
                return []

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = [s for s in ext.sources if s in KERNELS]
            compiled = list(zip(sources, pool.map(compile_kernels, sources), strict=True))
            # The files of an instruction set need each other: without one, none.
            kernels = [names for source, names in compiled if instruction_set(source) not in left_out]
            # After them: dispatch.cpp has to know which there are.
            shared = list(pool.map(compile_one, [s for s in ext.sources if s not in KERNELS]))
        objects = [name for names in [*kernels, *shared] for name in names]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        link = ["-Wl,-s"] if sys.platform == "linux" and not SANITIZE else []
        self.compiler.link_shared_object(
            objects, target, extra_postargs=[*link, *sanitize], target_lang="c++", libraries=self.get_libraries(ext)
        )

    def get_outputs(self):
        # A module that was not built is no output; setuptools would look for it.
        return [path for path in super().get_outputs() if os.path.exists(path)]


HEADERS = sorted(f"csrc/{name}" for name in os.listdir("csrc") if name.endswith(".h"))
# Optional: setuptools then does not look for what could not be built.
NATIVE = Extension("gdpd_kernels._native", SHARED + KERNELS, depends=HEADERS, language="c++", optional=BUILD != "1")
setup(ext_modules=[] if BUILD == "0" else [NATIVE], cmdclass={"build_ext": BuildNative})
