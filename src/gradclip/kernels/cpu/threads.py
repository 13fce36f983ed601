"""A walk of memory shared out among threads: those of a framework's team, or helpers of ours."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

# Handing work to a thread that sleeps takes 60 us, in which one thread reads about 2 MB.
_BYTES_PER_THREAD = 1 << 21

T = TypeVar("T")


class Walked(Protocol):
    """What `walk` asks of the memory of a list."""

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""

    @property
    def team_size(self) -> int:
        """How many threads the framework has for the calling one; 1 if they cannot be asked."""

    def rewind(self) -> None:
        """Start over: before each walk."""


def walk(leaves: Walked, job: Callable[[int], list[T]], bytes_per_member: int) -> list[T]:
    """Run ``job``, a walk of ``leaves``, on as many threads as it is worth; their results.

    Of a team each member is to have ``bytes_per_member``.
    """
    leaves.rewind()
    nbytes = leaves.nbytes
    team = leaves.team_size
    if team > 1:
        # They stay awake for a while after work, so they come sooner than a thread that sleeps,
        # and it is they who would be in the way of another.
        return job(max(1, min(team, number(), nbytes // bytes_per_member)))
    helpers = min(number(), nbytes // _BYTES_PER_THREAD) - 1
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


def number() -> int:
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
_libc = ctypes.CDLL(None)


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
