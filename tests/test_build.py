"""How the C kernel is built and loaded: by strict compilers, with hostile flags, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from builds import CC, SOURCES, build, copy_tree, install, write_sources
from host import HAS_MXCSR, run_python

on_x86 = pytest.mark.skipif(not HAS_MXCSR, reason="looks at what x86-64 Linux has")

# ---- compilers ----

OTHERS = [
    name
    for name in ("gcc-13", "gcc-14", "gcc-15", *(f"clang-{version}" for version in range(14, 23)))
    if shutil.which(name)
]
if importlib.util.find_spec("ziglang"):
    OTHERS.append(f"{sys.executable} -m ziglang cc -target x86_64-linux-gnu")
STRICT = "-Wall -Wextra -Werror"


def build_strictly(compiler: str, folder: Path, **environment: str) -> Path:
    """Install with every warning an error."""
    copy_tree(folder)
    return install(folder, CC=compiler, GRADCLIP_REQUIRE_KERNEL="1", **environment)[0]


@pytest.mark.slow
@on_x86
@pytest.mark.parametrize(
    "compiler",
    [" ".join(CC), *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)],
)
def test_each_target_has_its_instructions_and_no_others_have(compiler: str, tmp_path: Path) -> None:
    """Built without a warning for one machine, the loops are what each other machine needs."""
    # Zig takes -march for a target of ours, of which single instructions cannot be left out.
    machine = "" if "zig" in compiler else "-march=sapphirerapids"
    library = build_strictly(compiler, tmp_path, CFLAGS=f"{STRICT} {machine}")
    assert misplaced(library) == {}
    done = run_python(KERNELS, str(library))
    assert done.stdout.split() == kernels_of_this_processor(), done.stderr


KERNELS = """
    from builds import load_instead
    print(*load_instead(sys.argv[1]).kernels())
"""


def kernels_of_this_processor() -> list[str]:
    """As Linux sees it."""
    (flags, *_) = re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    avx2 = {"avx2", "fma", "f16c"}
    needed = {"avx512": avx2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}, "avx2": avx2}
    return [*(name for name, all_of in needed.items() if all_of <= {*flags.split()}), "baseline"]


@pytest.mark.slow
@on_x86
@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        ("-mavx512f", {"baseline has newer instructions", "avx2 has 512 bits"}),
        ("-O0", {"avx512 has no 512 bits"}),
    ],
)
def test_instructions_in_the_wrong_place_would_be_seen(
    flags: str, wrong: set[str], tmp_path: Path
) -> None:
    library = tmp_path / "targets.o"
    optimised = ("-std=c11", "-O3", "-fopenmp-simd", "-fno-trapping-math")
    command = [
        *CC,
        *optimised,
        *flags.split(),
        "-c",
        str(SOURCES / "targets.c"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert wrong <= set(misplaced(library))


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no compiler for aarch64")
def test_a_compiler_for_another_processor_has_nothing_to_complain_of(tmp_path: Path) -> None:
    """Nothing is chosen at load there."""
    target = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "CFLAGS": STRICT}
    library = build_strictly("aarch64-linux-gnu-gcc", tmp_path, **target)
    assert b"avx512" not in library.read_bytes()


def functions(library: Path) -> dict[str, str]:
    """The instructions of each function."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    parts = re.split(r"\n\n[0-9a-f]+ <(\w+)[.\w]*>:\n", listing)
    found: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = found.get(name, "") + body
    return found


# Not tzcnt: on older processors it is bsf, which Clang wants where it writes it.
NEWER = re.compile(
    r"\t(v[a-z0-9]+|sarx|shlx|shrx|rorx|mulx|adcx|adox|andn|blsr|lzcnt|popcnt|pdep|movbe)\s"
)
# Registers of AVX-512 alone: 512 bits, masks, and those from the 16th on.
OF_AVX512 = re.compile(r"%(zmm|k[0-7]|[xy]mm(1[6-9]|2\d|3[01]))")


def misplaced(library: Path) -> dict[str, set[str]]:
    """What is wrong, and where."""
    copies: dict[str, dict[str, str]] = {"avx512": {}, "avx2": {}, "baseline": {}}
    for name, body in functions(library).items():
        # Those that convert float16 are for both of the newer targets.
        target = "avx2" if re.match("convert_|scale_halves", name) else name.rpartition("_")[2]
        copies.get(target, copies["baseline"])[name] = body
    loops = {
        target: {name.rpartition("_")[0] for name in copy if name.endswith(target)}
        for target, copy in copies.items()
    }
    assert loops["avx512"] == loops["avx2"] == loops["baseline"] != set()
    # The instruction that converts is of 256 bits, and what it leaves is less than that.
    wide = {name for name in copies["avx512"] if not re.match("(load|store)_f16", name)}
    found = {
        "baseline has newer instructions": having(NEWER, copies["baseline"]),
        "avx2 has 512 bits": having(OF_AVX512, copies["avx2"]),
        "avx2 has no 256 bits": set(copies["avx2"]) - having(re.compile("%ymm"), copies["avx2"]),
        "avx512 has no 512 bits": wide - having(re.compile("%zmm"), copies["avx512"]),
    }
    return {what: names for what, names in found.items() if names}


def having(pattern: re.Pattern[str], copy: dict[str, str]) -> set[str]:
    return {name for name, body in copy.items() if pattern.search(body)}


def test_what_a_newer_compiler_takes_for_an_error_would_be_seen(tmp_path: Path) -> None:
    pointer = ("scale.c", "const uint8_t *recode, void *out)", "const uint8_t *recode, char *out)")
    write_sources(tmp_path, pointer)
    command = [*CC, "-std=c11", *STRICT.split(), "-fsyntax-only", str(tmp_path / "scale.c")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "incompatible-pointer-types" in run.stderr


# ---- flags ----

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


# ---- a kernel that is not to be used ----

WAY_OUT = (
    ", so NumPy or XLA does its work: the same bits, slower. Install gradclip again where a C "
    "compiler is found, without CFLAGS: `pip install --force-reinstall --no-cache-dir -v .` in "
    "its checkout shows what it says."
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


@pytest.mark.long
def test_a_kernel_of_an_older_gradclip_is_not_used(tmp_path: Path) -> None:
    library = build(tmp_path, change=("handles.c", "numbers, type, strided)", "numbers, type)"))
    why = "is of an older gradclip"
    wanted = [[5.0, 5.0], [f"gradclip's C kernel {why}{WAY_OUT}"], "numpy", False, why]
    assert told_of(str(library)) == wanted


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


# ---- an install without a kernel ----


def pip(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What pip says by itself of a `copy_tree`; no index is asked."""
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", "."]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "CC": str(broken_compiler(folder)), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def broken_compiler(folder: Path) -> Path:
    compiler = folder / "broken"
    compiler.write_text("#!/bin/sh\necho the compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    return compiler


WITHOUT_KERNEL = re.compile(r"gradclip-[0-9.]+-0_without_the_C_kernel-py3-none-any\.whl")


@pytest.mark.slow
def test_pip_shows_that_it_has_no_kernel(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    done = pip("install", "--target", str(tmp_path / "site"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "Created wheel" in line)
    assert WITHOUT_KERNEL.search(line), line
    assert told_of(path=tmp_path / "site")[-1] == "was not built"


@pytest.mark.long
def test_a_wheel_without_a_kernel_is_for_every_machine(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    done = pip("wheel", "--wheel-dir", str(tmp_path / "wheels"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert WITHOUT_KERNEL.fullmatch(wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        assert not [name for name in opened.namelist() if name.endswith((".so", ".c"))]
        (about,) = (name for name in opened.namelist() if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: true" in opened.read(about).decode()


@pytest.mark.long
def test_a_wheel_with_a_kernel_is_for_its_machine_and_compiled_once(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {" ".join(CC)} "$@"\n')
    compiler.chmod(0o755)
    environment = {"CC": str(compiler), "GRADCLIP_REQUIRE_KERNEL": "1"}
    done = pip("wheel", "--wheel-dir", str(tmp_path / "wheels"), folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert re.fullmatch(r"gradclip-[0-9.]+-cp311-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        assert [name for name in opened.namelist() if name.endswith(".so")]
    compiled = re.findall(r" -c (\S+\.c) ", calls.read_text())
    assert sorted(Path(name).name for name in compiled) == sorted(
        path.name for path in SOURCES.glob("*.c")
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["install", pytest.param("wheel", marks=pytest.mark.long)])
def test_a_kernel_that_is_required_stops_an_install_without_it(verb: str, tmp_path: Path) -> None:
    copy_tree(tmp_path)
    option = {"install": "--target", "wheel": "--wheel-dir"}[verb]
    target = tmp_path / "target"
    done = pip(verb, option, str(target), folder=tmp_path, GRADCLIP_REQUIRE_KERNEL="1")
    assert done.returncode == 1
    assert "the compiler is broken" in done.stdout + done.stderr
    assert not target.exists() or not [*target.iterdir()]
