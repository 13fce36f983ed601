"""Files that torch.save has written, read and written by PyTorch, which is imported for them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from gradclip.cli._headers import Tensor, number_of
from gradclip.cli._pieces import PIECE, Bytes, Change, Read, UnreadableError, reading
from gradclip.cli._regular import open_regular, state

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_ADVICE = re.compile(r"Weights only load failed|\(\d\)|Please file an issue")


class Checkpoint:
    """A file of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            self.state = state(stream.fileno())
            self._zipped = stream.read(4) == b"PK\x03\x04"  # as it is since PyTorch 1.6
        self._torch = _imported(path)
        _, self.tensors = self._described(self._load(mapped=self._zipped))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """What reads the bytes of a tensor: one with gaps is taken into memory whole."""
        _, found = self._reloaded(mapped=self._zipped)
        yield partial(self._read, found)

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target``, each storage changed, and so each tensor in it, once."""
        held, found = self._reloaded(mapped=False)
        for tensor, span in self._storages(found):
            for start in range(0, span.size, PIECE):
                span[start : start + PIECE] = change(tensor, span[start : start + PIECE])
        try:
            self._torch.save(held, target, _use_new_zipfile_serialization=self._zipped)
        except RuntimeError as error:  # behind which are a full disk, and signals
            raise error.__context__ or OSError(str(error)) from None

    def _load(self, *, mapped: bool) -> Any:
        """What is in the file.

        Raises:
            ValueError: PyTorch finds it damaged, or not to be loaded without running its code.
        """
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": mapped}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of interfaces of PyTorch's that are to change
                return self._torch.load(self.path, **options)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"torch.load(weights_only=True) fails: {_reason(error)}") from None

    def _described(self, held: Any) -> tuple[list[Any], list[Tensor]]:
        """The tensors in what was loaded, and what there is to say of each."""
        named = [*_named(self._torch, held)]
        tensors = [
            _tensor(name or str(self.path), found, place)
            for place, (name, found) in enumerate(named)
        ]
        return [found for _, found in named], tensors

    def _reloaded(self, *, mapped: bool) -> tuple[Any, list[Any]]:
        """What is in the file once more, and the tensors in that."""
        with reading(self.path):
            held = self._load(mapped=mapped)
            found, tensors = self._described(held)
            if tensors != self.tensors:
                raise ValueError("has changed while gradclip read it")
        return held, found

    def _read(self, found: list[Any], tensor: Tensor) -> Iterator[Bytes]:
        if not tensor.nbytes:
            return
        with reading(self.path):
            flat = _bytes_of(self._torch, found[tensor.offset])
        for start in range(0, tensor.nbytes, PIECE):
            yield flat[start : start + PIECE]

    def _storages(self, found: list[Any]) -> Iterator[tuple[Tensor, Bytes]]:
        """The bytes of each storage with numbers to clip, and a tensor in it."""
        storages: dict[int, tuple[Tensor, Any]] = {}
        for tensor, held in zip(self.tensors, found, strict=True):
            if not tensor.nbytes:
                continue
            storage = held.untyped_storage()
            first, _ = storages.setdefault(storage.data_ptr(), (tensor, storage))
            if first.number != tensor.number:
                dtypes = sorted((first.dtype, tensor.dtype))
                raise UnreadableError(
                    self.path, f"has tensors of {' and '.join(dtypes)} in the same bytes"
                )
        for tensor, storage in storages.values():
            if tensor.number is not None:
                span = self._torch.empty(0, dtype=self._torch.uint8).set_(storage).numpy()
                yield tensor, span[: span.size - span.size % tensor.number.itemsize]


def _imported(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        reason = "is read by PyTorch, which is not installed: pip install torch"
        raise UnreadableError(path, reason) from None
    return torch


def _reason(error: Exception) -> str:
    """What PyTorch says, without its advice to load the file by running the code in it."""
    # Older versions put advice before it, in one line.
    lines = [
        line.rpartition("WeightsUnpickler error: ")[2].strip() for line in str(error).split("\n")
    ]
    told = [line for line in lines if line and not _ADVICE.match(line)] or ["no reason is given"]
    line = re.split(r"\. (?=Please |This |In PyTorch )", told[0])[0]
    way_out = "; save tensors alone, as model.state_dict() has them" if " GLOBAL " in line else ""
    return f"{type(error).__name__}: {line}{way_out}"


def _named(
    torch: Any, held: Any, name: str = "", around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Each tensor in nested containers, under the keys that lead to it, joined by dots.

    Raises:
        ValueError: a container holds itself, or one of tensors has no order.
    """
    if isinstance(held, torch.Tensor):
        yield name, held.detach()
    elif isinstance(held, torch.TypedStorage):
        yield name, torch.empty(0, dtype=held.dtype).set_(held)
    elif isinstance(held, dict | list | tuple):
        if id(held) in around:
            raise ValueError(f"has a container that holds itself at {name!r}")
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            under = f"{name}.{key}" if name else f"{key}"
            yield from _named(torch, item, under, (*around, id(held)))
    elif isinstance(held, set) and any(isinstance(item, torch.Tensor) for item in held):
        raise ValueError(f"has a set of tensors at {name!r}, which have no names; save a list")


def _tensor(name: str, found: Any, place: int) -> Tensor:
    if found.is_nested:  # and has no shape
        return Tensor(name, "nested", (), None, False, place, 0)
    dtype = str(found.dtype).removeprefix("torch.")
    layout = str(found.layout).removeprefix("torch.")
    if found.is_meta:
        dtype = f"meta {dtype}"
    elif layout != "strided":
        dtype = layout
    exempt = re.fullmatch(r"bool|u?int\d+", dtype) is not None
    number = number_of(dtype)
    is_read = exempt or number is not None
    nbytes = found.numel() * found.element_size() if is_read else 0
    return Tensor(name, dtype, tuple(found.shape), number, exempt, place, nbytes)


def _bytes_of(torch: Any, found: Any) -> Bytes:
    """The bytes of a tensor's elements in order, where they lie if they lie so."""
    solid = found.resolve_conj().resolve_neg().contiguous()
    # Not view(-1): an axis of one element keeps its stride, which a view as bytes refuses.
    flat: Bytes = solid.as_strided((solid.numel(),), (1,)).view(torch.uint8).numpy()
    return flat
