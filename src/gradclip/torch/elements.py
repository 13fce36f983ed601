"""What is done to tensors by PyTorch's own operations, in whatever memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.torch import mesh
from gradclip.torch.tensors import FLOAT8, detached, values_of


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements of a leaf, or of what is here of a DTensor, are NaN and how many inf."""
    values = values_of(mesh.local(leaf))
    if values.dtype in FLOAT8 | {torch.complex32}:
        values = values.to(torch.complex64 if values.is_complex() else torch.float32)
    return int(values.isnan().sum()), int(values.isinf().sum())


def scalar(norm: Scaled, device: Any, *, wide: bool) -> Tensor:
    """A norm as a 0-d tensor."""
    dtype = torch.float64 if wide else torch.float32
    # Half the time, but it refuses a number that is too large for the dtype.
    make = torch.scalar_tensor if norm.exponent < 128 else torch.tensor
    return make(float(norm), dtype=dtype, device=device)


def vector(norms: ScaledArray, device: Any, *, wide: bool) -> Tensor:
    """Norms as a tensor of one dimension."""
    return torch.from_numpy(norms.rounded(wide=wide)).to(device)


def fill_(tensors: Iterable[Tensor], value: float) -> None:
    """Put ``value`` into every element."""
    # In which inference tensors are written as all others are, and versions are counted.
    with torch.inference_mode():
        for tensor in tensors:
            if tensor.dtype in FLOAT8:  # which has no fill_
                tensor.copy_(torch.tensor(value, device=tensor.device))
            else:
                tensor.fill_(complex(value, value) if tensor.is_complex() else value)


def copy(leaf: Any) -> Tensor:
    """A new tensor of a leaf's elements."""
    values = detached(leaf)
    return torch.empty_like(values).copy_(values)
