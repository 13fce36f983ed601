"""An optimizer's gradients that are clipped together: what is known from backward, their norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.decide import Fill, Keep, OnNonfinite, Raise, Scale, decide
from gradclip.core.exact import Part, Scaled, certified_norm
from gradclip.core.held import Clip, Held, Measured
from gradclip.core.workers import Joint
from gradclip.torch import host
from gradclip.torch.backend import hold
from gradclip.torch.tensors import WIDE
from gradclip.torch.unread import is_without_numbers


class Gradients:
    """Gradients that are clipped together, and what is known of their sum of squares."""

    __slots__ = ("_held", "_keys", "_names", "cold", "parts", "tensors", "wide")

    def __init__(self) -> None:
        self._names: list[str] = []
        self.tensors: list[Tensor] = []
        self.parts: list[Part] = []
        self.cold: list[Tensor] = []
        self.wide = False
        self._keys: set[int] = set()
        self._held: Held | None = None

    def add(self, name: str, gradient: Tensor, watch: Any) -> None:
        """One more: that of a parameter, with the watch on it if there is one."""
        self._names.append(name)
        self.tensors.append(gradient)
        dense = type(gradient) is Tensor and gradient.layout is torch.strided
        self._keys.add((dense and gradient.data_ptr()) or id(gradient))
        warm = None if watch is None else watch.sums(gradient)
        if warm is not None:
            self.parts += warm
            return
        self.cold.append(gradient)
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
        return f"{self._names[number]}.grad"

    def decided(
        self, limit: float, on_nonfinite: OnNonfinite, scale: float, part: Joint | None
    ) -> tuple[Scaled, Keep | Fill | Scale]:
        """Their norm without GradScaler's ``scale``, and what is to be done to them.

        Raises:
            FloatingPointError: they are refused.
            RuntimeError: another worker has failed.
        """
        norm, wide = self._norm(part)
        self.wide = self.wide or wide
        norm = _unscaled(norm, scale, self.wide)
        action = decide(norm, limit, on_nonfinite)
        if isinstance(action, Raise):
            # To be read: also those that could not be written are named.
            held = hold(self.tensors, self.path, writable=False)
            self._clip(part).refuse(held, float(norm))
        return norm, action

    def _norm(self, part: Joint | None) -> Measured:
        """The global norm: by what was measured while it was warm, if that is all it takes."""
        alone = part is None and not _is_distributed()
        if alone and not self.wide and not self.repeated:
            more = host.sums(self.cold)
            norm = None if more is None else certified_norm([*self.parts, *more])
            if norm is not None:
                return Measured(norm)
        return self._clip(part).measured(self.held())

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


def _is_distributed() -> bool:
    """If other processes' gradients may be reduced into these, which no version counter shows."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
