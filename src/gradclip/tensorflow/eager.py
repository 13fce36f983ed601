"""Eager tensors, variables and slices in this machine's memory, which is reached without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.held import Clip
from gradclip.core.memory import Lesson
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.kernels.cpu import leaves as host
from gradclip.kernels.cpu.leaves import Array
from gradclip.tensorflow.leaf import checked, is_slices, tensor_of, with_values
from gradclip.tensorflow.limits import check_replicas

_HOST = "/job:localhost/replica:0/task:0/device:CPU:0"
_NATIVE = {tf.float16, tf.float32, tf.float64, tf.complex64, tf.complex128}


def hold(leaves: Sequence[Any], path: Callable[[int], str]) -> Leaves:
    """Check the leaves and take hold of their memory, to be read.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped.
        ValueError: slices are malformed, or there are more elements than an int64 counts.
    """
    if all(type(leaf) is tf.__internal__.EagerTensor and leaf.dtype in _NATIVE for leaf in leaves):
        held = host.hold_plain(Leaves, leaves, list(map(_memory, leaves)), path, writable=False)
        if held is not None:
            return held
    values = [_values(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    merged = _merged if any(map(is_slices, leaves)) else None
    return host.hold(Leaves, leaves, values, merged, path, writable=False)


class Leaves(host.Leaves):
    """Leaves whose memory is never written: new elements are new tensors, or assigned."""

    __slots__ = ()

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        return host.nonfinite(_values(leaf, str))

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Any:
        return self._beside(self.norm_of_numpy(norm, wide=wide))

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Any:
        return self._beside(self.vector_of_numpy(norms, wide=wide))

    def _beside(self, value: Any) -> Any:
        """A tensor where the first leaf is."""
        with tf.device(tensor_of(self.leaves[0]).device if self.leaves else None):
            return tf.constant(value)

    def copied(self) -> list[Any]:
        """The leaves themselves: no tensor can be changed."""
        return [
            tf.convert_to_tensor(leaf) if isinstance(leaf, tf.Variable) else leaf
            for leaf in self.leaves
        ]

    def fill_(self, value: float) -> None:
        """Put ``value`` into every element of variables."""
        self._assign(self.filled(value))

    def scale_(self, factor: Scaled) -> None:
        """Multiply every element of variables."""
        self._assign(self.scaled(factor))

    def scale_each_(self, factors: ScaledArray) -> None:
        """Multiply the elements of each variable by a factor of its own."""
        self._assign(self.scaled_each(factors))

    def clip_(self, clip: Clip) -> Any:
        """Clip variables.

        Raises:
            NotImplementedError: each of several replicas would have a limit learn.
            ValueError: each is to have a limit of its own, and one is there twice.
        """
        check_replicas([clip.clip_norm])
        each = isinstance(clip.clip_norm, Lesson) and clip.clip_norm.per_tensor
        if each and len(self.leaves) < len(clip.leaves):
            raise ValueError(
                f"clip_norm is {clip.clip_norm!r}, and a variable is listed twice; list it once"
            )
        return super().clip_(clip)

    def _assign(self, new: list[Any]) -> None:
        for variable, value in zip(self.leaves, new, strict=True):
            variable.assign(value)

    def _written(self, write: Callable[[list[Array]], None]) -> list[Any]:
        """New leaves, their elements written by ``write``."""
        shapes = _Shapes()
        with tf.device(_HOST):
            pairs = [_new(values, shapes) for values in self.values]
            write([array for _, array in pairs])
            new = [_finished(tensor, array) for tensor, array in pairs]
        return [_rewrap(leaf, tensor) for leaf, tensor in zip(self.leaves, new, strict=True)]


# ---- the memory of a leaf ----


def _values(leaf: Any, path: Callable[[], str]) -> Array:
    """The elements of a leaf as an array of the same memory."""
    tensor = checked(leaf, path)
    values = _memory(tf.convert_to_tensor(tensor))
    if is_slices(leaf):
        shape = None if leaf.dense_shape is None else tuple(np.asarray(leaf.dense_shape).tolist())
        check_rows(IndexedSlices(values, np.asarray(leaf.indices), shape), path)
    return values


def _memory(tensor: Any) -> Array:
    """The memory of an eager tensor as an array; of float8, which has no such view, a copy."""
    if tensor.dtype in _NATIVE:
        return np.asarray(memoryview(tensor))
    if tensor.dtype == tf.bfloat16:
        codes: Array = np.asarray(memoryview(tf.bitcast(tensor, tf.uint16)))
        return codes.view(tf.bfloat16.as_numpy_dtype)
    copy: Array = np.asarray(tensor.numpy())
    return copy


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    """The rows of slices, those with one index added; None if each has its own."""
    return merged_rows(values, np.asarray(leaf.indices)) if is_slices(leaf) else None


# ---- new tensors ----


class _Writable:
    """Memory of a tensor that nobody else has seen yet."""

    def __init__(self, array: Array) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self.owner = array


# Bytes from which on the allocator matters.
_LARGE = 1 << 18


class _Shapes(dict[tuple[int, ...], Any]):
    """Shapes as tensors, of which each costs more than an allocation."""

    def __missing__(self, shape: tuple[int, ...]) -> Any:
        self[shape] = tf.constant(shape, tf.int32)
        return self[shape]


def _new(values: Array, shapes: _Shapes) -> tuple[Any, Array]:
    """A tensor like an array, and its memory; no tensor yet if it is to be made of that."""
    if values.nbytes < _LARGE or values.itemsize == 1 or not _buffers_are_memory():
        return None, np.empty(values.shape, values.dtype)
    # TensorFlow's allocator, unlike NumPy's, hands out memory that has been in use before: none of
    # its pages has to be mapped and cleared first.
    code = tf.as_dtype(host.code_dtype(values.dtype))
    tensor = tf.raw_ops.Empty(shape=shapes[values.shape], dtype=code)
    memory: Array = np.asarray(_Writable(np.asarray(memoryview(tensor))))
    return tensor, memory.view(values.dtype)


@functools.cache
def _buffers_are_memory() -> bool:
    """If the buffer of a tensor is its memory: no TensorFlow promises that it is no copy."""
    tensor = tf.constant(np.zeros(_LARGE, np.uint8))
    views = [np.asarray(memoryview(tensor)) for _ in range(2)]
    return len({view.__array_interface__["data"] for view in views}) == 1


def _finished(tensor: Any, array: Array) -> Any:
    """The tensor of an array that has been written."""
    if tensor is None:  # it takes over the array's memory, or copies it
        return tf.__internal__.EagerTensor(array, _HOST, None)
    return tf.bitcast(tensor, tf.bfloat16) if tensor.dtype == tf.uint16 else tensor


def _rewrap(leaf: Any, tensor: Any) -> Any:
    """A leaf with new elements, where the old ones were."""
    device = tensor_of(leaf).device
    if device not in (_HOST, ""):
        with tf.device(device):
            tensor = tf.identity(tensor)
    return with_values(leaf, tensor)
