"""Arrays in this machine's memory: sums of squares and scaling, on several `threads`.

The walks are written twice, in C (`cpu.h`) and in NumPy (`plain.py`), and give the same bits.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from gradclip.core.exact import Part, ScaledArray
from gradclip.kernels.cpu import plain, threads

_why_numpy: str | None = None  # why the C kernel is not in use
try:
    import gradclip.kernels.cpu._cpu as _cpu  # noqa: PLR0402  (which tells not built from not loaded)
except ModuleNotFoundError:
    _why_numpy = "was not built"
except ImportError as _error:
    _why_numpy = f"cannot be loaded ({_error})"
else:
    # What has changed last.
    if "strided" not in str(getattr(getattr(_cpu, "use_handles", None), "__text_signature__", "")):
        _why_numpy = "is of an older gradclip"
    elif (_fault := _cpu.fault()) is not None:
        _why_numpy = f"gets {_fault} wrong on this machine"
if _why_numpy is not None:
    _cpu = None  # type: ignore[assignment]


def _samples() -> Iterator[Any]:
    """One array of each dtype that the C kernel takes as it is, none laid out as another."""
    for place, char in enumerate("efdFD"):
        array = np.zeros((4, 1 + place, 6), char)[::-1, :, place::2]
        array.flags.writeable = place % 2 == 0
        yield array


if _cpu is not None:
    _cpu.use_arrays(*_samples())
    if sys.platform != "win32":  # where no process forks
        os.register_at_fork(after_in_child=_cpu.forget_helpers)

T = TypeVar("T")


class Leaves(Protocol):
    """The memory of a list of arrays, held for a call. So many threads share each walk."""

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""

    @property
    def most_threads(self) -> int:
        """How many threads the leaves' framework allows the calling one."""

    @property
    def has_f64(self) -> bool:
        """If a leaf is float64 or complex128."""

    def spans(self) -> bytes | None:
        """Of each leaf its address, size and kind, as int64; None if one is not in one run."""

    def crowded(self) -> list[tuple[int, int, int, tuple[tuple[int, int], ...]]] | None:
        """None where it is seen that leaves to be written lie apart, or none is to be written.

        Else of each that has elements its number, and its `layout.Layout`.
        """

    def sum_squares(self, threads: int) -> list[Part]:
        """Shares of sum x^2 as (high, low, has_inf, has_nan); float64 is passed over."""

    def exact_squares(self, threads: int) -> list[tuple[bytes, bytes, float]]:
        """Shares, exactly: words for narrow and wide types, largest finite |x|."""

    def norms(self, threads: int) -> tuple[bytes, bytes, list[int], list[Part]]:
        """Each leaf's norm as significand and exponent, those that are unsure, the sum of all."""

    def only(self, number: int) -> Any:
        """The memory of one leaf."""

    def rows(self, counts: bytes) -> Any:
        """Each leaf cut into so many, as leaves; None if one is not in one run of memory."""

    def scale(
        self,
        source: Any,
        significand: float,
        exponent: int,
        recode: list[bytes | None] | None,
        threads: int,
    ) -> None:
        """Write shares of source times factor."""

    def scale_each(
        self,
        source: Any,
        significands: bytes,
        exponents: bytes,
        recode: list[bytes | None] | None,
        threads: int,
    ) -> None:
        """Write shares of source, each leaf times a factor of its own."""


def kernel() -> str:
    """The name of the kernel in use: a set of instructions, or ``numpy``."""
    return "numpy" if _cpu is None else _cpu.kernel()


def why_numpy() -> str | None:
    """Why the C kernel is not in use: what can be said of it; None where it is."""
    return _why_numpy


def kinds(items: Sequence[Any]) -> set[type]:
    """The types of what is in a list, each once."""
    if _cpu is None or not isinstance(items, list):
        return set(map(type, items))
    return _cpu.kinds(items)


def distinct(items: list[T]) -> list[T]:
    """The objects in a list, each once: equal ones are others."""
    if _cpu is None:
        return list({id(item): item for item in items}.values())
    return _cpu.distinct(items)


def take(arrays: list[Any], decode: list[bytes | None] | None, *, writable: bool) -> Leaves | None:
    """Hold the memory of arrays, or None where one of them needs care first.

    None too where they have more elements, a complex one counted as two, than an int64 counts.

    With ``decode`` None only native NumPy dtypes are taken. Else it has an entry for each array:
    uint16 arrays are bfloat16, uint8 arrays are codes for the 256 float32 values in the entry.
    """
    if _cpu is None:
        warn_once()
        return plain.take(arrays, writable, decode)
    return _cpu.take(arrays, writable, decode)


def use_handles(
    functions: tuple[int, ...], numbers: tuple[int, ...], of: type, strided: object
) -> None:
    """Tell the C kernel by which C functions objects of a type say where their memory is.

    Each of those takes a handle, which points into such an object. `handles.c` has their order.
    ``strided`` is the ``layout`` of objects whose elements lie one by one in their storage.
    """
    assert _cpu is not None, "the C kernel is in use"
    _cpu.use_handles(functions, numbers, of, strided)


def take_handles(
    objects: Sequence[Any], *, writable: bool, device: tuple[int, int] = (-1, 0)
) -> Leaves | None:
    """Hold the memory of objects that have handles, or None where one of them needs care.

    Only after `use_handles`, and only objects of the type it was told, or of one that adds no
    memory of its own to it. ``device`` is the functions' number of its type and its index: of
    others than the CPU only `spans` can be asked.
    """
    assert _cpu is not None, "the C kernel is in use"
    return _cpu.take_handles(objects, writable, *device)


_warned = False


def warn_once() -> None:
    """Say that the C kernel is not in use, and why, at the first call."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"gradclip's C kernel {_why_numpy}, so NumPy or XLA does its work: the same bits, "
            "slower. Install gradclip again where a C compiler is found, without CFLAGS: "
            "`pip install --force-reinstall --no-cache-dir -v .` in its checkout shows what it "
            "says.",
            RuntimeWarning,
            stacklevel=2,
        )


def xla_handlers() -> dict[str, Any]:
    """What XLA may call, as capsules; nothing where the C kernel is not in use."""
    return {} if _cpu is None else _cpu.xla_handlers()


def watch() -> Any:
    """What measures a parameter's gradient when it is called with the parameter: `_cpu.Watch`."""
    assert _cpu is not None, "the C kernel is in use"
    return _cpu.Watch(threads.number(), threads.BYTES_PER_THREAD)


def sum_squares(leaves: Leaves) -> list[Part]:
    """Each thread's share of sum x^2 in float64."""
    return leaves.sum_squares(_threads(leaves))


def exact_squares(leaves: Leaves) -> list[tuple[bytes, bytes, float]]:
    """Each thread's share of sum x^2, exactly."""
    return leaves.exact_squares(_threads(leaves))


def scale(
    source: Leaves,
    target: Leaves,
    significand: float,
    exponent: int,
    recode: list[bytes | None] | None,
) -> None:
    """Write ``source * significand * 2**exponent`` to ``target``, which may be ``source``.

    Leaves of 32 bits or fewer take the factor rounded to 24 bits. ``recode`` has the 256 new bytes
    for each leaf of codes.
    """
    target.scale(source, significand, exponent, recode, _threads(target))


def norms(leaves: Leaves) -> tuple[ScaledArray, list[int], list[Part]]:
    """The norm of each leaf, which of them sums in float64 do not prove, and the sum of all.

    An unsure one is 0 here; every leaf of float64 is unsure.
    """
    significands, exponents, unsure, parts = leaves.norms(_threads(leaves))
    each = ScaledArray(
        np.frombuffer(significands, np.float64).copy(), np.frombuffer(exponents, np.int64).copy()
    )
    return each, unsure, parts


def rows(leaves: Leaves, counts: Sequence[int]) -> Leaves | None:
    """Each leaf cut into so many of its first axis; None if one is not in one run of memory."""
    found: Leaves | None = leaves.rows(np.array(counts, np.int64).tobytes())
    return found


def scale_each(
    source: Leaves, target: Leaves, factors: ScaledArray, recode: list[bytes | None] | None
) -> None:
    """As `scale`, each leaf by a factor of its own; in place none is touched whose factor is 1."""
    bits = factors.significand.tobytes(), factors.exponent.tobytes()
    target.scale_each(source, *bits, recode, _threads(target))


def _threads(leaves: Leaves) -> int:
    return threads.worth(leaves.nbytes, leaves.most_threads)
