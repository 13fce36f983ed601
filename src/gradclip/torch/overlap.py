"""Which of PyTorch's tensors share memory: in place each memory counts and is written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.kernels import layout
from gradclip.kernels.layout import Layout
from gradclip.torch import mesh
from gradclip.torch.tensors import values_of


def distinct(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, those whose elements are in one memory once."""
    return list({_key(leaf): leaf for leaf in reversed(leaves)}.values())[::-1]


def first_places(leaves: Sequence[Any]) -> list[int]:
    """The places of the leaves; of those whose elements are in one memory the first."""
    return sorted(set(first_of_each(leaves)))


def first_of_each(leaves: Sequence[Any]) -> list[int]:
    """For each leaf the place of the first whose elements are in the same memory."""
    places: dict[Any, int] = {}
    return [places.setdefault(_key(leaf), place) for place, leaf in enumerate(leaves)]


def at_every_place(norms: Tensor, leaves: Sequence[Any]) -> Tensor:
    """The norm of each leaf, from norms that are 0, or missing, where one is listed again."""
    first = first_of_each(leaves)
    if len(norms) < len(leaves):
        numbers = {place: number for number, place in enumerate(sorted(set(first)))}
        first = [numbers[place] for place in first]
    return norms[torch.tensor(first, device=norms.device)]


def _key(leaf: Any) -> Any:
    values = values_of(mesh.local(leaf))
    if not values.numel() or not values.data_ptr():
        return id(leaf)
    return values.device, values.dtype.to_real(), _layout(values)


def _layout(values: Tensor) -> Layout:
    parts, item = 1 + values.is_complex(), values.element_size()
    address, real = values.data_ptr(), item // parts
    if values.is_contiguous():
        return Layout(address, real, ((real, values.numel() * parts),))
    strides = [step * item for step in values.stride()]
    return layout.layout(address, real, values.shape, strides, parts)


def check_apart(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to tensors of which elements share memory."""
    check_steps(tensors, path)
    check_pairs(tensors, path)


def check_steps(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to a tensor whose own elements share memory."""
    for place, tensor in enumerate(tensors):
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{path(place)} has elements that share memory (strides {tensor.stride()}); "
                "clip_by_global_norm returns new arrays instead"
            )


def check_pairs(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to tensors that share a part of their memory; all of it is no trouble."""
    places = {_key(tensor): place for place, tensor in reversed([*enumerate(tensors)])}
    on: dict[torch.device, dict[int, Layout]] = {}
    for key, place in places.items():
        if isinstance(key, tuple):  # else it has no memory
            device, _, where = key
            on.setdefault(device, {})[place] = where
    for found in on.values():
        layout.check_apart(found, path)
