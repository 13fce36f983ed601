"""The thread that writes: it wakes about once a second, and no error of it reaches the training."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gradclip.record.judging import Entry, Judge, Judged, Log, log_of
from gradclip.record.store import Row, Store, Vector

# Seconds between two looks, and how many steps wake it earlier.
_PAUSE, _MANY = 1.0, 256
# How many steps may wait for it, and how long the training then waits for it, once.
_MOST_WAITING, _PATIENCE = 4096, 5.0
# How many are written in one go, so that there is room again soon.
_AT_ONCE = 512
# Bytes that are kept while they cannot be written, and seconds between two tries at most.
_MOST_KEPT, _LONGEST_PAUSE = 64_000_000, 30.0
# Seconds that a process waits at its end.
_LAST_WAIT = 60.0
_ROW_BYTES = 200


class Writer:
    """Judges and writes what it is handed. It holds no `Record`, so that one can be collected."""

    def __init__(self, store: Store, path: Path, judge: Judge, log: Log | None) -> None:
        self._store, self._path, self._judge, self._log = store, path, judge, log
        self._process = os.getpid()
        self._entries: deque[Entry | threading.Event] = deque()
        self._kept: deque[Row | Vector] = deque()
        self._kept_bytes = 0
        self._failures, self._next_try = 0, 0.0
        self._is_stuck = False
        self._lost = 0
        self._told: set[str] = set()
        self._news: deque[str] = deque()
        self._wake, self._has_room = threading.Event(), threading.Event()
        self._stops = False
        self._thread = threading.Thread(target=self._live, name="gradclip.Record", daemon=True)
        self._thread.start()

    # ---- on the training's thread ----

    @property
    def is_of_another_process(self) -> bool:
        """If this is a copy that a fork has made."""
        return os.getpid() != self._process

    def put(self, entry: Entry) -> None:
        """Hand over a step."""
        if len(self._entries) >= _MOST_WAITING:
            self._make_room()
        self._entries.append(entry)
        if len(self._entries) >= _MANY and not self._wake.is_set():
            self._wake.set()
        if self._news:
            self.tell()  # last, as a warning may be an error

    def _make_room(self) -> None:
        """Wait for a thread that is behind, once; if it is stuck, lose the oldest."""
        if not self._is_stuck:
            self._has_room.clear()
            self._wake.set()
            self._is_stuck = not self._has_room.wait(_PATIENCE)
        while len(self._entries) >= _MOST_WAITING:
            oldest = self._next()
            if isinstance(oldest, Entry):
                self._lost += 1
                self._report("behind", f"{self._path}: the thread that writes is stuck, {_LOSES}")
            elif oldest is not None:
                oldest.set()

    def _next(self) -> Entry | threading.Event | None:
        """The oldest that waits; None if another thread was faster."""
        try:
            return self._entries.popleft()
        except IndexError:
            return None

    def tell(self) -> None:
        """Warn of what has happened to the thread."""
        while self._news:
            warnings.warn(self._news.popleft(), RuntimeWarning, stacklevel=4)

    def flush(self) -> None:
        """Have all written that was handed over."""
        done = threading.Event()
        self._entries.append(done)
        self._wake.set()
        while not done.wait(_PAUSE) and self._thread.is_alive():
            pass
        self.tell()

    def close(self) -> None:
        """Write the rest, and end. In a process that was forked it is the parent's to do."""
        if self.is_of_another_process:
            return
        self._stops = True
        self._wake.set()
        if threading.current_thread() is self._thread:
            return  # the collector has found the record there
        self._thread.join(_LAST_WAIT)
        if self._thread.is_alive():
            self._news.append(
                f"{self._path}: the last steps are not written after {_LAST_WAIT:.0f} s; the "
                "thread that writes is stuck"
            )
        self.tell()

    # ---- on its own ----

    def _live(self) -> None:
        while not self._stops:
            self._wake.wait(_PAUSE)
            self._wake.clear()
            self._write_all(at_once=False)
        self._write_all(at_once=True)
        self._end()

    def _write_all(self, *, at_once: bool) -> None:
        """Write what has been handed over so far; with ``at_once`` it tries again what failed."""
        self._turn(at_once=at_once)
        while self._entries:
            self._turn(at_once=at_once)

    def _turn(self, *, at_once: bool) -> None:
        entries, waiting = self._taken()
        try:
            judged = self._judge.judge(entries)
        except Exception as error:  # of a framework, in its own words
            self._lost += len(entries)
            self._report("read", f"{self._path}: steps could not be read, {_LOSES}: {error!r}")
        else:
            self._hand_on(judged)
            self._keep(judged)
        self._write(at_once=at_once or bool(waiting))
        for each in waiting:
            each.set()

    def _taken(self) -> tuple[list[Entry], list[threading.Event]]:
        found = [self._next() for _ in range(min(len(self._entries), _AT_ONCE))]
        self._is_stuck = False
        self._has_room.set()
        return (
            [each for each in found if isinstance(each, Entry)],
            [each for each in found if isinstance(each, threading.Event)],
        )

    def _hand_on(self, judged: Sequence[Judged]) -> None:
        if self._log is None:
            return
        for row, _, own in judged:
            try:
                self._log(log_of(row, own), row.step)
            except BaseException as error:  # the user's: SystemExit too would end the thread
                self._report("log", f"{self._path}: log failed in step {row.step}: {error!r}")

    def _keep(self, judged: Sequence[Judged]) -> None:
        for row, vectors, _ in judged:
            writes: list[Row | Vector] = [row, *vectors]
            self._kept.extend(writes)
            self._kept_bytes += sum(map(_bytes_of, writes))
        while self._kept_bytes > _MOST_KEPT:
            oldest = self._kept.popleft()
            self._kept_bytes -= _bytes_of(oldest)
            self._lost += isinstance(oldest, Row)

    def _write(self, *, at_once: bool) -> None:
        if not self._kept or (not at_once and time.monotonic() < self._next_try):
            return
        try:
            self._store.write(self._kept)
        except sqlite3.Error as error:
            self._next_try = time.monotonic() + min(2.0**self._failures, _LONGEST_PAUSE)
            self._failures += 1
            self._report(
                "write",
                f"{self._path} cannot be written: {error}. The training goes on; the latest "
                f"{_MOST_KEPT // 1_000_000} MB are kept, and written once that is possible",
            )
        else:
            self._kept.clear()
            self._kept_bytes = self._failures = 0

    def _end(self) -> None:
        """Close the file, and say what is not in it."""
        self._lost += sum(isinstance(each, Row) for each in self._kept)
        if self._lost:
            self._news.append(f"{self._path}: {self._lost} steps are not in it")
        try:
            self._store.close()
        except (sqlite3.Error, OSError) as error:
            self._news.append(f"{self._path} could not be closed: {error}")

    def _report(self, kind: str, text: str) -> None:
        """Have the training warned, once for each kind of trouble."""
        if kind not in self._told:
            self._told.add(kind)
            self._news.append(text)


_LOSES = "and steps are lost"


def _bytes_of(write: Row | Vector) -> int:
    return _ROW_BYTES + (len(write.values) if isinstance(write, Vector) else 0)
