"""PyTorch's names for what `kernels.gpu` asks of a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.kernels.gpu.launch import OPTIONS, Reserve


class Memory(NamedTuple):
    """PyTorch's names for what `_device` asks of a device; see there."""

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

    def sent(self, words: Any, *, again: bool) -> Tensor:
        words = torch.from_numpy(words)
        pinned = _reserve.keep(words) if again else words.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def received(self, buffer: Tensor) -> Any:
        return buffer.cpu().numpy()

    def scalar(self, *, wide: bool) -> Tensor:
        dtype = torch.float64 if wide else torch.float32
        return torch.empty((), dtype=dtype, device=self.device)

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
