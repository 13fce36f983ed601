"""What an optimizer's step is told to do differently, so that it clips, or is not taken.

A fused step of PyTorch's own is told by a stand-in: an object of the optimizer's class and with its
attributes but for one, which takes the optimizer's place in the step. So whatever becomes of the
step, nothing of ours is left on the optimizer.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip import _clip
from gradclip.core.decide import Fill, Keep, Scale
from gradclip.torch import backend
from gradclip.torch.gradients import Gradients

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

    taken: bool = False
    clipped: bool = False
    there: bool = False  # if the books are kept in a device's memory
    stand_in: StandIn | None = None


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


def carried_out(
    optimizer: Any,
    lists: Sequence[Gradients],
    actions: Sequence[Keep | Fill | Scale],
    scale: float,
) -> StandIn | None:
    """Do what has been decided; the stand-in that is to do it in the step, if one can."""
    if len(lists) == 1 and isinstance(actions[0], Scale) and not lists[0].repeated:
        divisor = scale / (float(actions[0].factor) or math.ulp(0.0))
        if can_be_told(optimizer) and divisor < torch.finfo(torch.float32).max:
            return StandIn.of(optimizer, {"grad_scale": cpu_tensor(divisor, torch.float32)})
    todo = [
        (each.held(), action)
        for each, action in zip(lists, actions, strict=True)
        if not isinstance(action, Keep)
    ]
    for held, action in todo:
        _clip.carry_out_(backend, held, action)
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


# ---- who calls a hook ----


def is_within_another(optimizer: Any) -> bool:
    """If a hook calls this whose step was called by another step, as a base class's is."""
    caller = _next_step(sys._getframe(1))
    return caller is not None and is_under_way(optimizer, caller.f_back)


def is_under_way(optimizer: Any, frame: FrameType | None) -> bool:
    """If a step of an optimizer, or of its stand-in, has led to a frame."""
    hooks = getattr(optimizer, HOOKS)
    step = _next_step(frame)
    while step is not None:
        if getattr(step.f_locals.get("self"), HOOKS, None) is hooks:
            return True
        step = _next_step(step.f_back)
    return False


def _next_step(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that calls hooks of steps: what PyTorch has wrapped every step in."""
    while frame is not None and not (
        frame.f_code.co_name == "wrapper"
        and frame.f_globals.get("__name__") == "torch.optim.optimizer"
    ):
        frame = frame.f_back
    return frame


def factor_of(action: Keep | Fill | Scale) -> float:
    """What elements are multiplied by, or, in its place, filled with."""
    match action:
        case Scale(factor):
            return float(factor)
        case Fill(value):
            return value
    return 1.0


def cpu_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, whatever the default device."""
    return torch.tensor(values, dtype=dtype, device="cpu")
