"""What is put on an optimizer so that its steps are clipped, and those of its copies."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from gradclip.torch.step import HOOKS, KEY, StepSkippedError

AGAIN = "remove() the clipper before, and attach again"

_HOOKS = {HOOKS: "_before_step", "_optimizer_step_post_hooks": "_after_step"}


class Hooked:
    """What has hooks around the steps of an optimizer; it is copied with the optimizer.

    PyTorch leaves out hooks, and all else that is ours, where it copies an optimizer. So the state
    that it copies is made here, with the hooks. They are methods, which bring the clipper's copy.
    """

    __slots__ = ("_catches", "_optimizer")

    _optimizer: Any
    _catches: tuple[Any, Any] | None  # a step that may be skipped, and what it has replaced

    def _hook_on(self, *, skips: bool) -> None:
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
        self._catches = None
        if skips:
            replaced = ours.get("step")
            ours["step"] = MethodType(_catching(self._optimizer.step), self._optimizer)
            self._catches = ours["step"], replaced

    def _hook_off(self) -> None:
        """Take off what is there."""
        ours: Any = vars(self._optimizer)
        for name in _HOOKS:
            ours[name].pop(KEY)
        for name in ("__getstate__", "__deepcopy__", "__reduce_ex__"):
            ours.pop(name, None)
        # Where another has replaced it, it stays within that one, and catches nothing.
        if self._catches is not None and ours.get("step") is self._catches[0]:
            del ours["step"]
            if self._catches[1] is not None:
                ours["step"] = self._catches[1]

    def _with_state_of_optimizer(self) -> dict[str, Any]:
        """What is copied of the optimizer."""
        of_class: Any = type(self._optimizer).__getstate__
        state = of_class(self._optimizer)
        # What copy.copy makes would share a clipper with the optimizer, but not all that it tells.
        if not isinstance(state, dict) or sys._getframe(1).f_code is copy.copy.__code__:
            self._refuse_copy()
        hooks = {
            name: OrderedDict({**state.get(name, {}), KEY: getattr(self, hook)})
            for name, hook in _HOOKS.items()
        }
        return {**state, **hooks}

    def _refuse_copy(self, *_: Any) -> None:
        """Have no copy that is not clipped."""
        raise TypeError(
            f"such a copy of {type(self._optimizer).__name__} would not be clipped: use "
            f"copy.deepcopy where the class has no copying of its own, or {AGAIN}"
        )


def that_steps(optimizer: Any) -> Any:
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
