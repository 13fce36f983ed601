"""The derivative of a clip in PyTorch, where what nobody has changed comes as None."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from gradclip.kernels.traced import derivative
from gradclip.kernels.traced.derivative import Slope
from gradclip.torch.operations import Operations


def slope(norm: Tensor, limit: Tensor, policy: str) -> Slope:
    """The derivative's parts, of a norm and the limit that it is held against."""
    return derivative.slope(Operations(norm.device), norm, limit, policy)


def pulled_back(
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    at: Slope,
    *,
    given: bool,
    d_norms: Sequence[Tensor | None],
    d_values: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradient in the inputs, the limit and the norm, from that in the outputs."""
    # NaN where the factor is, as the derivative is then; else nothing, also to the sign of a zero.
    d_norm = -0.0 * at.factor.detach()
    for each in d_norms:
        d_norm = d_norm if each is None else d_norm + each.to(torch.float64)
    on_leaves = [not given or change is not None for change in d_values]
    leaves = list(zip(values, rows, strict=True))
    new, d_limit, d_given = derivative.pulled_back(
        Operations(at.norm.device),
        list(compress(leaves, on_leaves)),
        at,
        d_norm,
        list(compress(d_values, on_leaves)),
        given=given,
    )
    found = iter(new)
    every = [
        next(found) if depends else torch.zeros_like(x)
        for x, depends in zip(values, on_leaves, strict=True)
    ]
    return every, d_limit, d_given


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
    ops, changes = Operations(at.norm.device), list(map(_filled, values, d_values))
    if given:
        d_norm = torch.zeros_like(at.norm) if d_given is None else d_given.to(torch.float64)
    else:
        d_norm = derivative.change_of_norm(ops, list(zip(values, rows, strict=True)), at, changes)
    d_bound = 0.0 if d_limit is None else d_limit.to(torch.float64)
    return d_norm, derivative.pushed_forward(
        ops, values, at, d_limit=d_bound, d_norm=d_norm, d_values=changes
    )


def _filled(x: Tensor, change: Tensor | None) -> Tensor:
    # To add -0 changes nothing, not the sign of a zero either.
    zero = complex(-0.0, -0.0) if x.is_complex() else -0.0
    return torch.full_like(x, zero) if change is None else change
