"""The derivative of a clip, by operations that a framework can differentiate again.

With N the norm of leaves x, and factor c = limit / N where it clips, else 1, and y = c x::

    dN = <x, dx> / N,   dy = c dx + x (dlimit - c dN) / N where it clips

and back, from what is wanted of N and y::

    dx = c dy + x / N (dN - c <x, dy> / N where it clips),   dlimit = <x, dy> / N where it clips

All in float64, with x / N before any product, so that nothing overflows. Where the norm is zero or
no number each element's share x / N is 0; where a branch is not taken its derivative is 0, and not
0 times inf. A change of an output that is None is none: no pass over a leaf is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from gradclip.kernels.traced.norms import merged
from gradclip.kernels.traced.operations import Operations, by_parts, real_parts

_FACTORS = {"nan": math.nan, "raise": math.nan, "zero": 0.0, "keep": 1.0}  # of no finite norm


class Slope(NamedTuple):
    """What the derivative of a clip is made of: scalars."""

    norm: Any  # 1 where it is zero or no number
    rises: Any  # if the norm depends on the elements
    clips: Any  # if the norm is above the limit
    factor: Any
    unit: Any = None  # what the norm and the limit have been multiplied by, and elements are to be


def slope(ops: Operations, norm: Any, limit: Any, policy: str) -> Slope:
    """The derivative's parts, of a norm and the limit that it is held against."""
    norm, limit = ops.cast(norm, "float64"), ops.cast(limit, "float64")
    finite = norm < math.inf
    rises, clips = finite & (norm > 0), finite & ~(norm <= limit)
    safe = ops.where(rises, norm, 1.0)
    factor = ops.where(clips, ops.where(clips, limit, 1.0) / safe, 1.0)
    return Slope(safe, rises, clips, ops.where(finite, factor, _FACTORS[policy]))


def change_of_norm(
    ops: Operations, leaves: Sequence[tuple[Any, Any]], at: Slope, changes: Sequence[Any]
) -> Any:
    """``<x, dx> / N``, of leaves, of (values, indices or None), with rows of one index added."""
    found = ops.constant(0.0, "float64")
    for (values, indices), change in zip(leaves, changes, strict=True):
        if change is None:
            continue
        # Parts first, widened then: JAX's transpose of a real part does not know of float64.
        pairs = zip(real_parts(ops, values), real_parts(ops, change), strict=True)
        products = [_share(ops, x, indices, at) * ops.cast(y, "float64") for x, y in pairs]
        found = found + ops.sum(sum(products[1:], start=products[0]), None)
    return found


def pulled_back(
    ops: Operations,
    leaves: Sequence[tuple[Any, Any]],
    at: Slope,
    d_norm: Any,
    d_values: Sequence[Any],
    *,
    given: bool,
) -> tuple[list[Any], Any, Any]:
    """What is wanted of leaves, of (values, indices or None), of the limit and of the norm.

    A norm that is ``given`` does not depend on the leaves: then each has to have a change.
    """
    inner = change_of_norm(ops, [(values, None) for values, _ in leaves], at, d_values)
    d_limit = ops.where(at.clips, inner, 0.0)
    d_norm = d_norm - ops.where(at.clips, at.factor * inner, 0.0)

    def pulled(indices: Any, x: Any, *changes: Any) -> Any:
        terms = [ops.cast(change, "float64") * at.factor for change in changes]
        if not given:
            terms.append(_share(ops, x, indices, at) * d_norm)
        return ops.cast(sum(terms[1:], start=terms[0]), ops.dtype(x))

    new = [
        by_parts(ops, partial(pulled, indices), values, *([] if change is None else [change]))
        for (values, indices), change in zip(leaves, d_values, strict=True)
    ]
    return new, d_limit, d_norm


def pushed_forward(
    ops: Operations,
    values: Sequence[Any],
    at: Slope,
    *,
    d_limit: Any,
    d_norm: Any,
    d_values: Sequence[Any],
) -> list[Any]:
    """The change of what comes out, from that of what goes in and of the norm."""
    d_factor = ops.where(at.clips, (d_limit - at.factor * d_norm) / at.norm, 0.0)

    def pushed(x: Any, change: Any) -> Any:
        along = ops.where(at.clips, _widened(ops, x, at), 0.0) * d_factor
        return ops.cast(ops.cast(change, "float64") * at.factor + along, ops.dtype(x))

    return [by_parts(ops, pushed, *pair) for pair in zip(values, d_values, strict=True)]


def _share(ops: Operations, x: Any, indices: Any, at: Slope) -> Any:
    """``x / N``, with each row replaced by the sum of all rows of its index."""
    share = ops.where(at.rises, _widened(ops, x, at) / at.norm, 0.0)
    return share if indices is None else merged(ops, share, indices)


def _widened(ops: Operations, x: Any, at: Slope) -> Any:
    wide = ops.cast(x, "float64")
    return wide if at.unit is None else wide * at.unit
