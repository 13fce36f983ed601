"""PyTorch's own operations: the derivative of a clip, and its names for what `traced` asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.kernels.devices import OPTIONS, Reserve


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


class Operations:
    """PyTorch's names for what `kernels.traced` asks for; see there."""

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
        return torch.as_tensor(x, device=self._device).to(getattr(torch, dtype))

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
        first, second = self._of_one_dtype(x, y)
        return torch.where(condition, first, second)

    def maximum(self, x: Any, y: Any) -> Tensor:
        return torch.maximum(*self._of_one_dtype(x, y))

    def minimum(self, x: Any, y: Any) -> Tensor:
        return torch.minimum(*self._of_one_dtype(x, y))

    def segment_sum(self, rows: Tensor, segments: Tensor, count: int) -> Tensor:
        return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, segments, rows)

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        for place in range(int(count)):
            start = body(place, start)
        return start

    def cond(self, condition: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        return yes() if condition else no()

    def _of_one_dtype(self, x: Any, y: Any) -> list[Tensor]:
        """A Python number takes the dtype of the other operand."""
        dtype = x.dtype if isinstance(x, Tensor) else y.dtype
        return [torch.as_tensor(each, dtype=dtype, device=self._device) for each in (x, y)]


class Memory(NamedTuple):
    """PyTorch's names for what `_device` asks of a device; see there."""

    device: torch.device
    stream: int

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        """Of a device, and the stream that is current there."""
        return cls(device, torch.cuda.current_stream(device).cuda_stream)

    @property
    def key(self) -> Any:
        return self

    @property
    def processors(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @property
    def is_capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def zeros(self, words: int) -> Tensor:
        if not self.is_capturing:
            _reserve.take()
        return torch.zeros(words, dtype=torch.int64, device=self.device)

    def sent(self, words: Any, *, again: bool) -> Tensor:
        words = torch.from_numpy(words)
        pinned = _reserve.keep(words) if again else words.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def received(self, buffer: Tensor) -> Any:
        return buffer.cpu().numpy()

    def scalar(self, *, wide: bool) -> Tensor:
        dtype = torch.float64 if wide else torch.float32
        return torch.empty((), dtype=dtype, device=self.device)

    def locate(self, value: Any) -> tuple[bool, int] | None:
        ours = isinstance(value, Tensor) and value.shape == () and value.device == self.device
        if not ours or value.dtype not in (torch.float32, torch.float64):
            return None
        return value.dtype == torch.float64, value.data_ptr()

    def address(self, buffer: Tensor) -> int:
        return buffer.data_ptr()

    def launch(self, kernel: Any, programs: int, args: tuple[int, ...], **constants: int) -> None:
        with torch.cuda.device(self.device):
            kernel[(programs,)](*args, **constants, **OPTIONS)


_reserve = Reserve(lambda words: torch.empty(words, dtype=torch.int64, pin_memory=True))
