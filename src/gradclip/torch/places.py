"""Which parameters an optimizer has, and the watch on the gradient of each."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from gradclip.torch import host
from gradclip.torch.gradients import Gradients
from gradclip.torch.limits import Limits


class Place:
    """A parameter, its place in the optimizer, and the watch on its gradient."""

    __slots__ = ("_handle", "group", "name", "parameter", "waits", "watching")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.waits = True  # to be watched: it may be frozen, or have no shape yet
        self.watching: Any = None
        self._handle: Any = None

    def moved_to(self, group: int, name: str) -> Place:
        """The place, in a parameter group and by a name."""
        self.group, self.name = group, name
        return self

    def watch(self) -> None:
        """Have the gradient measured when it is written, if that is worth it."""
        self.waits = False
        self.watching, self._handle = host.watch(self.parameter) or (None, None)

    def leave(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()


class Places:
    """All places of an optimizer."""

    __slots__ = ("_shapes", "every")

    def __init__(self) -> None:
        self.every: list[Place] = []
        self._shapes: list[tuple[int, Any]] = []  # of the groups: how many there are, their names

    def find(self, optimizer: Any) -> list[Tensor]:
        """Which parameters the optimizer has; each is watched once it is trained."""
        groups = [group["params"] for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        shapes = [(len(each["params"]), each.get("param_names")) for each in optimizer.param_groups]
        known = [place.parameter for place in self.every]
        if not _are_same(shapes, self._shapes) or not all(map(is_, parameters, known)):
            self._shapes = shapes
            self._move(optimizer.param_groups)
        for place in self.every:
            if place.waits and place.parameter.requires_grad and not is_lazy(place.parameter):
                place.watch()
        return parameters

    def _move(self, groups: Sequence[dict[str, Any]]) -> None:
        old = {id(place.parameter): place for place in self.every}
        self.every = [
            (old.pop(id(parameter), None) or Place(parameter)).moved_to(number, name)
            for number, (group, names) in enumerate(zip(groups, names_in(groups), strict=True))
            for parameter, name in zip(group["params"], names, strict=True)
        ]
        for place in old.values():
            place.leave()

    def gradients(self, limits: Limits) -> list[Gradients]:
        """The gradients there are, in lists of those that are clipped together."""
        lists = [Gradients() for _ in limits.every]
        per_group = limits.per_group
        for place in self.every:
            gradient = place.parameter.grad
            if gradient is not None:
                number = place.group if per_group else 0
                lists[number].add(place.name, gradient, place.watching)
        return lists

    def forget(self) -> None:
        """Let go of the gradients that were watched."""
        for place in self.every:
            if place.watching is not None:
                place.watching.forget()

    def leave(self) -> None:
        """Watch none of them any more."""
        for place in self.every:
            place.leave()
        self.every = []


def names_in(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What an error calls each parameter of the groups: by its name, where the optimizer has it."""
    every = []
    for place, group in enumerate(groups):
        known = group.get("param_names", ())
        numbered = range(len(known), len(group["params"]))
        others = [f"param_groups[{place}]['params'][{number}]" for number in numbered]
        every.append([*known, *others][: len(group["params"])])
    return every


def _are_same(ones: Sequence[tuple[int, Any]], others: Sequence[tuple[int, Any]]) -> bool:
    pairs = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(a == b and x is y for (a, x), (b, y) in pairs)
