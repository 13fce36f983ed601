"""Real arrays of CuPy over this machine's memory, where there is no device and no driver.

Their kernels run in Triton's interpreter, on that memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import cupy
import numpy as np
import pytest
import triton
from cupy.cuda import MemoryPointer, UnownedMemory

from gradclip.cupy import gpu as words
from gradclip.kernels.gpu import triton as cuda

IS_INTERPRETED = not isinstance(cuda.measure, triton.JITFunction)
HAS_DEVICE = cupy.cuda.is_available() and not IS_INTERPRETED


def make(values: Any) -> Any:
    """A new array of CuPy, in the order of dimensions that NumPy's has."""
    return cupy.asarray(values, order="K") if HAS_DEVICE else array(values.copy("K"))


def read(values: Any) -> Any:
    """The elements of an array of CuPy, as one of NumPy."""
    return values.get() if HAS_DEVICE else view(values).copy()


LAYOUTS = ("contiguous", "strided", "reversed", "fortran", "transposed", "broadcast")


def lay_out(values: Any, layout: str) -> Any:
    """A new array with these elements, laid out in memory in a certain way.

    To be laid out as ``broadcast`` they must be the same all along the first dimension.
    """
    if layout == "strided" and values.ndim:
        room = np.zeros((*values.shape[:-1], 3 * values.shape[-1]), values.dtype)
        room[..., 1::3] = values
        return make(room)[..., 1::3]
    if layout == "reversed":
        turned = (..., *[slice(None, None, -1)] * values.ndim)
        return make(values[turned].copy())[turned]
    if layout == "fortran":
        return make(np.array(values, order="F"))
    if layout == "transposed" and values.ndim:
        return cupy.moveaxis(make(np.ascontiguousarray(np.moveaxis(values, 0, -1))), -1, 0)
    if layout == "broadcast" and values.ndim:
        return cupy.broadcast_to(make(values[:1].copy()), values.shape)
    return make(values)


class Array(cupy.ndarray):
    """An array that is read without a driver."""

    def __float__(self) -> float:
        return float(view(self))

    def tolist(self) -> Any:
        return view(self).tolist()


class Stream:
    """A stream whose work is done as soon as it is asked for."""

    def __init__(self, ptr: int = 0, *, capturing: bool = False) -> None:
        self.ptr, self.capturing = ptr, capturing

    def is_capturing(self) -> bool:
        return self.capturing


def array(values: Any, device: int = 0, kind: Any = cupy.ndarray) -> Any:
    """An array of CuPy over the memory of one of NumPy, which it keeps."""
    low, high = np.lib.array_utils.byte_bounds(values)
    memory = UnownedMemory(low, high - low, values, device)
    start = MemoryPointer(memory, values.ctypes.data - low)
    return kind(values.shape, values.dtype, memptr=start, strides=values.strides)


def view(values: Any) -> Any:
    """An array of NumPy over the memory of one of CuPy, which it keeps."""
    if not values.size:
        return np.empty(values.shape, values.dtype)
    steps = [(n - 1) * step for n, step in zip(values.shape, values.strides, strict=True)]
    low = sum(step for step in steps if step < 0)
    high = sum(step for step in steps if step > 0) + values.itemsize
    memory = (ctypes.c_char * (high - low)).from_address(values.data.ptr + low)
    memory.owner = values
    return np.ndarray(values.shape, values.dtype, memory, -low, values.strides)


def _allocate(size: int, device: int = 0) -> MemoryPointer:
    room = np.empty(size + 512, np.uint8)
    start = room.ctypes.data + -room.ctypes.data % 512
    return MemoryPointer(UnownedMemory(start, size, room, device), 0)


class Memory(words.Memory):
    """What of `gradclip.cupy.gpu.Memory` needs a driver, by NumPy."""

    @property
    def processors(self) -> int:
        return 1

    def zeros(self, words: int) -> Any:
        return self.kept(array(np.zeros(words, np.int64)))

    def empty(self, words: int) -> Any:
        return self.kept(array(np.empty(words, np.int64), kind=Array))

    def sent(self, words: Any, *, again: bool) -> Any:
        assert again == self.is_capturing
        return self.kept(array(words.copy(), kind=Array))

    def received(self, buffer: Any) -> Any:
        return view(buffer).copy()

    def scalar(self, *, wide: bool) -> Any:
        return self.kept(array(np.empty((), np.float64 if wide else np.float32), kind=Array))

    def vector(self, count: int, *, wide: bool) -> Any:
        return self.kept(array(np.empty(count, np.float64 if wide else np.float32), kind=Array))

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        with np.errstate(all="ignore"):  # the interpreter calculates by NumPy
            super().launch(kernel, programs, args, **constants)

    def duplicate(self, values: Any) -> Any:
        new = cupy.empty_like(values)
        view(new)[...] = view(values)
        return new

    def assign(self, target: Any, source: Any) -> None:
        view(target)[...] = view(source)


@contextlib.contextmanager
def no_driver(stream: Stream | None = None) -> Any:
    """Within it CuPy allocates in this machine's memory, and the backend needs no driver.

    CuPy's own are the arrays, their views and what makes them. Replaced are, in `Memory`: the
    current stream; how many processors there are; copies to the device, from it and within it, also
    between strides; memory that is set to 0; and what a scalar is, so that it can be read. The
    pool, pinned memory and events are not used.
    """
    current = Stream() if stream is None else stream
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Memory, "now", classmethod(lambda kind, device: kind(device, current)))
        patched.setattr("gradclip.cupy.backend.Memory", Memory)
        cupy.cuda.set_allocator(_allocate)
        try:
            yield
        finally:
            cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
