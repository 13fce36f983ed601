"""Limits that learn on a device: what they go by, as words of its memory, from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.core.limits import Average, Limit, Percentile, PerTensor, ZScore
from gradclip.core.memory import Lesson
from gradclip.kernels.gpu.device import limits as rules

Words = npt.NDArray[np.int64]

RULE = int(rules.RULE.value)


class Memory(Protocol):
    """What is asked of a framework for what stays from step to step; `runs.Memory` has more."""

    @property
    def place(self) -> Any:
        """What tells its device from all others, of all frameworks."""

    @property
    def is_capturing(self) -> bool:
        """If what is launched is only recorded, to be run again and again."""

    def empty(self, words: int) -> Any:
        """Memory of so many words of 8 bytes."""

    def sent(self, words: Words, *, again: bool) -> Any:
        """A copy on the device, made without waiting for it; ``again`` whenever it is replayed."""

    def part(self, buffer: Any, start: int, shape: tuple[int, ...], *, real: bool) -> Any:
        """A view of some of the words: as float64 if they are ``real``, else as int64."""

    def assign(self, target: Any, source: Any) -> None:
        """Write the bits of one array to another of the same shape and dtype."""

    def address(self, buffer: Any) -> int:
        """Where such memory begins."""


class Judge(NamedTuple):
    """What a kernel is told of a limit that learns: its kind, and where its words are."""

    kind: int = 0
    before: int = 0
    after: int = 0


@contextmanager
def judging(memory: Memory, limit: Any) -> Iterator[Judge]:
    """Launch within it what is to judge norms by a lesson, which then knows what has been learnt.

    Of any other limit there is nothing to be told.

    Raises:
        RuntimeError: it is being captured, and what replays are to go on from is not there.
    """
    if not isinstance(limit, Lesson):
        yield Judge()
        return
    count = 1 if limit.keys is None else len(limit.keys)

    def sent(state: Any) -> Any:
        if memory.is_capturing:
            raise RuntimeError(
                f"{limit!r} has learnt nothing on this device, and a graph that is captured would "
                "begin anew at each replay: clip once before capturing"
            )
        words = _packed(limit.kind, state, count)
        return _state_in(memory, memory.sent(words, again=False), state, count)

    before = limit.on_device(memory.place, sent)
    buffer = memory.empty(RULE + count + sum(int(np.prod(part.shape)) for part in before))
    limit.after = _state_in(memory, buffer, before, count)
    shape = () if limit.keys is None else (count,)
    limit.in_force = memory.part(buffer, RULE, shape, real=True)
    first = memory.address(before[0]) - 8 * (RULE + count)
    yield Judge(_rule(limit.kind)[0], first, memory.address(buffer))
    if memory.is_capturing:  # each replay is to go on from what the one before has learnt
        for old, new in zip(before, limit.after, strict=True):
            memory.assign(old, new)
        limit.after = before


def _rule(kind: Limit) -> tuple[int, dict[Any, float]]:
    """The number of a kind, and its numbers by their places."""
    match kind:
        case PerTensor():
            return _rule(kind.kind)
        case ZScore():
            number = rules.Z_SCORE_OF_LOG if kind.log else rules.Z_SCORE
            found = {
                rules.WARMUP: max(kind.warmup, 1),
                rules.CONSTANT: kind.limit,
                rules.DECAY: kind.decay,
                rules.Z: kind.z,
                rules.BEYOND: rules.BEYONDS[kind.beyond],
                rules.RAW: kind.learn_from == "raw",
            }
        case Average():
            number = rules.AVERAGE
            found = {
                rules.WARMUP: max(kind.warmup, 1),
                rules.CONSTANT: kind.limit,
                rules.DECAY: kind.decay,
                rules.FACTOR: kind.factor,
                rules.RAW: kind.learn_from == "raw",
            }
        case Percentile():
            number = rules.PERCENTILE
            found = {
                rules.HISTORY: kind.history,
                rules.PART: kind.p / 100,
                rules.FACTOR: kind.factor,
            }
        case _:
            raise NotImplementedError(f"{kind!r} is of no kind that is judged on a device")
    return int(number.value), found


def _packed(kind: Limit, state: Any, count: int) -> Words:
    """A rule, no limits yet, and a state of the host, as words."""
    rule = np.zeros(RULE)
    for place, value in _rule(kind)[1].items():
        rule[place.value] = value
    parts = [rule, np.full(count, np.nan), *map(np.ravel, state)]
    return np.concatenate([np.ascontiguousarray(part).view(np.int64) for part in parts])


def _state_in(memory: Memory, buffer: Any, like: Any, count: int) -> Any:
    """A state like another, its parts where they lie in a buffer."""
    start, parts = RULE + count, []
    for name, part in like._asdict().items():
        shape = np.shape(part)
        parts.append(memory.part(buffer, start, shape, real=name != "count"))
        start += int(np.prod(shape))
    return type(like)(*parts)
