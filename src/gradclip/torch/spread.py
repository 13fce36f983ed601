"""What a process counts of leaves that it shares with others; and leaves that are DTensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradclip.core.exact import (
    FLOAT32,
    FLOAT64,
    NARROW,
    WORDS,
    Format,
    Scaled,
    ScaledArray,
    Total,
    merge,
    normalised,
    total_of,
)
from gradclip.core.exact import norm as root_of
from gradclip.core.held import Clip, Held, Measured
from gradclip.core.workers import Joint
from gradclip.torch import mesh
from gradclip.torch.elements import copy, count_nonfinite, fill_
from gradclip.torch.overlap import at_every_place, distinct, first_places
from gradclip.torch.tensors import WIDE, detached, values_of, with_values

# What has been learnt of some of the leaves.
Learnt = Callable[[Sequence[int]], str]


class Tensors(Held):
    """Tensors in some memory, of which a process may count only a part."""

    __slots__ = ()

    leaves: Sequence[Any]
    writable: bool
    hold: ClassVar[Callable[..., Any]]  # that of `backend`, which stands on this file

    def addend(self, joint: Joint) -> Any:
        """What all of the leaves add to the sum of squares of all workers."""
        del joint  # only a device's memory can leave it where it is
        return self.total()[0]

    def share(self, joint: Joint) -> tuple[Any, bool]:
        """What this process adds to the sum of squares of all, and if a leaf is float64."""
        return self.counted(joint).addend(joint), self.wide

    def counted(self, joint: Joint) -> Tensors:
        """What this process counts of the leaves: not what another counts.

        Raises:
            ValueError: leaves have no memory, and another worker waits for what is in it.
            RuntimeError: another worker has failed, and terms are to be added up.
        """
        return _counted(self, self.leaves, joint)

    def measure_each_with(self, joint: Joint, learnt: Learnt) -> tuple[Measured, ScaledArray]:
        return _measured_each(self, self.leaves, joint, learnt)

    def at_every_place(self, norms: Tensor, leaves: Sequence[Any]) -> Tensor:
        """The norm of each leaf, from those of what is held, where one listed again has none."""
        return at_every_place(norms, leaves) if self.lacks(norms, leaves) else norms

    def lacks(self, norms: Tensor, leaves: Sequence[Any]) -> bool:
        """If that may be so."""
        return len(norms) < len(leaves) or not norms.all()

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        return count_nonfinite(leaf)

    def copied(self) -> list[Any]:
        return self.rewrapped(list(map(copy, self.leaves)))

    def filled(self, value: float) -> list[Any]:
        new = [torch.empty_like(detached(leaf)) for leaf in self.leaves]
        fill_(new, value)
        return self.rewrapped(new)

    def rewrapped(self, new: list[Any]) -> list[Any]:
        """The leaves again, with new elements."""
        return list(map(with_values, self.leaves, new))

    def fill_(self, value: float) -> None:
        """Put ``value`` into every element; autograd sees that it has changed."""
        fill_(map(values_of, self.leaves), value)


def _counted(here: Tensors, leaves: Sequence[Any], joint: Joint) -> Tensors:
    here.check_there()
    if not isinstance(joint.workers, mesh.Ring):
        return here
    groups = mesh.alike(leaves)
    if mesh.any_terms(leaves, groups):
        joint.agree()  # adding up is a collective, for which one that has failed would be missed
    else:
        found = mesh.counted(leaves, groups, joint.workers)
        if len(found) == len(here.leaves) and all(map(is_, found, here.leaves)):
            return here
    # One memory listed twice counts once where it is written once.
    once = distinct(leaves) if here.writable else leaves
    addends = mesh.counted(once, mesh.alike(once), joint.workers)
    counted: Tensors = Tensors.hold(addends, str, writable=False)
    return counted


def _measured_each(
    here: Tensors, leaves: Sequence[Any], joint: Joint, learnt: Learnt
) -> tuple[Measured, ScaledArray]:
    """The global norm and that of each leaf, of which the spread ones are added up in one sum.

    Raises:
        NotImplementedError: parameters are flat: the parts of many in one tensor.
        RuntimeError: another worker has failed, or has other leaves that are spread.
    """
    here.check_there()
    ring = joint.workers
    if not isinstance(ring, mesh.Ring):
        return Held.measure_each_with(here, joint, learnt)
    if ring.flat:
        raise NotImplementedError(
            "limits.PerTensor, or the norm of each tensor, under FullyShardedDataParallel, which "
            "has many parameters in one tensor: shard by fully_shard (FSDP2), which leaves each "
            "its own"
        )
    groups = mesh.alike(leaves)
    places = sorted(place for group in groups if group.is_spread for place in group.places)
    shapes = [tuple(leaves[place].shape) for place in places]
    joint.asked_too(spread=shapes, learnt=learnt(places))
    if mesh.any_terms(leaves, groups):
        joint.agree()  # adding up is a collective, for which one that has failed would be missed
    counted = mesh.counted_at(leaves, groups, ring)
    # One memory listed twice counts once where it is written once.
    once = set(first_places(leaves) if here.writable else range(len(leaves)))
    counted = {place: x for place, x in counted.items() if place in once}
    totals = [_total([counted[place]] if place in counted else []) for place in places]
    known = set(places)
    rest = [x for place, x in counted.items() if place not in known]
    norm, wide = joint.norm(merge([*totals, _total(rest)]), wide=here.wide)
    own = [place for place in range(len(leaves)) if place not in known]
    _, each = Tensors.hold([leaves[place] for place in own], str, writable=False).measure_each()
    found = [Scaled(0.0, 0)] * len(leaves)
    for place, number in zip(own, each.singly(), strict=True):
        found[place] = number
    formats = [FLOAT64 if values_of(leaves[place]).dtype in WIDE else FLOAT32 for place in places]
    for place, number in zip(places, ring_norms(ring, totals, formats), strict=True):
        found[place] = number
    return Measured(norm, wide), ScaledArray.of(found)


def ring_norms(ring: mesh.Ring, totals: Sequence[Total], formats: Sequence[Format]) -> list[Scaled]:
    """The roots of totals, each added up over the workers, all in one sum of integers."""
    if not totals:
        return []
    # What is narrower than float64 takes a sixth of the words.
    kept = [slice(None) if to is FLOAT64 else np.r_[NARROW, WORDS : WORDS + 2] for to in formats]
    digits = [normalised(total)[each] for total, each in zip(totals, kept, strict=True)]
    together = np.split(ring.sum(np.concatenate(digits)), np.cumsum([len(x) for x in digits])[:-1])
    found = []
    for words, each, to in zip(together, kept, formats, strict=True):
        total = total_of()
        total[each] = words
        found.append(root_of(total, to))
    return found


def _total(tensors: Sequence[Any]) -> Total:
    return Tensors.hold(tensors, str, writable=False).total()[0] if tensors else total_of()


class Spread(Tensors):
    """DTensors, and what this process holds of them."""

    __slots__ = ("here", "leaves", "writable")

    def __init__(self, leaves: Sequence[Any], here: Tensors) -> None:
        self.leaves = leaves
        self.here = here
        self.writable = here.writable

    @property
    def wide(self) -> bool:
        return self.here.wide

    def measure(self) -> Scaled:
        """The norm of what is here."""
        return self.here.measure()

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        return self.here.measure_each()

    def measure_each_with(self, joint: Joint, learnt: Learnt) -> tuple[Measured, ScaledArray]:
        return _measured_each(self.here, self.leaves, joint, learnt)

    def total(self) -> tuple[Total, float, bool]:
        """The exact sum of what is here, the largest finite |x|, if any is wide."""
        return self.here.total()

    def counted(self, joint: Joint) -> Tensors:
        return _counted(self.here, self.leaves, joint)

    def check_there(self) -> None:
        self.here.check_there()

    def knows(self, value: Any) -> bool:
        return self.here.knows(value)

    def norm(self, clip: Clip) -> Any:
        """The norm: of what is here, where nobody else takes part."""
        return self.here.norm(clip) if clip.part is None else super().norm(clip)

    def clip_(self, clip: Clip) -> Any:
        return self.here.clip_(clip) if clip.part is None else super().clip_(clip)

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        if clip.part is not None:
            return super().clipped(clip)
        new, norm = self.here.clipped(clip)
        return self.rewrapped(new), norm

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Any:
        return self.here.scalar(norm, wide=wide)

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Any:
        return self.here.vector(norms, wide=wide)

    def lacks(self, norms: Tensor, leaves: Sequence[Any]) -> bool:
        return self.here.lacks(norms, leaves)

    def copied(self) -> list[Any]:
        return self.rewrapped(self.here.copied())

    def filled(self, value: float) -> list[Any]:
        return self.rewrapped(self.here.filled(value))

    def scaled(self, factor: Scaled) -> list[Any]:
        return self.rewrapped(self.here.scaled(factor))

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        return self.rewrapped(self.here.scaled_each(factors))

    def scale_each_(self, factors: ScaledArray) -> None:
        self.here.scale_each_(factors)

    def fill_(self, value: float) -> None:
        self.here.fill_(value)

    def scale_(self, factor: Scaled) -> None:
        self.here.scale_(factor)

    def rewrapped(self, new: list[Any]) -> list[Any]:
        return list(map(mesh.like, self.leaves, new))
