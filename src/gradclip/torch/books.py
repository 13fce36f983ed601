"""What is known of an optimizer's steps: norms, factors and counts.

Whoever decides about a step keeps the books: the host, or a device, for which it does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from gradclip.core.decide import ScaleEach, Write, at_most
from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.held import Clip
from gradclip.core.memory import Lesson, told
from gradclip.core.norms import Norms
from gradclip.core.opening import taking_part
from gradclip.core.reading import Reading
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.torch.elements import vector
from gradclip.torch.gradients import Decided, Gradients
from gradclip.torch.overlap import first_of_each
from gradclip.torch.step import (
    Outcome,
    StandIn,
    Step,
    StepSkippedError,
    can_be_told,
    carried_out,
    cpu_tensor,
    factor_of,
)

COUNTS = ("begun", "steps", "clipped_steps", "skipped_steps")


class Known(NamedTuple):
    """What stands in books, for others that go on from there."""

    norms: list[float]
    factors: list[float]
    limits: list[Any]  # numbers, or an array for each tensor's own
    wide: bool
    counts: dict[str, int]

    @classmethod
    def nothing(cls, lists: int) -> Known:
        """Of no step yet, in which so many lists of gradients are to be clipped."""
        none = [math.nan] * lists
        return cls([0.0] * lists, [1.0] * lists, none, False, dict.fromkeys(COUNTS, 0))


class _Counts:
    """How many steps were begun, taken, clipped and skipped, as far as the host knows."""

    __slots__ = ("counts",)

    def __init__(self, known: Known) -> None:
        self.counts = dict(known.counts)

    def note(self, outcome: Outcome) -> None:
        """A step has been taken."""
        self.counts["begun"] += 1
        self.counts["steps"] += outcome.taken
        self.counts["clipped_steps"] += outcome.clipped

    def take_back(self) -> None:
        """Have the latest step not counted if it was not taken: nor has it been, on the host."""


class Here(_Counts):
    """Books that the host keeps: steps are counted when they have been taken."""

    __slots__ = ("_each", "factors", "latest", "limits", "norms", "wide")

    device = None
    # What became of the latest step; one is unmeasured that GradScaler is to skip.
    latest: Literal["taken", "skipped", "unmeasured"]

    def __init__(self, known: Known) -> None:
        super().__init__(known)
        self.norms, self.factors, self.limits, self.wide = known[:4]
        self.latest = "taken"
        self._each: list[_Each] = []

    def note(self, outcome: Outcome) -> None:
        """A step has ended."""
        super().note(outcome)
        self.latest = "taken" if outcome.taken else "unmeasured"

    def reading(self) -> Reading:
        """All of the latest step, for which no tensor is made."""
        begun = self.counts["begun"]
        if self.latest == "unmeasured":
            return Reading(None, taken=False, begun=begun)
        taken = self.latest == "taken"
        told = self.norms, self.limits, self.factors, self._later()
        return Reading(*told, taken=taken, begun=begun)

    def each(self) -> list[Norms]:
        """The norm of each gradient in the latest step, for each list; none if it is not known."""
        return [make() for make in self._later()]

    def _later(self) -> list[Callable[[], Norms]]:
        """What makes these, also when other steps have been taken since."""
        return [
            partial(found.told, norm, wide=self.wide)
            for found, norm in zip(self._each, self.norms, strict=bool(self._each))
        ]

    def norm(self, *, per_group: bool) -> Tensor:
        """The global norm of the latest step; of each list, if ``per_group``."""
        dtype = torch.float64 if self.wide else torch.float32
        with ieee_arithmetic():
            return cpu_tensor(self.norms if per_group else self.norms[0], dtype)

    def factor(self, *, per_group: bool) -> Tensor:
        """What gradients were multiplied by in it."""
        with ieee_arithmetic():
            return cpu_tensor(self.factors if per_group else self.factors[0], torch.float64)

    def limit(self, *, per_group: bool) -> Any:
        """What was in force in it."""
        with ieee_arithmetic():
            return _limits_told(
                [cpu_tensor(each, torch.float64) for each in self.limits], per_group=per_group
            )

    def count(self, name: str) -> Tensor:
        """One of the counts, int64."""
        return cpu_tensor(self.counts[name], torch.int64)

    def state(self) -> dict[str, int]:
        """The counts, read."""
        return dict(self.counts)

    def known(self) -> Known:
        """All of it, read."""
        return Known(self.norms, self.factors, self.limits, self.wide, self.state())

    def clip(self, step: Step) -> Outcome:
        """Clip gradients once the host has seen their norms.

        Raises:
            StepSkippedError: the step is not to be taken.
        """
        # Alone, nothing is stepped where a gradient overflowed under GradScaler's scale.
        if step.part is None and step.found_inf:
            return Outcome()
        limits, scale = step.limits(), step.scale()
        norms, actions, each = zip(*_decided(step, limits, scale), strict=True)
        self.norms = list(map(float, norms))
        self.limits = list(map(_in_force, limits))
        self.wide = any(gradients.wide for gradients in step.lists)
        self._each = list(map(_Each, each, step.lists)) if step.wants_each else []
        finite = [math.isfinite(norm.significand) for norm in norms]
        if (step.on_nonfinite == "skip" and not all(finite)) or any(
            map(_stands_out, limits, finite)
        ):
            for lesson in step.lessons:
                lesson.show()
            self._skip()
        self.factors = list(map(factor_of, actions))
        return Outcome(
            taken=True,
            clipped=any(map(_is_clipped, norms, limits, actions)),
            stand_in=carried_out(step, actions, scale),
            lessons=step.lessons,
        )

    def _skip(self) -> NoReturn:
        self.latest = "skipped"
        self.factors = [1.0] * len(self.norms)
        self.counts["begun"] += 1
        self.counts["skipped_steps"] += 1
        raise StepSkippedError(
            f"the global norm is {', '.join(map(str, self.norms))}, and this step is to be "
            "skipped; but optimizer.step is no longer what attach has made of it: remove() the "
            "clipper, and attach again after whatever has replaced it"
        )


class _Each:
    """The norms of gradients, each by its name, and what it takes to make a tensor of them."""

    __slots__ = ("again", "names", "norms")

    def __init__(self, norms: ScaledArray, gradients: Gradients) -> None:
        self.names = tuple(gradients.names)
        self.norms = norms
        # Of one that is listed again no norm of its own has been found.
        self.again = first_of_each(gradients.tensors) if gradients.repeated else None

    def told(self, norm: float, *, wide: bool) -> Norms:
        """The norms in a tensor, beside the global one."""
        with ieee_arithmetic():
            found = vector(self.norms, "cpu", wide=wide)
            values = found if self.again is None else found[torch.tensor(self.again)]
            whole = cpu_tensor(norm, torch.float64 if wide else torch.float32)
        return Norms(values, whole, self.names)


def _in_force(limit: float | Lesson) -> Any:
    return limit.in_force if isinstance(limit, Lesson) else limit


def _stands_out(limit: float | Lesson, is_finite: bool) -> bool:
    """If a limit has the step skipped; what is not finite goes by the policy."""
    if not isinstance(limit, Lesson) or not limit.kind.skips:
        return False
    return is_finite and bool(limit.skip)


def _is_clipped(norm: Scaled, limit: float | Lesson, action: Write) -> bool:
    """If a norm was not at most its limit, or that of one of its tensors."""
    if isinstance(limit, Lesson) and limit.per_tensor:
        return isinstance(action, ScaleEach) or not math.isfinite(norm.significand)
    return not at_most(norm, _in_force(limit))


def _decided(step: Step, limits: Sequence[float | Lesson], scale: float) -> list[Decided]:
    """The norm of each list of gradients, and what is to be done to them."""
    part = step.part
    if part is not None:
        part.asked(
            max_norm=list(map(told, limits)), on_nonfinite=step.on_nonfinite, grad_scale=scale
        )
    policy: Any = "keep" if step.on_nonfinite == "skip" else step.on_nonfinite
    wants_each = step.wants_each
    found = [step.lists[0].decided(limits[0], policy, scale, part, wants_each=wants_each)]
    for each, limit in zip(step.lists[1:], limits[1:], strict=True):
        with taking_part(None if part is None else part.workers) as another:
            found.append(each.decided(limit, policy, scale, another, wants_each=wants_each))
    return found


def _limits_told(limits: Sequence[Tensor], *, per_group: bool) -> Any:
    """One tensor; several where groups are clipped tensor by tensor."""
    if not per_group:
        return limits[0]
    return torch.stack(list(limits)) if not any(x.dim() for x in limits) else tuple(limits)


# ---- in a device's memory ----

# Words of 8 bytes, as `kernels.gpu.triton.measure` has them.
_STEPS, _CLIPPED, _LATEST, _DIVISOR, _SKIPPED, _SKIPS, _BEFORE, _WORDS = 0, 1, 2, 3, 4, 5, 6, 10
_WORD = {"steps": _STEPS, "clipped_steps": _CLIPPED, "skipped_steps": _SKIPPED}


class There(_Counts):
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
        return _limits_told([each.clone() for each in self._limits], per_group=per_group)

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


# ---- which of them ----

Books = Here | There


def kept_for(step: Step, books: Books) -> Books:
    """The books, where a step needs them.

    Raises:
        TypeError, ValueError: a schedule gives no number, or one out of range.
    """
    if step.memory is None:
        return on_host(books)
    if books.device == step.memory.device:
        return books
    step.limits()  # an error in one leaves the books as they are
    return There(step.memory, books.known())


def on_host(books: Books) -> Books:
    """The books, kept by the host."""
    return books if books.device is None else Here(books.known())
