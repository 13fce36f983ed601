"""What the tests of the file commands share: making files, reading them back, running gradclip."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gradclip.cli import main

Arrays = dict[str, np.ndarray[Any, Any]]

_CODES = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NUMPY_DTYPES = ["<f2", "<f4", "<f8", "<c8", "<c16", ">f2", ">f4", ">f8", ">c8", ">c16"]
SAFETENSORS_DTYPES = [code for code in _CODES if code[0] not in "IUB" or code == "BF16"]


def numpy_dtype(code: str) -> np.dtype[Any]:
    """The dtype of a name in a .safetensors header, or of NumPy's."""
    return np.dtype(_CODES.get(code, code))


def random(dtype: Any, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * generator.standard_normal(shape)
    return values.astype(dtype)


def save(path: Path, arrays: Arrays, **options: Any) -> Path:
    """Write arrays in the format that the suffix says; an index gets two shards."""
    if path.suffix == ".npy":
        (array,) = arrays.values()
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(arrays, path, **options)
    else:
        _save_shards(path, arrays)
    return path


def _save_shards(path: Path, arrays: Arrays) -> None:
    places = {}
    for shard in (0, 1):
        part = dict(list(arrays.items())[shard::2])
        save_file(part, path.parent / f"m-{shard}.safetensors", metadata={"shard": str(shard)})
        places.update(dict.fromkeys(part, f"m-{shard}.safetensors"))
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def load(path: Path) -> Arrays:
    """The arrays of a file, or of all shards in a folder."""
    if path.is_dir():
        return {
            k: v for shard in sorted(path.glob("*.safetensors")) for k, v in load(shard).items()
        }
    if path.suffix == ".npy":
        return {str(path): np.load(path)}
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    if path.suffix == ".safetensors":
        return _load_safetensors(path.read_bytes())
    return load(path.parent)


def _load_safetensors(raw: bytes) -> Arrays:
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[start:][slice(*entry["data_offsets"])], _CODES[entry["dtype"]])
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
    }


NO_REGULAR_FILES = ("a folder", "a FIFO", "a socket", "a device", "a link to itself")


@contextlib.contextmanager
def no_regular_file(path: Path, kind: str) -> Iterator[None]:
    """Put something that is no regular file at a path."""
    with contextlib.ExitStack() as stack:
        if kind == "a folder":
            path.mkdir()
        elif kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a socket":
            # The path of a socket may have no more than some 100 characters.
            stack.enter_context(contextlib.chdir(path.parent))
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(path.name)
        else:
            path.symlink_to(os.devnull if kind == "a device" else path)
        yield


def header(path: Path) -> bytes:
    """The bytes of a .npy or .safetensors file that are no numbers."""
    raw = path.read_bytes()
    return raw[: len(raw) - sum(array.nbytes for array in load(path).values())]


def members(path: Path) -> list[tuple[Any, ...]]:
    """What a user sees of the members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        return [
            (m.filename, m.compress_type, m.date_time, m.comment, m.external_attr, m.file_size)
            for m in archive.infolist()
        ]


def same(ours: Any, expected: Any) -> bool:
    """If two arrays have the same dtype, shape and bits."""
    return (
        ours.dtype == expected.dtype
        and ours.shape == expected.shape
        and ours.tobytes() == np.ascontiguousarray(expected).tobytes()
    )


def run_main(*arguments: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def command(*arguments: Any) -> list[str]:
    """The command line for a process of its own."""
    return [sys.executable, "-m", "gradclip", *map(str, arguments)]


def run(arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a process to its end."""
    return subprocess.run(
        list(map(str, arguments)),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_process(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return run(command(*arguments), **environment)


def run_on_terminal(*arguments: Any, columns: int = 80, **environment: str) -> tuple[int, str]:
    """Status and output of a process whose stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    settings = {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        command(*arguments), env=inherited | settings, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        output = b""
        # At the end of the other side Linux raises EIO, other systems give no bytes.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 65536):
                output += piece
        os.close(ours)
    return process.returncode, output.decode()


# Runs the command line and reports the largest memory in use, in kB, as the last line.
PEAK = """
import re, sys
from pathlib import Path
from gradclip.cli import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def peak_memory(*arguments: Any) -> int:
    """The largest resident memory, in bytes, of a process that runs the command line."""
    done = run([sys.executable, "-c", PEAK, *arguments])
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout.split()[-1]) * 1024


def sparse_npy(path: Path, size: int) -> Path:
    """A file of ``size`` float32 zeros that takes no room, and a 3 and a 4 at its ends."""
    with path.open("wb") as stream:
        described = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(stream, described)
        stream.write(np.float32(3).tobytes())
        stream.seek(4 * (size - 2), os.SEEK_CUR)
        stream.write(np.float32(4).tobytes())
    return path


@contextlib.contextmanager
def heeded(*numbers: int) -> Iterator[None]:
    """What is started here heeds these signals, of which a shell has its background ignore some."""
    inherited = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, inherited, strict=True):
            signal.signal(number, handler)
