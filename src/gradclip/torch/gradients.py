"""An optimizer's gradients that are clipped together: what is known from backward, their norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradclip.core.decide import OnNonfinite, Raise, Write
from gradclip.core.exact import Part, Scaled, ScaledArray, certified_norm
from gradclip.core.held import Clip, Held, Measured
from gradclip.core.memory import Lesson
from gradclip.core.workers import Joint
from gradclip.torch import host
from gradclip.torch.backend import hold
from gradclip.torch.tensors import WIDE
from gradclip.torch.unread import is_without_numbers


class Decided(NamedTuple):
    """What is known of gradients before one of them is written."""

    norm: Scaled
    action: Write
    each: ScaledArray | None  # the norm of each, if it was wanted


class Gradients:
    """Gradients that are clipped together, and what is known of their sum of squares."""

    __slots__ = ("_held", "_keys", "cold", "names", "tensors", "warm", "wide")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.warm: list[tuple[int, list[Part]]] = []  # by number, what was measured of them
        self.cold: list[int] = []  # the numbers of the others
        self.wide = False
        self._keys: set[int] = set()
        self._held: Held | None = None

    def add(self, name: str, gradient: Tensor, watch: Any) -> None:
        """One more: that of a parameter, with the watch on it if there is one."""
        number = len(self.tensors)
        self.names.append(name)
        self.tensors.append(gradient)
        dense = type(gradient) is Tensor and gradient.layout is torch.strided
        self._keys.add((dense and gradient.data_ptr()) or id(gradient))
        warm = None if watch is None else watch.sums(gradient)
        if warm is not None:
            self.warm.append((number, warm))
            return
        self.cold.append(number)
        if gradient.dtype in WIDE:
            self.wide = True

    @property
    def repeated(self) -> bool:
        """If one of them is listed twice."""
        return len(self._keys) < len(self.tensors)

    def held(self) -> Held:
        """Their memory.

        Raises:
            NotImplementedError: they have none, or what is done to them is written down.
        """
        if self._held is None:
            held = hold(self.tensors, self.path, writable=True)
            if is_without_numbers(held):
                raise NotImplementedError(
                    f"{self.path(0)} is meta, fake or traced, of which an attached clipper can "
                    "know no norm; gradclip.torch.clip_grad_norm_ before step() takes it"
                )
            self._held = held
        return self._held

    def path(self, number: int) -> str:
        """What an error calls one of them."""
        return f"{self.names[number]}.grad"

    def decided(
        self,
        limit: float | Lesson,
        on_nonfinite: OnNonfinite,
        scale: float,
        part: Joint | None,
        *,
        wants_each: bool = False,
    ) -> Decided:
        """Their norm without GradScaler's ``scale``, and what is to be done to them.

        Raises:
            FloatingPointError: they are refused.
            RuntimeError: another worker has failed.
        """
        each = None
        per_tensor = isinstance(limit, Lesson) and limit.per_tensor
        if per_tensor or wants_each:
            (norm, wide), each = self._norm_and_each(limit, part)
            each = _each_unscaled(each, scale, self.wide or wide)
        else:
            norm, wide = self._norm(part)
        self.wide = self.wide or wide
        norm = _unscaled(norm, scale, self.wide)
        clip = Clip(self.tensors, self.path, on_nonfinite=on_nonfinite, part=part)
        action = clip.judged(norm, each if per_tensor else None, limit)
        if isinstance(action, Raise):
            # To be read: also those that could not be written are named.
            held = hold(self.tensors, self.path, writable=False)
            clip.refuse(held, float(norm))
        return Decided(norm, action, each)

    def _norm(self, part: Joint | None) -> Measured:
        """The global norm: by what was measured while it was warm, if that is all it takes."""
        if self._may_use_warm(part):
            more = host.sums([self.tensors[number] for number in self.cold])
            warm = [each for _, parts in self.warm for each in parts]
            norm = None if more is None else certified_norm([*warm, *more])
            if norm is not None:
                return Measured(norm)
        return self._clip(part).measured(self.held())

    def _norm_and_each(
        self, limit: float | Lesson, part: Joint | None
    ) -> tuple[Measured, ScaledArray]:
        """The global norm, and each one's own."""
        if self.warm and self._may_use_warm(part):
            found = host.norms([self.tensors[number] for number in self.cold])
            warm = [certified_norm(parts) for _, parts in self.warm]
            if found is not None and None not in warm:
                parts = [each for _, parts in self.warm for each in parts]
                norm = certified_norm([*parts, *found[1]])
                if norm is not None:
                    return Measured(norm), self._in_order(warm, found[0])
        return self._clip(part).measured_each(self.held(), limit)

    def _in_order(self, warm: Sequence[Any], cold: ScaledArray) -> ScaledArray:
        """The norms of those that were measured and of the others, each in its place."""
        numbers = [number for number, _ in self.warm]
        known = ScaledArray.of(warm)
        new = ScaledArray(np.zeros(len(self.tensors)), np.zeros(len(self.tensors), np.int64))
        for every, ones, others in zip(new, known, cold, strict=True):
            every[numbers], every[self.cold] = ones, others
        return new

    def _may_use_warm(self, part: Joint | None) -> bool:
        """If what was measured by backward holds, and is all that counts."""
        alone = part is None and not _is_distributed()
        return alone and not self.wide and not self.repeated

    def _clip(self, part: Joint | None) -> Clip:
        return Clip(self.tensors, self.path, part=part)


def _unscaled(norm: Scaled, scale: float, wide: bool) -> Scaled:
    """The norm of gradients that GradScaler has multiplied by ``scale``."""
    if scale == 1 or not math.isfinite(norm.significand):
        return norm
    by = Scaled.of(scale)
    quotient = norm.significand / by.significand
    significand, exponent = math.frexp(quotient if wide else float(np.float32(quotient)))
    return Scaled(significand, exponent + norm.exponent - by.exponent)


def _each_unscaled(norms: ScaledArray, scale: float, wide: bool) -> ScaledArray:
    """As `_unscaled`, of each."""
    if scale == 1:
        return norms
    return ScaledArray.of(_unscaled(each, scale, wide) for each in norms.singly())


def _is_distributed() -> bool:
    """If other processes' gradients may be reduced into these, which no version counter shows."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
