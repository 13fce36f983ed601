"""A clip as operations of PyTorch, for what follows a program without its numbers.

``torch.compile``, ``torch.export`` and ``make_fx`` write down operations; fake, meta and functional
tensors have no memory of their own to be read. Each sees one operation, which tells the shapes of
what comes out, and which goes through the one flow, to the same bits, where there is memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gradclip import _clip
from gradclip.core.decide import OnNonfinite, check_clip_norm, check_use_norm
from gradclip.core.tree import Tree
from gradclip.torch.derivative import pulled_back, slope
from gradclip.torch.following import is_differentiated
from gradclip.torch.plain import clipped_plainly
from gradclip.torch.tensors import norm_dtype

# ---- the operations, by what is called to have one ----


def clip(
    leaves: Sequence[Tensor],
    path: Callable[[int], str],
    clip_norm: Any,
    use_norm: Any,
    on_nonfinite: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The norm, the norm as float64 (whatever its size, if there is a derivative), new leaves."""
    limits = operand("clip_norm", clip_norm), operand("use_norm", use_norm)
    is_derived = is_differentiated([*leaves, *(each for each in limits if each is not None)])
    return _clip_op(list(leaves), *limits, on_nonfinite, _paths(leaves, path), is_derived)


def clip_(
    leaves: Sequence[Tensor],
    path: Callable[[int], str],
    clip_norm: Any,
    use_norm: Any,
    on_nonfinite: str,
) -> Tensor:
    """The norm of leaves that are clipped where they lie."""
    limits = operand("clip_norm", clip_norm), operand("use_norm", use_norm)
    return _clip_op_(list(leaves), *limits, on_nonfinite, _paths(leaves, path))


def norm(leaves: Sequence[Tensor], path: Callable[[int], str]) -> Tensor:
    """The global norm."""
    if is_differentiated(leaves):
        return clip(leaves, path, math.inf, None, "keep")[0]
    return _norm_op(list(leaves), _paths(leaves, path))


def operand(name: str, value: Any) -> Tensor | None:
    """A limit as a tensor; a number that is out of range is found when its value is there.

    Raises:
        TypeError, ValueError: it is no scalar.
    """
    if value is None and name == "use_norm":
        return None
    if isinstance(value, (np.ndarray, np.generic)):  # which torch.compile has as tensors already
        return torch.as_tensor(value)
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        is_norm = name in ("use_norm", "total_norm")
        value = float(check_use_norm(value, name)) if is_norm else check_clip_norm(value, name)
    # A product, and no tensor made of the number, for which torch.compile would compile anew
    # whenever the number changes.
    return torch.ones((), dtype=torch.float64, device="cpu") * float(value)


def number(limit: Tensor | None) -> Any:
    """What an error shows of a limit that may have been a number."""
    if limit is None or limit.shape or limit.device.type != "cpu":
        return limit
    return limit.item() if limit.dtype is torch.float64 else limit


def _paths(leaves: Sequence[Tensor], path: Callable[[int], str]) -> str:
    # A line for each: no operation takes a list of strings.
    return "\n".join([path(place).replace("\n", " ") for place in range(len(leaves))])


# ---- what PyTorch calls ----


# The schemas are written out, since PyTorch 2.6 does not read `list[Tensor]` off a function.


@torch.library.custom_op(
    "gradclip::clip",
    mutates_args=(),
    schema="(Tensor[] leaves, Tensor clip_norm, Tensor? use_norm, str on_nonfinite, str paths, "
    "bool is_derived) -> (Tensor, Tensor, Tensor[])",
)
def _clip_op(
    leaves: list[Tensor],
    clip_norm: Tensor,
    use_norm: Tensor | None,
    on_nonfinite: str,
    paths: str,
    is_derived: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tree, policy = _named(leaves, paths), cast(OnNonfinite, on_nonfinite)
    limit, given = number(clip_norm), number(use_norm)
    if not is_derived:
        new, norm, _ = _clip.clipped(tree, limit, given, on_nonfinite=policy)
        return norm, norm.to(torch.float64, copy=True), new
    return clipped_plainly(leaves, tree.path, limit, given, policy)


@torch.library.custom_op(
    "gradclip::clip_",
    mutates_args=("leaves",),
    schema="(Tensor(a0!)[] leaves, Tensor clip_norm, Tensor? use_norm, str on_nonfinite, "
    "str paths) -> Tensor",
)
def _clip_op_(
    leaves: list[Tensor],
    clip_norm: Tensor,
    use_norm: Tensor | None,
    on_nonfinite: str,
    paths: str,
) -> Tensor:
    limits, policy = (number(clip_norm), number(use_norm)), cast(OnNonfinite, on_nonfinite)
    return _clip.clip_by_global_norm_(_named(leaves, paths), *limits, on_nonfinite=policy)


@torch.library.custom_op(
    "gradclip::norm", mutates_args=(), schema="(Tensor[] leaves, str paths) -> Tensor"
)
def _norm_op(leaves: list[Tensor], paths: str) -> Tensor:
    return _clip.global_norm(_named(leaves, paths))


def _named(leaves: Sequence[Tensor], paths: str) -> Tree:
    kinds, names = set(map(type, leaves)), paths.split("\n")
    places = range(len(leaves))
    return Tree(list(leaves), kinds, list, names.__getitem__, places, lambda: names)


# ---- the derivative ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    leaves, clip_norm, use_norm, ctx.on_nonfinite, *_ = inputs
    ctx.is_given = use_norm is not None
    ctx.save_for_backward(use_norm if ctx.is_given else output[1], clip_norm, *leaves)


def _pulled_back(ctx: Any, d_norm: Any, d_wide: Any, d_leaves: Any) -> tuple[Any, ...]:
    norm, limit, *leaves = ctx.saved_tensors
    new, d_limit, d_given = pulled_back(
        leaves,
        [None] * len(leaves),
        slope(norm, limit, ctx.on_nonfinite),
        given=ctx.is_given,
        d_norms=[d_norm, d_wide],
        d_values=d_leaves,
    )
    d_norm_given = d_given.to(norm.dtype) if ctx.is_given else None
    return new, d_limit.to(limit.dtype), d_norm_given, None, None, None


_clip_op.register_autograd(_pulled_back, setup_context=_save)


# ---- what comes out, of tensors without memory ----


def scalar_like(leaves: Sequence[Tensor]) -> Tensor:
    """A norm of leaves, of which nothing is known but its dtype and device."""
    device = leaves[0].device if leaves else torch.device("cpu")
    return torch.empty((), dtype=norm_dtype(leaves), device=device)


def _new_like(leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    norm = scalar_like(leaves)
    return norm, norm.to(torch.float64, copy=True), [torch.empty_like(leaf) for leaf in leaves]


_clip_op.register_fake(lambda leaves, *_: _new_like(leaves))
_clip_op_.register_fake(lambda leaves, *_: scalar_like(leaves))
_norm_op.register_fake(lambda leaves, *_: scalar_like(leaves))
