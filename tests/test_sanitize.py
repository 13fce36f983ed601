"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "src/gradclip/kernels"
FUZZ = Path(__file__).parent / "fuzz_kernel.py"
CC = sysconfig.get_config_var("CC").split()


def build(folder, *flags, source=KERNELS):
    """Compile the extension with extra flags."""
    target = folder / "_cpu.abi3.so"
    subprocess.run(
        [
            *CC,
            *("-std=c11", "-O1", "-g", "-fopenmp-simd", "-ffp-contract=off", "-shared", "-fPIC"),
            *("-fno-trapping-math", "-fno-math-errno", "-DPy_LIMITED_API=0x030B0000", *flags),
            f"-I{sysconfig.get_path('include')}",
            *(str(source / name) for name in ("cpumodule.c", "cpu.c")),
            *("-o", str(target)),
        ],
        check=True,
    )
    return target


def fuzz(kernel, *, rounds, seed, **environment):
    return subprocess.run(
        [sys.executable, str(FUZZ), str(kernel), str(rounds), str(seed)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def runtime(name):
    """The path of a sanitizer's library, which must be loaded before Python."""
    command = [*CC, f"-print-file-name={name}.so"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


SANITIZERS = {
    "LD_PRELOAD": " ".join(map(runtime, ("libasan", "libubsan"))),
    # CPython keeps memory to its end on purpose; test_process.py counts leaks over many calls.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
}
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    run = fuzz(build(tmp_path, *FLAGS), rounds=400, seed=1, **SANITIZERS)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == "400 rounds agree\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sound", "broken", "found"),
    [
        ("if (length > most) length = most;", "(void)most;", "stack-buffer-overflow"),
        ("(uintptr_t)leaf->data % (uintptr_t)item == 0", "1", "misaligned"),
    ],
    ids=["blocks without end", "reads unaligned"],
)
def test_sanitizers_find_a_planted_fault(tmp_path, sound, broken, found):
    for name in ("cpumodule.c", "cpu.c", "cpu.h", "cpu_blocks.h"):
        text = (KERNELS / name).read_text()
        (tmp_path / name).write_text(text.replace(sound, broken))
    run = fuzz(build(tmp_path, *FLAGS, source=tmp_path), rounds=400, seed=1, **SANITIZERS)
    assert run.returncode != 0
    assert found in run.stderr
