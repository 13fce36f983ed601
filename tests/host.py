"""What surrounds a call: the host's floating-point environment, and other Python processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
HAS_MXCSR = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
_FENV_SIZE = 32
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 0x8000, 0x0040
_EXCEPTION_FLAGS = 0x003F
_MODES = {
    "x86_64": {"downward": 0x400, "upward": 0x800, "towards zero": 0xC00},
    "aarch64": {"downward": 0x800000, "upward": 0x400000, "towards zero": 0xC00000},
}
ROUNDING_MODES = _MODES.get(platform.machine(), {})


def mxcsr() -> int:
    """The control bits of the x86 vector unit."""
    return _mxcsr_of(_environment()) & ~_EXCEPTION_FLAGS


def x87_tags() -> int:
    """Which registers of the x87 unit are in use; 0xFFFF: none, as every function must leave it."""
    return int.from_bytes(_environment().raw[8:10], sys.byteorder)


def _environment() -> ctypes.Array[ctypes.c_char]:
    saved = ctypes.create_string_buffer(_FENV_SIZE)
    _libc.fegetenv(saved)
    return saved


def _mxcsr_of(saved: ctypes.Array[ctypes.c_char]) -> int:
    return int.from_bytes(saved.raw[_FENV_SIZE - 4 :], sys.byteorder)


@contextlib.contextmanager
def flush_to_zero() -> Iterator[None]:
    """A host that has subnormal numbers read and written as zero."""
    saved = _environment()
    changed = _mxcsr_of(saved) | _FLUSH_TO_ZERO | _DENORMALS_ARE_ZERO
    _libc.fesetenv(saved.raw[: _FENV_SIZE - 4] + changed.to_bytes(4, sys.byteorder))
    try:
        yield
    finally:
        _libc.fesetenv(saved)


def rounding() -> int:
    """The host's rounding mode."""
    return int(_libc.fegetround())


@contextlib.contextmanager
def rounding_mode(mode: int) -> Iterator[None]:
    """A host that does not round to nearest."""
    saved = rounding()
    assert _libc.fesetround(mode) == 0
    try:
        yield
    finally:
        _libc.fesetround(saved)


def run_python(
    code: str, *args: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in another interpreter, which finds the modules of this folder."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", start + textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        check=False,
    )


def run_script(
    script: Path, cwd: Path, *arguments: str, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script as its user does."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


_IN_TURN = """
import json, runpy, sys
script, folder, commands = sys.argv[1:]
sys.path.insert(0, folder)
for command in json.loads(commands):
    sys.argv = [script, *command]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        print("ended with", ended.code)
"""


def run_script_in_turn(
    script: Path, commands: list[list[str]], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script with some arguments and with others, in one process: imports take seconds."""
    arguments = [str(script), str(script.parent), json.dumps(commands)]
    return subprocess.run(
        [sys.executable, "-c", _IN_TURN, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
