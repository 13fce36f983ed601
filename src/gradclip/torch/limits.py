"""By what an optimizer's gradients are clipped: one limit, or one for each parameter group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

from torch import Tensor

from gradclip.core.decide import check_clip_norm
from gradclip.core.limits import Limit as Learning

# What a limit may be: a number, or a schedule: from how many steps were begun before to a number;
# or one that learns.
Limit = SupportsFloat | Callable[[int], SupportsFloat] | Learning


class Limits(NamedTuple):
    """The limits of all lists of gradients that are clipped together."""

    every: list[Limit]
    per_group: bool  # if each parameter group has one

    @classmethod
    def of(cls, max_norm: Any) -> Limits:
        """What a user gives.

        Raises:
            TypeError, ValueError: one is no number, or out of range; or two are one object that
                learns.
        """
        per_group = isinstance(max_norm, Sequence) and not isinstance(max_norm, str)
        every = [_checked(limit) for limit in (max_norm if per_group else [max_norm])]
        learning = [limit for limit in every if isinstance(limit, Learning)]
        if len(set(map(id, learning))) < len(learning):
            raise ValueError(
                f"max_norm has {learning[0]!r} for several groups; each learns by an object of its "
                "own"
            )
        return cls(every, per_group)

    @property
    def given(self) -> Any:
        """As a user gives them."""
        return tuple(self.every) if self.per_group else self.every[0]

    def replaced_by(self, max_norm: Any) -> Limits:
        """Others, for the same lists.

        Raises:
            TypeError, ValueError: they are none, or not as many.
        """
        new = Limits.of(max_norm)
        if new.per_group != self.per_group or len(new.every) != len(self.every):
            ours = f"{len(self.every)} limits" if self.per_group else "one limit for all groups"
            raise ValueError(f"max_norm is {max_norm!r}; this clipper has {ours}: attach another")
        return new

    @property
    def learning(self) -> list[Learning]:
        """Those that learn."""
        return [limit for limit in self.every if isinstance(limit, Learning)]

    @property
    def may_skip(self) -> bool:
        """If one may have a step skipped."""
        return any(limit.skips for limit in self.learning)

    def check_number(self, optimizer: Any) -> None:
        """Count parameter groups.

        Raises:
            ValueError: each has a limit, and there are more of the ones or the others.
        """
        groups = len(optimizer.param_groups)
        if self.per_group and len(self.every) != groups:
            raise ValueError(
                f"max_norm has {len(self.every)} limits, and the optimizer {groups} parameter "
                "groups"
            )

    def after(
        self, begun: int, knows: Callable[[Any], bool], keys: Sequence[Sequence[str]]
    ) -> list[Any]:
        """Those of the step before which so many were begun; lessons of those that learn.

        Args:
            begun: what schedules are called with.
            knows: if a limit need not be read by the host.
            keys: the names of the gradients of each.

        Raises:
            TypeError, ValueError: a schedule gives no number, or one out of range.
        """
        return [
            _now(limit, begun, knows, names) for limit, names in zip(self.every, keys, strict=True)
        ]


def _checked(limit: Any) -> Limit:
    if isinstance(limit, Learning) or callable(limit):
        return limit
    return check_clip_norm(limit, "max_norm")


def _now(limit: Any, begun: int, knows: Callable[[Any], bool], names: Sequence[str]) -> Any:
    if isinstance(limit, Learning):
        return limit.lesson(names)
    return _number(limit(begun), begun, knows) if callable(limit) else limit


def _number(limit: Any, begun: int, knows: Callable[[Any], bool]) -> Any:
    return limit if knows(limit) else check_clip_norm(limit, f"max_norm({begun})")


def by_limit(limit: Any, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Functions of parameters and a number, by a limit in the number's place."""
    known: list[Any] = []  # a parameter that stands for those whose gradients it learns from

    def replaced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def by(parameters: Any, max_norm: Any = None, *args: Any, **options: Any) -> Any:
            del max_norm
            if isinstance(parameters, Iterator):
                parameters = list(parameters)
            first = _first(parameters)
            if isinstance(limit, Learning) and first is not None:
                if known and known[0] is not first:
                    raise ValueError(
                        f"gradclip.torch.patch has {limit!r}, which learns from the gradients of "
                        "one list of parameters, and others are clipped now: "
                        "gradclip.torch.attach(optimizer, limit) has one for each optimizer"
                    )
                known[:] = [first]
            return function(parameters, limit, *args, **options)

        return by

    return list(map(replaced, functions))


def _first(parameters: Any) -> Any:
    """The first of parameters, which may come with their names; None if there is none."""
    if isinstance(parameters, Tensor):
        return parameters
    items = parameters.values() if isinstance(parameters, Mapping) else parameters
    first = next(iter(items), None)
    return first[1] if isinstance(first, tuple) else first
