"""Files of tensors, by their suffixes, by an index of shards, or all in a folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from gradclip.cli import _checkpoints
from gradclip.cli._checkpoints import Checkpoint
from gradclip.cli._console import note
from gradclip.cli._headers import Tensor, npy, safetensors
from gradclip.cli._pieces import (
    Bytes,
    Change,
    Read,
    TensorFile,
    UnreadableError,
    open_stream,
    pieces,
    reading,
    rewrite_flat,
)
from gradclip.cli._regular import State, open_regular, state

SUFFIXES = (".npy", ".npz", ".safetensors", *_checkpoints.SUFFIXES)

_INDEX = re.compile(r"(\.safetensors|\.bin|\.pth?)\.index(\..+)?\.json$")


class Again(NamedTuple):
    """A file that is given once more, by this name or another."""

    path: Path
    first: Path

    def __str__(self) -> str:
        how = "given again" if self.path == self.first else f"the same file as {self.first}"
        return f"{self.path} is {how}; it is measured once"


class Opened(NamedTuple):
    """What is found at the paths that are given."""

    files: list[TensorFile]
    again: list[Again]
    unreadable: list[UnreadableError]


def given_path(text: str) -> Path:
    """A path of the command line; an empty one, as of a variable not set, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, the numbers in them by what they count: layers.2, layers.10."""
    parts = re.split(r"0*([0-9]+)", name)
    # Of two numbers the one of more digits is larger. Python makes no int of thousands of digits.
    return [(len(part) if at % 2 else 0, part) for at, part in enumerate(parts)]


def is_index(path: Path) -> bool:
    """If it is an index of the shards of a large model."""
    return _INDEX.search(path.name) is not None


def located(path: Path) -> list[Path]:
    """The path itself; for a folder the index in it, or else the files of tensors in it.

    Those are the .safetensors files, for beside a model in one lie the same in another format, the
    state of its optimizer and what has no tensors; where there is none, all of every format.

    Which one of several is read, and which files, is noted on stderr.

    Raises:
        UnreadableError: the folder has none, or several indexes of one format.
    """
    if not path.is_dir():
        return [path]
    with reading(path):
        inside = sorted(path.iterdir(), key=lambda file: natural(file.name))
        indexes = [file for file in inside if is_index(file)]
        if indexes:
            return [_only_index(path, indexes)]
        found = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if not found:
            raise ValueError(f"is a folder with no index and none of {', '.join(SUFFIXES)} in it")
    chosen = [file for file in found if file.suffix.lower() == ".safetensors"] or found
    if len(found) > 1:
        left = [file for file in found if file not in chosen]
        others = f"; left out: {_listed(left)}" if left else ""
        note(f"{path} has no index; read in it: {_listed(chosen)}{others}")
    return chosen


def _only_index(folder: Path, indexes: list[Path]) -> Path:
    """The index of a folder; of a model that is there in two formats that of safetensors."""
    chosen = [file for file in indexes if ".safetensors.index" in file.name] or indexes
    if len(chosen) > 1:
        raise ValueError(
            f"is a folder with {len(chosen)} indexes; name the file: {_listed(chosen)}"
        )
    if len(indexes) > 1:
        note(f"{folder} has {len(indexes)} indexes: {chosen[0].name} is read")
    return chosen[0]


def _listed(files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:3])
    return names + (f" and {len(files) - 3} more" if files[3:] else "")


def open_files(path: Path) -> list[TensorFile]:
    """The file, or the shards that an index names, with their headers checked.

    Raises:
        UnreadableError: it is missing, no regular file, of another format or damaged.
    """
    with reading(path):
        return [*_shards(path)] if is_index(path) else [_open(path)]


def open_once(paths: Iterable[Path]) -> Opened:
    """Every file that is given, once, with a note on stderr of each that comes again."""
    opened = Opened([], [], [])
    seen: dict[tuple[int, int], Path] = {}

    def is_new(path: Path, found: State) -> bool:
        identity = found.device, found.inode
        if identity not in seen:
            seen[identity] = path
            return True
        opened.again.append(Again(path, seen[identity]))
        note(str(opened.again[-1]))
        return False

    def add(path: Path) -> None:
        with reading(path):
            new = not is_index(path) or is_new(path, state(path))
        if new:
            files = open_files(path)
            opened.files.extend(file for file in files if is_new(file.path, file.state))

    for given in paths:
        try:
            found = located(given)
        except UnreadableError as error:
            opened.unreadable.append(error)
            continue
        for path in found:
            try:
                add(path)
            except UnreadableError as error:
                opened.unreadable.append(error)
    return opened


def _open(path: Path) -> TensorFile:
    match path.suffix.lower():
        case ".npy" | ".safetensors":
            return Flat(path)
        case ".npz":
            return Zip(path)
        case suffix if suffix in _checkpoints.SUFFIXES:
            return Checkpoint(path)
    with open_regular(path):  # what is not there, or is no file, is told first
        raise ValueError(
            f"is of another format; gradclip reads {', '.join(SUFFIXES)} files, and the "
            ".safetensors.index.json or .bin.index.json of shards"
        )


def _shards(path: Path) -> Iterator[TensorFile]:
    """The shards of an index, which must name the tensors that they hold."""
    with open_regular(path) as stream:
        index = json.load(stream)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(at, str) for at in places.values()):
        raise ValueError("has no weight_map of tensors to files")
    found = _INDEX.search(path.name)
    suffix = found[1] if found else ""
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or not shard.endswith(suffix):
            raise ValueError(f"names {shard!r}, which is no {suffix} file beside it")
        with reading(path, f"its shard {shard}: "):
            file = _open(path.parent / shard)
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

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """What reads the bytes of a tensor."""
        with open_stream(self.path) as stream:
            yield partial(self._read, stream)

    def _read(self, stream: IO[bytes], tensor: Tensor) -> Iterator[Bytes]:
        with reading(self.path):
            stream.seek(tensor.offset)
        return pieces(self.path, stream, tensor.nbytes, tensor.name)

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        rewrite_flat(self.path, self.tensors, target, change)


class Zip:
    """A zip file whose members are .npy files: .npz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._heads: dict[str, bytes] = {}  # what stands before the bytes of a tensor
        self.tensors: list[Tensor] = []
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            self.state = state(stream.fileno())
            self._comment = archive.comment
            for member in archive.infolist():
                with archive.open(member) as opened:
                    tensor = _tensor(member, opened)
                    opened.seek(0)
                    self._heads[tensor.name] = opened.read(tensor.offset)
                if tensor.name in self._members:
                    raise ValueError("has two members of one name")
                self._members[tensor.name] = member
                self.tensors.append(tensor)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """What reads the bytes of a tensor."""
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open_stream(self.path))
            with reading(self.path):
                archive = stack.enter_context(zipfile.ZipFile(stream))
            yield partial(self._read, archive)

    def _read(self, archive: zipfile.ZipFile, tensor: Tensor) -> Iterator[Bytes]:
        with contextlib.ExitStack() as stack:
            with reading(self.path):
                stream = stack.enter_context(archive.open(self._members[tensor.name]))
                stream.read(tensor.offset)
            yield from pieces(self.path, stream, tensor.nbytes, tensor.name)

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target`` with each piece of each tensor changed."""
        with self.opened() as read, zipfile.ZipFile(target, "w") as archive:
            archive.comment = self._comment
            for tensor in self.tensors:
                member = self._members[tensor.name]
                with archive.open(_like(member), "w", force_zip64=True) as sink:
                    sink.write(self._heads[tensor.name])
                    for piece in read(tensor):
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
