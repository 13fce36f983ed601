"""A whole clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradclip.kernels.traced.norms import is_wide, measured
from gradclip.kernels.traced.numbers import compared, number_of, rounded
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
    wide = is_wide(ops, leaves)
    norm = measured(ops, leaves) if use_norm is None else number_of(ops, use_norm)
    above, factor = compared(ops, norm, number_of(ops, clip_norm))
    failed = norm.inf | norm.nan

    def clipped(values: Any) -> Any:
        kept = ops.where(above, scaled(ops, values, factor), values)
        if policy == "keep":
            return kept
        filling = ops.cast(
            ops.constant({"nan": math.nan, "zero": 0.0}[policy], "float32"), ops.dtype(values)
        )
        return ops.where(failed, filling, kept)

    new = [by_parts(ops, clipped, values) for values, _ in leaves]
    return [rounded(ops, norm, wide=wide), rounded(ops, norm, wide=True), *new]
