"""The native kernel. Everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[
        Extension(
            "gradclip.kernels._cpu",
            sources=["src/gradclip/kernels/cpumodule.c", "src/gradclip/kernels/cpu.c"],
            depends=["src/gradclip/kernels/cpu.h", "src/gradclip/kernels/cpu_blocks.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            # Contraction would change which roundings happen; fma is asked for by name where meant.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-fopenmp-simd",
                "-ffp-contract=off",
                "-fno-trapping-math",
                "-fno-math-errno",
            ],
            py_limited_api=True,
            # Without a C compiler the install still succeeds; the NumPy path gives the same bits.
            optional=True,
        )
    ],
)
