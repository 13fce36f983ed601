"""The arithmetic of IEEE for a call, whatever the host has set for its threads."""

from __future__ import annotations

import ctypes
import sys

from gradclip.kernels.cpu import _cpu  # type: ignore[attr-defined]  # None where it is not in use


class ieee_arithmetic:  # noqa: N801  (used as a function)
    """Round to nearest and keep subnormals, whatever the host has set; then as it was."""

    __slots__ = ("_saved",)

    def __enter__(self) -> None:
        self._saved = _set_ieee()

    def __exit__(self, *_: object) -> None:
        _set_arithmetic(self._saved)


if _cpu is not None:
    _set_ieee, _set_arithmetic = _cpu.set_ieee, _cpu.set_arithmetic
elif sys.platform == "win32":
    # _MCW_DN | _MCW_RC: how subnormals are treated, and the rounding. Of both, 0 is IEEE's.
    _CONTROLS = 0x03000300
    _control = ctypes.CDLL("ucrtbase")._controlfp

    def _set_ieee() -> int:
        saved = int(_control(0, 0))
        _control(0, _CONTROLS)
        return saved

    def _set_arithmetic(saved: int) -> None:
        _control(saved, _CONTROLS)
else:
    _libc = ctypes.CDLL(None)
    _set_arithmetic = _libc.fesetenv
    # FE_DFL_ENV: a symbol on macOS, the pointer -1 in glibc and musl.
    _DEFAULT = (
        ctypes.c_void_p.in_dll(_libc, "_FE_DFL_ENV")
        if sys.platform == "darwin"
        else ctypes.c_void_p(-1)
    )

    def _set_ieee() -> bytes:
        saved = ctypes.create_string_buffer(256)
        _libc.fegetenv(saved)
        _libc.fesetenv(_DEFAULT)
        return saved.raw
