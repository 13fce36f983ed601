"""How the C kernel is built and loaded: by strict compilers, with hostile flags, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from builds import CC, DEFINE, INCLUDE, SOURCES, build, copy_tree, install, write_sources
from host import HAS_MXCSR, run_python

# ---- compilers ----

COMPILERS = [CC, *([name] for name in ("clang", "clang-16") if shutil.which(name))]
# What newer compilers than this one take for errors: GCC since 14, Clang since 16.
STRICT = (
    *("-std=c11", "-O2", "-fopenmp-simd", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"),
    *("-Wincompatible-pointer-types", "-Wint-conversion", "-Wimplicit-function-declaration"),
)


def complaints(compiler: list[str], folder: Path) -> str:
    sources = [str(source) for source in sorted(folder.glob("*.c"))]
    command = [*compiler, *STRICT, DEFINE, INCLUDE, *sources]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("compiler", COMPILERS, ids=" ".join)
def test_strict_compilers_have_nothing_to_complain_of(compiler: list[str]) -> None:
    assert complaints(compiler, SOURCES) == ""


def test_what_a_newer_compiler_takes_for_an_error_would_be_seen(tmp_path: Path) -> None:
    pointer = ("scale.c", "const uint8_t *recode, void *out)", "const uint8_t *recode, char *out)")
    write_sources(tmp_path, pointer)
    assert "incompatible-pointer-types" in complaints(CC, tmp_path)


# ---- flags ----

on_x86 = pytest.mark.skipif(not HAS_MXCSR, reason="looks at what x86-64 Linux has")

LOAD = """
    from host import mxcsr
    from builds import load_instead
    before = mxcsr()
    load_instead(sys.argv[1])
    print(mxcsr() == before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "-Ofast -flto",
        pytest.param("-O3 -ffast-math", marks=pytest.mark.long),
        pytest.param(
            "-O0 -funsafe-math-optimizations -ffinite-math-only -fno-signed-zeros",
            marks=pytest.mark.long,
        ),
    ],
)
def test_flags_for_other_arithmetic_are_undone(flags: str, tmp_path: Path) -> None:
    """The kernel passes all checks, and the process's own arithmetic stays as it was."""
    copy_tree(tmp_path)
    (library, copy) = sorted(install(tmp_path, CFLAGS=flags, LDFLAGS=flags))
    done = run_python("import mutant; mutant.main(sys.argv[1])", str(copy))
    assert (done.returncode, done.stdout) == (0, "trial: None\n"), done.stderr
    assert library.read_bytes() == copy.read_bytes()
    if HAS_MXCSR:
        assert run_python(LOAD, str(copy)).stdout == "True\n"


@pytest.mark.slow
@on_x86
def test_what_a_linker_adds_to_flush_subnormal_numbers_would_be_seen(tmp_path: Path) -> None:
    assert run_python(LOAD, str(build(tmp_path, "-ffast-math"))).stdout == "False\n"


@pytest.mark.slow
@on_x86
def test_no_instructions_of_the_machine_it_is_built_on(tmp_path: Path) -> None:
    """Beyond the loops that are chosen at load: it may be loaded on another machine."""
    copy_tree(tmp_path)
    objects = install(tmp_path, CFLAGS="-march=sapphirerapids")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(objects[0])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = re.split(r"\n\n[0-9a-f]+ <(\w+)[.\w]*>:\n", listing)
    named = zip(functions[1::2], functions[2::2], strict=True)
    newer = re.compile(
        r"\t(v[a-z0-9]+|sarx|shlx|shrx|rorx|mulx|andn|blsr|tzcnt|lzcnt|popcnt|pdep)\s"
    )
    found = {name for name, body in named if newer.search(body)}
    assert found
    assert all(re.search(r"_avx2$|_avx512$|^convert_", name) for name in found), found


# ---- a kernel that is not to be used ----

WAY_OUT = (
    ", so NumPy or XLA does its work: the same bits, slower. Install gradclip again where a C "
    "compiler is found, without CFLAGS: `pip install --force-reinstall --no-cache-dir -v gradclip` "
    "shows what it says."
)

USE = """
    import json, warnings
    if sys.argv[1:]:
        from builds import load_instead
        load_instead(sys.argv[1])
    import gradclip
    import numpy as np
    from gradclip.kernels import cpu
    from gradclip.cli.env import facts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norms = [float(gradclip.global_norm([np.array([3.0, 4.0, np.finfo(t).tiny], t)]))
                 for t in (np.float32, np.float64)]
    told = [str(warning.message) for warning in caught]
    env = facts()
    print(json.dumps([norms, told, env["kernel"], env["xla_calls_kernel"], env["why_numpy"]]))
"""


def told_of(*arguments: str, path: Path | None = None) -> list[object]:
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    done = run_python(USE, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["-ffast-math"], "a sum in two parts"),
        (["-ffinite-math-only"], "a sum in float64"),
        pytest.param(
            ["-fassociative-math", "-fno-signed-zeros"],
            "a sum in two parts",
            marks=pytest.mark.long,
        ),
    ],
    ids=["fast", "finite", "associative"],
)
def test_a_kernel_that_gets_its_trial_wrong_is_not_used(
    flags: list[str], wrong: str, tmp_path: Path
) -> None:
    library = build(tmp_path, *flags)
    why = f"gets {wrong} wrong on this machine"
    wanted = [[5.0, 5.0], [f"gradclip's C kernel {why}{WAY_OUT}"], "numpy", False, why]
    assert told_of(str(library)) == wanted


@pytest.mark.slow
def test_a_kernel_that_cannot_be_loaded_is_told_of(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    library = tmp_path / "src/gradclip/kernels/cpu/_cpu.abi3.so"
    library.write_bytes(b"of another machine")
    norms, told, kernel, xla, why = told_of(path=tmp_path / "src")
    assert (norms, kernel, xla) == ([5.0, 5.0], "numpy", False)
    assert why == f"cannot be loaded ({library}: file too short)"
    assert told == [f"gradclip's C kernel {why}{WAY_OUT}"]


@pytest.mark.slow
def test_a_build_that_fails_leaves_no_older_kernel_in_its_place(tmp_path: Path) -> None:
    """The install succeeds all the same, and the first use says what it has come to."""
    copy_tree(tmp_path)
    built = install(tmp_path)
    assert len(built) == 2
    assert install(tmp_path, CC="false") == []
    norms, told, kernel, xla, why = told_of(path=tmp_path / "src")
    assert (norms, kernel, xla, why) == ([5.0, 5.0], "numpy", False, "was not built")
    assert told == [f"gradclip's C kernel was not built{WAY_OUT}"]
