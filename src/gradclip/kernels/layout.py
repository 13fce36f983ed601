"""Where the elements of an array lie, and whether arrays share some of them.

Addresses are of any memory, the host's or a device's: nothing here reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Of NumPy's search for an element that two arrays share: under a millisecond.
_MOST_WORK = 10_000


class Layout(NamedTuple):
    """The real numbers of an array, in the order of memory: the order of visits is free."""

    address: int  # of the first byte
    item: int  # bytes of a number
    steps: tuple[tuple[int, int], ...]  # (stride, length), outermost first, as few as can be

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + self.item + sum(step * (length - 1) for step, length in self.steps)


def layout(
    address: int, item: int, shape: Sequence[int], strides: Sequence[int], parts: int = 1
) -> Layout:
    """The layout of an array of elements of so many ``parts``, of ``item`` bytes each."""
    dimensions: list[tuple[int, int]] = []
    for stride, length in zip((*strides, item), (*shape, parts), strict=True):
        if length != 1:
            address += min(0, stride * (length - 1))
            dimensions.append((abs(stride), length))
    steps: list[tuple[int, int]] = []
    for stride, length in sorted(dimensions, reverse=True):
        if steps and steps[-1][0] == stride * length:
            steps[-1] = (stride, steps[-1][1] * length)
        else:
            steps.append((stride, length))
    return Layout(address, item, tuple(steps) or ((item, 1),))


def check_apart(layouts: Mapping[int, Layout], path: Callable[[int], str]) -> None:
    """Refuse to write to arrays that share memory; each has elements, and is of one number.

    Raises:
        ValueError: two do, or it would take too long to find out.
    """
    for crowd in _crowds(layouts):
        if not _interleave([layouts[place] for place in crowd]):
            _check_pairs(crowd, layouts, path)


def _crowds(layouts: Mapping[int, Layout]) -> Iterator[list[int]]:
    """Those that reach into each other's memory, in the order of their addresses."""
    crowd: list[int] = []
    end = 0
    for place in sorted(layouts, key=lambda place: layouts[place].address):
        if layouts[place].address >= end:
            yield crowd
            crowd = []
        crowd.append(place)
        end = max(end, layouts[place].end)
    yield crowd


def _interleave(layouts: Sequence[Layout]) -> bool:
    """If arrays are seen to lie apart as columns of one matrix do; else they may or may not."""
    period = math.gcd(*(stride for each in layouts for stride, _ in _rows(each)[1]))
    if not period:
        return len(layouts) < 2
    runs = sorted(((each.address % period), _rows(each)[0]) for each in layouts)
    ends = [begin + length for begin, length in runs]
    begins = [*(begin for begin, _ in runs[1:]), runs[0][0] + period]
    return all(end <= begin for end, begin in zip(ends, begins, strict=True))


def _rows(each: Layout) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Bytes that lie in one run, and the dimensions in which such runs are repeated."""
    stride, length = each.steps[-1]
    if stride == each.item:
        return stride * length, each.steps[:-1]
    return each.item, each.steps


def _check_pairs(
    crowd: Sequence[int], layouts: Mapping[int, Layout], path: Callable[[int], str]
) -> None:
    arrays = {place: np.asarray(_Unread(layouts[place])) for place in crowd}
    for number, place in enumerate(crowd):
        for other in crowd[:number]:
            if layouts[other].end <= layouts[place].address:
                continue
            what = _shared(arrays[place], arrays[other])
            if what is not None:
                first, second = map(path, sorted((place, other)))
                raise ValueError(
                    f"{first} and {second} {what}; pass what lies apart, or use "
                    "clip_by_global_norm, which returns new arrays"
                )


def _shared(first: Any, second: Any) -> str | None:
    """Why two arrays cannot both be written; None if they lie apart."""
    try:
        if np.shares_memory(first, second, max_work=_MOST_WORK):  # type: ignore[arg-type]
            return "share a part of their memory, which would be scaled twice"
    except np.exceptions.TooHardError:
        return "may share memory, and to find out would take too long"
    return None


class _Unread:
    """An array that is nowhere, for NumPy to compare addresses of."""

    def __init__(self, each: Layout) -> None:
        strides, shape = zip(*each.steps, strict=True)
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (each.address, True),
            "typestr": f"|V{each.item}",
            "shape": shape,
            "strides": strides,
        }
