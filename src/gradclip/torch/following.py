"""Who follows what is done to tensors, and needs an operation or a function to see a clip."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from gradclip.core.sparse import IndexedSlices
from gradclip.torch.overlap import check_steps
from gradclip.torch.tensors import PLAIN_TYPES, check_dtypes

_OPERANDS = (*PLAIN_TYPES, FakeTensor, FunctionalTensor)

F = TypeVar("F", bound=Callable[..., Any])


def looked_away_from(function: F) -> F:
    """Have torch.compile not look into a function where it has broken a graph."""
    hidden = _disable_dynamo(function)
    looks = torch._C._dynamo.eval_frame.get_eval_frame_callback

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        is_looked_into = torch.compiler.is_compiling() or looks() is not None
        return (hidden if is_looked_into else function)(*args, **options)

    return cast(F, run)


_MODES = torch._C._TorchDispatchModeKey.FUNCTIONAL, torch._C._TorchDispatchModeKey.PROXY
_is_on = torch._C._dispatch_tls_is_dispatch_key_included
_BY_MODES, _BEFORE_DISPATCH = torch._C.DispatchKey.Python, torch._C.DispatchKey.PreDispatch
trace_of_jit = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack


def is_unread(leaves: Sequence[Any]) -> bool:
    """If an operation stands for a clip: it is written down, or leaves have no memory to read."""
    return is_written_down() or is_functionalized() or any(map(has_no_memory, leaves))


def is_written_down() -> bool:
    """If something writes down what operations there are, to run them later."""
    if _is_on(_BEFORE_DISPATCH) or trace_of_jit() is not None:
        return True
    return _is_on(_BY_MODES) and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _MODES
    )


def is_functionalized() -> bool:
    """If `torch.func.functionalize` makes functional what is done.

    Raises:
        NotImplementedError: another transform does so too, of which it knows no operation.
    """
    if not is_transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    if all(each.key() != torch._C._functorch.TransformType.Functionalize for each in stack):
        return False
    if len(stack) > 1:
        raise NotImplementedError(
            "a clip under torch.func.functionalize together with another transform of torch.func; "
            "clip outside of functionalize"
        )
    return True


def check_not_functionalized() -> None:
    """Where gradients are written that `torch.func.functionalize` would have to know of.

    Raises:
        NotImplementedError: it is at work.
    """
    if is_functionalized():
        raise NotImplementedError(
            "gradients are clipped where they lie, which torch.func.functionalize does not follow; "
            "gradclip.clip_by_global_norm returns new tensors"
        )


def is_transformed() -> bool:
    """If a transform of `torch.func` follows what is done."""
    return _transform() is not None


def has_no_memory(leaf: Any) -> bool:
    """If a leaf has no elements that could be read: a meta or fake tensor."""
    leaf = leaf.values if isinstance(leaf, IndexedSlices) else leaf
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor) and leaf.is_meta)


def is_operand(leaf: Any) -> bool:
    """If an operation takes a leaf: a dense tensor, of no type that PyTorch's users have made."""
    return type(leaf) in _OPERANDS and leaf.layout is torch.strided


def check_operands(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Hold leaves against what an operation takes.

    Raises:
        TypeError: a leaf is no dense tensor, or of another dtype than those clipped.
        ValueError: some have memory and some have none.
    """
    empty = [has_no_memory(leaf) for leaf in leaves]
    for place, leaf in enumerate(leaves):
        if not is_operand(leaf):
            raise TypeError(
                f"{path(place)} is {type(leaf).__name__} of layout "
                f"{getattr(leaf, 'layout', None)}; where a clip is traced, or has no memory, "
                "gradclip clips dense tensors"
            )
        if empty[place] and not all(empty):
            raise ValueError(f"{path(place)} has no memory (device {leaf.device})")
    check_dtypes(leaves, path)


def check_writes(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to have it written down that tensors are written to, where that cannot be done."""
    if trace_of_jit() is not None:
        raise NotImplementedError(
            "torch.jit.trace loses what an operation writes where tensors lie; "
            "clip_by_global_norm returns new tensors, and torch.export takes both"
        )
    check_steps(tensors, path)


def check_not_traced() -> None:
    """Refuse what is asked of other workers, where it is written down to be run later.

    Raises:
        NotImplementedError: it is.
    """
    if is_written_down() or is_functionalized():
        raise NotImplementedError(
            "a clip over several workers cannot be traced; clip outside of what is traced"
        )


def is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """If autograd follows what becomes of tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_mapped() -> bool:
    """If a transform of `torch.func`, or forward-mode autograd, follows what is done."""
    return is_transformed() or torch.autograd.forward_ad._current_level >= 0
