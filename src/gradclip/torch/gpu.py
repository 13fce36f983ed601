"""Tensors in the memory of a GPU: PyTorch's names for what `kernels.gpu` asks of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.workers import Joint
from gradclip.kernels.cpu.leaves import check_apart
from gradclip.kernels.gpu import leaves as gpu
from gradclip.kernels.gpu.launch import OPTIONS, Reserve, is_run
from gradclip.kernels.gpu.runs import Runs
from gradclip.torch import host, mesh, pointers
from gradclip.torch.elements import copy, scalar, vector
from gradclip.torch.overlap import check_pairs, distinct
from gradclip.torch.spread import Tensors
from gradclip.torch.tensors import WIDE, needed


def hold(tensors: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Leaves | None:
    """Hold plain tensors on one device; None where one is elsewhere, or not in one run of memory.

    Raises:
        ValueError: with ``writable``, two share a part of their memory.
    """
    runs = _runs(tensors, path, writable=writable)
    return None if runs is None else Leaves(tensors, runs, writable=writable)


class Leaves(gpu.Leaves, Tensors):
    """Tensors in a GPU's memory."""

    __slots__ = ("_runs", "writable")

    def __init__(self, leaves: Sequence[Tensor], runs: Runs, *, writable: bool) -> None:
        super().__init__(leaves, leaves, runs.memory)
        self._runs = runs
        self.writable = writable

    @property
    def wide(self) -> bool:
        return self._runs.wide

    def runs(self) -> contextlib.AbstractContextManager[Runs]:
        return contextlib.nullcontext(self._runs)

    def new_runs(self, arrays: Sequence[Any]) -> Runs:
        found = _runs(arrays, str, writable=False)
        assert found is not None, "laid out as those that are there"
        return found

    share = Tensors.share  # of others' leaves too

    def addend(self, joint: Joint) -> Any:
        """The exact sum: it stays on the device where a process group can take it there."""
        stays = isinstance(joint.workers, mesh.Ring)
        return self._runs.share() if stays else self.sum_of_squares()

    def total(self) -> Any:
        copies = [tensor.cpu() for tensor in self.leaves]
        return host.hold(copies, copies, str, writable=False).total()

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Tensor:
        """The norm as a 0-d tensor on the device."""
        return scalar(norm, self.leaves[0].device, wide=wide or self.wide)

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Tensor:
        """Norms that the host knows, on the device."""
        return vector(norms, self.leaves[0].device, wide=wide or self.wide)

    def lacks(self, norms: Tensor, leaves: Sequence[Any]) -> bool:
        """If one is listed again, by what the host knows: nobody waits for the norms."""
        return len(norms) < len(leaves) or self._runs.any_empty

    def duplicated(self) -> list[Any]:
        """New tensors of the same bits, each in one run of memory."""
        return list(map(copy, self.leaves))

    def rewrapped(self, new: list[Any]) -> list[Any]:
        """The new tensors, which are the leaves."""
        return new

    def written(self) -> None:
        """Have autograd know that the leaves may have been written."""
        torch.autograd.graph.increment_version(self.leaves)


def _runs(tensors: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Runs | None:
    device = tensors[0].device
    found = (_spans_by_pointers if pointers.are_there() else _spans)(
        tensors, device, path, writable=writable
    )
    return None if found is None else Runs(Memory.now(device), *found)


def _spans_by_pointers(
    tensors: Sequence[Any], device: torch.device, path: Callable[[int], str], *, writable: bool
) -> tuple[bytes, bool] | None:
    memory = pointers.taken_on(device, tensors, writable=writable)
    spans = None if memory is None else memory.spans()
    if memory is None or spans is None:
        return None
    check_apart(memory, path)
    return spans, memory.has_f64


def _spans(
    tensors: Sequence[Any], device: torch.device, path: Callable[[int], str], *, writable: bool
) -> tuple[bytes, bool] | None:
    """Where tensors lie, and if one is wide; None where one is not in one run on the device."""
    if any(
        tensor.device != device
        or tensor.layout is not torch.strided
        or tensor.dtype not in _KINDS
        or not is_run(tensor.shape, tensor.stride(), 1)
        or needed(tensor) > tensor.untyped_storage().nbytes()
        for tensor in tensors
    ):
        return None
    if writable:
        check_pairs(tensors, path)
    rows = [
        (t.data_ptr(), t.numel() * (1 + t.is_complex()), _KINDS[t.dtype])
        for t in (distinct(tensors) if writable else tensors)
    ]
    wide = any(tensor.dtype in WIDE for tensor in tensors)
    return np.array(rows, np.int64).tobytes(), wide


# The numbers of `cpu.h`.
_KINDS = {
    torch.float32: 0,
    torch.complex64: 0,
    torch.float64: 1,
    torch.complex128: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
}


class Memory(NamedTuple):
    """PyTorch's names for what `kernels.gpu.runs` asks of a device; see there."""

    device: torch.device
    stream: int

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        """Of a device, and the stream that is current there."""
        return cls(device, torch.cuda.current_stream(device).cuda_stream)

    @property
    def key(self) -> Any:
        return self

    @property
    def place(self) -> torch.device:
        return self.device

    @property
    def processors(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @property
    def is_capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def zeros(self, words: int) -> Tensor:
        if not self.is_capturing:
            _reserve.take()
        return torch.zeros(words, dtype=torch.int64, device=self.device)

    def empty(self, words: int) -> Tensor:
        return torch.empty(words, dtype=torch.int64, device=self.device)

    def part(self, buffer: Tensor, start: int, shape: tuple[int, ...], *, real: bool) -> Tensor:
        words = buffer[start : start + math.prod(shape)]
        return (words.view(torch.float64) if real else words).view(shape)

    def assign(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def sent(self, words: Any, *, again: bool) -> Tensor:
        words = torch.from_numpy(words)
        pinned = _reserve.keep(words) if again else words.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def received(self, buffer: Tensor) -> Any:
        return buffer.cpu().numpy()

    def scalar(self, *, wide: bool) -> Tensor:
        dtype = torch.float64 if wide else torch.float32
        return torch.empty((), dtype=dtype, device=self.device)

    def vector(self, count: int, *, wide: bool) -> Tensor:
        dtype = torch.float64 if wide else torch.float32
        return torch.empty(count, dtype=dtype, device=self.device)

    def locate(self, value: Any) -> tuple[bool, int] | None:
        ours = isinstance(value, Tensor) and value.shape == () and value.device == self.device
        if not ours or value.dtype not in (torch.float32, torch.float64):
            return None
        return value.dtype == torch.float64, value.data_ptr()

    def address(self, buffer: Tensor) -> int:
        return buffer.data_ptr()

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        with torch.cuda.device(self.device):
            kernel[(programs,)](*args, **constants, **OPTIONS)


_reserve = Reserve(lambda words: torch.empty(words, dtype=torch.int64, pin_memory=True))
