"""The derivative of a clip, by PyTorch's own operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Slope(NamedTuple):
    """What the derivative of a clip is made of: float64 scalars that can be differentiated."""

    norm: Tensor  # 1 where it is zero or no number
    rises: Tensor  # 1 where the norm depends on the elements, else 0
    clips: Tensor  # 1 where the norm is above the limit, else 0
    factor: Tensor


def slope(norm: Tensor, limit: Tensor, policy: str) -> Slope:
    """The derivative's parts, of a norm and the limit that it is held against."""
    norm, limit = norm.to(torch.float64), limit.to(torch.float64)
    finite = norm.isfinite()
    clips = finite & ~(norm <= limit)
    rises = finite & (norm > 0)
    one = torch.ones_like(norm)
    # Where a branch is not taken its derivative is to be 0, not 0 times inf.
    safe = torch.where(rises, norm, one)
    bound = torch.where(clips, limit, one)
    otherwise = {"nan": math.nan, "raise": math.nan, "zero": 0.0, "keep": 1.0}[policy]
    factor = torch.where(clips, bound / safe, torch.where(finite, one, otherwise * one))
    return Slope(safe, rises.to(one.dtype), clips.to(one.dtype), factor)


def pulled_back(
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    at: Slope,
    *,
    given: bool,
    d_norms: Sequence[Tensor | None],
    d_values: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradient in the inputs, the limit and the norm, from that in the outputs.

    With factor c = limit / N where it clips, else 1, and y = c x::

        dx = c dy + x / N (dN - c <x, dy> / N where it clips),   dlimit = <x, dy> / N
    """
    d_limit = at.clips * _inner([_unit(x, at) for x in values], d_values, at)
    d_measured = -at.factor * d_limit
    for change in d_norms:
        if change is not None:
            d_measured = d_measured + change.to(torch.float64)
    results = []
    for x, row, change in zip(values, rows, d_values, strict=True):
        unit = _unit(x, at) if row is None else summed_rows(_unit(x, at), row)
        result = torch.zeros_like(unit) if given else unit * d_measured
        if change is not None:
            result = result + widened(change) * at.factor
        results.append(result.to(x.dtype))
    return results, d_limit, d_measured


def pushed_forward(
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    at: Slope,
    *,
    d_limit: Tensor | None,
    d_given: Tensor | None,
    given: bool,
    d_values: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """The change of the norm and of the outputs, from that of the inputs."""
    if given:
        d_norm = torch.zeros_like(at.norm) if d_given is None else d_given.to(torch.float64)
    else:
        merged = [
            _unit(x, at) if row is None else summed_rows(_unit(x, at), row)
            for x, row in zip(values, rows, strict=True)
        ]
        d_norm = _inner(merged, d_values, at)
    d_factor = -at.factor * d_norm / at.norm
    if d_limit is not None:
        d_factor = d_factor + d_limit.to(torch.float64) / at.norm
    d_factor = at.clips * d_factor
    results = []
    for x, change in zip(values, d_values, strict=True):
        result = torch.where(at.clips > 0, widened(x), 0) * d_factor
        if change is not None:
            result = result + widened(change) * at.factor
        results.append(result.to(x.dtype))
    return d_norm, results


def _inner(xs: Sequence[Tensor], ys: Sequence[Tensor | None], at: Slope) -> Tensor:
    """The sum of Re conj(x) y; 0 where the norm is 0 or no number."""
    terms = []
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            product = widened(x).conj() * widened(y)
            terms.append((product.real if product.is_complex() else product).sum())
    zero = torch.zeros_like(at.norm)
    return torch.where(at.rises > 0, reduce(torch.add, terms, zero), zero)


def _unit(x: Tensor, at: Slope) -> Tensor:
    """``x / N``; 0 where N is 0 or no number, since of that each element's share is 0."""
    wide = widened(x)
    return torch.where(at.rises > 0, wide / at.norm, torch.zeros_like(wide))


def widened(x: Tensor) -> Tensor:
    """As float64 or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def summed_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Each row replaced by the sum of all rows of its index."""
    distinct, group = torch.unique(rows, return_inverse=True)
    sums = values.new_zeros((len(distinct), *values.shape[1:])).index_add(0, group, values)
    return sums[group]
