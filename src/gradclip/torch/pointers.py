"""Where PyTorch's tensors lie, by its C interface, which the C kernel asks by itself.

`Tensor.numpy()` takes a microsecond, which is more than a small gradient takes to measure.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
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


# In the order of `use_handles`.
_FUNCTIONS = tuple(
    f"aoti_torch_get_{name}"
    for name in (
        "data_ptr",
        "dim",
        "sizes",
        "strides",
        "storage_offset",
        "storage_size",
        "dtype",
        "device_type",
        "layout",
        "device_index",
    )
)
_NUMBERS = tuple(
    f"aoti_torch_{name}"
    for name in (
        "dtype_float16",
        "dtype_bfloat16",
        "dtype_float32",
        "dtype_float64",
        "dtype_complex64",
        "dtype_complex128",
        "device_type_cpu",
        "layout_strided",
    )
)
# PyTorch before 2.9 has none: the kernel asks for the attribute `layout` then.
_MAY_LACK = "aoti_torch_get_layout"
_OPENMP = "omp_get_max_threads", "GOMP_parallel"


@functools.cache
def _c_interface() -> bool:
    """If this PyTorch has the C interface that the C kernel knows; it is told where.

    Where it has not, a warning says so, once.
    """
    shim, place = _shim(), _place_of_a_tensor()
    lacking = _lacking(shim, place)
    if place is None or lacking is not None:
        warnings.warn(
            f"{lacking}, so gradclip reads tensors as NumPy arrays: the same bits, slower for "
            "small ones, and gradients are not measured while backward makes them",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    addresses = tuple(_address(shim, name) for name in (*_FUNCTIONS, *_OPENMP))
    numbers = tuple(getattr(shim, number)() for number in _NUMBERS)
    cpu.use_handles(addresses, (*numbers, place), Tensor, torch.strided)
    return True


def _lacking(shim: Any, place: int | None) -> str | None:
    """What keeps the C kernel from PyTorch's C interface."""
    if shim is None:
        return f"no library of PyTorch {torch.__version__} has its C interface"
    if place is None:
        return f"PyTorch {torch.__version__} keeps its tensors where gradclip does not find them"
    needed = {*_FUNCTIONS, *_NUMBERS} - {_MAY_LACK}
    missing = sorted(each for each in needed if not hasattr(shim, each))
    return f"PyTorch {torch.__version__} has no {', '.join(missing)}" if missing else None


@functools.cache
def _shim() -> Any:
    library = next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"), None)
    return None if library is None else ctypes.CDLL(str(library))


def _address(shim: Any, name: str) -> int:
    """Where a function is; 0 if there is none."""
    function = getattr(shim, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


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
