"""Books of an optimizer's steps in a device's memory: it decides, and the host does not wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.held import Clip
from gradclip.core.memory import Lesson
from gradclip.core.norms import Norms
from gradclip.core.reading import Reading
from gradclip.torch.counts import Counts, Known, limits_told
from gradclip.torch.gradients import Gradients
from gradclip.torch.step import Outcome, StandIn, Step, can_be_told

# Words of 8 bytes, as `kernels.gpu.triton.measure` has them.
_STEPS, _CLIPPED, _LATEST, _DIVISOR, _SKIPPED, _SKIPS, _BEFORE, _WORDS = 0, 1, 2, 3, 4, 5, 6, 10
_WORD = {"steps": _STEPS, "clipped_steps": _CLIPPED, "skipped_steps": _SKIPPED}


class There(Counts):
    """Books that a device keeps: it counts a step when it clips."""

    __slots__ = (
        "_each",
        "_factors",
        "_is_open",
        "_limits",
        "_memory",
        "_norms",
        "_numbers",
        "_words",
    )

    def __init__(self, memory: Any, known: Known) -> None:
        super().__init__(known)
        lists = len(known.norms)
        self._memory = memory
        self._each: list[Norms] = []
        self._words: Tensor = memory.zeros(_WORDS)
        pairs = memory.zeros(2 * lists).view(torch.float64).view(lists, 2)
        self._factors: list[Tensor] = list(pairs[:, 0].fill_(1.0))
        self._numbers: list[Tensor] = list(pairs[:, 1].fill_(math.nan))
        self._limits: list[Tensor] = list(self._numbers)
        self._norms: list[Tensor] = [memory.scalar(wide=False).zero_() for _ in range(lists)]
        self._is_open = False  # if the latest step has been counted, and may not have been taken

    @property
    def device(self) -> Any:
        """In whose memory they are kept; None for the host's."""
        return self._memory.device

    def norm(self, *, per_group: bool) -> Tensor:
        """The global norm of the latest step; of each list, if ``per_group``."""
        return _told(self._norms, per_group=per_group)

    def each(self) -> list[Norms]:
        """The norm of each gradient in the latest step, for each list; none if it is not known."""
        return list(self._each)

    def factor(self, *, per_group: bool) -> Tensor:
        """What gradients were multiplied by in it."""
        return _told(self._factors, per_group=per_group)

    def limit(self, *, per_group: bool) -> Any:
        """What was in force in it."""
        return limits_told([each.clone() for each in self._limits], per_group=per_group)

    def reading(self) -> Reading:
        """All of the latest step, in copies that later steps leave alone."""
        norms, limits, factors = (
            [scalar.clone() for scalar in each]
            for each in (self._norms, self._limits, self._factors)
        )
        now, before = self._words[_STEPS : _SKIPPED + 1 : _SKIPPED], self._words[_BEFORE::3]
        told = norms, limits, factors, self.each()
        return Reading(*told, taken=now != before, begun=self.counts["begun"])

    def count(self, name: str) -> Tensor:
        """One of the counts, int64."""
        return self._words[_WORD[name]] + self.counts[name]

    def state(self) -> dict[str, int]:
        """The counts, read."""
        return {**self.counts, **{name: int(self.count(name)) for name in _WORD}}

    def known(self) -> Known:
        """All of it, read."""
        wide = any(norm.dtype is torch.float64 for norm in self._norms)
        return Known(
            list(map(float, self._norms)),
            list(map(float, self._factors)),
            [np.array(each.tolist()) if each.dim() else float(each) for each in self._limits],
            wide,
            self.state(),
        )

    def clip(self, step: Step) -> Outcome:
        """Have gradients clipped where they lie."""
        limits = step.limits()
        # A fused optimizer that divides by the scale divides by the factor at no cost. Without a
        # scale it would write each gradient back for it, clipped or not.
        folds = step.is_of_one_list and step.grad_scale is not None and can_be_told(step.optimizer)
        folds = folds and not any(lesson.per_tensor for lesson in step.lessons)
        _check_once(step)
        self._is_open = True
        self._each = []
        for number, limit in enumerate(limits):
            self._clip(step, number, limit, folds=folds)
        told: dict[str, Tensor] = {}
        words = self._words.view(torch.float32)
        if folds:
            told["grad_scale"] = words[2 * _DIVISOR]
        if step.may_skip:
            told["found_inf"] = words[2 * _SKIPS]
        stand_in = StandIn.of(step.optimizer, told) if told else None
        return Outcome(stand_in=stand_in, lessons=step.lessons)

    def _clip(self, step: Step, number: int, limit: Any, *, folds: bool) -> None:
        """Clip one list, and tell the device where its norm, and all that comes with it, go."""
        from gradclip.kernels.gpu.runs import Ledger  # of which nobody has need without a device

        gradients = step.lists[number]
        held: Any = gradients.held()
        if held.wide != (self._norms[number].dtype is torch.float64):
            self._norms[number] = self._memory.scalar(wide=held.wide).zero_()
        ledger = Ledger(
            words=self._words.data_ptr(),
            factor=self._factors[number].data_ptr(),
            begins=int(number == 0),
            folds=int(folds),
            scale=_address(step.grad_scale),
            found_inf=_address(step.found_inf),
        )
        into = {"norm": self._norms[number], "ledger": ledger}
        clip = _Noted(gradients, limit, step.on_nonfinite, into, wants_each=step.wants_each)
        held.clip_(clip)
        if clip.each is not None:
            values = held.at_every_place(clip.each, gradients.tensors)
            self._each.append(Norms(values, self._norms[number].clone(), tuple(gradients.names)))
        learns = isinstance(limit, Lesson)
        self._limits[number] = limit.in_force if learns else self._numbers[number]

    def note(self, outcome: Outcome) -> None:
        """A step has been taken."""
        super().note(outcome)
        self._is_open = False

    def take_back(self) -> None:
        """Count the latest step no more if it was not taken."""
        if self._is_open:
            now = [_STEPS, _CLIPPED, _LATEST, _SKIPPED]
            self._words[now] = self._words[_BEFORE:].clone()
            self._is_open = False


class _Noted(Clip):
    """A clip of gradients, of which a device writes down what it finds."""

    __slots__ = ("into",)

    def __init__(
        self,
        gradients: Gradients,
        limit: Any,
        on_nonfinite: str,
        into: Mapping[str, Any],
        *,
        wants_each: bool,
    ) -> None:
        super().__init__(
            gradients.tensors, gradients.path, limit, None, on_nonfinite, wants_each=wants_each
        )
        self.into = into


def _check_once(step: Step) -> None:
    """Refuse gradients that are listed twice to be clipped each by itself, before one is written.

    Raises:
        ValueError: one is.
    """
    for gradients, limit in zip(step.lists, step.limits(), strict=True):
        if isinstance(limit, Lesson) and limit.per_tensor:
            held: Any = gradients.held()
            with held.runs() as runs:
                Clip(gradients.tensors, gradients.path).check_once(runs.number)


def _address(amp: Tensor | None) -> int:
    return 0 if amp is None else amp.data_ptr()


def _told(scalars: Sequence[Tensor], *, per_group: bool) -> Tensor:
    """A copy that later steps leave alone."""
    wide = any(each.dtype is torch.float64 for each in scalars)
    every = [each.double() if wide else each for each in scalars]
    return torch.stack(every) if per_group else every[0].clone()
