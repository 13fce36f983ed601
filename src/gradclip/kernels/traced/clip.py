"""A whole clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from gradclip.kernels.traced.norms import is_wide, measured, measured_each
from gradclip.kernels.traced.numbers import Number, compared, number_of, rounded
from gradclip.kernels.traced.operations import Operations, by_parts
from gradclip.kernels.traced.scaling import scaled


def clip(
    ops: Operations,
    leaves: Sequence[tuple[Any, Any]],
    clip_norm: Any,
    use_norm: Any,
    policy: str,
) -> list[Any]:
    """Clip leaves, of (values, indices or None), as `gradclip.clip_by_global_norm` does.

    Returns:
        The norm in its dtype, the norm as float64, then the new values.
    """
    norm = measured(ops, leaves) if use_norm is None else number_of(ops, use_norm)
    decided = compared(ops, norm, number_of(ops, clip_norm))
    return _carried_out(ops, leaves, norm, [decided] * len(leaves), policy)


def norms_of_each(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> Any:
    """The norm of each leaf, a vector of the dtype of the norm of all."""
    return rounded(ops, measured_each(ops, leaves), wide=is_wide(ops, leaves))


def clip_learning(
    ops: Operations, leaves: Sequence[tuple[Any, Any]], lesson: Any, policy: str, place: Any
) -> list[Any]:
    """The same by a limit that learns; ``lesson`` and ``place`` are as in `core.memory`."""
    norm = measured(ops, leaves)
    whole = rounded(ops, norm, wide=True)
    if not lesson.per_tensor:
        limit = lesson.judge(ops, whole, place)
        decided = [compared(ops, norm, number_of(ops, limit))] * len(leaves)
        return _carried_out(ops, leaves, norm, decided, policy)
    each = measured_each(ops, leaves)
    limits, own = lesson.judge_each(ops, rounded(ops, each, wide=True), whole, place)
    decided = []
    for leaf in range(len(leaves)):
        *number, limit, is_own = (ops.take(vector, leaf) for vector in (*each, limits, own))
        against = Number(*(ops.where(is_own, *pair) for pair in zip(number, norm, strict=True)))
        decided.append(compared(ops, against, number_of(ops, limit)))
    return _carried_out(ops, leaves, norm, decided, policy)


def _carried_out(
    ops: Operations,
    leaves: Sequence[tuple[Any, Any]],
    norm: Number,
    decided: Sequence[tuple[Any, Number]],
    policy: str,
) -> list[Any]:
    """The norm, twice, and new values, of each leaf by whether it is above, and a factor."""
    failed = norm.inf | norm.nan

    def clipped(decision: tuple[Any, Number], values: Any) -> Any:
        above, factor = decision
        kept = ops.where(above, scaled(ops, values, factor), values)
        if policy == "keep":
            return kept
        filling = ops.cast(
            ops.constant({"nan": math.nan, "zero": 0.0}[policy], "float32"), ops.dtype(values)
        )
        return ops.where(failed, filling, kept)

    new = [
        by_parts(ops, partial(clipped, decision), values)
        for decision, (values, _) in zip(decided, leaves, strict=True)
    ]
    wide = is_wide(ops, leaves)
    return [rounded(ops, norm, wide=wide), rounded(ops, norm, wide=True), *new]
