"""Files that torch.save has written, of both its formats; read in pieces, without PyTorch."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradclip.cli._headers import Tensor, number_of
from gradclip.cli._pickled import Dtype, Found, Other, Storage, Strided, tensors_in, unpickled
from gradclip.cli._pieces import (
    Bytes,
    Change,
    Read,
    gathered,
    is_dense,
    open_stream,
    pieces,
    reading,
    rewrite_flat,
)
from gradclip.cli._regular import open_regular, state

SUFFIXES = (".pt", ".pth", ".bin")

_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL, _CENTRAL = 30, 46  # bytes of the headers of a member of a zip file
_HAS_DESCRIPTOR = 8  # a flag: the checksum stands behind the bytes


class Place(NamedTuple):
    """Where the bytes of a storage lie, and where their checksum stands, each time."""

    offset: int
    nbytes: int
    checksums: tuple[int, ...] = ()


class Checkpoint:
    """A file of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            self.state = state(stream.fileno())
            held, places = _opened(stream)
        found = list(tensors_in(held))
        self._places = {
            storage.key: _held_place(storage, places)
            for storage in (each.storage for _, each in found if isinstance(each, Strided))
        }
        tensors = [_tensor(name or str(path), each, self._places) for name, each in found]
        self.tensors = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
        self._dtypes: dict[str, set[Dtype]] = {}
        for _, each in found:
            if isinstance(each, Strided):
                self._dtypes.setdefault(each.storage.key, set()).add(each.dtype)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """What reads the bytes of a tensor: one with gaps is taken into memory whole."""
        with open_stream(self.path) as stream:
            yield partial(self._read, stream)

    def _read(self, stream: IO[bytes], tensor: Tensor) -> Iterator[Bytes]:
        with reading(self.path):
            stream.seek(tensor.offset)
        if is_dense(tensor):
            yield from pieces(self.path, stream, tensor.nbytes, tensor.name)
            return
        span = list(pieces(self.path, stream, _span(tensor), tensor.name))
        yield from gathered(tensor, np.concatenate([np.empty(0, np.uint8), *span]))

    def rewrite(self, target: IO[bytes], change: Change) -> None:
        """Write the file to ``target``, each storage changed, and so each tensor in it, once."""
        storages = sorted(map(self._storage, self._places), key=lambda storage: storage.offset)
        sums = dict.fromkeys(self._places, 0)

        def changed(storage: Tensor, piece: Bytes) -> Bytes:
            new = change(storage, piece)
            sums[storage.name] = zlib.crc32(new.data, sums[storage.name])
            return new

        rewrite_flat(self.path, storages, target, changed)
        for key, place in self._places.items():
            for at in place.checksums:
                target.seek(at)
                target.write(struct.pack("<I", sums[key]))

    def _storage(self, key: str) -> Tensor:
        """A storage as a tensor."""
        place, dtypes = self._places[key], sorted(self._dtypes[key])
        numbers = {number_of(dtype) for dtype in dtypes}
        number = numbers.pop()
        with reading(self.path):
            if numbers:
                raise ValueError(f"has tensors of {' and '.join(dtypes)} in the same bytes")
        count = place.nbytes // (number.itemsize if number else 1)
        return Tensor(key, dtypes[0], (count,), number, not number, place.offset, place.nbytes)


def _held_place(storage: Storage, places: dict[str, Place]) -> Place:
    place = places.get(storage.key)
    if place is None or place.nbytes != storage.nbytes:
        size = "no bytes" if place is None else f"{place.nbytes} bytes"
        raise ValueError(f"has {size} for its storage {storage.key}, which takes {storage.nbytes}")
    return place


def _tensor(name: str, found: Found, places: dict[str, Place]) -> Tensor:
    if isinstance(found, Other):
        return Tensor(name, found.kind, found.shape, None, False, 0, 0)
    dtype, shape = found.dtype, found.shape
    count = math.prod(shape)
    exempt = re.fullmatch(r"bool|u?int\d+", dtype) is not None
    offset = places[found.storage.key].offset + found.offset * dtype.itemsize
    nbytes = count * dtype.itemsize
    strides = None if _lies_in_order(found) else found.strides
    return Tensor(name, str(dtype), shape, number_of(dtype), exempt, offset, nbytes, strides)


def _lies_in_order(found: Strided) -> bool:
    expected = 1
    for stride, length in reversed(list(zip(found.strides, found.shape, strict=True))):
        if length not in (0, 1) and stride != expected:
            return False
        expected *= length
    return True


def _span(tensor: Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last one."""
    count = math.prod(tensor.shape)
    if not count:
        return 0
    steps = zip(tensor.shape, tensor.strides or (), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * (tensor.nbytes // count)


# ---- both formats ----


def _opened(stream: IO[bytes]) -> tuple[Any, dict[str, Place]]:
    """What is pickled in a file, and where its storages lie."""
    start = stream.read(4)
    stream.seek(0)
    if start == b"PK\x03\x04":
        with zipfile.ZipFile(stream) as archive:
            return _zipped(stream, archive)
    if start[:1] == b"\x80":
        return _in_sequence(stream)
    raise ValueError("is no file that torch.save has written")


def _zipped(stream: IO[bytes], archive: zipfile.ZipFile) -> tuple[Any, dict[str, Place]]:
    members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError("is a TorchScript archive; save its state_dict() with torch.save")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("has compressed members; torch.save writes none")
    places = dict(_members(stream, members, archive.start_dir))
    folder = next((name[: -len("data.pkl")] for name in places if _is_pickle(name)), None)
    if folder is None:
        raise ValueError("is a zip file with no data.pkl in it, which torch.save has not written")

    def read(name: str) -> bytes:
        stream.seek(places[name].offset)
        return stream.read(places[name].nbytes)

    if f"{folder}byteorder" in places and read(f"{folder}byteorder") != b"little":
        raise ValueError("was written on a big-endian machine, which gradclip does not read")
    held = unpickled(io.BytesIO(read(f"{folder}data.pkl"))).held
    data = f"{folder}data/"
    return held, {
        name.removeprefix(data): at for name, at in places.items() if name.startswith(data)
    }


def _is_pickle(name: str) -> bool:
    return re.fullmatch(r"[^/]*/data\.pkl", name) is not None


def _members(
    stream: IO[bytes], members: Iterable[zipfile.ZipInfo], entry: int
) -> Iterator[tuple[str, Place]]:
    """Each member's place, ``entry`` being where the directory of a zip file starts."""
    for member in members:
        stream.seek(max(member.header_offset, 0))
        header = stream.read(_LOCAL)
        if member.header_offset < 0 or len(header) < _LOCAL or not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"has no member {member.filename!r} where its directory says")
        offset = member.header_offset + _LOCAL + sum(struct.unpack("<HH", header[26:]))
        end = offset + member.file_size
        stream.seek(end)
        behind = stream.read(4)
        checksums = [entry + 16]
        if not member.flag_bits & _HAS_DESCRIPTOR:
            checksums.append(member.header_offset + 14)
        elif behind == b"PK\x07\x08":
            checksums.append(end + 4)
        yield member.filename, Place(offset, member.file_size, tuple(checksums))
        stream.seek(entry)
        central = stream.read(_CENTRAL)
        entry += _CENTRAL + sum(struct.unpack("<HHH", central[28:34]))


def _in_sequence(stream: IO[bytes]) -> tuple[Any, dict[str, Place]]:
    """The format before PyTorch 1.6: pickles one after the other, then the storages."""
    if unpickled(stream).held != _MAGIC:
        raise ValueError("is a pickle that torch.save has not written")
    unpickled(stream)  # the version of the format, which has had one
    system = unpickled(stream).held
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("was written on a big-endian machine, which gradclip does not read")
    held, storages = unpickled(stream)
    places = {}
    for key in unpickled(stream).held:
        length = stream.read(8)
        if key not in storages or len(length) < 8:
            raise ValueError(f"ends before its storage {key}, or has none of that name")
        count, itemsize = int.from_bytes(length, "little"), storages[key].dtype.itemsize
        places[key] = Place(stream.tell(), count * itemsize)
        stream.seek(count * itemsize, 1)
    return held, places
