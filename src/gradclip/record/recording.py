"""`gradclip.Record`: what a training calls in each step."""

from __future__ import annotations

import inspect
import operator
import os
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, SupportsIndex, TypedDict

from gradclip.core.norms import Norms
from gradclip.core.reading import Reading
from gradclip.record import states
from gradclip.record.judging import Entry, Judge, Log
from gradclip.record.ranks import rank_of
from gradclip.record.store import Store
from gradclip.record.values import kept, kept_norms, mark_of
from gradclip.record.writing import Writer

if TYPE_CHECKING:
    from gradclip._types import Scalar


class Telling(Protocol):
    """What tells all of its latest step, as a clipper does."""

    def _reading(self) -> Reading: ...


class Options(TypedDict, total=False):
    """What a `Record` is given beside its path."""

    per_tensor_every: int
    hard: float
    ring: int
    rank: int | None
    log: Log | None


class Record:
    """Writes what was clipped in each step into one file: a database of SQLite.

    ::

        with gradclip.Record("run.db") as record:
            for step, batch in enumerate(batches):
                ...
                optimizer.step()
                record(step, clipper)

    A step costs microseconds: a thread writes about once a second, and reads numbers that are on a
    device late, so that the training never waits for one. A crash loses what was not written yet
    and nothing else; a full disk, or anything else that the thread runs into, is a RuntimeWarning
    from the next call. An existing file is gone on with: of steps that are told again the
    later ones count. One rank alone writes; on others every method does nothing. Two
    optimizers take two files.

    Args:
        path: the file. SQLite keeps two more beside it while it is written, ``-wal`` and ``-shm``,
            and a lock is a third, ``-writer``.
        per_tensor_every: where there are norms of tensors, they are written in steps that are
            multiples of this (0 for none), and in those that were clipped hard, skipped or not
            finite, with those of the steps before.
        hard: what is clipped hard: by a factor below this, from 0 to 1.
        ring: of how many steps before.
        rank: of this process; 0 writes. None asks ``torch.distributed`` and ``jax.distributed`` if
            they are initialised, then the environment's ``RANK``.
        log: a function that is called for each step with a dict and the step, on the thread that
            writes: ``grad_norm``, ``grad_limit`` and ``grad_factor`` where known, and
            ``grad_norm/<name>`` of each tensor if it is written in that step. An exception of it is
            a RuntimeWarning, once.

    Closed by `close`, as a context manager, when it is collected and when the process ends.

    Raises:
        TypeError, ValueError: an argument is out of range; the file is no record, or one of a later
            version.
        OSError: it cannot be written: a folder, in none, or not allowed.
        RuntimeError: another Record is writing it.

    >>> import sqlite3, tempfile
    >>> from contextlib import closing
    >>> import numpy as np, gradclip
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Record(f"{folder}/run.db") as record:
    ...         for step in range(3):
    ...             gradients = {"w": np.array([3.0 * step]), "b": np.array([4.0 * step])}
    ...             record(step, gradclip.norms(gradients), limit=5.0)
    ...     with closing(sqlite3.connect(f"{folder}/run.db")) as file:
    ...         for row in file.execute('SELECT step, norm, "limit", factor, action FROM steps'):
    ...             print(row)
    (0, 0.0, 5.0, 1.0, 'keep')
    (1, 5.0, 5.0, 1.0, 'keep')
    (2, 10.0, 5.0, 0.5, 'clip')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        per_tensor_every: int = 100,
        hard: float = 0.1,
        ring: int = 32,
        rank: int | None = None,
        log: Log | None = None,
    ) -> None:
        self._path = Path(os.path.realpath(path))
        judge = Judge(
            _count("per_tensor_every", per_tensor_every), _share(hard), _count("ring", ring)
        )
        if log is not None and not callable(log):
            raise TypeError(f"log is {log!r}; it must be a function of a dict and a step, or None")
        self._begun: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._writer: Writer | None = None
        self._is_closed = False
        if rank_of(rank) == 0:
            self._writer = Writer(Store(self._path), self._path, judge, log)
            self._finalizer = weakref.finalize(self, self._writer.close)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def __repr__(self) -> str:
        return f"Record({str(self._path)!r})"

    def __call__(
        self,
        step: SupportsIndex,
        source: Reading | Norms | Scalar | Telling,
        *,
        limit: Scalar | None = None,
        factor: Scalar | None = None,
        skipped: bool | None = None,
    ) -> None:
        """Tell of a step, after it.

        Args:
            step: its number, from 0. The same again replaces what was told; a smaller one begins
                anew there, as a training does that has gone back to a checkpoint.
            source: what knows: a clipper of `gradclip.torch.attach`, which tells all; what
                `Record.of_state` has found in a state of optax; `gradclip.Norms`; or the global
                norm, a number or a scalar of any framework. What was passed may be changed, or
                donated, afterwards.
            limit: of `Norms`, a number, or a state of optax that has none, what the norm was held
                to; of groups or tensors, a vector.
            factor: of `Norms` or a number, what gradients were multiplied by; where None, told from
                norm and limit.
            skipped: of `Norms` or a number, if the step was not taken.

        Of several groups, or tensors, the record has the norm of the whole, the root of the sum of
        squares of the limits, and the least factor. A clipper's optimizer that has not been stepped
        since the last record was skipped by whoever was to step it, as GradScaler does; no norm is
        known then.

        Raises:
            TypeError, ValueError: an argument is of a wrong kind or out of range, or the record has
                been closed.
            RuntimeError: this process was forked from the one that opened the record.
        """
        if self._writer is None and not self._is_closed:
            return
        writer = self._open()
        step = _step(step)
        given = (limit, factor, skipped)
        reading = self._reading_of(step, source, given)
        if reading is not None:
            writer.put(Entry(step, time.time(), reading, mark_of(reading.norm)))

    def _open(self) -> Writer:
        if self._writer is None:
            raise ValueError(f"the record {self._path} has been closed")
        if self._writer.is_of_another_process:
            raise RuntimeError(
                f"the record {self._path} was opened in another process, of which this one is a "
                "fork; open one here, of another file, or record there"
            )
        return self._writer

    def _reading_of(self, step: int, source: Any, given: tuple[Any, ...]) -> Reading | None:
        """What a source tells; None if that of this step is known already."""
        ask = getattr(source, "_reading", None)
        if ask is None and not isinstance(source, Reading):
            return _completed(source, *given)
        if ask is None:
            return _completed_reading(source, *given)
        if given != (None, None, None):
            raise TypeError(
                f"limit, factor and skipped are {given}; they are for norms and numbers: "
                f"{type(source).__name__} tells its own"
            )
        return self._of_clipper(step, source, ask())

    def _of_clipper(self, step: int, clipper: Any, reading: Reading) -> Reading | None:
        before = self._begun.get(clipper)
        begun = reading.begun or 0
        self._begun[clipper] = begun, step
        if begun and (before is None or before[0] != begun):
            return reading
        if before is not None and before[1] == step:
            return None
        return Reading(None, taken=False)

    def flush(self) -> None:
        """Have everything written that was recorded, and wait for it.

        Raises:
            ValueError, RuntimeError: as a call.
        """
        if self._writer is not None or self._is_closed:
            self._open().flush()

    def close(self) -> None:
        """Write the rest and close the file; a second time it does nothing."""
        writer, self._writer = self._writer, None
        self._is_closed = self._is_closed or writer is not None
        if writer is not None:
            self._finalizer()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Record is neither copied nor pickled: one alone writes a file; open it where it is "
            "needed"
        )

    @staticmethod
    def of_state(state: Any, names: Any = None) -> Reading:
        """What a state of optax tells of the latest update, for a record.

        Args:
            state: of an optimizer with `gradclip.optax.clip_by_global_norm` or
                `gradclip.optax.apply_clipped` somewhere in it. What is read of it is copied, so
                that the next step may be given its memory.
            names: of the tensors, where the state has their norms: a sequence of str, as
                ``gradclip.norms(params).paths``, which costs least; or a tree like the updates.

        Returns:
            What a record takes as its source.

        Raises:
            TypeError: the state is traced, or names are not as many as norms.
            ValueError: there is no such state in it, or more than one.
        """
        return states.reading_of(state, names)


class Lent:
    """The record of a trainer's callback: one that is open, or one opened for each training.

    Which rank a process has is known once a training has begun, and a callback may have come to it
    from another process by then. Closed at the end, a file is free for the next training.

    Args:
        record: a record, or the path of one.
        options: of `Record`, where it is a path.

    Raises:
        TypeError: there are options for one that is open, or unknown ones.
    """

    def __init__(self, record: Record | str | os.PathLike[str], options: Options) -> None:
        if isinstance(record, Record) and options:
            raise TypeError(
                f"{', '.join(options)} are options of Record: {record!r} is open already"
            )
        inspect.signature(Record).bind(record, **options)
        self._given, self._options = record, options
        self._record: Record | None = None

    def open(self) -> Record:
        """The record, for a training that begins."""
        self.close()  # which a training that an exception ended has not done
        given = self._given
        self._record = given if isinstance(given, Record) else Record(given, **self._options)
        return self._record

    def close(self) -> None:
        """Have all written, and close what was opened here."""
        record, self._record = self._record, None
        if record is None:
            return
        if record is self._given:
            record.flush()
        else:
            record.close()


def _completed_reading(reading: Reading, limit: Any, factor: Any, skipped: Any) -> Reading:
    """Of a state, with what it does not tell."""
    if factor is not None or skipped is not None or (limit, reading.limit).count(None) == 0:
        raise TypeError(
            f"limit, factor and skipped are {(limit, factor, skipped)}; a state tells its own, but "
            "for a limit that is a number or a schedule"
        )
    if limit is None:
        return reading
    return reading._replace(limit=kept(limit, "limit", of_each=True))


def _completed(source: Any, limit: Any, factor: Any, skipped: Any) -> Reading:
    """Of norms, or of a number, with what was said beside them."""
    if skipped is not None and not isinstance(skipped, bool):
        raise TypeError(f"skipped is {skipped!r}; it must be True, False or None")
    is_norms = isinstance(source, Norms)
    _check_sign(norm=None if is_norms else source, limit=limit, factor=factor)
    return Reading(
        kept(source.global_norm if is_norms else source, "norm"),
        None if limit is None else kept(limit, "limit", of_each=True),
        None if factor is None else kept(factor, "factor", of_each=True),
        [kept_norms(source)] if is_norms else (),
        taken=not skipped,
    )


def _check_sign(**numbers: Any) -> None:
    """Refuse numbers below 0; what is a framework's nobody waits for."""
    for name, value in numbers.items():
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} is {value!r}; it must be 0 or above")


def _step(step: Any) -> int:
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step is {step!r}; it must be an int")
    found = operator.index(step)
    if not 0 <= found < 2**63:
        raise ValueError(f"step is {step}; it must be from 0 to below 2**63")
    return found


def _count(name: str, value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or above")
    return value


def _share(hard: Any) -> float:
    if isinstance(hard, bool) or not isinstance(hard, int | float):
        raise TypeError(f"hard is {hard!r}; it must be a number")
    if not 0 <= hard <= 1:
        raise ValueError(f"hard is {hard}; it must be from 0 to 1")
    return float(hard)
