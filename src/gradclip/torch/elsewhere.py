"""Tensors in memory that neither the host's kernels nor Triton's reach: by PyTorch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.exact import WORDS, Scaled, ScaledArray, Total, total_of
from gradclip.core.sparse import IndexedSlices
from gradclip.core.workers import Joint
from gradclip.kernels.traced import norms, scaling, squares
from gradclip.kernels.traced.numbers import Number
from gradclip.torch import host
from gradclip.torch.elements import scalar, vector
from gradclip.torch.operations import Operations
from gradclip.torch.spread import Tensors
from gradclip.torch.tensors import WIDE, detached, rows_of, values_of


class Leaves(Tensors):
    """Tensors on a device, or on several; of those to be written, each memory once."""

    __slots__ = ("leaves", "writable")

    def __init__(self, leaves: Sequence[Any], *, writable: bool) -> None:
        self.leaves = leaves
        self.writable = writable

    @property
    def wide(self) -> bool:
        return any(values_of(leaf).dtype in WIDE for leaf in self.leaves)

    def measure(self) -> Scaled:
        devices = {values_of(leaf).device for leaf in self.leaves}
        if len(devices) > 1:
            return self._on_the_host().measure()
        norm = norms.measured(Operations(devices.pop()), list(map(_with_rows, self.leaves)))
        if norm.nan | norm.inf:
            return Scaled.of(np.nan if norm.nan else np.inf)
        significand, exponent = Scaled.of(float(norm.significand))
        return Scaled(significand, exponent + int(norm.exponent) if significand else 0)

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        each = [Leaves([leaf], writable=False).measure() for leaf in self.leaves]
        return self.measure(), ScaledArray.of(each)

    def total(self) -> tuple[Total, float, bool]:
        return self._on_the_host().total()

    def addend(self, joint: Joint) -> Total:
        """The exact sum by PyTorch's operations; of several devices, one after the other."""
        del joint
        found = total_of()
        for leaf in self.leaves:
            values, rows = _with_rows(leaf)
            ops = Operations(values.device)
            addends = norms.addends(ops, [(values, rows)])
            if addends:
                words = squares.total(ops, addends).cpu().numpy()
                found[:WORDS] += words[:WORDS]
                found[WORDS:] += words[-2:]
        return found

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Tensor:
        """The norm as a 0-d tensor, where the first leaf is."""
        return scalar(norm, values_of(self.leaves[0]).device, wide=wide or self.wide)

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Tensor:
        return vector(norms, values_of(self.leaves[0]).device, wide=wide or self.wide)

    def scaled(self, factor: Scaled) -> list[Any]:
        return self.rewrapped([_scaled(detached(leaf), factor) for leaf in self.leaves])

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        pairs = zip(self.leaves, factors.singly(), strict=True)
        return self.rewrapped([_scaled(detached(leaf), factor) for leaf, factor in pairs])

    def scale_(self, factor: Scaled) -> None:
        self.scale_each_(ScaledArray.of([factor] * len(self.leaves)))

    def scale_each_(self, factors: ScaledArray) -> None:
        one = Scaled.of(1.0)
        with torch.inference_mode():
            for tensor, factor in zip(map(values_of, self.leaves), factors.singly(), strict=True):
                if factor != one:
                    tensor.copy_(_scaled(tensor, factor))

    def _on_the_host(self) -> host.Leaves:
        """Copies of the leaves, to be measured."""
        leaves = [
            leaf._replace(values=leaf.values.cpu())
            if isinstance(leaf, IndexedSlices)
            else leaf.cpu()
            for leaf in self.leaves
        ]
        return host.hold(leaves, list(map(values_of, leaves)), str, writable=False)


def _with_rows(leaf: Any) -> tuple[Tensor, Tensor | None]:
    return detached(leaf), rows_of(leaf)


def _scaled(values: Tensor, factor: Scaled) -> Tensor:
    if not factor.significand:
        return values * 0
    ops = Operations(values.device)
    significand = ops.constant(int(factor.significand * 2**53), "int64")
    exponent = ops.constant(factor.exponent - 53, "int64")
    never = significand < 0
    number = Number(significand, exponent, never, never)
    if values.dtype is torch.complex32:
        parts = torch.view_as_real(values.resolve_conj())
        return torch.view_as_complex(scaling.scaled(ops, parts, number))
    return torch.empty_like(values).copy_(scaling.scaled(ops, values, number))
