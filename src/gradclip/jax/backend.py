"""JAX: arrays, tracers, `gradclip.IndexedSlices` of them, and BCOO.

Arrays on one CPU go through the host's kernels, without a copy. Under a transformation, on other
devices and where they are sharded, `jax.traced` has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import BCOO

from gradclip.core.versions import require

require("jax>=0.8.2", jax.__version__)

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.norms import Norms
from gradclip.core.protocol import Beside
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.workers import nobody
from gradclip.jax.leaf import SPARSE, checked, places_of, values_of, with_values
from gradclip.jax.traced import Traced, axes_of, is_followed, one_device
from gradclip.kernels import cpu
from gradclip.kernels.cpu import leaves as host
from gradclip.kernels.cpu.leaves import Array


def workers(leaves: Sequence[Any], group: Any) -> None:
    """Nobody here: a group of JAX names axes, which only what is traced has."""


everyone = nobody


def hold(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    *,
    writable: bool,
    beside: Beside | None = None,
) -> Leaves | Traced:
    """Check the leaves and take hold of their memory; what is followed is checked when clipped.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped, or the group is no name
            of an axis; with ``writable``, always.
        ValueError: a sparse leaf is malformed.
    """
    if writable:
        raise TypeError(
            "a JAX array cannot be written in place; clip_by_global_norm returns new arrays, and "
            "under jit with donated arguments uses their memory"
        )
    if beside is not None:
        axes = axes_of(beside.group)
        if axes is not None or is_followed([*leaves, *beside.limits]):
            return Traced(axes)
    # The kernel asks for their buffers by itself: NumPy would take a microsecond or more for each.
    memory = cpu.take(list(leaves), None, writable=False)
    if memory is not None:
        return Leaves(leaves, [], None, memory, None, writable=False)
    values = [_memory(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    merged = _merged if any(isinstance(leaf, SPARSE) for leaf in leaves) else None
    return host.hold(Leaves, leaves, values, merged, path, writable=False)


class Leaves(host.Leaves):
    """Arrays, and sparse ones, in this machine's memory; dense ones may have no `values`."""

    __slots__ = ()

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        return host.nonfinite(_memory(leaf, str))

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Any:
        return self._beside(np.asarray(self.norm_of_numpy(norm, wide=wide)))

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Any:
        return self._beside(self.vector_of_numpy(norms, wide=wide))

    def _beside(self, array: Array) -> Any:
        """An array of JAX where the first leaf is."""
        committed = [x for x in map(values_of, self.leaves[:1]) if x.committed]
        places = [next(iter(x.sharding.device_set)) for x in committed] or [None]
        return _arrays([array], places)[0]

    def copied(self) -> list[Any]:
        """The leaves themselves: no array can be changed."""
        return list(self.leaves)

    def scale_to(self, targets: Sequence[Array], factor: Scaled | ScaledArray) -> None:
        if self.values:
            super().scale_to(targets, factor)
            return
        memory = cpu.take(list(targets), None, writable=False)
        assert memory is not None, "new arrays"
        self.scale_into(memory, factor)

    def rewrapped(self, new: list[Array]) -> list[Any]:
        """The leaves again, with new elements, each in its place."""
        places = (x.sharding if x.committed else None for x in map(values_of, self.leaves))
        arrays = _arrays(new, places)  # which asks for them only if there is a choice
        return [with_values(leaf, array) for leaf, array in zip(self.leaves, arrays, strict=True)]

    def empty(self) -> list[Array]:
        return [_new(values.shape, values.dtype) for values in map(values_of, self.leaves)]


# ---- the elements of one leaf ----


def _memory(leaf: Any, path: Callable[[], str]) -> Array:
    """The elements of a leaf as an array."""
    values = np.asarray(checked(leaf, path))
    if isinstance(leaf, IndexedSlices):
        check_rows(leaf._replace(values=values, indices=np.asarray(leaf.indices)), path)
    return values


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    if isinstance(leaf, IndexedSlices):
        return merged_rows(values, np.asarray(leaf.indices))
    if not isinstance(leaf, BCOO):
        return None
    places, inside = places_of(leaf, np.asarray(leaf.indices))
    kept = np.broadcast_to(values, (*places.shape, *values.shape[places.ndim :]))[inside]
    sums = merged_rows(kept, places[inside])
    return iter([kept]) if sums is None and kept.shape != values.shape else sums


# ---- what is found ----


def _parts(norms: Norms) -> tuple[tuple[Any, Any], tuple[str, ...]]:
    return (norms.values, norms.global_norm), norms.paths


def _parts_with_keys(norms: Norms) -> tuple[Any, tuple[str, ...]]:
    pairs = [(jax.tree_util.GetAttrKey(name), getattr(norms, name)) for name in _FIELDS]
    return pairs, norms.paths


def _norms(paths: tuple[str, ...], parts: Iterable[Any]) -> Norms:
    values, global_norm = parts
    return Norms(values, global_norm, paths)


_FIELDS = "values", "global_norm"

# By which jit and other transformations take it in and return it; names are a part of its type.
jax.tree_util.register_pytree_with_keys(Norms, _parts_with_keys, _norms, _parts)


# ---- new arrays ----

# Bytes from which on a copy takes longer than to ask for none.
_LARGE = 1 << 18
_ALIGNMENT = 64  # of memory that XLA takes over


def _new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return np.empty(shape, dtype)
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    array: Array = room[begin : begin + nbytes].view(dtype).reshape(shape)
    return array


def _arrays(new: list[Array], places: Iterable[Any]) -> list[Any]:
    """Arrays of JAX of these elements, each in its place, or if that is None where a new one is."""
    with jax.enable_x64(True):  # without it float64 would be rounded
        if one_device():
            return [
                _identity(array) if array.nbytes < _LARGE else jax.device_put(array, may_alias=True)
                for array in new
            ]
        return list(map(jax.device_put, new, places))


@jax.jit
def _identity(array: Array) -> Any:
    """An array of JAX: by a call, which takes 8 us, against 30 by device_put.

    For each shape and dtype it is compiled once, in 14 ms.
    """
    return array
