"""Which steps of optimizers are under way where a hook is called, as the stack of calls tells."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from gradclip.torch.step import HOOKS


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
