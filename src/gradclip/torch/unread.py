"""Tensors that are written down, or have no memory: no number of theirs is to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.held import Clip
from gradclip.torch import library
from gradclip.torch.following import is_functionalized
from gradclip.torch.spread import Spread, Tensors
from gradclip.torch.tensors import WIDE


class ByOperation(Clip):
    """A clip by other words than the core's, for which it has operations of its own."""

    __slots__ = ()

    def norm_of_unread(self, leaves: Sequence[Tensor]) -> Tensor:
        """The norm."""
        raise NotImplementedError

    def clip_unread_(self, held: Unread, leaves: Sequence[Tensor]) -> Tensor | None:
        """Clip where the leaves are; the norm, if it was not given."""
        raise NotImplementedError


class Unread(Tensors):
    """Leaves that are written down, or have no memory: what is done to them is one operation."""

    __slots__ = ("leaves", "path", "writable")

    follows = True

    def __init__(
        self, leaves: Sequence[Tensor], path: Callable[[int], str], *, writable: bool
    ) -> None:
        self.leaves = leaves
        self.path = path
        self.writable = writable

    @property
    def wide(self) -> bool:
        return any(leaf.dtype in WIDE for leaf in self.leaves)

    def knows(self, value: Any) -> bool:
        """Of a tensor's value nothing is asked before it is there."""
        return isinstance(value, Tensor)

    def check_there(self) -> None:
        """Hold the leaves against what the other workers of a group count on.

        Raises:
            ValueError: they have no memory.
        """
        raise ValueError(f"{self.path(0)} has no memory (device {self.leaves[0].device})")

    def norm(self, clip: Clip) -> Any:
        """The global norm."""
        if clip.part is not None:
            return super().norm(clip)
        if isinstance(clip, ByOperation):
            return clip.norm_of_unread(self.leaves)
        return library.norm(self.leaves, self.path)

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        """Refuse to: no operation has these numbers.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.path(0)} is meta, fake or traced, and the norm of each tensor is not there "
            "for such; the global norm is"
        )

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves and the norm."""
        if clip.part is not None:
            return super().clipped(clip)
        norm, _, new = library.clip(self.leaves, self.path, *clip.limits(self), clip.on_nonfinite)
        return new, norm

    def clip_(self, clip: Clip) -> Any:
        """Clip where the leaves are; the norm."""
        if clip.part is not None:
            return super().clip_(clip)
        if isinstance(clip, ByOperation):
            return clip.clip_unread_(self, self.leaves)
        limits = clip.limits(self)
        if not is_functionalized():
            return library.clip_(self.leaves, self.path, *limits, clip.on_nonfinite)
        # There PyTorch lets no operation but its own write to anything.
        new, norm = self.clipped(clip)
        for leaf, values in zip(self.leaves, new, strict=True):
            leaf.copy_(values)
        return norm


def is_without_numbers(held: Any) -> bool:
    """If leaves, or what is here of those that are spread, are such."""
    return isinstance(held.here if isinstance(held, Spread) else held, Unread)
