"""What an optimizer's step is told to do differently, so that it clips, or is not taken.

It is told by a stand-in: an object of the optimizer's class and with its attributes but for one,
which takes the optimizer's place in the step. So whatever becomes of the step, nothing of ours is
left on the optimizer.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip import _clip
from gradclip._decide import Fill, Keep, Scale
from gradclip._gradients import Gradients
from gradclip.backends import torch as backend


class Outcome(NamedTuple):
    """What is to become of a step once it has been taken; it may yet fail."""

    taken: bool = False
    clipped: bool = False
    skipped: bool = False
    there: bool = False  # if the books are kept in a device's memory
    stand_in: Any = None
    hidden: Sequence[tuple[Tensor, Tensor]] = ()  # parameters, and the gradients taken from them

    def leave(self, optimizer: Any) -> None:
        """Have the optimizer be what the step has made of its stand-in, and see its gradients."""
        for parameter, gradient in self.hidden:
            parameter.grad = gradient
        if self.stand_in is not None and not self.skipped:
            ours = vars(optimizer)
            for name, value in vars(self.stand_in).items():
                if name not in _TOLD:
                    ours[name] = value


_TOLD = ("grad_scale", "found_inf")


def stand_in_for(optimizer: Any, told: dict[str, Any]) -> Any:
    """An optimizer that is another's like, but for what its step is told."""
    new: Any = object.__new__(type(optimizer))
    vars(new).update(vars(optimizer), **told)
    return new


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a step whose gradients are made in it, or are others than those of the parameters.

    Raises:
        RuntimeError: it is given a closure, or gradients.
    """
    # The optimizer itself is the first of args.
    if all(value is None for value in (*args[1:], *kwargs.values())):
        return
    names = list(inspect.signature(type(args[0]).step).parameters)
    for name, value in [*zip(names[1:], args[1:], strict=False), *kwargs.items()]:
        if callable(value):
            raise RuntimeError(
                f"optimizer.step({name}=...) under gradclip.torch.attach: a closure would make the "
                "gradients inside of the step. Call it before step(), or clip at its end by "
                "gradclip.torch.clip_grad_norm_. Under Lightning's automatic optimization, which "
                "always passes one, use gradclip.torch.patch(), or optimize manually"
            )
        if "grad" in name and value is not None:
            raise RuntimeError(
                f"optimizer.step({name}=...) under gradclip.torch.attach, which clips what the "
                "parameters have in .grad: pass no gradients, or clip them by "
                "gradclip.clip_by_global_norm_"
            )


def carried_out(
    optimizer: Any,
    lists: Sequence[Gradients],
    actions: Sequence[Keep | Fill | Scale],
    scale: float,
) -> Any:
    """Do what has been decided; the stand-in that is to do it in the step, if one can."""
    if len(lists) == 1 and isinstance(actions[0], Scale) and not lists[0].repeated:
        divisor = scale / (float(actions[0].factor) or math.ulp(0.0))
        if is_fused(optimizer) and divisor < torch.finfo(torch.float32).max:
            return stand_in_for(optimizer, {"grad_scale": cpu_tensor(divisor, torch.float32)})
    todo = [
        (each.held(), action)
        for each, action in zip(lists, actions, strict=True)
        if not isinstance(action, Keep)
    ]
    for held, action in todo:
        _clip.carry_out_(backend, held, action)
    return None


def is_fused(optimizer: Any) -> bool:
    """If the step is known to divide by ``grad_scale`` and to heed ``found_inf``."""
    # A step of a subclass may be its own, whatever its base class was told to be.
    ours = type(optimizer).step.__module__ in _FUSED
    divides = ours and getattr(optimizer, "_step_supports_amp_scaling", False)
    return divides and all(group.get("fused") for group in optimizer.param_groups)


_FUSED = {f"torch.optim.{name}" for name in ("adagrad", "adam", "adamw", "sgd")}


def without_a_step(optimizer: Any, lists: Sequence[Gradients]) -> dict[str, Any]:
    """Who steps in the optimizer's place where no step is to be taken: one without parameters.

    The step of another library may step by other objects, too: it sees no gradient, either.
    """
    if type(optimizer).step.__module__.startswith("torch.optim."):
        return {"stand_in": stand_in_for(optimizer, {"param_groups": []})}
    hidden = []
    for parameter in {id(p): p for each in lists for p in each.parameters}.values():
        hidden.append((parameter, parameter.grad))
        parameter.grad = None
    groups = [dict(group) for group in optimizer.param_groups]
    return {"stand_in": stand_in_for(optimizer, {"param_groups": groups}), "hidden": hidden}


def caller() -> FrameType | None:
    """What has called the hook from which this is called; not what keeps Dynamo out of it."""
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_globals["__name__"].startswith(_DYNAMO):
        frame = frame.f_back
    return frame


_DYNAMO = ("torch._compile", "torch._dynamo")


def calls(step: FrameType | None) -> bool:
    """If a step is under way that has led to where we are: it is not one that has failed."""
    frame = sys._getframe(1) if step is not None else None
    while frame is not None and frame is not step:
        frame = frame.f_back
    return frame is not None


def factor_of(action: Keep | Fill | Scale) -> float:
    match action:
        case Scale(factor):
            return float(factor)
        case Fill(value):
            return value
    return 1.0


def cpu_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")
