"""What every book of an optimizer's steps has: counts, and what others go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.torch.step import Outcome

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


class Counts:
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


def limits_told(limits: Sequence[Tensor], *, per_group: bool) -> Any:
    """One tensor; several where groups are clipped tensor by tensor."""
    if not per_group:
        return limits[0]
    return torch.stack(list(limits)) if not any(x.dim() for x in limits) else tuple(limits)
