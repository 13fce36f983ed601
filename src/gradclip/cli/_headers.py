"""What the headers of .npy and .safetensors files say: each tensor and where its bytes lie."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradclip.cli._console import need_extra

_DTYPES = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


class Tensor(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    number: np.dtype[Any] | None  # of its elements; None if they are nothing that gradclip clips
    exempt: bool  # if it is of integers or text, which no one would clip
    offset: int  # of its first byte in the file, or in its member of an .npz; in a .pt its place
    nbytes: int  # of its elements
    strides: tuple[int, ...] | None = None  # in elements; None if they lie in order


def npy(name: str, stream: IO[bytes], size: int) -> Tensor:
    """The tensor of an .npy file of ``size`` bytes.

    Raises:
        ValueError: it is none, holds Python objects, or is of another size than its header says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the Python expression that a header is
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ValueError("holds pickled Python objects, which gradclip does not load")
    if min(shape, default=0) < 0:
        raise ValueError(f"has the shape {shape}")
    offset, nbytes = stream.tell(), math.prod(shape) * dtype.itemsize
    if size != offset + nbytes:
        raise ValueError(
            f"holds {size - offset} bytes of data; {dtype} of shape {shape} takes {nbytes}"
        )
    number = dtype if dtype.char in "efdFD" else None
    exempt = dtype.kind in "biuSUmM"
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if fortran else None
    return Tensor(name, str(dtype), shape, number, exempt, offset, nbytes, strides)


def safetensors(path: Path, stream: IO[bytes]) -> list[Tensor]:
    """The tensors of a .safetensors file, open at its start, in the order of their bytes.

    Raises:
        Exception: whatever the safetensors library makes of a damaged file.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise need_extra("safetensors") from None
    with safe_open(path, framework="np"):  # which checks all that is relied on below
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    first = stream.tell()
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = [_tensor(name, entry, first) for name, entry in entries.items()]
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))


def number_of(dtype: str) -> np.dtype[Any] | None:
    """The little-endian dtype of this name; None if gradclip does not clip it."""
    code = next((code for code, name in _DTYPES.items() if name == dtype), "")
    return np.dtype("<c16") if dtype == "complex128" else _number(code)


def _tensor(name: str, entry: dict[str, Any], first: int) -> Tensor:
    code = entry["dtype"]
    number = _number(code)
    exempt = re.fullmatch(r"BOOL|[IU]\d+", code) is not None
    dtype = code if number is None else number.name
    if exempt:
        dtype = code.replace("BOOL", "bool").replace("I", "int").replace("U", "uint")
    start, end = entry["data_offsets"]
    return Tensor(name, dtype, tuple(entry["shape"]), number, exempt, first + start, end - start)


def _number(code: str) -> np.dtype[Any] | None:
    name = _DTYPES.get(code)
    if name is None:
        return None
    if not name.startswith(("bfloat", "float8")):
        return np.dtype(name).newbyteorder("<")
    try:
        import ml_dtypes
    except ImportError:
        raise need_extra("ml_dtypes") from None
    number: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return number
