"""Tensors of the CPU taken for those of a device, where the kernels run in Triton's interpreter.

With what counts launches, refuses to wait, and changes a line of the kernels; and a limit whose
reading gives a tensor other memory.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradclip.kernels.gpu import triton as cuda
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


class Counted(HostMemory):
    """Memory that writes down what is asked of it."""

    launched: list[str] = []  # noqa: RUF012
    sent_rows: list[int] = []  # noqa: RUF012

    def launch(self, kernel: Any, programs: int, args: Any, **constants: int) -> None:
        self.launched.append(kernel.fn.__name__)
        super().launch(kernel, programs, args, **constants)

    def sent(self, words: Any, *, again: bool) -> Any:
        self.sent_rows.append(len(words) // 3)
        return super().sent(words, again=again)


def refuse_to_wait(patched: pytest.MonkeyPatch) -> None:
    """From here on it is an error if the host waits for a tensor."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("__float__", "__bool__", "__int__", "item", "tolist", "cpu", "numpy"):
        patched.setattr(torch.Tensor, name, refuse)
    patched.setattr(HostMemory, "received", refuse)


def mutated(folder: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, of another source: a copy of the folder that they and their parts are in."""
    name = f"mutated_{folder.name}"
    package = shutil.copytree(Path(cuda.__file__).parent, folder / name)
    found = 0
    for file in package.rglob("*.py"):
        source = file.read_text()
        found += source.count(old)
        source = source.replace("from gradclip.kernels.gpu.", f"from {name}.")
        file.write_text(source.replace(old, new))
    assert found == 1
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(f"{name}.triton")


class Moving(float):
    """A limit that gives a tensor other memory when it is read."""

    def __new__(cls, value: float, leaf: torch.Tensor) -> Moving:
        new = super().__new__(cls, value)
        new.leaf, new.old = leaf, leaf.data
        return new

    def __float__(self) -> float:
        self.leaf.set_(torch.full((4,), 2.0))
        return float(str(self))
