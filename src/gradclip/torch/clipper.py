"""Clipping inside of an optimizer's step: measured while gradients are warm, folded into the step.

A large gradient is measured in the hook that runs when autograd has just written it, so much of it
is read from the processor's caches. The step adds the parts up. Fused optimizers divide gradients
by a number that they are given, so clipping takes no pass of its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from gradclip import _clip
from gradclip.core.decide import (
    Fill,
    Keep,
    OnNonfiniteStep,
    Scale,
    at_most,
    check_clip_norm,
    check_on_nonfinite,
)
from gradclip.core.exact import Scaled
from gradclip.core.workers import Joint
from gradclip.kernels.cpu import ieee_arithmetic
from gradclip.torch import backend
from gradclip.torch.books import CLIPPED, SKIPPED, STEPS, There
from gradclip.torch.gradients import Gradients, Place, leave, names_in, unscaled
from gradclip.torch.step import (
    HOOKS,
    KEY,
    Outcome,
    StandIn,
    StepSkippedError,
    can_be_told,
    carried_out,
    check_arguments,
    check_unrecorded,
    cpu_tensor,
    factor_of,
    is_under_way,
    is_within_another,
)

# What a limit may be: a number, or a schedule: from how many steps were begun before to a number.
Limit = float | Callable[[int], Any]

_HOOKS = {HOOKS: "_before_step", "_optimizer_step_post_hooks": "_after_step"}


class Clipper:
    """Clips gradients inside of ``optimizer.step()`` by the global norm of its parameters.

    ::

        norm   = sqrt(sum of |g|^2 over every element g of every gradient)
        factor = max_norm / norm    if norm > max_norm, else 1

    Gradients are measured as backward writes them, so the step reads them no second time. Fused
    Adam, AdamW, SGD and Adagrad divide by the factor as they step; for others gradients are scaled
    before the step, if there is anything to clip. After a step in which a fused optimizer clipped,
    ``grad`` holds what it made of it: divided by ``norm / max_norm`` in its own dtype.

    With ``torch.amp.GradScaler``, fused or not, the limit is on the gradients without its scale,
    and a step that the scaler skips is not counted. Gradients that are changed after backward are
    measured again, as their version counters tell. A change that those do not count, through
    ``.data``, ``.numpy()`` or DLPack, is seen only if it changes one of eight numbers that are
    looked at. With ``torch.distributed`` in use every gradient is measured in the step.

    A copy of the optimizer, by ``copy.deepcopy``, ``pickle`` or ``torch.save``, has a clipper of
    its own, with the same limit and counts: `clipper_of` finds it. The optimizer's ``state_dict``
    stays as it is, and the clipper has one too.

    Args:
        optimizer: any optimizer, or one that accelerate has prepared, whose step is given no
            closure.
        max_norm: a number above 0 (``inf`` only measures); a schedule, which is called with how
            many steps were begun before, 0 in the first (one that a fused optimizer skips for
            GradScaler is begun, too); or a list of these, one for each parameter group: then each
            group is clipped by a norm of its own.
        on_nonfinite: what becomes of the gradients where an element is NaN or inf, as in
            `gradclip.clip_by_global_norm`; or ``"skip"``: the step is not taken, and neither
            weights nor anything that the optimizer keeps change (``optimizer.step`` is replaced by
            one that may end so). ``"zero"`` takes it: momentum, the averages of Adam and weight
            decay still move the weights.
        group: as in `gradclip.torch.clip_grad_norm_`; every worker attaches, and steps. With it,
            what GradScaler finds to be inf has to be made known to all before, or they do not step
            alike.

    On a GPU gradients are clipped before the step, by two launches for which the host does not
    wait; a fused optimizer divides by the factor only where it divides by GradScaler's scale. It
    also skips by itself, if it has one limit; for others that are to skip, the host waits.

    ``norm``, ``factor``, ``steps``, ``clipped_steps`` and ``skipped_steps`` tell of it, in tensors;
    the first two of one element for each group if ``max_norm`` has. A step is counted when it has
    been taken, and as clipped if its norm was not at most the limit: above it, as inf is above
    every finite limit, or NaN.

    Raises:
        TypeError: what is given is no optimizer, or one whose step runs no hooks or needs a
            closure; a limit is no number; a copy is made that would not be clipped.
        ValueError: a limit is out of range, there are not as many as groups, or the optimizer has
            a clipper already.
        RuntimeError: from a step that is given a closure or gradients, or is to be differentiated;
            another worker has failed.
        FloatingPointError: from a step, with ``on_nonfinite="raise"``; nothing has been written.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> clipper = Clipper(optimizer, max_norm=2.5)
    >>> (weight @ torch.tensor([3.0, 4.0])).backward()
    >>> optimizer.step()
    >>> print(clipper.norm, weight.data)
    tensor(5.) tensor([-1.5000, -2.0000])
    """

    __slots__ = (
        "__weakref__",
        "_args",
        "_begun",
        "_catches",
        "_clipped_steps",
        "_factors",
        "_finalizer",
        "_group",
        "_limits",
        "_norms",
        "_on_nonfinite",
        "_optimizer",
        "_outcome",
        "_per_group",
        "_places",
        "_shapes",
        "_skipped_steps",
        "_steps",
        "_there",
        "_thread",
        "_wide",
    )

    # Of the step that is under way, or has failed: on which thread, what it was given in place of
    # its arguments, and what is to become of it.
    _thread: int
    _args: tuple[Any, ...] | None
    _outcome: Outcome
    _places: list[Place]
    _shapes: list[tuple[int, Any]]  # of the parameter groups: how many there are, their names
    _catches: tuple[Any, Any] | None  # a step that may be skipped, and what it has replaced
    _there: There | None  # the books, if it is a device's memory in which they are kept

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: Limit | Sequence[Limit],
        *,
        on_nonfinite: OnNonfiniteStep = "nan",
        group: Any = None,
    ) -> None:
        workers = None if group is None else backend.workers([], group)
        with _clip.taking_part(workers) as part:
            check_on_nonfinite(on_nonfinite, steps=True)
            self._optimizer = _that_steps(optimizer)
            self._per_group = _is_list(max_norm)
            self._limits = _limits(max_norm)
            self._check_number_of_limits(self._optimizer)
            if clipper_of(self._optimizer) is not None:
                raise ValueError(
                    "the optimizer has a clipper already, as a copy of an attached one has; "
                    "gradclip.torch.clipper_of(optimizer).remove() takes it off"
                )
            if part is not None:
                part.asked(limits=len(self._limits), on_nonfinite=on_nonfinite)
                part.meet()
        self._on_nonfinite: OnNonfiniteStep = on_nonfinite
        self._group = group
        self._norms = [0.0] * len(self._limits)
        self._factors = [1.0] * len(self._limits)
        self._wide = False
        self._begun = self._steps = self._clipped_steps = self._skipped_steps = 0
        self._leave_off()
        self._hook_on()
        try:
            self._find_places(self._optimizer)
        except BaseException:
            self.remove()
            raise

    def _leave_off(self) -> None:
        """Begin with no step, no place and no books."""
        self._places, self._shapes, self._there, self._catches = [], [], None, None
        self._end_step()
        # The watches go with the optimizer, though parameters may outlive it.
        self._finalizer = weakref.finalize(self._optimizer, leave, self._places)

    def _hook_on(self) -> None:
        """Have the optimizer's steps clipped, and its copies too."""
        ours: Any = vars(self._optimizer)
        for name, hook in _HOOKS.items():
            # After a step ours comes first: it has been taken, whatever others make of it.
            hooks = ours.setdefault(name, OrderedDict())
            hooks[KEY] = getattr(self, hook)
            hooks.move_to_end(KEY, last=name == HOOKS)
        ours["__getstate__"] = self._with_state_of_optimizer
        if _copies_itself(type(self._optimizer)):
            ours["__deepcopy__"] = ours["__reduce_ex__"] = self._refuse_copy
        if self._on_nonfinite == "skip":
            replaced = ours.get("step")
            ours["step"] = MethodType(_catching(self._optimizer.step), self._optimizer)
            self._catches = ours["step"], replaced

    def remove(self) -> None:
        """Clip no more; what was counted stays."""
        ours: Any = vars(self._optimizer)
        if clipper_of(self._optimizer) is self:
            for name in _HOOKS:
                ours[name].pop(KEY)
            for name in ("__getstate__", "__deepcopy__", "__reduce_ex__"):
                ours.pop(name, None)
            # Where another has replaced it, it stays within that one, and catches nothing.
            if self._catches is not None and ours.get("step") is self._catches[0]:
                del ours["step"]
                if self._catches[1] is not None:
                    ours["step"] = self._catches[1]
        self._finalizer()

    # ---- what it tells, and is told ----

    def __repr__(self) -> str:
        told = [f"{name}={getattr(self, name).tolist()}" for name in ("norm", "factor", *_COUNTS)]
        return f"Clipper(max_norm={self.max_norm}, {', '.join(told)})"

    @property
    def max_norm(self) -> Any:
        """The limit, or the schedule; a tuple if each parameter group has one. May be set.

        Raises:
            TypeError, ValueError: it is set to what is none, or to another number of them.
        """
        return tuple(self._limits) if self._per_group else self._limits[0]

    @max_norm.setter
    def max_norm(self, max_norm: Any) -> None:
        limits = _limits(max_norm)
        if _is_list(max_norm) != self._per_group or len(limits) != len(self._limits):
            ours = f"{len(self._limits)} limits" if self._per_group else "one limit for all groups"
            raise ValueError(f"max_norm is {max_norm!r}; this clipper has {ours}: attach another")
        self._limits = limits

    @property
    def norm(self) -> Tensor:
        """The global norm of the latest step, as it was before clipping."""
        if self._there is not None:
            return self._there.told(self._there.norms, per_group=self._per_group)
        return self._tensor(self._norms, torch.float64 if self._wide else torch.float32)

    @property
    def factor(self) -> Tensor:
        """What gradients were multiplied by in the latest step, float64."""
        if self._there is not None:
            return self._there.told(self._there.factors, per_group=self._per_group)
        return self._tensor(self._factors, torch.float64)

    @property
    def steps(self) -> Tensor:
        """How many steps were taken, int64."""
        return self._count(self._steps, STEPS)

    @property
    def clipped_steps(self) -> Tensor:
        """In how many of them a norm was not at most its limit: above it, or NaN; int64."""
        return self._count(self._clipped_steps, CLIPPED)

    @property
    def skipped_steps(self) -> Tensor:
        """How many were not taken, with ``on_nonfinite="skip"``, int64."""
        return self._count(self._skipped_steps, SKIPPED)

    def _count(self, here: int, word: int) -> Tensor:
        self._settle()
        if self._there is None:
            return cpu_tensor(here, torch.int64)
        return self._there.words[word] + here

    def _tensor(self, values: list[float], dtype: torch.dtype) -> Tensor:
        with ieee_arithmetic():
            return cpu_tensor(values if self._per_group else values[0], dtype)

    def state_dict(self) -> dict[str, int]:
        """The counts, to be saved beside the optimizer's; the limit is for `attach` to say."""
        return {
            "begun": self._begun,
            **{name: int(getattr(self, name)) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting from a `state_dict`; a schedule goes on, too.

        Raises:
            ValueError: it is none.
        """
        names = {"begun", *_COUNTS}
        counts = [x for x in dict(state).values() if type(x) is int and x >= 0]
        if set(state) != names or len(counts) != len(names):
            raise ValueError(f"the state is {state!r}; it must be of Clipper.state_dict()")
        self._come_here()
        for name, value in state.items():
            setattr(self, f"_{name}", value)

    # ---- copies ----

    def _with_state_of_optimizer(self) -> dict[str, Any]:
        """What is copied of the optimizer: PyTorch leaves all hooks out, also ours."""
        optimizer: Any = self._optimizer
        of_class: Any = type(optimizer).__getstate__
        state = of_class(optimizer)
        # What copy.copy makes would share a clipper with the optimizer, but not all that it tells.
        if not isinstance(state, dict) or sys._getframe(1).f_code is copy.copy.__code__:
            self._refuse_copy()
        hooks = {
            name: OrderedDict({**state.get(name, {}), KEY: getattr(self, hook)})
            for name, hook in _HOOKS.items()
        }
        return {**state, **hooks}  # which bring the clipper's copy, and that does the rest

    def _refuse_copy(self, *_: Any) -> None:
        """Have no copy that is not clipped."""
        raise TypeError(
            f"such a copy of {type(self._optimizer).__name__} would not be clipped: use "
            f"copy.deepcopy where the class has no copying of its own, or {_AGAIN}"
        )

    def _state(self) -> dict[str, Any]:
        """What a copy of the clipper begins with."""
        if self._there is None:
            books: dict[str, Any] = {f"_{name}": getattr(self, f"_{name}") for name in _BOOKS}
        else:
            books = self._books_there(self._there)
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**kept, **books, "attached": clipper_of(self._optimizer) is self}

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError(f"a clipper over a group cannot be pickled: {_AGAIN}")
        if any("<" in getattr(limit, "__qualname__", "") for limit in self._limits):
            raise TypeError(
                f"the schedule of a clipper is a function within another, or a lambda, and cannot "
                f"be pickled: {_AGAIN}"
            )
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        for name, value in state.items():
            setattr(self, name, value)
        self._leave_off()
        if attached:
            self._hook_on()
        else:
            self._finalizer()

    def __copy__(self) -> Clipper:
        raise TypeError("a clipper is copied with its optimizer, by copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Clipper:
        new: Clipper = object.__new__(type(self))
        memo[id(self)] = new
        memo[id(self._group)] = self._group  # the workers are the same
        new.__setstate__(copy.deepcopy(self._state(), memo))
        return new

    # ---- the step ----

    # What torch.compile would make of these depended on every number that they see.

    @backend.looked_away_from
    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._finalizer.alive or is_within_another(optimizer):
            return None  # removed; or a step that calls its base class's: it has been clipped
        self._take_back()
        self._thread = threading.get_ident()
        follows = torch.is_grad_enabled()
        with torch.no_grad(), ieee_arithmetic():
            self._outcome = self._clipped(optimizer, args, kwargs, follows)
        stand_in = self._outcome.stand_in
        self._args = (optimizer if stand_in is None else stand_in.optimizer, *args[1:])
        return self._args, kwargs

    @backend.looked_away_from
    def _after_step(self, optimizer: Any, args: tuple[Any, ...], *_: Any) -> None:
        if self._args is None or (args is not self._args and is_within_another(optimizer)):
            return  # removed; or of the base class: the step goes on
        outcome = self._outcome
        self._end_step()
        self._begun += 1
        self._steps += outcome.taken
        self._clipped_steps += outcome.clipped
        if outcome.stand_in is not None:
            outcome.stand_in.leave(optimizer)
        self._forget()
        getattr(optimizer, HOOKS).move_to_end(KEY)  # those that came after it come before it now

    def _forget(self) -> None:
        """Let go of the gradients that were watched."""
        for place in self._places:
            if place.watching is not None:
                place.watching.forget()

    def _settle(self) -> None:
        """See if a step has failed: it does not count."""
        here = sys._getframe()
        if self._thread == threading.get_ident() and not is_under_way(self._optimizer, here):
            self._take_back()

    def _take_back(self) -> None:
        if self._outcome.there and self._there is not None:
            self._there.take_back()
        self._end_step()

    def _end_step(self) -> None:
        """Note that no step is under way."""
        self._thread, self._args, self._outcome = 0, None, Outcome()

    def _clipped(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], follows: bool
    ) -> Outcome:
        """Clip, and say what is to become of the step.

        Raises:
            StepSkippedError: nothing is.
        """
        with _clip.Opening(self._group) as opening:
            self._find_places(optimizer)
            everyone = opening.seen = [place.parameter for place in self._places]
            workers = opening.workers = backend.workers(everyone, self._group)
        # The same for all lists, so that an error in one is told to whoever waits.
        with _clip.taking_part(workers) as part:
            check_arguments(args, kwargs)
            self._check_number_of_limits(optimizer)
            lists = self._gradients()
            if follows:
                check_unrecorded(optimizer, lists)
            if workers is None and self._is_there(optimizer, everyone):
                outcome = self._clipped_there(optimizer, lists)
                if outcome is not None:
                    return outcome
            self._come_here()
            # Alone, nothing is stepped where a gradient overflowed under GradScaler's scale.
            if part is None and getattr(optimizer, "found_inf", None):
                return Outcome()
            limits = [self._limit(place) for place in range(len(lists))]
            scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
            if part is not None:
                part.asked(max_norm=limits, on_nonfinite=self._on_nonfinite, grad_scale=scale)
            found = [self._found(lists[0], limits[0], scale, part)]
        for each, limit in zip(lists[1:], limits[1:], strict=True):
            with _clip.taking_part(workers) as part:
                found.append(self._found(each, limit, scale, part))
        norms, actions = zip(*found, strict=True)
        self._norms = list(map(float, norms))
        self._wide = any(each.wide for each in lists)
        finite = all(math.isfinite(norm.significand) for norm in norms)
        if self._on_nonfinite == "skip" and not finite:
            self._factors = [1.0] * len(norms)
            self._begun += 1
            self._skipped_steps += 1
            self._forget()
            raise StepSkippedError(
                f"the global norm is {', '.join(map(str, self._norms))}, and this step is to be "
                "skipped; but optimizer.step is no longer what attach has made of it: remove() the "
                "clipper, and attach again after whatever has replaced it"
            )
        self._factors = list(map(factor_of, actions))
        return Outcome(
            taken=True,
            clipped=not all(map(at_most, norms, limits)),
            stand_in=carried_out(optimizer, lists, actions, scale),
        )

    def _found(
        self, gradients: Gradients, limit: float, scale: float, part: Joint | None
    ) -> tuple[Scaled, Keep | Fill | Scale]:
        """The norm of gradients, and what is to be done to them."""
        norm, wide = gradients.norm(part)
        gradients.wide = gradients.wide or wide
        norm = unscaled(norm, scale, gradients.wide)
        policy = "keep" if self._on_nonfinite == "skip" else self._on_nonfinite
        action = _clip.decided(
            backend, gradients.tensors, gradients.path, norm, limit, policy, part=part
        )
        return norm, action

    def _limit(self, place: int) -> float:
        """The limit of this step."""
        limit = self._limits[place]
        if not callable(limit):
            return limit
        return check_clip_norm(limit(self._begun), f"max_norm({self._begun})")

    def _check_number_of_limits(self, optimizer: Any) -> None:
        groups = len(optimizer.param_groups)
        if self._per_group and len(self._limits) != groups:
            raise ValueError(
                f"max_norm has {len(self._limits)} limits, and the optimizer {groups} parameter "
                "groups"
            )

    def _find_places(self, optimizer: Any) -> None:
        """See which parameters the optimizer has, and have each watched once it is trained."""
        groups = [group["params"] for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        shapes = [(len(each["params"]), each.get("param_names")) for each in optimizer.param_groups]
        known = [place.parameter for place in self._places]
        if not _are_same(shapes, self._shapes) or not all(map(is_, parameters, known)):
            self._shapes = shapes
            old = {id(place.parameter): place for place in self._places}
            self._places[:] = [
                (old.pop(id(parameter), None) or Place(parameter)).moved_to(group, name)
                for group, names in enumerate(names_in(optimizer.param_groups))
                for name, parameter in zip(names, groups[group], strict=True)
            ]
            for place in old.values():
                place.leave()
        for place in self._places:
            trained = place.waits and place.parameter.requires_grad
            if trained and not torch.nn.parameter.is_lazy(place.parameter):
                place.watch()

    def _gradients(self) -> list[Gradients]:
        """The gradients there are, in lists of those that are clipped together."""
        lists = [Gradients() for _ in self._limits]
        for place in self._places:
            gradient = place.parameter.grad
            if gradient is not None:
                lists[place.group if self._per_group else 0].add(place, gradient)
        return lists

    # ---- the step, in a device's memory ----

    def _is_there(self, optimizer: Any, parameters: Sequence[Tensor]) -> bool:
        """If the step is to be clipped in a device's memory, without waiting for it."""
        if not parameters or not backend.has_triton(parameters[0].device):
            return False
        # The host waits in any case to raise: for all lists, before one is written. So it does
        # where it, or the norm of another list, decides about a step.
        waits = self._on_nonfinite == "raise"
        skips = self._on_nonfinite == "skip"
        return not waits and not (skips and (self._per_group or not can_be_told(optimizer)))

    def _clipped_there(self, optimizer: Any, lists: list[Gradients]) -> Outcome | None:
        """Clip where the gradients lie; None where that is not in the memory of one device."""
        queues: list[Any] = [backend.queue(each.held()) for each in lists]
        amp = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
        if None in queues:
            return None
        devices = [queue.memory.device for queue in queues]
        devices += [each.device for each in amp if each is not None]
        if len(set(devices)) > 1:
            return None
        limits = [
            _clip.limits_there(queue, limit(self._begun), None, f"max_norm({self._begun})")[0]
            if callable(limit)
            else limit
            for queue, limit in zip(queues, self._limits, strict=True)
        ]
        if self._there is not None and self._there.words.device != devices[0]:
            self._come_here()
        if self._there is None:
            self._there = There(queues[0].memory, len(lists))
        # A fused optimizer that divides by the scale divides by the factor at no cost. Without a
        # scale it would write each gradient back for it, clipped or not.
        one = len(lists) == 1 and not lists[0].repeated
        folds = one and amp[0] is not None and can_be_told(optimizer)
        self._outcome = Outcome(there=True)  # from here on there is something to take back
        for place, (each, queue, limit) in enumerate(zip(lists, queues, limits, strict=True)):
            into = self._there.into(place, queue.wide, amp, folds=folds)
            policy = self._on_nonfinite
            _clip.queued_(backend, queue, each.tensors, each.path, limit, None, policy, **into)
        told: dict[str, Tensor] = {}
        if folds:
            told["grad_scale"] = self._there.divisor
        if self._on_nonfinite == "skip":
            told["found_inf"] = self._there.skips
        return Outcome(there=True, stand_in=StandIn.of(optimizer, told) if told else None)

    def _come_here(self) -> None:
        """Have the books on the host, if the latest step was clipped elsewhere."""
        if self._there is None:
            return
        for name, value in self._books_there(self._there).items():
            setattr(self, name, value)
        self._there = None

    def _books_there(self, there: There) -> dict[str, Any]:
        """The books that a device keeps, for the host."""
        return {
            "_norms": list(map(float, there.norms)),
            "_factors": list(map(float, there.factors)),
            "_wide": any(norm.dtype is torch.float64 for norm in there.norms),
            **{f"_{name}": count for name, count in self.state_dict().items()},
        }


def clipper_of(optimizer: torch.optim.Optimizer) -> Clipper | None:
    """The clipper that is attached to an optimizer; None if none is.

    A copy of an attached optimizer has a clipper of its own, which this finds.
    """
    hook = getattr(optimizer, HOOKS, {}).get(KEY)
    return None if hook is None else hook.__self__


_AGAIN = "remove() the clipper before, and attach again"
_COUNTS = ("steps", "clipped_steps", "skipped_steps")
_BOOKS = ("norms", "factors", "wide", "begun", *_COUNTS)
_KEPT = ("_optimizer", "_limits", "_per_group", "_on_nonfinite", "_group")


# ---- what is attached to, and the limits ----


def _that_steps(optimizer: Any) -> Any:
    """The optimizer, or the one that it wraps.

    Raises:
        TypeError: it is none, or its step needs a closure.
    """
    found = optimizer
    # accelerate's has no hooks of its own, Lightning's has those of the one within.
    while hasattr(inner := getattr(found, "optimizer", None), HOOKS) and (
        getattr(found, HOOKS, None) is None or getattr(found, HOOKS) is getattr(inner, HOOKS)
    ):
        found = inner
    name = type(found).__name__
    if not isinstance(found, torch.optim.Optimizer):
        raise TypeError(
            "attach takes an optimizer, as torch.optim.AdamW(model.parameters()) is; this is "
            f"{type(optimizer).__name__}"
        )
    if not hasattr(found, HOOKS) or not getattr(type(found).step, "hooked", False):
        raise TypeError(
            f"the step of {name} runs no hooks, so it would not be clipped: attach to the "
            "optimizer within it, or clip by gradclip.torch.clip_grad_norm_ before step()"
        )
    closure = inspect.signature(type(found).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"the step of {name} needs a closure, which would make the gradients "
            "inside of the step: clip at the closure's end by gradclip.torch.clip_grad_norm_"
        )
    return found


def _copies_itself(kind: type) -> bool:
    """If a class of optimizers has a way of its own to be copied."""
    own = kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer)]
    names = {"__deepcopy__", "__reduce__", "__reduce_ex__"}
    return any(names & vars(each).keys() for each in own)


def _catching(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that may be skipped."""

    @functools.wraps(step)
    def catching(_: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except StepSkippedError:
            return None

    return catching


def _are_same(ones: Sequence[tuple[int, Any]], others: Sequence[tuple[int, Any]]) -> bool:
    pairs = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(a == b and x is y for (a, x), (b, y) in pairs)


def _is_list(max_norm: Any) -> bool:
    return isinstance(max_norm, Sequence) and not isinstance(max_norm, str)


def _limits(max_norm: Any) -> list[Limit]:
    limits = max_norm if _is_list(max_norm) else [max_norm]
    return [limit if callable(limit) else check_clip_norm(limit, "max_norm") for limit in limits]
