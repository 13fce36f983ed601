"""What is known of an optimizer's steps: norms, factors and counts.

Whoever decides about a step keeps the books: the host, or a device, for which it does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from gradclip.core.decide import ScaleEach, Write, at_most
from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.memory import Lesson, told
from gradclip.core.norms import Norms
from gradclip.core.opening import taking_part
from gradclip.core.reading import Reading
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.torch.counts import COUNTS, Counts, Known, limits_told
from gradclip.torch.elements import vector
from gradclip.torch.gradients import Decided, Gradients
from gradclip.torch.overlap import first_of_each
from gradclip.torch.step import (
    Outcome,
    Step,
    StepSkippedError,
    carried_out,
    cpu_tensor,
    factor_of,
)
from gradclip.torch.there import There

__all__ = ["COUNTS", "Books", "Here", "Known", "There", "kept_for", "on_host"]


class Here(Counts):
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
            return limits_told(
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
