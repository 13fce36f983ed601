"""Arrays in this machine's memory: sums of squares and scaling, on several threads.

The walks are written twice, in C (`cpu.h`) and in NumPy (`plain.py`), and give the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from gradclip.kernels.cpu import plain

_why_numpy: str | None = None  # why the C kernel is not in use
try:
    import gradclip.kernels.cpu._cpu as _cpu  # noqa: PLR0402  (which tells not built from not loaded)
except ModuleNotFoundError:
    _why_numpy = "was not built"
except ImportError as _error:
    _why_numpy = f"cannot be loaded ({_error})"
else:
    if not hasattr(_cpu, "fault"):
        _why_numpy = "is of an older gradclip"
    elif (_fault := _cpu.fault()) is not None:
        _why_numpy = f"gets {_fault} wrong on this machine"
if _why_numpy is not None:
    _cpu = None  # type: ignore[assignment]

# Handing work to a thread that sleeps takes 60 us, in which one thread reads about 2 MB.
_BYTES_PER_THREAD = 1 << 21

T = TypeVar("T")


class Leaves(Protocol):
    """The memory of a list of arrays, held for a call. Threads share out each walk.

    A walk takes the calling thread's share, or, where there is a team, those of so many threads.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""

    @property
    def team_size(self) -> int:
        """How many threads the framework has for the calling one; 1 if they cannot be asked."""

    @property
    def has_f64(self) -> bool:
        """If a leaf is float64 or complex128."""

    def spans(self) -> bytes | None:
        """Of each leaf its address, size and kind, as int64; None if one is not in one run."""

    def crowded(self) -> list[tuple[int, int, int, tuple[tuple[int, int], ...]]] | None:
        """None where it is seen that leaves to be written lie apart, or none is to be written.

        Else of each that has elements its number, and its `layout.Layout`.
        """

    def rewind(self) -> None:
        """Start over: before each walk."""

    def sum_squares(self, threads: int) -> list[tuple[float, float, bool, bool]]:
        """Shares of sum x^2 as (high, low, has_inf, has_nan); float64 is passed over."""

    def exact_squares(self, threads: int) -> list[tuple[bytes, bytes, float]]:
        """Shares, exactly: words for narrow and wide types, largest finite |x|."""

    def scale(
        self,
        source: Any,
        significand: float,
        exponent: int,
        recode: list[bytes | None] | None,
        threads: int,
    ) -> None:
        """Write shares of source times factor."""


def kernel() -> str:
    """The name of the kernel in use: a set of instructions, or ``numpy``."""
    return "numpy" if _cpu is None else _cpu.kernel()


def why_numpy() -> str | None:
    """Why the C kernel is not in use: what can be said of it; None where it is."""
    return _why_numpy


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


def use_handles(functions: tuple[int, ...], numbers: tuple[int, ...], of: type) -> None:
    """Tell the C kernel by which C functions objects of a type say where their memory is.

    Each of those takes a handle, which points into such an object. `handles.c` has their order.
    """
    assert _cpu is not None, "the C kernel is in use"
    _cpu.use_handles(functions, numbers, of)


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
            "`pip install --force-reinstall --no-cache-dir -v gradclip` shows what it says.",
            RuntimeWarning,
            stacklevel=2,
        )


def xla_handlers() -> dict[str, Any]:
    """What XLA may call, as capsules; nothing where the C kernel is not in use."""
    return {} if _cpu is None else _cpu.xla_handlers()


def watch() -> Any:
    """What measures a parameter's gradient when it is called with the parameter: `_cpu.Watch`."""
    assert _cpu is not None, "the C kernel is in use"
    return _cpu.Watch(threads())


def sum_squares(leaves: Leaves) -> list[tuple[float, float, bool, bool]]:
    """Each thread's share of sum x^2 in float64."""
    return _walk(leaves, leaves.sum_squares)


def exact_squares(leaves: Leaves) -> list[tuple[bytes, bytes, float]]:
    """Each thread's share of sum x^2, exactly."""
    return _walk(leaves, leaves.exact_squares)


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
    source.rewind()

    def job(threads: int) -> list[None]:
        target.scale(source, significand, exponent, recode, threads)
        return []

    _walk(target, job)


def _walk(leaves: Leaves, job: Callable[[int], list[T]]) -> list[T]:
    """Run ``job``, a walk of ``leaves``, on as many threads as it is worth; their results."""
    leaves.rewind()
    nbytes = leaves.nbytes
    team = leaves.team_size
    if team > 1 and _cpu is not None:
        # They stay awake for a while after work, so they come sooner than a thread that sleeps,
        # and it is they who would be in the way of another.
        return job(max(1, min(team, threads(), nbytes // _cpu.BYTES_PER_TEAM_MEMBER)))
    helpers = min(threads(), nbytes // _BYTES_PER_THREAD) - 1
    if helpers < 1:
        return job(1)
    shared = _Shared(job)
    _ask_for_help(shared.take_part, helpers)
    shared.take_part()
    return shared.results()


class _Shared(Generic[T]):
    """A walk that any number of threads take part in, until the first has come to its end."""

    def __init__(self, job: Callable[[int], list[T]]) -> None:
        self._job: Callable[[int], list[T]] | None = job
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._busy = 0
        self._changed = threading.Condition()

    def take_part(self) -> None:
        """Do a share of the work; none if there is none left to begin."""
        with self._changed:
            job = self._job
            if job is None:
                return
            self._busy += 1
        try:
            self._results += job(1)
        except BaseException as error:  # raised again where the walk was asked for
            self._errors.append(error)
        finally:
            job = None  # it holds the caller's memory, which is to be free when the call returns
            with self._changed:
                self._job = None  # a job returns when no work is left that nobody has taken
                self._busy -= 1
                self._changed.notify()

    def results(self) -> list[T]:
        """Wait for every thread that has begun."""
        with self._changed:
            while self._busy:
                self._changed.wait()
        if self._errors:
            raise self._errors[0]
        return self._results


def threads() -> int:
    """``GRADCLIP_NUM_THREADS``, or else the processors this process may use.

    Raises:
        ValueError: the variable is set to something else than a number above 0.
    """
    wanted = os.environ.get("GRADCLIP_NUM_THREADS")
    if wanted is None:
        if sys.platform == "linux":
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not wanted.isdecimal() or not int(wanted):
        raise ValueError(f"GRADCLIP_NUM_THREADS is {wanted!r}; it must be a number above 0")
    return int(wanted)


# Reentrant: a signal handler or finaliser may clip while this thread asks for help.
_lock = threading.RLock()
_queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
_helpers: list[int] = []  # their native thread ids


def _ask_for_help(job: Callable[[], None], helpers: int) -> None:
    """Have ``job`` called on other threads too, as soon as they are free."""
    with _lock:
        while len(_helpers) < helpers:
            thread = threading.Thread(target=_serve, args=(_queue,), name="gradclip", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break  # the system gives no more threads: those there are do all the work
            _helpers.append(thread.native_id or 0)
        _keep_helpers_off_this_processor()
        for _ in range(min(helpers, len(_helpers))):
            _queue.put(job)


def _serve(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


def _keep_helpers_off_this_processor() -> None:
    """Have the helpers wake on the other processors.

    Linux wakes a thread where it last ran. Where that is the processor of the thread which asks for
    help, and which goes on working there, it has been seen to wait up to 4 ms for a turn.
    """
    if sys.platform == "linux":
        others = os.sched_getaffinity(0) - {_libc.sched_getcpu()}
        for helper in _helpers if others else ():
            with contextlib.suppress(OSError):  # a sandbox that forbids it: only slower
                os.sched_setaffinity(helper, others)


def _forget_threads() -> None:
    global _lock, _queue, _helpers
    _lock, _queue, _helpers = threading.RLock(), SimpleQueue(), []


# A forked child has none of its parent's threads; OpenMP would wait for them for ever.
os.register_at_fork(after_in_child=_forget_threads)
if _cpu is not None:
    os.register_at_fork(after_in_child=_cpu.leave_team)


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
