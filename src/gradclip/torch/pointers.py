"""Where PyTorch's tensors lie, by its C interface, which the C kernel asks by itself.

`Tensor.numpy()` takes a microsecond, which is more than a small gradient takes to measure.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradclip.kernels import cpu
from gradclip.torch.following import is_transformed, is_written_down


def taken(tensors: Sequence[Any], *, writable: bool) -> cpu.Leaves | None:
    """The memory of plain tensors; None where one needs care."""
    if is_transformed() or is_written_down() or not are_there():
        return None
    return cpu.take_handles(tensors, writable=writable)


def taken_on(device: torch.device, tensors: Sequence[Any], *, writable: bool) -> cpu.Leaves | None:
    """The memory of plain tensors on a device, to be asked for `spans`; None where one is not."""
    number = -1 if device.type == "cpu" else _cuda_number()
    place = number, device.index or 0
    return cpu.take_handles(tensors, writable=writable, device=place)


def are_there() -> bool:
    """If the C kernel is in use, and this PyTorch has the C interface that it knows."""
    return cpu.kernel() != "numpy" and _c_interface()


@functools.cache
def _cuda_number() -> int:
    """PyTorch's number for this type of device."""
    return int(_shim().aoti_torch_device_type_cuda())


_FUNCTIONS = (
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_storage_offset",
    "get_storage_size",
    "get_dtype",
    "get_device_type",
    "get_layout",
    "get_device_index",
)
_NUMBERS = (
    "dtype_float16",
    "dtype_bfloat16",
    "dtype_float32",
    "dtype_float64",
    "dtype_complex64",
    "dtype_complex128",
    "device_type_cpu",
    "layout_strided",
)


@functools.cache
def _c_interface() -> bool:
    """If this PyTorch has the C interface that the C kernel knows; it is told where."""
    shim, place = _shim(), _place_of_a_tensor()
    if shim is None or place is None:
        return False
    names = [f"aoti_torch_{name}" for name in (*_FUNCTIONS, *_NUMBERS)]
    if not all(hasattr(shim, name) for name in names):
        return False
    functions = [getattr(shim, name) for name in names]
    addresses = [_address(function) for function in functions[: len(_FUNCTIONS)]]
    for name in ("omp_get_max_threads", "GOMP_parallel"):
        addresses.append(_address(getattr(shim, name)) if hasattr(shim, name) else 0)
    numbers = [number() for number in functions[len(_FUNCTIONS) :]]
    cpu.use_handles(tuple(addresses), (*numbers, place), Tensor)
    return True


@functools.cache
def _shim() -> Any:
    library = next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"), None)
    return None if library is None else ctypes.CDLL(str(library))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _place_of_a_tensor() -> int | None:
    """Where in the memory of a Python tensor its at::Tensor lies, if all kinds agree."""
    with torch.inference_mode(False), torch.enable_grad():
        owned_by_python = torch.zeros(2, device="cpu")
        parameter = torch.nn.Parameter(torch.zeros(2, device="cpu"))
        parameter.sum().backward()  # its gradient belongs to PyTorch
    samples: tuple[Any, ...] = (owned_by_python, parameter, parameter.grad)
    word = ctypes.sizeof(ctypes.c_void_p)
    header, size = object.__basicsize__, Tensor.__basicsize__
    for place in range(header, size - word + 1, word):
        if all(
            ctypes.c_void_p.from_address(id(tensor) + place).value == tensor._cdata
            for tensor in samples
        ):
            return place
    return None
