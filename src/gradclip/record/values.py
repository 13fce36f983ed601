"""Numbers of any framework: kept on the training's thread, read on the writer's.

What the host has is read at once, as it costs nothing and may change. What a device has is copied
there, for its memory may be written in the next step, and read late: many steps in one go, on a
stream of our own, so that neither the training nor its stream waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from gradclip.core.norms import Norms, listed

Floats = list[float]


def kept(value: Any, called: str, *, of_each: bool = False) -> Any:
    """A number that no later step changes: a float, a list of floats, or what a device has.

    Args:
        value: a number, or a scalar of a framework.
        called: its name in an error.
        of_each: if it may be a vector, of groups or tensors.

    Raises:
        TypeError: it is no real number.
    """
    if type(value) is float:
        return value
    _check(value, called, of_each=of_each)
    root = root_of(value)
    if root == "keras":  # a variable
        return kept(value.value, called, of_each=of_each)
    keep = _KEEPING.get(root)
    if keep is not None:
        return keep(value)
    return value.tolist() if hasattr(value, "tolist") else float(value)


def kept_norms(norms: Norms) -> Norms:
    """Norms that no later step changes."""
    values = norms.values
    keep = _COPYING.get(root_of(values))
    return Norms(values if keep is None else keep(values), norms.global_norm, norms._names)


def root_of(value: Any) -> str:
    """The name of the framework that a value is of."""
    return type(value).__module__.partition(".")[0]


def _check(value: Any, called: str, *, of_each: bool) -> None:
    shape = getattr(value, "shape", ())
    kind = str(getattr(value, "dtype", type(value).__name__))
    if "bool" in kind or "complex" in kind or isinstance(value, str | bytes):
        raise TypeError(f"{called} is {value!r}; it must be a real number")
    if len(shape) > of_each:
        wanted = "a number, or a vector of one for each group or tensor" if of_each else "a number"
        raise TypeError(f"{called} has the shape {tuple(shape)}; it must be {wanted}")
    if not hasattr(value, "dtype") and not hasattr(value, "__float__"):
        raise TypeError(
            f"{called} is {type(value).__name__}; it must be a number or a scalar of a framework"
        )


def copied(arrays: Sequence[Any]) -> list[Any]:
    """Copies of JAX's arrays, whose memory a donated argument of the next step may take.

    Raises:
        TypeError: one is traced.
    """
    import jax

    if any(isinstance(each, jax.core.Tracer) for each in arrays):
        raise TypeError("record was called under jax.jit; call it with what the step has returned")
    found: list[Any] = _copying(jax)(list(map(_own, arrays)))
    return found


def _own(array: Any) -> Any:
    """The part of this process, of one that all have: what one alone compiles is of its own."""
    return array if getattr(array, "is_fully_addressable", True) else array.addressable_data(0)


_jitted: list[Any] = []


def _copying(jax: Any) -> Any:
    """One compiled function for all: copies by themselves take several times as long."""
    if not _jitted:
        _jitted.append(jax.jit(lambda arrays: [jax.numpy.copy(each) for each in arrays]))
    return _jitted[0]


def _of_torch(tensor: Any) -> Any:
    return tensor.tolist() if tensor.device.type == "cpu" else tensor.detach().clone()


def _of_tensorflow(value: Any) -> Any:
    tensor = value.read_value() if hasattr(value, "read_value") else value
    if not hasattr(tensor, "numpy"):
        raise TypeError(
            f"record was called in a graph, with {value}; call it outside of tf.function"
        )
    # Nobody writes to one that is on a device.
    return tensor.numpy().tolist() if "CPU" in tensor.device else tensor


_KEEPING: dict[str, Callable[[Any], Any]] = {
    "torch": _of_torch,
    "jax": lambda array: copied([array])[0],
    "jaxlib": lambda array: copied([array])[0],
    "cupy": lambda array: array.copy(),
    "tensorflow": _of_tensorflow,
}


# Nobody writes to those of TensorFlow.
_COPYING: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda array: array.copy(),
    "torch": lambda tensor: tensor.detach().clone(),
    "jax": _KEEPING["jax"],
    "jaxlib": _KEEPING["jaxlib"],
    "cupy": _KEEPING["cupy"],
}


def mark_of(value: Any) -> Any:
    """The place in a stream of CUDA's after which a value of PyTorch is there; else None."""
    first = value[0] if type(value) is list and value else value
    if root_of(first) != "torch" or first.device.type != "cuda":
        return None
    import torch

    mark: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    mark.record(torch.cuda.current_stream(first.device))
    return mark


class Reader:
    """Reads what devices have. On the writer's thread, which waits."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}

    def read(self, values: Iterable[Any], marks: Iterable[Any] = ()) -> list[Floats]:
        """Each value as a list of floats.

        Args:
            values: as `kept` has left them, and lists of such.
            marks: after which they are there.
        """
        found = [list(value) if isinstance(value, list) else [value] for value in values]
        late = [
            (numbers, place)
            for numbers in found
            for place, number in enumerate(numbers)
            if not isinstance(number, float)
        ]
        torch = [each for each in late if root_of(each[0][each[1]]) == "torch"]
        self._read_torch(torch, [mark for mark in marks if mark is not None])
        for numbers, place in late:
            if not isinstance(numbers[place], list):
                numbers[place] = floats(numbers[place])
        return [_flat(numbers) for numbers in found]

    def _read_torch(self, late: list[tuple[list[Any], int]], marks: Sequence[Any]) -> None:
        """Put lists of floats in the place of tensors: one copy for each kind of them."""
        kinds: dict[Any, list[tuple[list[Any], int]]] = {}
        for numbers, place in late:
            tensor = numbers[place]
            kinds.setdefault((tensor.device, tensor.dtype), []).append((numbers, place))
        for (device, _), several in kinds.items():
            tensors = [numbers[place].detach().reshape(-1) for numbers, place in several]
            read = map(float, self._joined(device, tensors, marks))
            for (numbers, place), tensor in zip(several, tensors, strict=True):
                numbers[place] = list(islice(read, tensor.shape[0]))

    def _joined(self, device: Any, tensors: list[Any], marks: Sequence[Any]) -> Any:
        import torch

        if device.type != "cuda":
            return torch.cat(tensors).tolist()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[device]):
            for mark in marks:
                mark.wait(self._streams[device])
            return torch.cat(tensors).tolist()


def floats(value: Any) -> Floats:
    """A scalar or vector of any framework, once it is there."""
    read = value if isinstance(value, int) else listed(value)
    return list(map(float, read)) if isinstance(read, list) else [float(read)]


def _flat(numbers: list[Any]) -> Floats:
    return [x for each in numbers for x in (each if isinstance(each, list) else [each])]


# ---- of several, one for each group or tensor, the number of the whole ----


def whole(numbers: Floats) -> float:
    """The norm of the whole, of those of its parts; the limit, of their limits."""
    if len(numbers) == 1:
        return numbers[0]
    # For hypot an inf beside a NaN is an inf.
    return math.nan if any(map(math.isnan, numbers)) else math.hypot(*numbers)


def least(numbers: Floats) -> float:
    """The least factor; NaN if one is."""
    return math.nan if any(map(math.isnan, numbers)) else min(numbers, default=1.0)
