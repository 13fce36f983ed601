"""Damaged files: both file commands answer in one line, and write all or nothing."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli_files

INDEX = "m.safetensors.index.json"


def _good(name: str) -> bytes:
    arrays = {"w": np.float32([[3, 4]]), "step": np.array([7])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if path.suffix == ".npy":
            arrays.popitem()
        elif path.suffix == ".safetensors":
            arrays["b"] = np.ones(3, ml_dtypes.bfloat16)
        return cli_files.save(path, arrays, **_metadata(name)).read_bytes()


def _metadata(name: str) -> dict[str, Any]:
    return {"metadata": {"a": "b"}} if name.endswith(".safetensors") else {}


def _compressed() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, w=np.arange(100.0), v=np.ones(3, np.complex64))
    return stream.getvalue()


class Files(dict[str, bytes]):
    """Good files; those of PyTorch once they are asked for, where it is installed."""

    def __missing__(self, name: str) -> bytes:
        return self.setdefault(name, _checkpoint(legacy=name == "old.pt"))


def _checkpoint(*, legacy: bool) -> bytes:
    import torch

    base = torch.arange(12.0).reshape(3, 4)
    held = {
        "model": {"w": base, "t": base.t(), "column": base[:, 1]},
        "optimizer": [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), 0.1, None],
        "step": torch.tensor(7),
        "text": "a" * 20,
    }
    stream = io.BytesIO()
    torch.save(held, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


FILES = Files({name: _good(name) for name in ("a.npy", "a.npz", "a.safetensors", INDEX)})
FILES["c.npz"] = _compressed()
NAMES = sorted([*FILES, *(["a.pt", "old.pt"] if find_spec("torch") else [])])


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good file with some of its bytes changed, cut off, doubled, or a length blown up."""
    name = draw(st.sampled_from(NAMES))
    raw = bytearray(FILES[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "double", "length", "digit"])):
            case "flip" if raw:
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if raw:
                raw[at] = draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + draw(st.integers(1, 64))]
            case "insert":
                raw[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "double":
                raw[at:at] = raw[at : at + 32]
            case "length":
                raw[at : at + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
            case "digit":
                digits = [place for place, byte in enumerate(raw) if chr(byte).isdigit()]
                if digits:
                    place = draw(st.sampled_from(digits))
                    raw[place : place + 1] = draw(st.sampled_from([b"9" * 19, b"-1", b"0", b"1e9"]))
    return name, bytes(raw)


garbage = st.tuples(st.sampled_from(NAMES), st.binary(max_size=300))


def check(name: str, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        if name == INDEX:
            for shard, part in enumerate([{"w": np.float32([[3, 4]])}, {"step": np.array([7])}]):
                cli_files.save(Path(folder) / f"m-{shard}.safetensors", part)
        source.write_bytes(raw)
        before = sorted(Path(folder).rglob("*"))
        status, out, err = cli_files.run_main("norm", "--json", source)
        assert status in (0, 2)
        _check_text(status, out, err)
        status, out, err = cli_files.run_main("compare", source, source, "--json")
        assert status in (0, 1, 2)
        _check_text(status, out, err)
        target = Path(folder) / ("out" if name == INDEX else f"out{source.suffix}")
        for policy in ("nan", "raise"):
            arguments = ("--clip-norm", 0.5, "-o", target, "--on-nonfinite", policy, "--json")
            status, out, err = cli_files.run_main("clip", source, *arguments, "--force")
            _check_text(status, out, err)
            assert status in (0, 1, 2)
            assert source.read_bytes() == raw
            if status and policy == "nan":
                assert sorted(Path(folder).rglob("*")) == before


def _check_text(status: int, out: str, err: str) -> None:
    if err:
        assert status
        assert out == ""
        assert err.startswith("gradclip: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert err[:-1].isprintable()
    else:
        json.loads(out)


@settings(max_examples=400, deadline=None)
@given(damaged())
@pytest.mark.slow
def test_damaged_files(file: tuple[str, bytes]) -> None:
    check(*file)


@settings(max_examples=100, deadline=None)
@given(garbage)
@pytest.mark.slow
def test_garbage(file: tuple[str, bytes]) -> None:
    check(*file)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_are_damaged_are_good(name: str) -> None:
    check(name, FILES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_off_anywhere(name: str) -> None:
    for size in range(0, len(FILES[name]), 3):
        check(name, FILES[name][:size])


def test_an_encrypted_member(tmp_path: Path) -> None:
    raw = bytearray(FILES["a.npz"])
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        start = archive.start_dir
    raw[start + 8] |= 1
    (tmp_path / "a.npz").write_bytes(raw)
    check("a.npz", bytes(raw))
    assert cli_files.run_main("norm", tmp_path / "a.npz")[0] == 2
