"""CuPy's arrays, and `gradclip.IndexedSlices` of them: clipped by Triton's kernels where they lie.

The host does not wait, but where it has to know: with a group, where an error may have to be
raised, and to look at the indices of slices. Rows with the same index are added on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import cupy
import numpy as np

from gradclip.core.exact import Scaled, ScaledArray, Total, counts
from gradclip.core.held import Clip
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.versions import require
from gradclip.core.workers import Workers, nobody, workers_of
from gradclip.kernels import layout
from gradclip.kernels.cpu import leaves as host
from gradclip.kernels.cpu.leaves import Array
from gradclip.kernels.gpu.launch import TRITON
from gradclip.kernels.layout import Layout

try:
    import triton

    require(TRITON, triton.__version__)
    from gradclip.cupy.gpu import Memory, is_run, may_overlap
    from gradclip.kernels.gpu import leaves as gpu
    from gradclip.kernels.gpu.runs import Runs
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ModuleNotFoundError(
        "gradclip clips arrays of CuPy by kernels in Triton, which is not installed; "
        "install triton",
        name="triton",
    ) from error

_ACCEPTED = (
    "float16, bfloat16, float32, float64 and complex arrays of CuPy, and IndexedSlices of them"
)
# The numbers of `cpu.h`.
_KINDS = {
    "float32": 0,
    "complex64": 0,
    "float64": 1,
    "complex128": 1,
    "float16": 2,
    "bfloat16": 3,
}
_WIDE = 1
_kinds: dict[Any, int | None] = {}


def _kind(dtype: Any) -> int | None:
    """The kind of a dtype, None if it is not clipped; to ask for its name takes 2 us."""
    if dtype not in _kinds:
        _kinds[dtype] = _KINDS.get(dtype.name)
    return _kinds[dtype]


def workers(leaves: Sequence[Any], group: Any) -> Workers | None:  # noqa: ARG001
    """Who holds parts of the same gradient: a communicator of mpi4py."""
    return workers_of(group)


everyone = nobody


def hold(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    *,
    writable: bool,
    beside: Any = None,  # noqa: ARG001  (nothing follows what becomes of an array)
) -> Leaves:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped.
        ValueError: leaves are on two devices, slices are malformed, or there are more elements
            than an int64 counts; with ``writable``, elements of one or of two share memory.
    """
    values = [_checked(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    memory = Memory.now(_device_of(values, path))
    repeats = [
        _has_repeats(leaf, memory, partial(path, place))
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, IndexedSlices)
    ]
    if writable:
        once = _check_apart(values, path)
        leaves, values = [leaves[place] for place in once], [values[place] for place in once]
    held = Leaves(leaves, values, memory, repeats=any(repeats), writable=writable)
    if held.there is None:
        host.check_countable((_span(array)[1] for array in values), path)
    return held


class Leaves(gpu.Leaves):
    """Arrays, and the rows of slices, in the memory of one device."""

    __slots__ = ("repeats", "there", "writable")

    memory: Memory

    def __init__(
        self,
        leaves: Sequence[Any],
        values: Sequence[Any],
        memory: Memory,
        *,
        repeats: bool,
        writable: bool,
    ) -> None:
        super().__init__(leaves, values, memory)
        self.repeats = repeats  # if rows with the same index are to be added
        self.writable = writable
        # None where elements of one are not in one run of memory
        self.there = self.new_runs(values) if all(map(is_run, values)) else None

    @property
    def wide(self) -> bool:
        return any(_kind(values.dtype) == _WIDE for values in self.values)

    def decides(self, clip: Clip) -> bool:
        """If the device decides: all, but where rows are to be added first."""
        return super().decides(clip) and not self.repeats

    def total(self) -> tuple[Total, float, bool]:
        return self._on_the_host().total()

    def sum_of_squares(self) -> Total:
        """The exact total, once the device has come so far."""
        return self.total()[0] if self.repeats else super().sum_of_squares()

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        return self._on_the_host().measure_each() if self.repeats else super().measure_each()

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        held = hold([leaf], str, writable=False)
        with held.runs() as runs:
            infs, nans = counts(runs.total())
        (values,) = held.values
        if values.dtype.kind == "c" and (infs or nans):  # two parts may be of one element
            return host.nonfinite(held.memory.received(values))
        return nans, infs

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Any:
        """The norm as a 0-d array on the device."""
        return self.vector(ScaledArray.of([norm]), wide=wide)[0]

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Any:
        """Norms that the host knows, on the device."""
        values = norms.rounded(wide=wide or self.wide)
        words = np.zeros(-(-values.nbytes // 8), np.int64)
        words.view(values.dtype)[: len(values)] = values
        sent = self.memory.sent(words, again=self.memory.is_capturing)
        return sent.view(values.dtype)[: len(values)]

    @contextmanager
    def runs(self) -> Iterator[Runs]:
        """The leaves in one run of memory each: where one is not, a copy, which is written back."""
        if self.there is not None:
            yield self.there
            return
        memory = self.memory
        runs = [
            values if is_run(values) else memory.kept(memory.duplicate(values))
            for values in self.values
        ]
        yield self.new_runs(runs)
        if self.writable:
            for values, run in zip(self.values, runs, strict=True):
                if run is not values:
                    memory.assign(values, run)

    def new_runs(self, arrays: Sequence[Any]) -> Runs:
        """Where the elements of arrays, each in one run of memory, lie."""
        spans = list(map(_span, arrays))
        wide = any(kind == _WIDE for _, _, kind in spans)
        return Runs(self.memory, np.array(spans, np.int64).tobytes(), wide)

    def duplicated(self) -> list[Any]:
        """New arrays of the same bits, each in one run of memory."""
        return list(map(self.memory.duplicate, self.values))

    def rewrapped(self, new: list[Any]) -> list[Any]:
        return [
            leaf._replace(values=values) if isinstance(leaf, IndexedSlices) else values
            for leaf, values in zip(self.leaves, new, strict=True)
        ]

    def _on_the_host(self) -> host.Leaves:
        """Copies, to be measured."""
        arrays: list[Array] = list(map(self.memory.received, self.values))
        leaves = [
            leaf._replace(values=array, indices=_indices(leaf, self.memory))
            if isinstance(leaf, IndexedSlices)
            else array
            for leaf, array in zip(self.leaves, arrays, strict=True)
        ]
        merged = _merged if self.repeats else None
        return host.hold(host.Leaves, leaves, arrays, merged, str, writable=False)


# ---- checks ----


def _checked(leaf: Any, path: Callable[[], str]) -> Any:
    """The array of a leaf's elements, once it has been found to be one that is clipped."""
    values = leaf.values if isinstance(leaf, IndexedSlices) else leaf
    kind = type(values)
    # An array of cupyx is spread over devices.
    if not isinstance(values, cupy.ndarray) or kind.__module__.partition(".")[0] == "cupyx":
        name = f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{path()} is {name}; gradclip clips {_ACCEPTED}")
    if _kind(values.dtype) is None:
        raise TypeError(f"{path()} is {values.dtype}; gradclip clips {_ACCEPTED}")
    return values


def _device_of(values: Sequence[Any], path: Callable[[int], str]) -> int:
    """The one device that all arrays are on."""
    devices = [array.data.device_id for array in values]
    for place, device in enumerate(devices):
        if device != devices[0]:
            raise ValueError(
                f"{path(0)} is on device {devices[0]} and {path(place)} is on device {device}; "
                "one call clips arrays of one device"
            )
    return int(devices[0])


def _has_repeats(slices: IndexedSlices, memory: Memory, path: Callable[[], str]) -> bool:
    """If rows of slices share an index."""
    rows = _indices(slices, memory)
    indices = check_rows(slices._replace(indices=rows), path)
    return len(np.unique(indices)) < len(indices)


def _check_apart(values: Sequence[Any], path: Callable[[int], str]) -> list[int]:
    """Refuse to write to arrays of which elements share memory; each memory's first place."""
    for place, array in enumerate(values):
        if not is_run(array) and may_overlap(array):
            raise ValueError(
                f"{path(place)} has elements that share memory (strides {array.strides}); "
                "clip_by_global_norm returns new arrays instead"
            )
    once: dict[Any, int] = {}
    for place, array in enumerate(values):
        if array.size:
            once.setdefault((_layout(array), _kind(array.dtype)), place)
    layout.check_apart({place: where for (where, _), place in once.items()}, path)
    first = set(once.values())
    return [place for place, array in enumerate(values) if not array.size or place in first]


def _layout(values: Any) -> Layout:
    address, size, _ = _span(values)
    parts = 1 + (values.dtype.kind == "c")
    item = values.itemsize // parts
    if is_run(values):
        return Layout(address, item, ((item, size),))
    return layout.layout(address, item, values.shape, values.strides, parts)


def _span(values: Any) -> tuple[int, int, int | None]:
    """Where an array lies, how many real numbers it has, and their kind."""
    dtype = values.dtype
    return values.data.ptr, values.size * (1 + (dtype.kind == "c")), _kind(dtype)


# ---- slices ----


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    """The rows of slices, those with one index added; None if each has its own."""
    return merged_rows(values, leaf.indices) if isinstance(leaf, IndexedSlices) else None


def _indices(slices: IndexedSlices, memory: Memory) -> Array:
    """The indices of slices, on the host."""
    indices = slices.indices
    found: Array = (
        memory.received(indices) if isinstance(indices, cupy.ndarray) else np.asarray(indices)
    )
    return found
