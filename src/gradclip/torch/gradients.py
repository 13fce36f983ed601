"""An optimizer's gradients: where each is, what is known of it from backward, and their norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip import _clip
from gradclip.core.exact import Part, Scaled, certified_norm
from gradclip.core.workers import Joint
from gradclip.torch import backend


class Place:
    """A parameter, its place in the optimizer, and the watch on its gradient."""

    __slots__ = ("_handle", "group", "name", "parameter", "waits", "watching")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.waits = True  # to be watched: it may be frozen, or have no shape yet
        self.watching: Any = None
        self._handle: Any = None

    def moved_to(self, group: int, name: str) -> Place:
        """The place, in a parameter group and by a name."""
        self.group, self.name = group, name
        return self

    def watch(self) -> None:
        """Have the gradient measured when it is written, if that is worth it."""
        self.waits = False
        self.watching, self._handle = backend.watch(self.parameter) or (None, None)

    def leave(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()


def leave(places: list[Place]) -> None:
    """Watch none of them any more."""
    for place in places:
        place.leave()
    places.clear()


def names_in(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What an error calls each parameter of the groups: by its name, where the optimizer has it."""
    every = []
    for place, group in enumerate(groups):
        known = group.get("param_names", ())
        numbered = range(len(known), len(group["params"]))
        others = [f"param_groups[{place}]['params'][{number}]" for number in numbered]
        every.append([*known, *others][: len(group["params"])])
    return every


class Gradients:
    """Gradients that are clipped together, and what is known of their sum of squares."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self.tensors: list[Tensor] = []
        self.parts: list[Part] = []
        self.cold: list[Tensor] = []
        self.wide = self.repeated = False
        self._keys: set[int] = set()

    def add(self, place: Place, gradient: Tensor) -> None:
        """One more."""
        self._places.append(place)
        self.tensors.append(gradient)
        dense = type(gradient) is Tensor and gradient.layout is torch.strided
        key = (dense and gradient.data_ptr()) or id(gradient)
        self.repeated = self.repeated or key in self._keys
        self._keys.add(key)
        warm = None if place.watching is None else place.watching.sums(gradient)
        if warm is not None:
            self.parts += warm
            return
        self.cold.append(gradient)
        self.wide = self.wide or gradient.dtype in backend.WIDE

    def held(self) -> Any:
        """Their memory.

        Raises:
            NotImplementedError: they have none, or what is done to them is written down.
        """
        held = backend.hold(self.tensors, self.path, writable=True)
        if held.unread is not None:
            raise NotImplementedError(
                f"{self.path(0)} is meta, fake or traced, of which an attached clipper can know no "
                "norm; gradclip.torch.clip_grad_norm_ before step() takes it"
            )
        return held

    def path(self, number: int) -> str:
        """What an error calls one of them."""
        return f"{self._places[number].name}.grad"

    def norm(self, part: Joint | None) -> _clip.Measured:
        """The global norm: by what was measured while it was warm, if that is all it takes."""
        alone = part is None and not _is_distributed()
        if alone and not self.wide and not self.repeated:
            more = backend.sums(self.cold)
            norm = None if more is None else certified_norm([*self.parts, *more])
            if norm is not None:
                return _clip.Measured(norm)
        return _clip.measured(backend, self.held(), part)


def unscaled(norm: Scaled, scale: float, wide: bool) -> Scaled:
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
