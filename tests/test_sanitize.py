"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builds import CC, build

FUZZ = Path(__file__).parent / "fuzz_kernel.py"


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


def sanitized(library, **options):
    """Run the fuzzer on a build with the sanitizers' libraries loaded."""
    return fuzz(
        library,
        LD_PRELOAD=" ".join(map(runtime, ("libasan", "libubsan"))),
        # CPython keeps memory to its end on purpose; test_process.py counts leaks over many calls.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        **options,
    )


FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [100, pytest.param(400, marks=pytest.mark.long)])
def test_sanitizers_find_nothing(tmp_path, rounds):
    run = sanitized(build(tmp_path, *FLAGS), rounds=rounds, seed=1)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == f"{rounds} rounds agree\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "sound", "broken", "found"),
    [
        ("walk.h", "if (length > most) length = most;", "(void)most;", "stack-buffer-overflow"),
        pytest.param(
            *("layout.c", "(uintptr_t)leaf->data % (uintptr_t)item == 0", "1", "misaligned"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["blocks without end", "reads unaligned"],
)
def test_sanitizers_find_a_planted_fault(tmp_path, file, sound, broken, found):
    library = build(tmp_path, *FLAGS, change=(file, sound, broken))
    run = sanitized(library, rounds=400, seed=1)
    assert run.returncode != 0
    assert found in run.stderr
