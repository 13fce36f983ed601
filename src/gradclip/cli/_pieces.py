"""Reading files of tensors piece by piece, and what a file of them is to the commands."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.cli._console import CliError
from gradclip.cli._headers import Tensor
from gradclip.cli._regular import State, open_regular, state

PIECE = 1 << 21  # which the caches hold

Bytes = npt.NDArray[np.uint8]
Change = Callable[[Tensor, Bytes], Bytes]
Read = Callable[[Tensor], Iterator[Bytes]]


class UnreadableError(CliError):
    """A file that cannot be read, and why."""

    def __init__(self, file: Path, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


class TensorFile(Protocol):
    """A file that can be read, and written again with other numbers in it."""

    path: Path
    state: State  # when its headers were read
    tensors: list[Tensor]

    def opened(self) -> contextlib.AbstractContextManager[Read]:
        """What reads the bytes of a tensor, while the file is open; one after the other."""

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""


def nbytes_of(files: Sequence[TensorFile]) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for file in files for tensor in file.tensors)


@contextlib.contextmanager
def reading(path: Path, about: str = "") -> Iterator[None]:
    """Turn whatever the libraries make of a damaged file into one line."""
    try:
        yield
    except CliError:
        raise
    except OSError as error:
        raise UnreadableError(path, f"{about}{error.strerror or error}") from None
    except Exception as error:
        raise UnreadableError(path, f"{about}{str(error) or type(error).__name__}") from None


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """A file to read; what the block around it raises is not taken for an error of reading."""
    with contextlib.ExitStack() as stack:
        with reading(path):
            stream = stack.enter_context(open_regular(path))
        yield stream


def pieces(path: Path, stream: IO[bytes], nbytes: int, what: str) -> Iterator[Bytes]:
    """Bytes of a stream; not mapped, for a file cut off meanwhile would end the process."""
    for start in range(0, nbytes, PIECE):
        size = min(PIECE, nbytes - start)
        with reading(path):
            piece = np.frombuffer(stream.read(size), np.uint8)
            if piece.size < size:
                raise ValueError(f"{what} ends {size - piece.size} bytes too early")
        yield piece


def contents(path: Path) -> Iterator[bytes]:
    """All bytes of a file, in pieces."""
    with reading(path), open_regular(path) as stream:
        while piece := stream.read(PIECE):
            yield piece


def rewrite_flat(path: Path, tensors: Sequence[Tensor], target: IO[bytes], change: Change) -> None:
    """Write a file to ``target``, its tensors changed, all that is between them as it is."""
    with open_stream(path) as stream:
        end = 0
        for tensor in tensors:
            for gap in pieces(path, stream, tensor.offset - end, "the file"):
                target.write(gap.data)
            for piece in pieces(path, stream, tensor.nbytes, tensor.name):
                target.write(change(tensor, piece).data)
            end = tensor.offset + tensor.nbytes
        while rest := stream.read(PIECE):
            target.write(rest)


def check_unchanged(files: Sequence[TensorFile]) -> None:
    """Hold files that have been read against what they were at first.

    Raises:
        UnreadableError: another has written to one, and what was read may be of both.
    """
    for file in files:
        with reading(file.path):
            if state(file.path) != file.state:
                raise ValueError("has changed while gradclip read it")


# ---- elements that do not lie in order ----


def in_order(tensor: Tensor, found: Iterator[Bytes]) -> Iterator[Bytes]:
    """The elements in the order of their indices, the last one first.

    Those of a file lie so, but for a tensor that was transposed: that one is taken into memory.
    """
    if tensor.strides is None:
        yield from found
        return
    count = math.prod(tensor.shape)
    if not count:
        return
    span = np.concatenate([*found])
    itemsize = tensor.nbytes // count
    array: npt.NDArray[Any] = np.lib.stride_tricks.as_strided(
        span.view(f"V{itemsize}"),
        tensor.shape,
        [stride * itemsize for stride in tensor.strides],
        writeable=False,
    )
    step = max(1, PIECE // itemsize)
    for start in range(0, count, step):
        yield array.flat[start : start + step].view(np.uint8)
