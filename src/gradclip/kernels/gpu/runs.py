"""Runs of elements in a device's memory: what one call launches, and what stays for the next.

`Memory` is what is asked of a framework. The same tensors find their table where the call before
has left it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import Scaled, ScaledArray, Total, total_of
from gradclip.core.memory import Lesson
from gradclip.kernels.gpu import each, learning
from gradclip.kernels.gpu import triton as cuda
from gradclip.kernels.gpu.device.decision import KEEP, POLICIES, SCALE
from gradclip.kernels.gpu.device.numbers import AT_F32, AT_F64, BITS, NONE
from gradclip.kernels.gpu.learning import Judge, judging

Words = npt.NDArray[np.int64]

# Elements of a chunk, a multiple of a tile: as many as leave each program so many chunks.
_MOST, _CHUNKS_PER_PROGRAM = 1 << 16, 64
_ITEM = np.array([4, 8, 2, 2])  # bytes of an element, by its kind
_ALIGNED = 16
_SPAN, _WIDE = 3, 1  # words of a span, and the kind of float64


class Memory(learning.Memory, Protocol):
    """What is asked of a framework about one device, and the stream that it is working on."""

    @property
    def key(self) -> Hashable:
        """Of the device and the stream: what one call has left is good for the next of the same."""

    @property
    def processors(self) -> int:
        """How many of them the device has."""

    def zeros(self, words: int) -> Any:
        """Memory of so many words of 8 bytes, all 0."""

    def received(self, buffer: Any) -> Words:
        """A copy on the host, once the device has come so far."""

    def scalar(self, *, wide: bool) -> Any:
        """A new array of shape (): float64 if it is ``wide``, else float32."""

    def vector(self, count: int, *, wide: bool) -> Any:
        """A new array of shape (count,), of the same dtypes."""

    def locate(self, value: Any) -> tuple[bool, int] | None:
        """If a scalar in this memory is float64, and its address; None for anything else."""

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        """Have a kernel of `kernels.gpu` run after all that has been launched before."""


class Ledger(NamedTuple):
    """What `measure` is told of an optimizer: addresses, of which 0 is none; see there."""

    words: int = 0
    factor: int = 0
    begins: int = 0
    folds: int = 0
    scale: int = 0
    found_inf: int = 0


class Told(NamedTuple):
    """Norms on the device."""

    values: Any  # of each run
    norm: Any  # of all
    whole: Any  # of all as float64, without a division by a scale


_NO_LEDGER = Ledger()
_BY_NUMBER = Judge()


class _Table(NamedTuple):
    buffer: Any
    chunks: int
    depth: int  # tiles that a program of `measure` reads at the most


class _TableOfEach(NamedTuple):
    buffer: Any
    chunks: int
    depth: int  # additions that make the sum of a chunk
    room: Any


class Runs(NamedTuple):
    """Elements in the memory of one device, in runs."""

    memory: Memory
    spans: bytes  # of each run its address, number of elements and kind, as int64
    wide: bool  # if one of them is float64

    def clip_(
        self,
        limit: Any,
        policy: str,
        *,
        given: Any = None,
        ledger: Ledger = _NO_LEDGER,
        norm: Any = None,
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Clip where the leaves lie; the norm, as a new scalar on the device or in ``norm``.

        ``limit``, and the norm if it is ``given``, are floats or what `Memory.locate` finds; or it
        is a lesson.
        ``check`` is shown the norm before anything is written, and may raise.
        """
        memory = self.memory
        norm = memory.scalar(wide=self.wide) if norm is None else norm
        number = None if isinstance(limit, Lesson) else limit
        limits = (*self._scalar(number), *self._scalar(given))
        with _prepared(self, _table) as (table, scratch), judging(memory, limit) as judge:
            args = (memory.address(norm), *limits, POLICIES[policy], *ledger)
            self._measure(table, scratch, args, judge, nothing=given is not None)
            if check is not None:
                check(norm)
            self._rewrite(table, scratch, (-1, 0, 0))
        return norm

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.spans) // (8 * _SPAN)

    @property
    def any_empty(self) -> bool:
        """If one of them has no element, as where one is listed again."""
        return not np.frombuffer(self.spans, np.int64)[1::_SPAN].all()

    def clip_each_(
        self,
        limit: Lesson,
        policy: str,
        *,
        ledger: Ledger = _NO_LEDGER,
        norm: Any = None,
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Clip each by itself where it lies; else as `clip_`."""
        memory = self.memory
        norm = memory.scalar(wide=self.wide) if norm is None else norm
        with _prepared(self, _table_of_each) as (table, scratch), judging(memory, limit) as judge:
            its = self._measure_each(table, scratch, norm, policy, ledger, judge)
            if check is not None:
                check(norm)
            self._rewrite_each(table, its, scratch, -1)
        return norm

    def norms(self) -> tuple[Scaled, ScaledArray]:
        """The global norm and that of each, once the device has come so far."""
        memory, norm = self.memory, self.memory.scalar(wide=self.wide)
        with _prepared(self, _table_of_each) as (table, scratch):
            self._measure_each(table, scratch, norm, "keep", _NO_LEDGER, _BY_NUMBER)
            count = each.OF_LEAF * self.number + each.OF_ALL
            words = memory.part(table.room, 0, (count,), real=False)
            found = memory.received(words)
        significands, exponents, _ = found[: -each.OF_ALL].reshape(each.OF_LEAF, -1)
        significand, exponent = found[-each.OF_ALL :]
        return Scaled(float(significand.view(np.float64)), int(exponent)), ScaledArray(
            significands.view(np.float64), exponents
        )

    def told(self, scale: int = 0) -> Told:
        """The norm of each and of all, as new arrays on the device, for which nobody waits.

        Args:
            scale: address of what they are to be divided by, in float32; 0 for nothing.
        """
        memory, wide = self.memory, self.wide
        values = memory.vector(self.number, wide=wide)
        norm, whole = memory.scalar(wide=wide), memory.scalar(wide=True)
        with _prepared(self, _table_of_each) as (table, scratch):
            room = self._measure_each(table, scratch, norm, "keep", _NO_LEDGER, _BY_NUMBER)
            places = [memory.address(each) for each in (values, norm, whole)]
            memory.launch(
                each.tell_each,
                1,
                (self.number, room, *places, scale),
                WIDE=wide,
                BLOCK=each.BLOCK,
            )
        return Told(values, norm, whole)

    def scale_each_(self, factors: ScaledArray) -> None:
        """Multiply the elements of each by a factor of its own."""
        memory = self.memory
        one = Scaled.of(1.0)
        same = (factors.significand == one.significand) & (factors.exponent == one.exponent)
        actions = np.where(same, KEEP.value, SCALE.value)
        words = [factors.significand.view(np.int64), factors.exponent, actions]
        with _prepared(self, _table_of_each) as (table, scratch):
            sent = memory.sent(np.concatenate(words), again=memory.is_capturing)
            self._rewrite_each(table, memory.address(sent), scratch, SCALE.value)

    def norm(self) -> Any:
        """The global norm, as a new scalar on the device."""
        norm = self.memory.scalar(wide=self.wide)
        with _prepared(self, _table) as (table, scratch):
            only = (*self._scalar(np.inf), *self._scalar(None), POLICIES["keep"], *_NO_LEDGER)
            self._measure(table, scratch, (self.memory.address(norm), *only))
        return norm

    def fill_(self, value: float) -> None:
        """Put NaN or 0 into every element: what becomes of them where the norm is NaN."""
        self.clip_(1.0, "nan" if math.isnan(value) else "zero", given=math.nan)

    def scale_(self, factor: Scaled) -> None:
        """Multiply every element where it lies."""
        _, significand = self._scalar(factor.significand)
        with _prepared(self, _table) as (table, scratch):
            self._rewrite(table, scratch, (SCALE.value, significand, factor.exponent))

    def share(self) -> Any:
        """The exact total, as 136 words on the device, carried: to be added up by integers."""
        memory = self.memory
        vector = memory.zeros(len(total_of()))
        with _prepared(self, _table) as (table, scratch):
            args = (memory.address(table.buffer), table.chunks, scratch, memory.address(vector))
            memory.launch(
                cuda.share, _programs(memory, table.chunks, cuda.MEASURES), args, SMALL=cuda.SMALL
            )
        return vector

    def total(self) -> Total:
        """The exact total, once the device has come so far."""
        return self.memory.received(self.share())

    def _scalar(self, value: Any) -> tuple[int, int]:
        """What the kernels take for a number: where it is, and its bits or its address."""
        if value is None:
            return NONE, 0
        found = self.memory.locate(value)
        if found is None:
            return BITS, int(np.float64(value).view(np.int64))
        wide, address = found
        return AT_F64 if wide else AT_F32, address

    def _measure(
        self,
        table: _Table,
        scratch: int,
        args: tuple[int, ...],
        judge: Judge = _BY_NUMBER,
        *,
        nothing: bool = False,
    ) -> None:
        kind, *addresses = judge
        chunks = 0 if nothing else table.chunks
        self.memory.launch(
            cuda.measure,
            _programs(self.memory, chunks, cuda.MEASURES),
            (self.memory.address(table.buffer), chunks, table.depth, scratch, *args, *addresses),
            WIDE=self.wide,
            KIND=kind,
            TILE=cuda.TILE,
            SMALL=cuda.SMALL,
            PROGRAMS=cuda.MOST_PROGRAMS,
        )

    def _measure_each(
        self,
        table: _TableOfEach,
        scratch: int,
        norm: Any,
        policy: str,
        ledger: Ledger,
        judge: Judge,
    ) -> int:
        """Measure and judge each; the address of what is to be done."""
        memory, (kind, *addresses) = self.memory, judge
        room = memory.address(table.room)
        own = memory.address(table.buffer), table.chunks, self.number
        memory.launch(
            each.measure_each,
            _programs(memory, table.chunks, cuda.MEASURES),
            (*own, room),
            WIDE=self.wide,
            TILE=cuda.TILE,
            SMALL=cuda.SMALL,
        )
        books = ledger._asdict()
        del books["folds"]  # into one division only one factor goes
        args = (*own, table.depth, scratch, room, memory.address(norm), POLICIES[policy])
        memory.launch(
            each.decide_each,
            1,
            (*args, *books.values(), *addresses),
            WIDE=self.wide,
            KIND=kind,
            SMALL=cuda.SMALL,
            BLOCK=each.BLOCK,
        )
        return room

    def _rewrite_each(self, table: _TableOfEach, its: int, scratch: int, action: int) -> None:
        memory = self.memory
        memory.launch(
            each.rewrite_each,
            _programs(memory, table.chunks, cuda.REWRITES),
            (memory.address(table.buffer), table.chunks, self.number, scratch, its, action),
            TILE=cuda.TILE,
            SMALL=cuda.SMALL,
        )

    def _rewrite(self, table: _Table, scratch: int, args: tuple[int, ...]) -> None:
        self.memory.launch(
            cuda.rewrite,
            _programs(self.memory, table.chunks, cuda.REWRITES),
            (self.memory.address(table.buffer), table.chunks, scratch, *args),
            TILE=cuda.TILE,
            SMALL=cuda.SMALL,
        )


# ---- what stays on the device from one call to the next ----

# Two launches share the scratch of their stream, and no third may come between them.
_lock = threading.RLock()
_tables: OrderedDict[Hashable, _Table] = OrderedDict()
_scratch: dict[Hashable, Any] = {}
_MOST_TABLES = 8


@contextmanager
def _prepared(leaves: Runs, make: Callable[..., Any]) -> Iterator[tuple[Any, int]]:
    """The table of the leaves' chunks, and scratch: sent only where they are not there already.

    What is being captured runs whenever it is replayed, perhaps on another stream, and has both to
    itself.
    """
    memory = leaves.memory
    with _lock:
        if memory.is_capturing:
            scratch = memory.zeros(cuda.SCRATCH)
            yield make(leaves, again=True), memory.address(scratch)
            return
        place = memory.key
        if place not in _scratch:
            _scratch[place] = memory.zeros(cuda.SCRATCH)
        key = place, leaves.spans, make
        if key not in _tables:
            _tables[key] = make(leaves, again=False)
            if len(_tables) > _MOST_TABLES:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        try:
            yield _tables[key], memory.address(_scratch[place])
        except BaseException:
            del _tables[key]  # one launch of several may have left sums in its room
            raise


def _table(leaves: Runs, *, again: bool) -> _Table:
    spans = np.frombuffer(leaves.spans, np.int64).reshape(-1, _SPAN)
    most = _programs(leaves.memory, cuda.MOST_PROGRAMS, cuda.MEASURES)
    rows, _, size = chunked(spans, most)
    programs = _programs(leaves.memory, len(rows), cuda.MEASURES)
    depth = -(-len(rows) // programs) * (size // cuda.TILE + cuda.TILE // cuda.SMALL)
    return _Table(leaves.memory.sent(rows.ravel(), again=again), len(rows), depth)


def _table_of_each(leaves: Runs, *, again: bool) -> _TableOfEach:
    memory = leaves.memory
    spans = np.frombuffer(leaves.spans, np.int64).reshape(-1, _SPAN)
    rows, leaf, size = chunked(spans, _programs(memory, cuda.MOST_PROGRAMS, cuda.MEASURES))
    order = np.argsort(leaf, kind="stable")
    firsts = np.searchsorted(leaf[order], np.arange(len(spans) + 1))
    wide = spans[:, 2] == _WIDE
    words = np.concatenate([rows[order].ravel(), leaf[order], firsts, wide]).astype(np.int64)
    sums = each.TOTAL_WORDS if leaves.wide else 1
    return _TableOfEach(
        memory.sent(words, again=again),
        len(rows),
        size // cuda.TILE + cuda.TILE // cuda.SMALL + cuda.TILE + cuda.SMALL,
        memory.zeros((each.OF_LEAF + sums) * len(spans) + each.OF_ALL),
    )


def _programs(memory: Memory, chunks: int, per_processor: int) -> int:
    """How many programs to launch: as many as run at once, if there are chunks for them."""
    return max(min(per_processor * memory.processors, cuda.MOST_PROGRAMS, chunks), 1)


def chunked(spans: Words, programs: int) -> tuple[Words, Words, int]:
    """Cut spans of memory into chunks: these, the span of each, how many elements one may have.

    Where a chunk has a whole tile of some kernel it begins at a multiple of 16 bytes: a span that
    does not is cut where the first one is.
    """
    (some,) = np.nonzero(spans[:, 1])
    address, length, kind = spans[some].T
    item = _ITEM[kind]
    head = np.minimum(-address % _ALIGNED // item, length)
    cut = (head > 0) & (length >= cuda.SMALL)
    heads = np.stack([address, head, kind], 1)[cut]
    head = np.where(cut, head, 0)
    address, length = address + head * item, length - head

    wanted = int(length.sum()) // (programs * _CHUNKS_PER_PROGRAM) // cuda.TILE * cuda.TILE
    size = min(max(wanted, cuda.TILE), _MOST)
    count = -(-length // size)
    leaf = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(leaf)) - np.repeat(np.cumsum(count) - count, count)
    rows = [
        address[leaf] + place * size * item[leaf],
        np.minimum(length[leaf] - place * size, size),
        kind[leaf],
    ]
    every = np.concatenate([heads, np.stack(rows, 1)]).astype(np.int64)
    return every, some[np.concatenate([np.flatnonzero(cut), leaf])], size
