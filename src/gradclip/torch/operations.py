"""PyTorch's names for what `kernels.traced` asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Operations:
    """PyTorch's names for what `kernels.traced` asks for; see `operations` there."""

    sqrt, round = staticmethod(torch.sqrt), staticmethod(torch.round)
    any, max = staticmethod(torch.any), staticmethod(torch.max)
    left = staticmethod(torch.bitwise_left_shift)
    right = staticmethod(torch.bitwise_right_shift)
    argsort = staticmethod(partial(torch.argsort, stable=True))
    cumsum = staticmethod(partial(torch.cumsum, dim=0))
    stack = staticmethod(partial(torch.stack, dim=-1))

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def dtype(self, x: Tensor) -> str:
        return str(x.dtype).removeprefix("torch.")

    def shape(self, x: Tensor) -> Any:
        return x.shape

    def size(self, x: Tensor) -> int:
        return x.numel()

    def concat(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(xs))

    def sum(self, x: Tensor, axis: int | None) -> Tensor:
        return x.sum() if axis is None else x.sum(axis)

    def cast(self, x: Any, dtype: str) -> Tensor:
        return x.to(getattr(torch, dtype)) if isinstance(x, Tensor) else self.constant(x, dtype)

    def bitcast(self, x: Tensor, dtype: str) -> Tensor:
        return x.view(getattr(torch, dtype))

    def constant(self, values: Any, dtype: str) -> Tensor:
        return torch.as_tensor(values, dtype=getattr(torch, dtype), device=self._device)

    def zeros(self, length: int, dtype: str) -> Tensor:
        return torch.zeros(length, dtype=getattr(torch, dtype), device=self._device)

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(torch.view_as_real(x.resolve_conj()).unbind(-1))

    def joined(self, parts: list[Tensor]) -> Tensor:
        return torch.complex(*parts)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def take(self, x: Tensor, indices: Any) -> Tensor:
        return x[indices]

    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        first, second = _of_one_dtype(x, y)
        return torch.where(condition, first, second)

    def maximum(self, x: Any, y: Any) -> Tensor:
        return torch.maximum(*_of_one_dtype(x, y))

    def minimum(self, x: Any, y: Any) -> Tensor:
        return torch.minimum(*_of_one_dtype(x, y))

    def segment_sum(self, rows: Tensor, segments: Tensor, count: int) -> Tensor:
        return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, segments, rows)

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        for place in range(int(count)):
            start = body(place, start)
        return start

    def cond(self, condition: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        return yes() if condition else no()


def _of_one_dtype(x: Any, y: Any) -> list[Tensor]:
    """A Python number takes the dtype of the other operand."""
    like = x if isinstance(x, Tensor) else y
    return [torch.as_tensor(each, dtype=like.dtype, device=like.device) for each in (x, y)]
