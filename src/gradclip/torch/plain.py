"""A clip of tensors that nobody follows, for what is followed itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.held import Clip
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.torch.spread import Tensors


def clipped_plainly(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    clip_norm: Any,
    use_norm: Any,
    on_nonfinite: Any,
) -> tuple[Tensor, Tensor, list[Any]]:
    """The norm, the norm as float64 whatever its size, and new leaves."""
    limit = check_clip_norm(clip_norm)
    given = None if use_norm is None else float(check_use_norm(use_norm))
    with ieee_arithmetic():
        held = Tensors.hold(leaves, path, writable=False)
        clip = Clip(leaves, path, limit, given, on_nonfinite)
        new, norm, measured = held.clipped_by_host(clip)
    return norm, norm.new_tensor(float(measured), dtype=torch.float64), new
