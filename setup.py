"""The native kernel. Everything else about the package stands in pyproject.toml."""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/gradclip/kernels/cpu")

# They come after those in CFLAGS, and the last one counts: what would change the arithmetic there
# is undone here. Each is known to GCC and to Clang; an unknown one would be an error.
FLAGS = [
    "-std=c11",
    "-O3",
    "-fopenmp-simd",
    # And again below, where it counts: Clang before 17 warns where only the one below is there.
    "-fno-trapping-math",
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
    "-fno-rounding-math",
    # Contraction would change which roundings happen; fma is asked for by name where meant.
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    # What the files have from each other is no business of other libraries.
    "-fvisibility=hidden",
]
# CFLAGS are the linker's too, and by any of these it would add code that has the whole process
# flush subnormal numbers from the import on. The last is as above, for one command that does both.
LINK_FLAGS = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-trapping-math"]
if sysconfig.get_platform().endswith(("x86_64", "amd64")):
    FLAGS += [
        # GCC 12 may keep values in MMX registers and leave the x87 unit, which shares them,
        # unusable: the caller's next long double is NaN.
        "-mno-mmx",
        "-mfpmath=sse",
        # No instructions but those that every such processor has, whatever machine -march=native
        # in CFLAGS was said on: the loops are there for newer ones too, to be chosen from at load.
        "-mno-sse3",
        "-mno-bmi",
        "-mno-bmi2",
        "-mno-lzcnt",
        "-mno-popcnt",
        # Of 512 bits, whole vectors: compilers take halves for some processors.
        "-mprefer-vector-width=512",
    ]


# A free-threaded Python has no limited API before 3.15. It takes its lock back when it loads the
# kernel, which does not say that it could do without, and warns of it.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildKernel(build_ext):
    """What an earlier build has left is not to stand in for one that fails."""

    def run(self) -> None:
        mapping = self.get_output_mapping()
        paths = [Path(path) for path in (*self.get_outputs(), *mapping, *mapping.values())]
        for path in paths:
            path.unlink(missing_ok=True)
        super().run()
        if not any(path.exists() for path in paths):
            self.distribution.ext_modules = None


class NameWheel(bdist_wheel):
    """One without the kernel runs everywhere, and says so by its name: all that pip shows of it."""

    def run(self) -> None:
        self.run_command("build")
        if not self.distribution.has_ext_modules():
            self.root_is_pure = True
            self.build_number = "0_without_the_C_kernel"
        self.skip_build = True  # it would compile all of the kernel again
        super().run()


setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": NameWheel},
    ext_modules=[
        Extension(
            "gradclip.kernels.cpu._cpu",
            sources=sorted(map(str, FOLDER.glob("*.c"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
            extra_compile_args=FLAGS,
            extra_link_args=LINK_FLAGS,
            py_limited_api=LIMITED_API,
            # Without a C compiler the install still succeeds; the NumPy path gives the same bits,
            # and the first use says so.
            optional=os.environ.get("GRADCLIP_REQUIRE_KERNEL", "0") in ("", "0"),
        )
    ],
)
