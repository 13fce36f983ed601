"""CuPy's arrays, and `gradclip.IndexedSlices` of them: clipped by Triton's kernels where they lie.

The host does not wait, but where it has to know: with a group, where an error may have to be
raised, and to look at the indices of slices. Rows with the same index are added on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import cupy
import numpy as np

from gradclip.core.exact import FLOAT32, FLOAT64, Scaled, Total, counts, norm
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.workers import Joint, Workers, workers_of
from gradclip.kernels import layout
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.kernels.cpu.leaves import Array
from gradclip.kernels.layout import Layout

try:
    from gradclip.cupy.gpu import Memory, is_run, may_overlap
    from gradclip.kernels.gpu import leaves as gpu_leaves
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ModuleNotFoundError(
        "gradclip clips arrays of CuPy by kernels in Triton, which is not installed; "
        "install triton",
        name="triton",
    ) from error

check_there, everyone = host_leaves.check_there, host_leaves.everyone

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


class Held(NamedTuple):
    """Leaves that have passed every check; of those to be written, each memory once."""

    leaves: Sequence[Any]
    values: list[Any]  # the elements of each: of slices, their rows
    memory: Memory
    there: gpu_leaves.Leaves | None  # None where elements of one are not in one run of memory
    repeats: bool  # if rows with the same index are to be added
    writable: bool

    @property
    def wide(self) -> bool:
        """If the norm is float64."""
        return any(_kind(values.dtype) == _WIDE for values in self.values)


def recorder(values: Sequence[Any], group: Any) -> None:
    """Nothing records what becomes of an array."""


def workers(leaves: Sequence[Any], group: Any) -> Workers | None:  # noqa: ARG001
    """Who holds parts of the same gradient: a communicator of mpi4py."""
    return workers_of(group)


def hold(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Held:
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
    there = _leaves(memory, values) if all(map(is_run, values)) else None
    if there is None:
        host_leaves.check_countable((_span(array)[1] for array in values), path)
    return Held(leaves, values, memory, there, any(repeats), writable)


def queue(held: Held) -> gpu_leaves.Leaves | _Queue | None:
    """Who clips in the memory of the device: all, but where rows are to be added first."""
    if held.repeats:
        return None
    return _Queue(held) if held.there is None else held.there


def written(leaves: Sequence[Any]) -> None:
    """Nothing: CuPy keeps no record of what is written."""


class _Queue(NamedTuple):
    """Leaves of which some are not in one run of memory: copies of those are clipped."""

    held: Held

    def knows(self, value: Any) -> bool:
        """If a limit need not be read by the host, since it is on the device."""
        return self.held.memory.locate(value) is not None

    def clip_(
        self,
        limit: Any,
        policy: str,
        *,
        given: Any = None,
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Clip where the leaves lie; the norm, as a new scalar on the device."""
        with _in_runs(self.held) as leaves:
            return leaves.clip_(limit, policy, given=given, check=check)

    def norm(self) -> Any:
        """The global norm, as a new scalar on the device."""
        with _in_runs(self.held) as leaves:
            return leaves.norm()


def measure(held: Held) -> Scaled:
    """The global norm, correctly rounded."""
    return norm(_total(held), FLOAT64 if held.wide else FLOAT32)


def total(held: Held) -> tuple[Total, float, bool]:
    """The exact sum, the largest finite |x| (of a complex x, of its parts), if any is wide."""
    return host_leaves.total(_on_the_host(held))


def share(held: Held, joint: Joint) -> tuple[Total, bool]:
    """What this worker adds to the sum of squares of all, and if a leaf is float64."""
    del joint  # all of it, whoever they are
    return _total(held), held.wide


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    held = hold([leaf], str, writable=False)
    with _in_runs(held) as leaves:
        infs, nans = counts(leaves.total())
    (values,) = held.values
    if values.dtype.kind == "c" and (infs or nans):  # two parts may be of one element
        return host_leaves.nonfinite(held.memory.received(values))
    return nans, infs


def scalar(norm: Scaled, held: Held, *, wide: bool = False) -> Any:
    """The norm as a 0-d array on the device."""
    dtype = np.float64 if wide or held.wide else np.float32
    word = np.zeros(1, np.int64)
    with np.errstate(over="ignore", under="ignore"):
        word.view(dtype)[0] = float(norm)
    return held.memory.sent(word, again=held.memory.is_capturing).view(dtype)[0]


def copied(held: Held) -> list[Any]:
    """New leaves, bit for bit the old ones."""
    return _rewrapped(held, list(map(held.memory.duplicate, held.values)))


def filled(held: Held, value: float) -> list[Any]:
    """New leaves, every element ``value``."""
    new = list(map(held.memory.duplicate, held.values))
    _fill(_leaves(held.memory, new), value)
    return _rewrapped(held, new)


def scaled(held: Held, factor: Scaled) -> list[Any]:
    """New leaves, every element multiplied."""
    new = list(map(held.memory.duplicate, held.values))
    _leaves(held.memory, new).scale_(factor)
    return _rewrapped(held, new)


def fill_(held: Held, value: float) -> None:
    """Put ``value`` into every element."""
    with _in_runs(held) as leaves:
        _fill(leaves, value)


def scale_(held: Held, factor: Scaled) -> None:
    """Multiply every element where it lies."""
    with _in_runs(held) as leaves:
        leaves.scale_(factor)


def _fill(leaves: gpu_leaves.Leaves, value: float) -> None:
    """Put NaN or 0 into every element: what becomes of them where the norm is NaN."""
    leaves.clip_(1.0, "nan" if math.isnan(value) else "zero", given=math.nan)


def _total(held: Held) -> Total:
    """The exact sum of squares, once the device has come so far."""
    if held.repeats:
        return host_leaves.total(_on_the_host(held))[0]
    with _in_runs(held) as leaves:
        return leaves.total()


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
    indices = check_rows(slices._replace(values=_Shape(slices.values.shape), indices=rows), path)
    return len(np.unique(indices)) < len(indices)


class _Shape(NamedTuple):
    """What `check_rows` asks of values."""

    shape: tuple[int, ...]


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


# ---- memory ----


def _leaves(memory: Memory, arrays: Sequence[Any]) -> gpu_leaves.Leaves:
    """Arrays in one run of memory each."""
    spans = list(map(_span, arrays))
    wide = any(kind == _WIDE for _, _, kind in spans)
    return gpu_leaves.Leaves(memory, np.array(spans, np.int64).tobytes(), wide)


def _span(values: Any) -> tuple[int, int, int | None]:
    """Where an array lies, how many real numbers it has, and their kind."""
    dtype = values.dtype
    return values.data.ptr, values.size * (1 + (dtype.kind == "c")), _kind(dtype)


@contextmanager
def _in_runs(held: Held) -> Iterator[gpu_leaves.Leaves]:
    """The leaves in one run of memory each: where one is not, a copy, which is written back."""
    if held.there is not None:
        yield held.there
        return
    memory = held.memory
    runs = [
        values if is_run(values) else memory.kept(memory.duplicate(values))
        for values in held.values
    ]
    yield _leaves(memory, runs)
    if held.writable:
        for values, run in zip(held.values, runs, strict=True):
            if run is not values:
                memory.assign(values, run)


def _rewrapped(held: Held, new: list[Any]) -> list[Any]:
    """The leaves again, with new elements."""
    return [
        leaf._replace(values=values) if isinstance(leaf, IndexedSlices) else values
        for leaf, values in zip(held.leaves, new, strict=True)
    ]


# ---- on the host ----


def _on_the_host(held: Held) -> host_leaves.Held:
    """Copies of leaves, to be measured."""
    arrays: list[Array] = list(map(held.memory.received, held.values))
    leaves = [
        leaf._replace(values=array, indices=_indices(leaf, held.memory))
        if isinstance(leaf, IndexedSlices)
        else array
        for leaf, array in zip(held.leaves, arrays, strict=True)
    ]
    return host_leaves.hold(leaves, arrays, _merged if held.repeats else None, str, writable=False)


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
