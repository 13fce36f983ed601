"""Files of tensors: .npy, .npz, .safetensors and its index of shards; read in pieces, in order."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.cli._console import CliError, note
from gradclip.cli._headers import Tensor, npy, safetensors
from gradclip.cli._regular import State, open_regular, state

PIECE = 1 << 21  # which the caches hold

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
    state: State  # when its headers were read
    nbytes: int  # of all the pieces

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""


class Again(NamedTuple):
    """A file that is given once more, by this name or another."""

    path: Path
    first: Path

    def __str__(self) -> str:
        how = "given again" if self.path == self.first else f"the same file as {self.first}"
        return f"{self.path} is {how}; it is measured once"


def given_path(text: str) -> Path:
    """A path of the command line; an empty one, as of a variable not set, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def is_index(path: Path) -> bool:
    """If it is an index of the shards of a large model."""
    return re.search(r"\.safetensors\.index(\..+)?\.json$", path.name) is not None


def located(path: Path) -> Path:
    """The path itself; for a folder the index in it, or else its only .safetensors file.

    Raises:
        CliError: the folder has none, or several.
    """
    if not path.is_dir():
        return path
    with _reading(path):
        inside = sorted(path.iterdir())
        indexes = [file for file in inside if is_index(file)]
        found = indexes or [file for file in inside if file.suffix.lower() == ".safetensors"]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(
                "is a folder with no .safetensors.index.json and no .safetensors file in it"
            )
        kind = "indexes" if indexes else ".safetensors files and no index"
        names = ", ".join(file.name for file in found[:3]) + (", ..." if found[3:] else "")
        raise ValueError(f"is a folder with {len(found)} {kind}; name the file: {names}")


def open_files(path: Path) -> list[TensorFile]:
    """The file, or the shards that an index names, with their headers checked.

    Raises:
        CliError: it is missing, no regular file, of another format or damaged.
    """
    with _reading(path):
        return [*_shards(path)] if is_index(path) else [_open(path)]


def open_once(paths: Iterable[Path]) -> tuple[list[TensorFile], list[Again]]:
    """Every file that is given, once, with a note on stderr of each that comes again."""
    files: list[TensorFile] = []
    again: list[Again] = []
    seen: dict[tuple[int, int], Path] = {}

    def is_new(path: Path, found: State) -> bool:
        identity = found.device, found.inode
        if identity not in seen:
            seen[identity] = path
            return True
        again.append(Again(path, seen[identity]))
        note(str(again[-1]))
        return False

    for path in map(located, paths):
        with _reading(path):
            new = not is_index(path) or is_new(path, state(path))
        if new:
            files += [file for file in open_files(path) if is_new(file.path, file.state)]
    return files, again


def check_unchanged(files: Iterable[TensorFile]) -> None:
    """Hold files that have been read against what they were at first.

    Raises:
        CliError: another has written to one, and what was read may be of both.
    """
    for file in files:
        with _reading(file.path):
            if state(file.path) != file.state:
                raise ValueError("has changed while gradclip read it")


def contents(path: Path) -> Iterator[bytes]:
    """All bytes of a file, in pieces."""
    with _reading(path), open_regular(path) as stream:
        while piece := stream.read(PIECE):
            yield piece


@contextlib.contextmanager
def _reading(place: object) -> Iterator[None]:
    """Turn whatever the libraries make of a damaged file into one line."""
    try:
        yield
    except CliError:
        raise
    except OSError as error:
        raise CliError(f"{place}: {error.strerror or error}") from None
    except Exception as error:
        raise CliError(f"{place}: {str(error) or type(error).__name__}") from None


def _open(path: Path) -> TensorFile:
    match path.suffix.lower():
        case ".npy" | ".safetensors":
            return Flat(path)
        case ".npz":
            return Zip(path)
    with open_regular(path):  # what is not there, or is no file, is told first
        raise ValueError(
            "is of another format; gradclip reads .npy, .npz, .safetensors "
            "and .safetensors.index.json files"
        )


def _shards(path: Path) -> Iterator[TensorFile]:
    """The shards of an index, which must name the tensors that they hold."""
    with open_regular(path) as stream:
        index = json.load(stream)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(at, str) for at in places.values()):
        raise ValueError("has no weight_map of tensors to files")
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"names {shard!r}, which is no .safetensors file beside it")
        with _reading(f"{path}: its shard {shard}"):
            file = Flat(path.parent / shard)
        listed = {name for name, at in places.items() if at == shard}
        wrong = listed.symmetric_difference(tensor.name for tensor in file.tensors)
        if wrong:
            raise ValueError(f"and {shard} differ on whether {min(wrong)!r} is in it")
        yield file


class Flat:
    """A file in which the tensors lie as they are, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            self.state = state(stream.fileno())
            if path.suffix.lower() == ".npy":
                self.tensors = [npy(str(path), stream, self.state.size)]
            else:
                self.tensors = safetensors(path, stream)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""
        with _reading(self.path), open_regular(self.path) as stream:
            end = 0
            for tensor in self.tensors:
                head = stream.read(tensor.offset - end)
                yield Part(tensor, head, _pieces(self.path, stream, tensor))
                end = tensor.offset + tensor.nbytes

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        for tensor, head, pieces in self.walk():
            target.write(head)
            for piece in pieces:
                target.write(change(tensor, piece).data)


class Zip:
    """A zip file whose members are .npy files: .npz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            self.state = state(stream.fileno())
            self._members = archive.infolist()
            self._comment = archive.comment
        self.nbytes = sum(member.file_size for member in self._members)
        if len({member.filename for member in self._members}) < len(self._members):
            raise ValueError("has two members of one name")

    def walk(self) -> Iterator[Part]:
        """Each tensor in turn."""
        with (
            _reading(self.path),
            open_regular(self.path) as file,
            zipfile.ZipFile(file) as archive,
        ):
            for member in self._members:
                with archive.open(member) as stream:
                    tensor = _tensor(member, stream)
                    stream.seek(0)
                    head = stream.read(tensor.offset)
                    yield Part(tensor, head, _pieces(self.path, stream, tensor))

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        with zipfile.ZipFile(target, "w") as archive:
            archive.comment = self._comment
            for member, (tensor, head, pieces) in zip(self._members, self.walk(), strict=True):
                with archive.open(_like(member), "w", force_zip64=True) as sink:
                    sink.write(head)
                    for piece in pieces:
                        sink.write(change(tensor, piece).data)


def _pieces(path: Path, stream: IO[bytes], tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a tensor; not mapped, for a file cut off meanwhile would end the process."""
    for start in range(0, tensor.nbytes, PIECE):
        size = min(PIECE, tensor.nbytes - start)
        with _reading(path):
            piece = np.frombuffer(stream.read(size), np.uint8)
            if piece.size < size:
                raise ValueError(f"{tensor.name} ends {size - piece.size} bytes too early")
        yield piece


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
