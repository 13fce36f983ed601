"""Leaves that are held: measure -> merge -> decide -> act, once for every kind of memory.

`Clip` is what is asked for. `Held` is the leaves: each kind of memory is a class that knows how to
measure and to scale what lies in it. Most leave it to the host to decide in between, as it stands
here; one that decides by itself says so by methods of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from gradclip.core.arithmetic import HOST
from gradclip.core.decide import (
    Action,
    Fill,
    Keep,
    Raise,
    Scale,
    ScaleEach,
    Write,
    check_clip_norm,
    check_use_norm,
    decide,
    factors,
)
from gradclip.core.exact import Scaled, ScaledArray, Total
from gradclip.core.memory import Lesson, told
from gradclip.core.workers import Joint


class Measured(NamedTuple):
    """A global norm."""

    norm: Scaled
    wide: bool = False  # if it is float64 because of a leaf that another worker has


class Clip:
    """One clip: of which leaves, by which limits, with whom.

    Args:
        leaves: as they were passed, for an error to name those with NaN or inf.
        path: what an error calls each.
        clip_norm: the limit: a number, what the leaves' memory `Held.knows`, or the `Lesson` of one
            that learns.
        use_norm: the norm, if it is given.
        on_nonfinite: the policy.
        part: this worker's part, where there are others.
        places: of each leaf among all that was passed.
        name: what a framework is to name its operations.
        wants_each: if the norm of each leaf is to be left in ``each``, as `Held.vector` makes it:
            of one that is listed again there it is 0, or missing.
    """

    __slots__ = (
        "clip_norm",
        "each",
        "leaves",
        "name",
        "on_nonfinite",
        "part",
        "path",
        "places",
        "use_norm",
        "wants_each",
    )

    # What errors call the limits.
    limit_name: str = "clip_norm"
    norm_name: str = "use_norm"
    # Where else a memory that decides is to write what it finds: arguments of `kernels.gpu.runs`.
    into: Mapping[str, Any] = {}

    def __init__(
        self,
        leaves: Sequence[Any],
        path: Callable[[int], str],
        clip_norm: Any = math.inf,
        use_norm: Any = None,
        on_nonfinite: Any = "nan",
        *,
        part: Joint | None = None,
        places: Sequence[int] = (),
        name: Any = None,
        wants_each: bool = False,
    ) -> None:
        self.leaves: Sequence[Any] = leaves
        self.path: Callable[[int], str] = path
        self.clip_norm: Any = clip_norm
        self.use_norm: Any = use_norm
        self.on_nonfinite: Any = on_nonfinite
        self.part: Joint | None = part
        self.places: Sequence[int] = places
        self.name: Any = name
        self.wants_each: bool = wants_each
        self.each: Any = None

    # ---- on the host ----

    def asked(self, limit: object, given: float | None) -> dict[str, object]:
        """What has to be the same on all workers: numbers, words and None, by name."""
        return {"clip_norm": limit, "use_norm": given, "on_nonfinite": self.on_nonfinite}

    def read(self) -> tuple[float | Lesson, Scaled | None]:
        """The limit, and the norm if it is given.

        Raises:
            TypeError, ValueError: either is out of range or no real scalar.
        """
        limit, given = self.clip_norm, self.use_norm
        if not isinstance(limit, Lesson):
            limit = check_clip_norm(limit, self.limit_name)
        return limit, None if given is None else check_use_norm(given, self.norm_name)

    def measured(self, held: Held) -> Measured:
        """The global norm of the leaves, and of those that other workers have.

        Raises:
            RuntimeError: another worker has failed.
        """
        if self.part is None:
            return Measured(held.measure())
        total, wide = held.share(self.part)
        return Measured(*self.part.norm(total, wide=wide))

    def decided(self, held: Held) -> tuple[Measured, Write]:
        """The norm, and what is to be done: everything up to the first write.

        Raises:
            FloatingPointError: the leaves are refused; the text names each that holds NaN or inf.
            RuntimeError: another worker has failed.
        """
        limit, given = self.read()
        if self.part is not None:
            known = None if given is None else float(given)
            self.part.asked(**self.asked(told(limit), known))
        each = None
        per_tensor = isinstance(limit, Lesson) and limit.per_tensor
        if per_tensor or self.wants_each:
            found, each = self.measured_each(held, limit)
        elif given is None:
            found = self.measured(held)
        else:
            found = Measured(given)
            if self.part is not None:
                held.check_there()
                self.part.meet()  # for an error of another, and for one that has not been given it
        action = self.judged(found.norm, each if per_tensor else None, limit)
        if isinstance(action, Raise):
            self.refuse(held, float(found.norm))
        return found, action

    def measured_each(
        self, held: Held, limit: float | Lesson = math.inf
    ) -> tuple[Measured, ScaledArray]:
        """The global norm, and that of each leaf.

        Raises:
            ValueError: one is listed twice, and the limit would clip it twice.
            RuntimeError: another worker has failed.
        """
        lesson = limit if isinstance(limit, Lesson) and limit.per_tensor else None
        if self.part is not None:
            told_of = _nothing_learnt if lesson is None else lesson.told_of
            found, each = held.measure_each_with(self.part, told_of)
        else:
            norm, each = held.measure_each()
            found = Measured(norm)
        if lesson is not None:
            self.check_once(len(each.exponent))
        if self.wants_each:
            self.each = held.vector(each, wide=found.wide)
        return found, each

    def check_once(self, count: int) -> None:
        """Refuse leaves that are not as many as those that are held.

        Raises:
            ValueError: one is listed twice.
        """
        if count < len(self.leaves):
            raise ValueError("a leaf is listed twice, and limits.PerTensor would clip it twice")

    def judged(self, norm: Scaled, each: ScaledArray | None, limit: float | Lesson) -> Action:
        """What is to be done to leaves of this norm, and each of one of its own, by a limit."""
        if not isinstance(limit, Lesson):
            return self.action(norm, limit)
        if each is None:
            bound = limit.judge(HOST, float(norm))
            # What is not finite goes by the policy, as beside a number: inf would only measure.
            return self.action(norm, bound if math.isfinite(norm.significand) else 1.0)
        norms = each.floats()
        limits, own = limit.judge_each(HOST, norms, float(norm))
        if not math.isfinite(norm.significand):
            return self.action(norm, 1.0)
        if (np.where(own, norms, float(norm)) <= limits).all():
            return Keep()
        against = ScaledArray(
            np.where(own, each.significand, norm.significand),
            np.where(own, each.exponent, norm.exponent),
        )
        return ScaleEach(factors(against, limits))

    def action(self, norm: Scaled, limit: float) -> Action:
        """What is to be done to leaves of this norm."""
        return decide(norm, limit, self.on_nonfinite)

    # ---- in a memory that decides by itself ----

    @property
    def is_for_the_host(self) -> bool:
        """If only the host can decide, since others have to agree."""
        return self.part is not None

    @property
    def policy(self) -> str:
        """The policy, as `kernels.gpu` has it."""
        return str(self.on_nonfinite)

    @property
    def may_refuse(self) -> bool:
        """If the host has to see the norm before anything is written."""
        return bool(self.on_nonfinite == "raise")

    def limits(self, held: Held) -> tuple[Any, Any]:
        """The limit, and the norm if it is given: floats, or what is in memory and not read."""
        limit = self.clip_norm
        if not held.knows(limit):
            limit = check_clip_norm(limit, self.limit_name)
        return limit, self.given(held)

    def given(self, held: Held) -> Any:
        """The norm if it is given: a float, or what is in memory and not read."""
        given = self.use_norm
        if given is not None and not held.knows(given):
            given = float(check_use_norm(given, self.norm_name))
        return given

    def check(self, held: Held, norm: Any) -> None:
        """Look at a norm that may have to be refused; the host waits for it.

        Raises:
            FloatingPointError: it is NaN or inf, as an element is; the text names each leaf.
        """
        given = self.use_norm
        value = float(norm if given is None else given)
        # A measured norm may also be inf since it is too large for float32.
        if not math.isfinite(value) and (given is not None or self.any_nonfinite(held)):
            self.refuse(held, value)

    def refuse(self, held: Held, norm: float) -> NoReturn:
        """Raise the error of leaves whose norm is NaN or inf; it names each that holds one."""
        raise FloatingPointError(self._offenders(held, norm))

    def any_nonfinite(self, held: Held) -> bool:
        """If an element is NaN or inf."""
        return any(any(held.count_nonfinite(leaf)) for leaf in self.leaves)

    def _offenders(self, held: Held, norm: float) -> str:
        """Each leaf that holds NaN or inf, with its counts; of workers, those of this one."""
        found = []
        for place, leaf in enumerate(self.leaves):
            nans, infs = held.count_nonfinite(leaf)
            if nans or infs:
                found.append(f"{self.path(place)} holds {nans} NaN and {infs} inf")
        if not found and self.use_norm is not None:
            found.append("given as use_norm, every leaf is finite")
        elif not found and self.part is not None:
            found.append("every leaf is finite; those of another are not")
        elif not found:
            found.append("rows with the same index add up to more than float64 holds")
        workers = None if self.part is None else self.part.workers
        on = "" if workers is None else f"on rank {workers.rank} of {workers.size} "
        return f"the global norm is {norm}: {on}" + "; ".join(found)


def _nothing_learnt(places: Sequence[int]) -> str:
    """What is known of leaves that are only measured."""
    del places
    return ""


_NO_TENSORS = "norms and limits tensor by tensor are not there for leaves of"


class Held:
    """Leaves that have passed every check: nothing has been written, and no error can come.

    A kind of memory defines what is above the line; a framework adds how to make new leaves and
    scalars of its own.
    """

    __slots__ = ()

    # If the framework follows what is done, by which no memory is held and no limit is read.
    follows = False

    @property
    def wide(self) -> bool:
        """If the norm is float64, as a leaf is float64 or complex128."""
        raise NotImplementedError

    def measure(self) -> Scaled:
        """The global norm, correctly rounded; NaN if an element is, else inf if one is."""
        raise NotImplementedError

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        """The global norm as `measure` has it, and that of each leaf.

        Each is rounded to float64 if that leaf is float64 or complex128, else to float32.
        """
        raise NotImplementedError(f"{_NO_TENSORS} {type(self).__module__}")

    def measure_each_with(
        self, joint: Joint, learnt: Callable[[Sequence[int]], str]
    ) -> tuple[Measured, ScaledArray]:
        """The same, where other workers have other leaves, or parts of these.

        What has been ``learnt`` of those of which they have parts has to be the same on all.
        """
        del learnt
        _, each = self.measure_each()
        total, wide = self.share(joint)
        return Measured(*joint.norm(total, wide=wide)), each

    def total(self) -> tuple[Total, float, bool]:
        """The exact sum of squares, the largest finite |x|, and if a leaf is float64."""
        raise NotImplementedError

    def share(self, joint: Joint) -> tuple[Any, bool]:
        """What this worker adds to the sum of squares of all, and if a leaf is float64.

        A total; or its words, carried, in a device's memory.
        """
        del joint  # all of it, whoever they are
        total, _, wide = self.total()
        return total, wide

    def check_there(self) -> None:
        """Hold leaves against what the other workers of a group count on.

        Raises:
            ValueError: they have no memory.
        """

    def knows(self, value: Any) -> bool:
        """If a limit need not be read by the host, since it is where the leaves are."""
        del value
        return False

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        """How many elements of one leaf are NaN, and how many are inf."""
        raise NotImplementedError

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Any:
        """The norm as a 0-d value of the framework: float64 if ``wide`` or a leaf is."""
        raise NotImplementedError

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Any:
        """Norms as a vector of the framework, of the dtype that `scalar` gives."""
        raise NotImplementedError(f"{_NO_TENSORS} {type(self).__module__}")

    def copied(self) -> list[Any]:
        """New leaves, bit for bit the old ones."""
        raise NotImplementedError

    def filled(self, value: float) -> list[Any]:
        """New leaves, every element ``value``."""
        raise NotImplementedError

    def scaled(self, factor: Scaled) -> list[Any]:
        """New leaves, every element multiplied."""
        raise NotImplementedError

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        """New leaves, the elements of each multiplied by a factor of its own."""
        raise NotImplementedError(f"{_NO_TENSORS} {type(self).__module__}")

    def scale_each_(self, factors: ScaledArray) -> None:
        """Multiply the elements of each leaf, where they lie, by a factor of its own."""
        raise NotImplementedError(f"{_NO_TENSORS} {type(self).__module__}")

    def fill_(self, value: float) -> None:
        """Put ``value`` into every element."""
        raise NotImplementedError

    def scale_(self, factor: Scaled) -> None:
        """Multiply every element where it lies."""
        raise NotImplementedError

    # ---- what follows from it, where the host decides ----

    def norm(self, clip: Clip) -> Any:
        """The global norm, as a scalar of the framework."""
        found = clip.measured(self)
        return self.scalar(found.norm, wide=found.wide)

    def norms(self, clip: Clip) -> tuple[Any, Any]:
        """The norm of each leaf as a `vector`, and the global norm."""
        found, each = clip.measured_each(self)
        return self.vector(each, wide=found.wide), self.scalar(found.norm, wide=found.wide)

    def clip_(self, clip: Clip) -> Any:
        """Clip where the leaves lie; the norm before, as a scalar of the framework."""
        found, action = clip.decided(self)
        self.act_(action)
        return self.scalar(found.norm, wide=found.wide)

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves, and the norm before, as a scalar of the framework."""
        leaves, norm, _ = self.clipped_by_host(clip)
        return leaves, norm

    def clipped_by_host(self, clip: Clip) -> tuple[list[Any], Any, Scaled]:
        """New leaves, and the norm: as a scalar of the framework, and without a limit."""
        found, action = clip.decided(self)
        match action:
            case Scale(factor):
                leaves = self.scaled(factor)
            case ScaleEach(factors):
                leaves = self.scaled_each(factors)
            case Fill(value):
                leaves = self.filled(value)
            case Keep():
                leaves = self.copied()
        return leaves, self.scalar(found.norm, wide=found.wide), found.norm

    def act_(self, action: Action) -> None:
        """Do to the leaves, where they lie, what has been decided."""
        match action:
            case Scale(factor):
                self.scale_(factor)
            case ScaleEach(factors):
                self.scale_each_(factors)
            case Fill(value):
                self.fill_(value)
