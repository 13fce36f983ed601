"""PyTorch's FullyShardedDataParallel (FSDP1): with whom a process holds its flat parameters.

Such a parameter says that it is one, and not with whom: that is known to its handle, to which only
the model leads. So handles are looked for among all objects, the first time that one is needed.
Nothing is done where no parameter is marked.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

_handles: weakref.WeakSet[Any] = weakref.WeakSet()


class Shards(NamedTuple):
    """Parameters of which the processes of a group hold parts."""

    group: Any
    whole: list[Tensor]  # those beside them, which each process has all of


def module() -> Any:
    """Where their class is defined; None where nobody has imported it."""
    # By attributes, for torch.compile, which would look at every module in sys.modules.
    return getattr(getattr(dist, "fsdp", None), "_flat_param", None)


def shards(parameters: Sequence[Any]) -> Shards | None:
    """What is sharded of parameters, if anything is.

    Raises:
        ValueError: it is not known, or not the same for all of them, who has the other parts.
        RuntimeError: it is not known if gradients are parts.
    """
    marked = [each for each in parameters if getattr(each, "_fsdp_flattened", False)]
    if not marked:
        return None
    known = _owners(marked)
    owners = {id(owner): owner for owner in (known[id(each)] for each in marked)}.values()
    sharding = [owner for owner in owners if _is_sharded(owner)]
    if not sharding:
        return None
    summoned = any(owner._training_state.name == "SUMMON_FULL_PARAMS" for owner in sharding)
    if summoned or any(map(_has_whole_gradient, sharding)):
        raise RuntimeError(
            "within FullyShardedDataParallel.summon_full_params, and after a backward pass within "
            "no_sync(), gradients may be parts or whole; clip after a backward pass without them"
        )
    if any(owner._fsdp_extension is not None for owner in sharding):
        raise ValueError(
            "parameters are sharded by FullyShardedDataParallel and by tensor parallelism, and it "
            "is not known what counts once; fully_shard (FSDP2) makes DTensors, which say so"
        )
    groups = {tuple(dist.get_process_group_ranks(owner.process_group)) for owner in sharding}
    if len(groups) > 1:
        raise ValueError(
            "parameters are sharded by FullyShardedDataParallel over the ranks "
            f"{sorted(groups)}; say by `group` who takes part"
        )
    whole = [each for each in parameters if not _is_sharded(known.get(id(each)))]
    return Shards(sharding[0].process_group, whole)


def _owners(marked: Sequence[Tensor]) -> dict[int, Any]:
    """The handles of parameters, by their ids, and of others."""
    known = dict(_held(_handles))
    if all(id(each) in known for each in marked):
        return known
    kind = module().FlatParamHandle
    _handles.update(each for each in gc.get_objects() if issubclass(type(each), kind))
    known = dict(_held(_handles))
    if all(id(each) in known for each in marked):
        return known
    raise ValueError(
        "a parameter is sharded by FullyShardedDataParallel, and the model that knows with whom is "
        "not found (gc.freeze() hides it); say by `group` who takes part: model.process_group"
    )


def _held(handles: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The ids of what is in flat parameters and of themselves, while the handles keep them."""
    for handle in handles:
        flat = handle.flat_param
        for each in (flat, *(flat._params or ()), *(flat._shared_params or ())):
            yield id(each), handle


def _has_whole_gradient(handle: Any) -> bool:
    """If the gradient of a sharded parameter has not been reduced to a shard."""
    flat = handle.flat_param
    whole, shard = flat._unpadded_unsharded_size.numel(), flat._sharded_size.numel()
    return flat.grad is not None and flat.grad.numel() >= whole > shard


def _is_sharded(handle: Any) -> bool:
    """If a process has a part of its gradients: not under NO_SHARD."""
    return handle is not None and bool(handle.uses_sharded_strategy)
