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


_libc = ctypes.CDLL(None)
# FE_DFL_ENV: a symbol on macOS, the pointer -1 in glibc and musl.
_DEFAULT = (
    ctypes.c_void_p.in_dll(_libc, "_FE_DFL_ENV")
    if sys.platform == "darwin"
    else ctypes.c_void_p(-1)
)


def _set_ieee_by_ctypes() -> bytes:
    saved = ctypes.create_string_buffer(256)
    _libc.fegetenv(saved)
    _libc.fesetenv(_DEFAULT)
    return saved.raw


if _cpu is None:
    _set_ieee, _set_arithmetic = _set_ieee_by_ctypes, _libc.fesetenv
else:
    _set_ieee, _set_arithmetic = _cpu.set_ieee, _cpu.set_arithmetic
