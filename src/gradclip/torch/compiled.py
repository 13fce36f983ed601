"""The public functions where ``torch.compile`` or ``torch.export`` follows them: by operations.

What no operation takes breaks a graph: tensors with gradients that are to be clipped in place,
sparse leaves and subclasses of tensors, a group, a limit that learns, a nest without leaves.
It is clipped where it is
run, as is what is called where a graph has been broken before. Only imported where there is
something to compile, for what compiles takes long to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradclip import _clip
from gradclip.core.decide import OnNonfinite
from gradclip.core.limits import Limit
from gradclip.core.protocol import Flat
from gradclip.core.sparse import IndexedSlices
from gradclip.core.tree import Tree, flatten
from gradclip.torch import library
from gradclip.torch.following import is_operand
from gradclip.torch.tensors import check_dtypes


def clip_by_global_norm(
    t_list: Any, clip_norm: Any, use_norm: Any, on_nonfinite: OnNonfinite, group: Any
) -> tuple[Any, Any]:
    """`gradclip.clip_by_global_norm`."""
    options = {"on_nonfinite": on_nonfinite, "group": group}
    if not torch.compiler.is_compiling():
        return _outside(_clip.clip_by_global_norm, t_list, clip_norm, use_norm, **options)
    t_list = _read_once(t_list)
    tree = None if isinstance(clip_norm, Limit) else _taken_whole(t_list, group)
    if tree is None:
        return _outside(_clip.clip_by_global_norm, t_list, clip_norm, use_norm, **options)
    _clip.check_policy(on_nonfinite)
    norm, _, leaves = library.clip(tree.leaves, tree.path, clip_norm, use_norm, on_nonfinite)
    return tree.rebuild(leaves), norm


def clip_by_global_norm_(
    t_list: Any, clip_norm: Any, use_norm: Any, on_nonfinite: OnNonfinite, group: Any
) -> Any:
    """`gradclip.clip_by_global_norm_`."""
    options = {"on_nonfinite": on_nonfinite, "group": group}
    if not torch.compiler.is_compiling():
        return _outside(_clip.clip_by_global_norm_, t_list, clip_norm, use_norm, **options)
    t_list = _read_once(t_list)
    tree = None if isinstance(clip_norm, Limit) else _taken_whole(t_list, group)
    if tree is None or (torch.is_grad_enabled() and any(x.requires_grad for x in tree.leaves)):
        return _outside(_clip.clip_by_global_norm_, t_list, clip_norm, use_norm, **options)
    _clip.check_policy(on_nonfinite)
    return library.clip_(tree.leaves, tree.path, clip_norm, use_norm, on_nonfinite)


def global_norm(t_list: Any, group: Any) -> Any:
    """`gradclip.global_norm`."""
    if not torch.compiler.is_compiling():
        return _outside(_clip.global_norm, t_list, group=group)
    t_list = _read_once(t_list)
    tree = _taken_whole(t_list, group)
    if tree is None:
        return _outside(_clip.global_norm, t_list, group=group)
    return library.norm(tree.leaves, tree.path)


def norms(t_list: Any, group: Any) -> Any:
    """`gradclip.norms`, which no operation takes."""
    return _outside(_clip.norms, t_list, group=group)


def _read_once(t_list: Any) -> Any:
    return list(t_list) if isinstance(t_list, (Iterator, ValuesView)) else t_list


def _taken_whole(t_list: Any, group: Any) -> Tree | None:
    """A nest taken apart, if its leaves are what an operation takes."""
    tree = flatten(t_list, apart=_as_pytorch_does)
    if group is not None or not tree.leaves or not all(map(is_operand, tree.leaves)):
        return None
    check_dtypes(tree.leaves, tree.path)
    return tree


def _as_pytorch_does(t_list: Any, called: str) -> Flat:
    """As optree does, but for the order of a dict, which changes no bit.

    Of optree the compiler of older versions knows nothing.
    """
    found, spec = pytree.tree_flatten_with_path(t_list, is_leaf=_is_leaf)
    paths = [called + pytree.keystr(path) for path, _ in found]
    every = [leaf for _, leaf in found]
    return every, lambda full: pytree.tree_unflatten(full, spec), paths.__getitem__, lambda: paths


def _is_leaf(node: Any) -> bool:
    return isinstance(node, IndexedSlices)


def _run(function: Callable[..., Any], t_list: Any, *limits: Any, **options: Any) -> Any:
    # A nest that has been taken apart is followed no more: torch.export heeds no `disable`.
    return function(flatten(t_list), *limits, **options)


_outside = torch.compiler.disable(_run)
