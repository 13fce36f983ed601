"""Tensors of the CPU taken for those of a device, where the kernels run in Triton's interpreter.

And a limit whose reading gives a tensor other memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gradclip.torch.gpu import Memory


class HostMemory(Memory):
    """The memory of the CPU, with one processor and no stream: in place of what has no device."""

    @classmethod
    def now(cls, device: torch.device) -> HostMemory:
        return cls(device, 0)

    @property
    def processors(self) -> int:
        return 1

    @property
    def is_capturing(self) -> bool:
        return False

    def zeros(self, words: int) -> torch.Tensor:
        return torch.zeros(words, dtype=torch.int64)

    def sent(self, words: Any, *, again: bool) -> torch.Tensor:  # noqa: ARG002
        return torch.from_numpy(words)

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def torch_there() -> Iterator[None]:
    """Tensors of the CPU are in the memory of a device that Triton compiles for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gradclip.torch.gpu.Memory", HostMemory)
        patched.setattr("gradclip.torch.devices.has_triton", lambda _: True)
        patched.setattr("gradclip.torch.pointers.taken", lambda *_, **__: None)
        with np.errstate(all="ignore"):  # the interpreter calculates by NumPy
            yield


class Moving(float):
    """A limit that gives a tensor other memory when it is read."""

    def __new__(cls, value: float, leaf: torch.Tensor) -> Moving:
        new = super().__new__(cls, value)
        new.leaf, new.old = leaf, leaf.data
        return new

    def __float__(self) -> float:
        self.leaf.set_(torch.full((4,), 2.0))
        return float(str(self))
