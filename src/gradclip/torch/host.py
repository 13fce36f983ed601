"""Tensors in this machine's memory: the host's kernels walk them where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.exact import Part, Scaled, ScaledArray
from gradclip.core.sparse import merged_rows
from gradclip.kernels import cpu
from gradclip.kernels.cpu import leaves as host
from gradclip.kernels.cpu.leaves import Array, Float8
from gradclip.torch import pointers
from gradclip.torch.elements import scalar
from gradclip.torch.spread import Tensors
from gradclip.torch.tensors import (
    FLOAT8,
    HALVES,
    are_plain,
    array_of,
    detached,
    rows_of,
    values_of,
)


def hold_plain(
    tensors: Sequence[Any], path: Callable[[int], str], *, writable: bool
) -> Leaves | None:
    """Hold plain tensors; None where one of them needs care, or is elsewhere.

    Raises:
        ValueError: with ``writable``, two share a part of their memory.
    """
    memory = pointers.taken(tensors, writable=writable)
    if memory is None:
        return None
    host.check_apart(memory, path)
    return Leaves(tensors, [], None, memory, None, writable=writable)


def hold(
    leaves: Sequence[Any], values: Sequence[Tensor], path: Callable[[int], str], *, writable: bool
) -> Leaves:
    """Hold the memory of tensors, which have been checked, as that of arrays.

    Raises:
        ValueError: with ``writable``, elements of one or of two share memory.
    """
    added = merged if any(values_of(leaf) is not leaf for leaf in leaves) else None
    arrays = list(map(_memory, values))
    codes = [_float8(tensor.dtype) if tensor.dtype in FLOAT8 else None for tensor in values]
    return host.hold_codes(Leaves, leaves, arrays, codes, added, path, writable=writable)


class Leaves(Tensors, host.Leaves):
    """Tensors in this machine's memory."""

    __slots__ = ()

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Tensor:
        return scalar(norm, "cpu", wide=wide or self.wide)

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Tensor:
        return torch.from_numpy(self.vector_of_numpy(norms, wide=wide))

    def scaled(self, factor: Scaled | ScaledArray) -> list[Any]:
        old = list(map(detached, self.leaves))
        new = list(map(torch.empty_like, old))
        # The kernel walks memory: what is conjugated later, or lies in another order, is copied.
        sources = [
            values
            if values.stride() == target.stride() and not _is_lazy(values)
            else target.copy_(values)
            for values, target in zip(old, new, strict=True)
        ]
        _held(sources).scale_into(_held(new).memory, factor)
        return self.rewrapped(new)

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        return self.scaled(factors)

    def scale_(self, factor: Scaled) -> None:
        """Multiply every element where it lies; autograd sees that it has changed."""
        super().scale_(factor)
        self._changed()

    def scale_each_(self, factors: ScaledArray) -> None:
        super().scale_each_(factors)
        self._changed()

    def _changed(self) -> None:
        as_they_are = self.codes is None
        torch.autograd.graph.increment_version(
            self.leaves if as_they_are else map(values_of, self.leaves)
        )


def sums(tensors: Sequence[Tensor]) -> list[Part] | None:
    """Each thread's share of sum x^2 in float64; None if the C kernel cannot add that up."""
    memory = pointers.taken(tensors, writable=False) if are_plain(tensors) else None
    if memory is None or memory.has_f64:
        return None
    return cpu.sum_squares(memory)


def norms(tensors: Sequence[Tensor]) -> tuple[ScaledArray, list[Part]] | None:
    """The norm of each, and the sum of all; None if sums in float64 do not prove every one."""
    memory = pointers.taken(tensors, writable=False) if are_plain(tensors) else None
    if memory is None:
        return None
    each, unsure, parts = cpu.norms(memory)
    return None if unsure else (each, parts)


def watch(parameter: Tensor) -> Any:
    """Have a parameter's gradient measured whenever backward has written it, while it is warm.

    Returns:
        The watch and the handle of its hook; None where it is not worth it, or cannot be done.
    """
    large = parameter.numel() * parameter.element_size() >= _LARGE
    here = parameter.device.type == "cpu" and parameter.is_leaf
    if not large or not here or not pointers.are_there():
        return None
    watch = cpu.watch()
    return watch, parameter.register_post_accumulate_grad_hook(watch)


# Gradients of fewer bytes are in some cache at the step too, where one call measures them all.
_LARGE = 1 << 16


# ---- its memory as arrays ----


def _held(tensors: list[Tensor]) -> Leaves:
    """Hold tensors that have passed every check, or are new."""
    found = hold_plain(tensors, str, writable=False) if are_plain(tensors) else None
    return found or hold(tensors, tensors, str, writable=False)


def _memory(values: Tensor) -> Array:
    """The memory of a tensor as an array: uint16 for bfloat16, uint8 for float8."""
    values = values.detach()
    if values.is_conj():
        values = values.conj()
    if values.is_neg():
        values = torch._neg_view(values)
    if values.dtype is torch.bfloat16:
        codes: Array = values.view(torch.int16).numpy()
        return codes.view(np.uint16)
    if values.dtype is torch.complex32:
        values = torch.view_as_real(values)
    array: Array = (values.view(torch.uint8) if values.dtype in FLOAT8 else values).numpy()
    return array


def merged(leaf: Any, _: Any = None) -> Iterator[Array] | None:
    """The rows of a sparse leaf, those of one index added; None if each has its own."""
    rows = rows_of(leaf)
    if rows is None:
        return None
    values = values_of(leaf).detach()
    if values.dtype in HALVES | FLOAT8:
        values = values.to(torch.complex64 if values.is_complex() else torch.float32)
    return merged_rows(values.resolve_conj().resolve_neg().numpy(), array_of(rows))


_float8s: dict[torch.dtype, Float8] = {}


def _float8(dtype: torch.dtype) -> Float8:
    if dtype not in _float8s:

        def encode(values: Array) -> bytes:
            new: Array = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
            return new.tobytes()

        codes = torch.arange(256, dtype=torch.uint8, device="cpu")
        numbers: Array = codes.view(dtype).float().numpy()
        _float8s[dtype] = Float8(numbers.tobytes(), encode)
    return _float8s[dtype]


def _is_lazy(values: Tensor) -> bool:
    """If the elements are the conjugates, or negatives, of what lies in memory."""
    return values.is_conj() or values.is_neg()
