"""Files of tensors: .npy, .npz, .safetensors and its index of shards; read in pieces, in order."""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.cli._console import CliError
from gradclip.cli._headers import Tensor, npy, safetensors

PIECE = 1 << 24

Bytes = npt.NDArray[np.uint8]
Change = Callable[[Tensor, Bytes], Bytes]


class Part(NamedTuple):
    """A tensor, the bytes that stand before it, and its own, which are to be read to their end."""

    tensor: Tensor
    head: bytes
    pieces: Iterator[Bytes]


class TensorFile(Protocol):
    """A file that can be read, and written again with other numbers in it."""

    path: Path
    nbytes: int  # of all the pieces

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""


def is_index(path: Path) -> bool:
    """If it is an index of the shards of a large model."""
    return re.search(r"\.safetensors\.index(\..+)?\.json$", path.name) is not None


def open_files(path: Path) -> list[TensorFile]:
    """The file, or the shards that an index names, with their headers checked.

    Raises:
        CliError: it is missing, of another format or damaged.
    """
    with _reading(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("is no regular file")
        return [*_shards(path)] if is_index(path) else [_open(path)]


def _open(path: Path) -> TensorFile:
    match path.suffix.lower():
        case ".npy":
            with path.open("rb") as stream:
                return Flat(path, [npy(str(path), stream, path.stat().st_size)])
        case ".npz":
            return Zip(path)
        case ".safetensors":
            return Flat(path, safetensors(path))
    raise ValueError(
        "is of another format; gradclip reads .npy, .npz, .safetensors "
        "and .safetensors.index.json files"
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever the libraries make of a damaged file into one line."""
    try:
        yield
    except CliError:
        raise
    except OSError as error:
        raise CliError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        raise CliError(f"{path}: {str(error) or type(error).__name__}") from None


def _shards(path: Path) -> Iterator[TensorFile]:
    """The shards of an index, which must name the tensors that they hold."""
    index = json.loads(path.read_bytes())
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(at, str) for at in places.values()):
        raise ValueError("has no weight_map of tensors to files")
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"names {shard!r}, which is no .safetensors file beside it")
        with _reading(path.parent / shard):
            tensors = safetensors(path.parent / shard)
        listed = {name for name, at in places.items() if at == shard}
        wrong = listed.symmetric_difference(tensor.name for tensor in tensors)
        if wrong:
            raise ValueError(f"and {shard} differ on whether {min(wrong)!r} is in it")
        yield Flat(path.parent / shard, tensors)


class Flat:
    """A file in which the tensors lie as they are, one after the other."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self.path = path
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self._tensors = tensors

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""
        with _reading(self.path), self.path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        end = 0
        for tensor in self._tensors:
            yield Part(tensor, mapped[end : tensor.offset], _mapped_pieces(mapped, tensor))
            end = tensor.offset + tensor.nbytes

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        for tensor, head, pieces in self.walk():
            target.write(head)
            for piece in pieces:
                target.write(change(tensor, piece).data)


def _mapped_pieces(mapped: mmap.mmap, tensor: Tensor) -> Iterator[Bytes]:
    end = tensor.offset + tensor.nbytes
    for start in range(tensor.offset, end, PIECE):
        size = min(PIECE, end - start)
        yield np.frombuffer(mapped, np.uint8, size, start)
        if hasattr(mmap, "MADV_DONTNEED"):  # else all that was read counts as memory in use
            page = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, page, start + size - page)


class Zip:
    """A zip file whose members are .npy files: .npz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._members = archive.infolist()
            self._comment = archive.comment
        self.nbytes = sum(member.file_size for member in self._members)
        if len({member.filename for member in self._members}) < len(self._members):
            raise ValueError("has two members of one name")

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            for member in self._members:
                with archive.open(member) as stream:
                    tensor = _tensor(member, stream)
                    stream.seek(0)
                    head = stream.read(tensor.offset)
                    yield Part(tensor, head, self._pieces(stream, tensor))

    def _pieces(self, stream: IO[bytes], tensor: Tensor) -> Iterator[Bytes]:
        for start in range(0, tensor.nbytes, PIECE):
            size = min(PIECE, tensor.nbytes - start)
            with _reading(self.path):
                piece = np.frombuffer(stream.read(size), np.uint8)
                if piece.size < size:
                    raise ValueError(f"{tensor.name} ends {size - piece.size} bytes too early")
            yield piece

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        with zipfile.ZipFile(target, "w") as archive:
            archive.comment = self._comment
            for member, (tensor, head, pieces) in zip(self._members, self.walk(), strict=True):
                with archive.open(_like(member), "w", force_zip64=True) as sink:
                    sink.write(head)
                    for piece in pieces:
                        sink.write(change(tensor, piece).data)


def _tensor(member: zipfile.ZipInfo, stream: IO[bytes]) -> Tensor:
    magic = np.lib.format.MAGIC_PREFIX
    if stream.read(len(magic)) != magic:
        return Tensor(member.filename, "no array", (), None, True, 0, member.file_size)
    stream.seek(0)
    try:
        return npy(member.filename.removesuffix(".npy"), stream, member.file_size)
    except ValueError as error:
        raise ValueError(f"{member.filename}: {error}") from None


def _like(member: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """A new entry with what a user can see of another."""
    new = zipfile.ZipInfo(member.filename, member.date_time)
    new.compress_type = member.compress_type
    new.comment = member.comment
    new.create_system = member.create_system
    new.external_attr = member.external_attr
    return new
