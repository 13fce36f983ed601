"""Norms of other orders than 2, which PyTorch's functions have: summed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.exact import Scaled
from gradclip.torch import host
from gradclip.torch.overlap import distinct
from gradclip.torch.tensors import detached, rows_of


def powers_of_order(leaves: Sequence[Any], order: float) -> tuple[float, float]:
    """The largest ``|x|``, and ``sum of (|x| / largest)^order`` in float64; 1 for an order of inf.

    NaN if any element is, else inf if any element is.
    """
    largest = 0.0
    for piece in _magnitudes(leaves):
        top = float(piece.max())
        largest = top if math.isnan(top) else max(largest, top)
        if math.isnan(largest):
            break
    if math.isinf(order) or not 0 < largest < math.inf:
        return largest, 1.0
    # Parts of the largest: neither a sum nor its root overflows.
    parts = (float((piece / largest).pow(order).sum()) for piece in _magnitudes(leaves))
    return largest, math.fsum(parts)


def norm_of_order(powers: Sequence[Sequence[float]], order: float, *, wide: bool) -> Scaled:
    """``(sum of |x|^order)^(1/order)``, or for inf the largest |x|; in float64, rounded once more.

    Of one or more `powers_of_order`; to float64 if it is ``wide``, else to float32.
    """
    tops = [top for top, _ in powers]
    largest = math.nan if any(map(math.isnan, tops)) else max(tops)
    norm = Scaled.of(largest)
    if math.isfinite(order) and 0 < largest < math.inf:
        total = math.fsum(part * (top / largest) ** order for top, part in powers)
        if math.log2(total) / order > 1000:
            return Scaled.of(math.inf)
        significand, exponent = math.frexp(norm.significand * total ** (1 / order))
        norm = Scaled(significand, norm.exponent + exponent)
    rounded = norm if wide else norm._replace(significand=float(np.float32(norm[0])))
    significand, exponent = math.frexp(rounded.significand)
    return Scaled(significand, norm.exponent + exponent)


def _magnitudes(leaves: Sequence[Any]) -> Iterator[Tensor]:
    """``|x|`` of the leaves in float64, rows of one index added; some at a time, never none."""
    for leaf in distinct(leaves):
        values, rows = detached(leaf), rows_of(leaf)
        merged = None if rows is None else host.merged(leaf)
        parts = [values] if merged is None else map(torch.from_numpy, merged)
        for part in parts:
            for piece in torch.split(part.reshape(-1), 1 << 16):
                if piece.numel():
                    wide = torch.complex128 if piece.is_complex() else torch.float64
                    yield piece.to(wide).abs()
