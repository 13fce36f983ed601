"""CuPy's own words for what `kernels.gpu.runs` asks of a device, and how it launches kernels."""

from __future__ import annotations

import functools
import math
import re
import threading
from collections import deque
from typing import Any, NamedTuple

import cupy
import numpy as np
import triton
from cupy_backends.cuda.api import driver
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradclip.kernels.gpu import launch
from gradclip.kernels.gpu.launch import OPTIONS, Reserve


class Memory(NamedTuple):
    """CuPy's names for what `kernels.gpu.runs` asks of a device; see there."""

    device: int
    stream: Any

    @classmethod
    def now(cls, device: int) -> Memory:
        """Of a device, and the stream that is current there.

        Raises:
            NotImplementedError: this CuPy is one for AMD's devices.
        """
        if cupy.cuda.runtime.is_hip:
            raise NotImplementedError(
                "gradclip clips arrays of CuPy on NVIDIA's GPUs; this CuPy is built for ROCm"
            )
        return cls(device, cupy.cuda.get_current_stream(device))

    @property
    def key(self) -> Any:
        # The default stream of a thread has one number, and each thread has its own.
        its = threading.get_ident() if self.stream.ptr == _OF_ITS_THREAD else 0
        return "cupy", self.device, self.stream.ptr, its

    @property
    def place(self) -> Any:
        return "cupy", self.device

    @property
    def processors(self) -> int:
        return _processors(self.device)

    @property
    def is_capturing(self) -> bool:
        return bool(self.stream.is_capturing())

    def zeros(self, words: int) -> Any:
        if not self.is_capturing:
            _reserve.take()
        with on(self.device):
            return self.kept(cupy.zeros(words, np.int64))

    def empty(self, words: int) -> Any:
        with on(self.device):
            return self.kept(cupy.empty(words, np.int64))

    def part(self, buffer: Any, start: int, shape: tuple[int, ...], *, real: bool) -> Any:
        words = buffer[start : start + math.prod(shape)]
        return (words.view(np.float64) if real else words).reshape(shape)

    def sent(self, words: Any, *, again: bool) -> Any:
        pinned = _reserve.keep(words) if again else _of_pinned(len(words), words)
        with on(self.device):
            new = cupy.empty(words.shape, np.int64)
            # An array's own way would refuse while capturing.
            cupy.cuda.runtime.memcpyAsync(
                new.data.ptr,
                pinned.ctypes.data,
                words.nbytes,
                cupy.cuda.runtime.memcpyHostToDevice,
                self.stream.ptr,
            )
            if not again:
                _hold_until_sent(pinned, self.stream)
            return self.kept(new)

    def received(self, buffer: Any) -> Any:
        with on(self.device):
            return buffer.get()

    def scalar(self, *, wide: bool) -> Any:
        with on(self.device):
            return self.kept(cupy.empty((), np.float64 if wide else np.float32))

    def vector(self, count: int, *, wide: bool) -> Any:
        with on(self.device):
            return self.kept(cupy.empty(count, np.float64 if wide else np.float32))

    def locate(self, value: Any) -> tuple[bool, int] | None:
        ours = isinstance(value, cupy.ndarray) and value.shape == ()
        if not ours or value.data.device_id != self.device or value.dtype.char not in "fd":
            return None
        return value.dtype.char == "d", value.data.ptr

    def address(self, buffer: Any) -> int:
        return int(buffer.data.ptr)

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
            kernel[(programs,)](*args, **constants)
            return
        with on(self.device):
            loaded = _loaded(kernel, tuple(constants.items()), self.device)
            loaded.function(
                (programs,),
                (loaded.threads,),
                args + loaded.more,
                shared_mem=loaded.shared,
                stream=self.stream,
            )

    def duplicate(self, values: Any) -> Any:
        """A new array of the same bits, in one run of memory."""
        with on(self.device):
            if not is_run(values):
                return _bits(values).copy("K").view(values.dtype)
            new = cupy.empty_like(values)
            new.data.copy_from_device_async(values.data, values.nbytes, self.stream)
            return new

    def assign(self, target: Any, source: Any) -> None:
        """Write the bits of one array to another of the same shape and dtype."""
        with on(self.device):
            _bits(target)[...] = _bits(source)

    def kept(self, array: Any) -> Any:
        """The array; if a graph is being captured, for as long as the graph may be replayed.

        CuPy gives the memory of an array that is dropped to the next one, also while capturing.
        """
        if self.is_capturing:
            _in_graphs.append(array)
        return array


_OF_ITS_THREAD = 2  # cudaStreamPerThread
_in_graphs: list[Any] = []


def on(device: int) -> Any:
    """Where a device is the current one."""
    return cupy.cuda.Device(device)


@functools.cache
def _processors(device: int) -> int:
    runtime = cupy.cuda.runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device))


# ---- arrays ----


def is_run(values: Any) -> bool:
    """If the elements are all that lies in one run of memory, in any order, none of them twice."""
    flags = values.flags
    if flags.c_contiguous or flags.f_contiguous:
        return True
    return launch.is_run(values.shape, values.strides, values.itemsize)


def may_overlap(values: Any) -> bool:
    """If elements may share memory: a step leads no further than what lies within it."""
    extent = values.itemsize
    steps = [
        (abs(stride), length)
        for stride, length in zip(values.strides, values.shape, strict=True)
        if length > 1
    ]
    for stride, length in sorted(steps):
        if stride < extent:
            return bool(values.size)
        extent += (length - 1) * stride
    return False


def _bits(values: Any) -> Any:
    """Elements of 16 bits as integers: not every CuPy has kernels for bfloat16."""
    return values.view(np.uint16) if values.itemsize == 2 else values


# ---- pinned memory ----

# CuPy gives pinned memory that is dropped to the next who asks, also while it is being read.
_sending: deque[tuple[Any, Any]] = deque()


def _of_pinned(count: int, words: Any = 0) -> Any:
    """New pinned memory for so many words."""
    new = np.frombuffer(cupy.cuda.alloc_pinned_memory(max(8 * count, 8)), np.int64, count)
    new[:] = words
    return new


def _hold_until_sent(pinned: Any, stream: Any) -> None:
    """Keep pinned memory until the stream has come so far; drop what has been sent by now."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    _sending.append((event, pinned))
    while _sending and _sending[0][0].done:
        _sending.popleft()


_reserve = Reserve(_of_pinned)


# ---- kernels ----


class _Loaded(NamedTuple):
    """A kernel on a device."""

    function: Any
    threads: int
    shared: int  # bytes of shared memory
    more: tuple[int, ...]  # arguments after the kernel's own


# Above this a kernel has to ask for shared memory before it is launched.
_SHARED = 48 << 10
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def _loaded(kernel: Any, constants: tuple[tuple[str, int], ...], device: int) -> _Loaded:
    """A kernel of Triton's, loaded by CuPy: Triton's own launcher takes PyTorch's stream."""
    capability = int(cupy.cuda.Device(device).compute_capability)
    compiled = compile_for(kernel, constants, capability)
    module = cupy.cuda.Module()
    module.load(compiled.asm["cubin"])
    function = module.get_function(compiled.metadata.name)
    shared = compiled.metadata.shared
    if shared > _SHARED:
        driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED_SIZE, shared)
    return _Loaded(function, 32 * compiled.metadata.num_warps, shared, _more(kernel, compiled))


@functools.cache
def compile_for(kernel: Any, constants: tuple[tuple[str, int], ...], capability: int) -> Any:
    """A kernel, all of whose arguments are int64 but for the constants, for such devices of NVIDIA.

    ``capability`` is 90 for 9.0.
    """
    values = dict(constants)
    signature = {name: "constexpr" if name in values else "i64" for name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, values),
        target=GPUTarget("cuda", capability, 32),
        options=OPTIONS,
    )


def _more(kernel: Any, compiled: Any) -> tuple[int, ...]:
    """What a compiled kernel takes after its own arguments: pointers to scratch that is not used.

    Raises:
        RuntimeError: it wants such scratch, or more than pointers.
    """
    own = len(kernel.arg_names) - len(compiled.src.constants)
    head = re.search(r"\.entry\s+\w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    kinds = re.findall(r"\.param\s+(\.\w+)", head[1] if head else "")
    metadata = compiled.metadata
    scratch = [getattr(metadata, f"{each}_scratch_size", 0) for each in ("global", "profile")]
    if len(kinds) < own or set(kinds) != {".u64"} or any(scratch):
        raise RuntimeError(
            f"Triton {triton.__version__} has compiled {metadata.name} to a kernel that gradclip "
            f"cannot launch (parameters {kinds}, bytes of scratch {scratch})"
        )
    return (0,) * (len(kinds) - own)
