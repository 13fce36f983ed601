"""The native kernel. Everything else about the package stands in pyproject.toml."""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-std=c11",
    "-O3",
    "-fopenmp-simd",
    # Contraction would change which roundings happen; fma is asked for by name where meant.
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
]
if platform.machine() in ("x86_64", "AMD64"):
    # GCC 12 may keep values in MMX registers and leave the x87 unit, which shares them, unusable:
    # the caller's next long double is NaN.
    FLAGS.append("-mno-mmx")

setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[
        Extension(
            "gradclip.kernels._cpu",
            sources=[f"src/gradclip/kernels/{name}.c" for name in ("cpumodule", "cpu", "xla")],
            depends=[f"src/gradclip/kernels/{name}.h" for name in ("cpu", "cpu_blocks", "xla")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            # Without a C compiler the install still succeeds; the NumPy path gives the same bits.
            optional=True,
        )
    ],
)
