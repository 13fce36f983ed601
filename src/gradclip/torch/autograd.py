"""A clip that autograd and the transforms of `torch.func` follow: one `torch.autograd.Function`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.held import Clip, Held
from gradclip.torch import library
from gradclip.torch.derivative import pulled_back, pushed_forward, slope
from gradclip.torch.following import check_operands, is_transformed, is_unread
from gradclip.torch.plain import clipped_plainly
from gradclip.torch.spread import Tensors
from gradclip.torch.tensors import rows_of, values_of, with_values


class Followed(Held):
    """Leaves whose clip is followed."""

    __slots__ = ("_leaves", "_path")

    follows = True

    def __init__(self, leaves: Sequence[Any], path: Callable[[int], str]) -> None:
        self._leaves = leaves
        self._path = path

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves and the norm."""
        call = _Call(self._leaves, self._path, clip.on_nonfinite)
        tensors = [_recordable(leaf, partial(self._path, i)) for i, leaf in enumerate(self._leaves)]
        limits = [_limit("clip_norm", clip.clip_norm), _limit("use_norm", clip.use_norm)]
        norm, _, *new = _Clip.apply(call, *limits, *tensors)
        return list(map(with_values, self._leaves, new)), norm

    def norms(self, clip: Clip) -> tuple[Any, Any]:
        """The norm of each leaf, and the global norm, of which autograd sees nothing.

        Raises:
            NotImplementedError: a transform of ``torch.func`` follows.
        """
        if is_transformed():
            raise NotImplementedError(
                "gradclip.norms under a transform of torch.func; gradclip.global_norm is followed"
            )
        leaves = [with_values(leaf, values_of(leaf).detach()) for leaf in self._leaves]
        held: Held = Tensors.hold(leaves, self._path, writable=False)
        return held.norms(clip)

    def norm(self, clip: Clip) -> Any:
        """The global norm."""
        only = Clip(clip.leaves, clip.path, math.inf, None, "keep")
        return self.clipped(only)[1]


class _Call(NamedTuple):
    """What does not change where a clip is differentiated or mapped."""

    leaves: Sequence[Any]
    path: Callable[[int], str]
    on_nonfinite: Any

    def clip(self, clip_norm: Any, use_norm: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The norm, rounded and in float64, and new values, of tensors that nobody follows."""
        if is_unread(tensors):
            check_operands(self.leaves, self.path)
            norm, wide, new = library.clip(
                tensors, self.path, clip_norm, use_norm, self.on_nonfinite
            )
            return norm, wide, *new
        leaves = list(map(with_values, self.leaves, tensors))
        norm, wide, new = clipped_plainly(leaves, self.path, clip_norm, use_norm, self.on_nonfinite)
        return norm, wide, *map(values_of, new)

    @property
    def rows(self) -> list[Tensor | None]:
        return [
            None if isinstance(leaf, Tensor) and leaf.layout is torch.strided else rows_of(leaf)
            for leaf in self.leaves
        ]


def _recordable(leaf: Any, path: Callable[[], str]) -> Tensor:
    """The elements of a leaf, as a tensor that autograd connects to it."""
    if isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
        if leaf.requires_grad and not leaf.is_coalesced():
            raise ValueError(
                f"{path()} requires a gradient and is not coalesced: coalesce it first"
            )
        return leaf.values() if leaf.is_coalesced() else leaf._values()
    return values_of(leaf)


def _limit(name: str, value: Any) -> Any:
    """A limit, checked if it is a number; a tensor is checked when its value is there."""
    if not isinstance(value, Tensor) and value is not None:
        return check_clip_norm(value) if name == "clip_norm" else float(check_use_norm(value))
    return value


class _Clip(torch.autograd.Function):
    """(call, clip_norm, use_norm, *values) to (norm, norm in float64, *new values)."""

    @staticmethod
    def forward(call: _Call, clip_norm: Any, use_norm: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return call.clip(clip_norm, use_norm, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, clip_norm, use_norm, *values = inputs
        ctx.limits = [None if isinstance(x, Tensor) else x for x in (clip_norm, use_norm)]
        tensors = [x if isinstance(x, Tensor) else None for x in (clip_norm, use_norm)]
        ctx.norm_dtype = output[0].dtype
        ctx.save_for_backward(output[1], *tensors, *values)
        ctx.save_for_forward(output[1], *tensors, *values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _parts(ctx: Any) -> tuple[Any, ...]:
        norm, limit, given, *values = ctx.saved_tensors
        is_given = given is not None or ctx.limits[1] is not None
        norm = norm if given is None else given
        if limit is None:
            limit = torch.full_like(norm, ctx.limits[0], dtype=torch.float64)
        return slope(norm, limit, ctx.call.on_nonfinite), is_given, values

    @staticmethod
    def backward(ctx: Any, d_norm: Any, d_wide: Any, *d_values: Any) -> tuple[Any, ...]:
        at, given, values = _Clip._parts(ctx)
        new, d_limit, d_given = pulled_back(
            values, ctx.call.rows, at, given=given, d_norms=[d_norm, d_wide], d_values=d_values
        )
        limits = [d_limit, d_given if given else None]
        wanted = ctx.needs_input_grad[1:3]
        d_limits = [
            None if not want or each is None else each.to(saved.dtype)
            for each, want, saved in zip(limits, wanted, ctx.saved_tensors[1:3], strict=True)
        ]
        return (None, *d_limits, *new)

    @staticmethod
    def jvp(ctx: Any, _: Any, d_limit: Any, d_given: Any, *d_values: Any) -> tuple[Any, ...]:
        at, given, values = _Clip._parts(ctx)
        d_norm, new = pushed_forward(
            values,
            ctx.call.rows,
            at,
            d_limit=d_limit,
            d_given=d_given,
            given=given,
            d_values=d_values,
        )
        return (d_norm.to(ctx.norm_dtype), d_norm, *new)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *inputs: Any) -> tuple[Any, Any]:
        """One after the other: each has a norm of its own."""
        outputs = [
            _Clip.apply(
                call,
                *(
                    x if dim is None else x.select(dim, place)
                    for x, dim in zip(inputs, in_dims[1:], strict=True)
                ),
            )
            for place in range(info.batch_size)
        ]
        stacked = tuple(map(torch.stack, zip(*outputs, strict=True)))
        return stacked, (0,) * len(stacked)
