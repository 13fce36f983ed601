"""Leaves in a device's memory: measured, decided about and scaled there, while the host goes on.

A backend gives what `runs.Memory` asks for, and derives a class from `Leaves` that says where its
leaves lie and how new ones are made; the rest is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from gradclip.core.exact import FLOAT32, FLOAT64, Scaled, ScaledArray, Total, norm
from gradclip.core.held import Clip, Held
from gradclip.core.memory import Lesson
from gradclip.core.workers import Joint
from gradclip.kernels.gpu.runs import Memory, Runs


class Leaves(Held):
    """Leaves in the memory of one device, which decides about them by itself where it may."""

    __slots__ = ("leaves", "memory", "values")

    def __init__(self, leaves: Sequence[Any], values: Sequence[Any], memory: Memory) -> None:
        self.leaves: Sequence[Any] = leaves  # of those to be written, each memory once
        self.values: Sequence[Any] = values  # the elements of each
        self.memory: Memory = memory

    def runs(self) -> contextlib.AbstractContextManager[Runs]:
        """Where the elements lie, each leaf in one run; what is changed there, is in the leaves."""
        raise NotImplementedError

    def new_runs(self, arrays: Sequence[Any]) -> Runs:
        """Where the elements of what is as `duplicated` lie."""
        raise NotImplementedError

    def duplicated(self) -> list[Any]:
        """New arrays of the same bits, each in one run of memory."""
        raise NotImplementedError

    def rewrapped(self, new: list[Any]) -> list[Any]:
        """The leaves again, with new elements."""
        raise NotImplementedError

    def written(self) -> None:
        """Have the framework know that the leaves may have been written."""

    def decides(self, clip: Clip) -> bool:
        """If the device decides about a clip, and the host need not wait for it."""
        return not clip.is_for_the_host

    def knows(self, value: Any) -> bool:
        """If a limit need not be read by the host, since it is on the device."""
        return self.memory.locate(value) is not None

    def measure(self) -> Scaled:
        return norm(self.sum_of_squares(), FLOAT64 if self.wide else FLOAT32)

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        with self.runs() as runs:
            return runs.norms()

    def share(self, joint: Joint) -> tuple[Any, bool]:
        """What this worker adds to the sum of squares of all, and if a leaf is float64."""
        del joint  # all of it, whoever they are
        return self.sum_of_squares(), self.wide

    def sum_of_squares(self) -> Total:
        """The exact total, once the device has come so far."""
        with self.runs() as runs:
            return runs.total()

    def norm(self, clip: Clip) -> Any:
        """The global norm, as a new scalar on the device."""
        if not self.decides(clip):
            return super().norm(clip)
        with self.runs() as runs:
            norm = runs.norm()
        if clip.may_refuse:
            clip.check(self, norm)
        return norm

    def norms(self, clip: Clip) -> tuple[Any, Any]:
        """The norm of each leaf, and of all, as new arrays on the device."""
        if not self.decides(clip):
            return super().norms(clip)
        with self.runs() as runs:
            told = runs.told()
        return told.values, told.norm

    def clip_(self, clip: Clip) -> Any:
        """Clip where the leaves lie; the norm, as a scalar on the device."""
        if not self.decides(clip):
            return super().clip_(clip)
        with self.runs() as runs:
            norm = self._clip(runs, clip)
        self.written()
        return norm

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves, and the norm, as a scalar on the device."""
        if not self.decides(clip):
            return super().clipped(clip)
        new = self.duplicated()
        norm = self._clip(self.new_runs(new), clip)
        return self.rewrapped(new), norm

    def _clip(self, runs: Runs, clip: Clip) -> Any:
        """Clip what lies in runs, the leaves or new ones of the same elements."""
        limit, given = clip.clip_norm, clip.given(self)
        if clip.wants_each:
            told = runs.told(getattr(clip.into.get("ledger"), "scale", 0))
            clip.each = told.values
            # In float64 a norm may be too large for its dtype, so the leaves are measured again.
            given = None if self.wide else told.whole
        if not isinstance(limit, Lesson):
            limit, _ = clip.limits(self)
        check = partial(clip.check, self) if clip.may_refuse else None
        if isinstance(limit, Lesson) and limit.per_tensor:
            clip.check_once(runs.number)
            return runs.clip_each_(limit, clip.policy, check=check, **clip.into)
        return runs.clip_(limit, clip.policy, given=given, check=check, **clip.into)

    def copied(self) -> list[Any]:
        return self.rewrapped(self.duplicated())

    def filled(self, value: float) -> list[Any]:
        new = self.duplicated()
        self.new_runs(new).fill_(value)
        return self.rewrapped(new)

    def scaled(self, factor: Scaled) -> list[Any]:
        new = self.duplicated()
        self.new_runs(new).scale_(factor)
        return self.rewrapped(new)

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        new = self.duplicated()
        self.new_runs(new).scale_each_(factors)
        return self.rewrapped(new)

    def scale_each_(self, factors: ScaledArray) -> None:
        with self.runs() as runs:
            runs.scale_each_(factors)
        self.written()

    def fill_(self, value: float) -> None:
        with self.runs() as runs:
            runs.fill_(value)
        self.written()

    def scale_(self, factor: Scaled) -> None:
        with self.runs() as runs:
            runs.scale_(factor)
        self.written()
