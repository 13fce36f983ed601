"""What PyTorch's functions are given: parameters, or tensors, in a row and with their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.torch import mesh

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Listed(NamedTuple):
    """What was given, in a row."""

    tensors: list[Any]
    called: str  # what the function calls it
    names: Sequence[str] | None = None

    def path(self, place: int) -> str:
        """What an error calls one of them."""
        return f"{self.called}[{place}]" if self.names is None else self.names[place]


def listed(given: Tensor | Iterable[Tensor] | Named, called: str, seen: list[Tensor]) -> Listed:
    """Tensors in a row, with their names if they have some; in ``seen`` too, as far as it goes.

    Raises:
        TypeError: what is given holds no tensors, or others than those meant.
    """
    if isinstance(given, _MAPPINGS):
        seen.extend(given.values())
        known = called != "parameters" or any(map(_may_have_gradient, seen))
        if not known and seen and all(isinstance(each, Tensor) for each in seen):
            raise TypeError(_no_tensors(given, called))
        return Listed(seen, called, list(map(str, given)))
    if isinstance(given, _HOLDERS):
        seen.extend(_tensors_in(given))  # which tell who is to hear of an error
        if not hasattr(given, "__iter__") or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(_no_tensors(given, called))
        seen.clear()
    try:
        items: Any = iter([given] if isinstance(given, Tensor) else given)
    except TypeError:
        raise TypeError(_no_tensors(given, called)) from None
    if isinstance(given, str):
        raise TypeError(_no_tensors(given, called))
    names = None
    try:
        seen.extend(items)
    finally:
        pairs: Any = seen
        if pairs and all(map(_is_named, pairs)):
            names = [name for name, _ in pairs]
            seen[:] = [tensor for _, tensor in pairs]
    return Listed(seen, called, names)


_HOLDERS = (torch.nn.Module, torch.optim.Optimizer)
_MAPPINGS = (dict, Mapping, torch.nn.ParameterDict)


def _is_named(pair: Any) -> bool:
    return type(pair) is tuple and len(pair) == 2 and isinstance(pair[0], str)


def _tensors_in(holder: Any) -> list[Any]:
    """The parameters that a model or an optimizer holds."""
    if isinstance(holder, torch.optim.Optimizer):
        return [parameter for group in holder.param_groups for parameter in group["params"]]
    return list(holder.parameters())


def _may_have_gradient(tensor: Any) -> bool:
    """If it is no weight of a ``state_dict``."""
    if isinstance(tensor, torch.nn.Parameter):
        return True
    return isinstance(tensor, Tensor) and (tensor.requires_grad or tensor.grad is not None)


def _no_tensors(given: Any, called: str) -> str:
    what = type(given).__name__
    if isinstance(given, _MAPPINGS):
        what += " of tensors that have no gradients, as a state_dict is"
    hint = f"{called} are tensors, as model.parameters() gives them"
    if called == "tensors":
        hint = "tensors are [p.grad for p in model.parameters() if p.grad is not None], or others"
    if isinstance(given, torch.optim.Optimizer):
        hint += "; gradclip.torch.attach takes an optimizer"
    return f"{called} is {what}; {hint}"


def gradients_of(given: Listed) -> list[Tensor]:
    """The gradients that there are.

    Raises:
        TypeError: what is given are no tensors.
    """
    if not torch.compiler.is_compiling() and mesh.are_spread(given.tensors):
        # Each would be asked first for a function of its own to be asked by, and has none.
        with torch._C.DisableTorchFunctionSubclass():
            grads = [each.grad for each in given.tensors]
        return [gradient for gradient in grads if gradient is not None]
    try:
        grads = [each.grad for each in given.tensors]
    except AttributeError:
        _check_tensors(given)
        raise
    return [gradient for gradient in grads if gradient is not None]


def _check_tensors(given: Listed) -> None:
    for place, tensor in enumerate(given.tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{given.path(place)} is {type(tensor).__name__}; {given.called} are tensors, or "
                "pairs of a name and a tensor, as model.named_parameters() gives them"
            )


def path_of_gradient(given: Listed, place: int) -> str:
    """What an error calls a gradient, by its place among those that there are."""
    places = [i for i, parameter in enumerate(given.tensors) if parameter.grad is not None]
    return f"{given.path(places[place])}.grad"


def keys_of_gradients(given: Listed, grads: Sequence[Tensor]) -> Sequence[Any]:
    """What tells gradients apart from step to step: their parameters' names, or places."""
    names: Sequence[Any] = range(len(given.tensors)) if given.names is None else given.names
    if len(grads) == len(names):
        return names
    return [key for key, each in zip(names, given.tensors, strict=True) if each.grad is not None]
