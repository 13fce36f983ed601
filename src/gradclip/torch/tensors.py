"""One leaf of PyTorch's: the tensor of its elements, its rows, and whether it is clipped at all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.sparse import IndexedSlices, check_rows
from gradclip.kernels.cpu import kinds

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
HALVES = {torch.float16, torch.bfloat16, torch.complex32}
WIDE = {torch.float64, torch.complex128}
_DTYPES = HALVES | FLOAT8 | WIDE | {torch.float32, torch.complex64}
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex tensors"


def are_plain(leaves: Sequence[Any]) -> bool:
    """If all are tensors or parameters, and of no type that PyTorch's users have made."""
    return PLAIN_TYPES.issuperset(kinds(leaves))


def values_of(leaf: Any) -> Tensor:
    """The tensor of a leaf's elements: of a sparse one, those it stores; the same memory."""
    if isinstance(leaf, IndexedSlices):
        values: Tensor = leaf.values
        return values
    if leaf.layout is torch.sparse_coo:
        return leaf._values()
    return leaf.values() if leaf.layout in _COMPRESSED else leaf


def detached(leaf: Any) -> Tensor:
    """The tensor of a leaf's elements, which autograd does not follow."""
    return values_of(leaf).detach()


def rows_of(leaf: Any) -> Tensor | None:
    """One index for each of a leaf's values; None if no two can share one."""
    if isinstance(leaf, IndexedSlices):
        return torch.as_tensor(leaf.indices, device=leaf.values.device)
    if leaf.layout is not torch.sparse_coo or leaf.is_coalesced():
        return None
    indices = leaf._indices()
    rows = indices.new_zeros(leaf._nnz())
    for axis, length in enumerate(leaf.shape[: leaf.sparse_dim()]):
        rows = rows * length + indices[axis]
    return rows


def with_values(leaf: Any, values: Tensor) -> Any:
    """A leaf with other elements."""
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=values)
    if leaf.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(
            leaf._indices(),
            values,
            leaf.shape,
            is_coalesced=leaf.is_coalesced(),
            check_invariants=False,
        )
    if leaf.layout in _COMPRESSED:
        return torch.sparse_compressed_tensor(
            *_compressed_indices(leaf),
            values,
            leaf.shape,
            layout=leaf.layout,
            check_invariants=False,
        )
    return values


def array_of(indices: Any) -> Any:
    """Indices as an array."""
    return indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)


def _compressed_indices(leaf: Tensor) -> tuple[Tensor, Tensor]:
    if leaf.layout in (torch.sparse_csr, torch.sparse_bsr):
        return leaf.crow_indices(), leaf.col_indices()
    return leaf.ccol_indices(), leaf.row_indices()


def norm_dtype(leaves: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the norm of dense leaves."""
    return torch.float64 if any(leaf.dtype in WIDE for leaf in leaves) else torch.float32


# ---- checks ----


def checked(leaf: Any, path: Callable[[], str]) -> Tensor:
    """The tensor of a leaf's elements, once the leaf has been found to be one that is clipped."""
    tensor = leaf.values if isinstance(leaf, IndexedSlices) else leaf
    kind = type(tensor)
    served = isinstance(tensor, Tensor) and (
        kind in PLAIN_TYPES
        or kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
        or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    if not served or tensor.is_nested or tensor.is_quantized or tensor.is_mkldnn:
        name = kind.__name__
        if served:
            name = "a tensor that is nested, quantized or of mkldnn"
        raise TypeError(f"{path()} is {name}; gradclip clips {_ACCEPTED}")
    _check_dtype(tensor, path)
    values = values_of(leaf)
    short = not values.is_meta and needed(values) > values.untyped_storage().nbytes()
    if values.is_meta or values._is_zerotensor() or short:
        raise ValueError(f"{path()} has no memory (device {values.device})")
    if values is not leaf:
        _check_indices(leaf, path)
    return values


def _check_dtype(tensor: Tensor, path: Callable[[], str]) -> None:
    if tensor.dtype not in _DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{path()} is {name}; gradclip clips {_ACCEPTED}")


def check_dtypes(leaves: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Hold the dtypes of leaves against those that are clipped.

    Raises:
        TypeError: one is not.
    """
    for place, leaf in enumerate(leaves):
        _check_dtype(leaf, partial(path, place))


def check_unrecorded(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Refuse to write to parameters, which are no gradients, and to what a graph has read."""
    if are_plain(leaves) and not _any_requires_grad(*leaves):
        return
    for place, leaf in enumerate(leaves):
        tensor = leaf.values if isinstance(leaf, IndexedSlices) else leaf
        if getattr(tensor, "requires_grad", False):
            raise TypeError(
                f"{path(place)} requires a gradient, and autograd would not see that it changes. "
                "Weights are no gradients: those of parameters are clipped by "
                "gradclip.torch.clip_grad_norm_. To write to this tensor itself use "
                "torch.no_grad(); clip_by_global_norm returns new ones"
            )


def _any_of(*tensors: Tensor) -> bool:
    return any(map(operator.attrgetter("requires_grad"), tensors))


# PyTorch 2.6 has none.
_any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", _any_of)


def needed(values: Tensor) -> int:
    """How many bytes of its storage a tensor reaches over."""
    if not values.numel():
        return 0
    extent = sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True)) + 1
    return int((values.storage_offset() + extent) * values.element_size())


def _check_indices(leaf: Any, path: Callable[[], str]) -> None:
    if isinstance(leaf, IndexedSlices):
        check_rows(leaf._replace(indices=array_of(leaf.indices)), path)
    elif leaf.layout in _COMPRESSED:
        try:
            torch._validate_sparse_compressed_tensor_args(
                *_compressed_indices(leaf), leaf.values(), leaf.shape, leaf.layout
            )
        except RuntimeError as error:
            raise ValueError(f"{path()} is malformed: {error}") from None
    elif leaf._indices().numel():
        indices = leaf._indices()
        lengths = indices.new_tensor(leaf.shape[: leaf.sparse_dim()])[:, None]
        wrong = ((indices < 0) | (indices >= lengths)).any(1)
        if wrong.any():
            axis = int(wrong.to(torch.int8).argmax())
            raise ValueError(
                f"{path()} has an index out of range on axis {axis} of length {leaf.shape[axis]}"
            )
