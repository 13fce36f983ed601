"""A step before which gradients are clipped: what is asked of it, and what it is told.

A fused step of PyTorch's own is told by a stand-in: an object of the optimizer's class and with its
attributes but for one, which takes the optimizer's place in the step. So whatever becomes of the
step, nothing of ours is left on the optimizer.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.core.decide import Fill, Keep, Scale, ScaleEach, Write
from gradclip.core.memory import Lesson
from gradclip.core.workers import Joint
from gradclip.torch import devices
from gradclip.torch.gradients import Gradients
from gradclip.torch.limits import Limits

HOOKS = "_optimizer_step_pre_hooks"
KEY = "gradclip"  # of our hooks, among those that PyTorch numbers


class StepSkippedError(RuntimeError):
    """A step is not to be taken: it ends the step, and is seen where nobody expects it."""


class StandIn(NamedTuple):
    """What takes an optimizer's place in a step."""

    optimizer: Any
    attributes: dict[str, Any]  # its own, as they were before the step

    @classmethod
    def of(cls, optimizer: Any, told: dict[str, Any]) -> StandIn:
        """One that is like an optimizer, but for what the step is told."""
        new: Any = object.__new__(type(optimizer))
        vars(new).update(vars(optimizer), **told)
        return cls(new, dict(vars(new)))

    def leave(self, optimizer: Any) -> None:
        """Have the optimizer keep what the step has changed of the stand-in's attributes."""
        for name, value in vars(self.optimizer).items():
            if name not in self.attributes or value is not self.attributes[name]:
                vars(optimizer)[name] = value


class Outcome(NamedTuple):
    """What is to become of a step once it has been taken; it may yet fail."""

    # As far as the host decides.
    taken: bool = False
    clipped: bool = False
    stand_in: StandIn | None = None
    lessons: Sequence[Lesson] = ()


@dataclass
class Step:
    """A step before which gradients are to be clipped.

    Raises:
        TypeError, ValueError, NotImplementedError: a device may decide about it, but for a gradient
            that is none of those clipped.
    """

    optimizer: Any
    lists: list[Gradients]
    max_norm: Limits
    on_nonfinite: Any
    begun: int  # how many steps were, before this one
    part: Joint | None
    device: torch.device | None  # of the first parameter
    wants_each: bool = False  # if the norm of each gradient is to be told
    # Of the device that decides about the step, so that the host need not wait; or None.
    memory: Any = field(init=False)
    _limits: list[Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.memory = self._memory() if self._may_be_left_to_a_device() else None

    def _memory(self) -> Any:
        """Of the one device in which all of it lies, if it does."""
        from gradclip.torch import gpu  # which loads Triton

        every = [each.held() for each in self.lists]
        memories: list[Any] = [held.memory for held in every if isinstance(held, gpu.Leaves)]
        found = {memory.device for memory in memories}
        found |= {each.device for each in (self.grad_scale, self.found_inf) if each is not None}
        return memories[0] if len(memories) == len(every) and len(found) == 1 else None

    def _may_be_left_to_a_device(self) -> bool:
        if self.part is not None or self.device is None or not devices.has_triton(self.device):
            return False
        # The host waits in any case to raise: for all lists, before one is written. So it does
        # where it, or the norm of another list, decides about a step.
        waits = self.on_nonfinite == "raise"
        return not waits and not (
            self.may_skip and (self.max_norm.per_group or not can_be_told(self.optimizer))
        )

    @property
    def may_skip(self) -> bool:
        """If it may turn out that the step is not to be taken."""
        return self.on_nonfinite == "skip" or self.max_norm.may_skip

    def limits(self) -> list[Any]:
        """The limit of each list, all checked before one list is written; asked for once.

        Raises:
            TypeError, ValueError: a schedule gives no number, or one out of range.
        """
        if self._limits is None:
            keys = [each.names for each in self.lists]
            self._limits = self.max_norm.after(self.begun, self._knows, keys)
        return self._limits

    @property
    def lessons(self) -> list[Lesson]:
        """Of the limits that learn."""
        return [limit for limit in self.limits() if isinstance(limit, Lesson)]

    def _knows(self, limit: Any) -> bool:
        return self.memory is not None and self.memory.locate(limit) is not None

    @property
    def grad_scale(self) -> Tensor | None:
        """What GradScaler has multiplied the gradients by."""
        return getattr(self.optimizer, "grad_scale", None)

    def scale(self) -> float:
        """The same, read."""
        return float(self.grad_scale or 1.0)

    @property
    def found_inf(self) -> Tensor | None:
        """Above 0 if it has found that some have overflowed."""
        return getattr(self.optimizer, "found_inf", None)

    @property
    def is_of_one_list(self) -> bool:
        """If one division by one number clips: of each gradient once."""
        return len(self.lists) == 1 and not self.lists[0].repeated


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a step whose gradients are made in it, or are others than those of the parameters.

    Raises:
        RuntimeError: it is given a closure, gradients, or a scaler of them.
    """
    # The optimizer itself is the first of args.
    if all(value is None for value in (*args[1:], *kwargs.values())):
        return
    names = list(inspect.signature(type(args[0]).step).parameters)[1:]
    positional = itertools.zip_longest(names[: len(args) - 1], args[1:], fillvalue="*args")
    for name, value in [*positional, *kwargs.items()]:
        if callable(value):
            raise RuntimeError(
                f"optimizer.step({name}=...) under gradclip.torch.attach: a closure would make the "
                "gradients inside of the step. Call it before step(), or clip at its end by "
                "gradclip.torch.clip_grad_norm_. Under Lightning's automatic optimization, which "
                "always passes one, use gradclip.torch.patch(), or optimize manually"
            )
        if name in ("grad_scaler", "grads", "gradients") and value is not None:
            raise RuntimeError(
                f"optimizer.step({name}=...) under gradclip.torch.attach, which clips what the "
                "parameters have in .grad, and knows of a scale by optimizer.grad_scale: clip by "
                "gradclip.torch.clip_grad_norm_, or gradclip.clip_by_global_norm_, before step()"
            )


def check_unrecorded(optimizer: Any, lists: Sequence[Gradients]) -> None:
    """Refuse a step that autograd is to follow through.

    Raises:
        RuntimeError: it is to, and would not see that it clips.
    """
    follows = any(group.get("differentiable") for group in optimizer.param_groups)
    if follows and any(grad.requires_grad for each in lists for grad in each.tensors):
        raise RuntimeError(
            "a differentiable step under gradclip.torch.attach, which clips below autograd: clip "
            "by gradclip.clip_by_global_norm, which is differentiable, or use torch.no_grad()"
        )


def carried_out(step: Step, actions: Sequence[Write], scale: float) -> StandIn | None:
    """Do what has been decided; the stand-in that is to do it in the step, if one can."""
    if isinstance(actions[0], Scale) and step.is_of_one_list:
        divisor = scale / (float(actions[0].factor) or math.ulp(0.0))
        if can_be_told(step.optimizer) and divisor < torch.finfo(torch.float32).max:
            # A fused step writes to gradients as if each lay in one run; `held` refuses others.
            if not all(map(Tensor.is_contiguous, step.lists[0].tensors)):
                step.lists[0].held()
            return StandIn.of(step.optimizer, {"grad_scale": cpu_tensor(divisor, torch.float32)})
    todo = [
        (each.held(), action)
        for each, action in zip(step.lists, actions, strict=True)
        if not isinstance(action, Keep)
    ]
    for held, action in todo:
        held.act_(action)
    return None


def can_be_told(optimizer: Any) -> bool:
    """If the step is known to divide by ``grad_scale`` and to heed ``found_inf``."""
    # A subclass may have a step of its own, whatever its base class was told to be; and a hook
    # that comes after ours may put something else in the place of a stand-in.
    kind: Any = type(optimizer)
    known = kind.__module__ in _FUSED and _is_of_torch(kind.step)
    divides = known and getattr(optimizer, "_step_supports_amp_scaling", False)
    last = next(reversed(getattr(optimizer, HOOKS)), None) == KEY
    return divides and last and all(group.get("fused") for group in optimizer.param_groups)


_FUSED = {f"torch.optim.{name}" for name in ("adagrad", "adam", "adamw", "sgd")}


def _is_of_torch(function: Callable[..., Any] | None) -> bool:
    """If a function, and all that it wraps, is PyTorch's: ``__module__`` may be a copy of its."""
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("torch.optim."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def factor_of(action: Write) -> float:
    """What elements are multiplied by, or, in its place, filled with; the least of several."""
    match action:
        case Scale(factor):
            return float(factor)
        case ScaleEach(factors):
            return float(factors.floats().min())
        case Fill(value):
            return value
    return 1.0


def cpu_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, whatever the default device."""
    return torch.tensor(values, dtype=dtype, device="cpu")
