"""``gradclip norm``: figures, formats, text, damaged files, memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import random, run_main, run_on_terminal, run_process, save
from gradclip.cli._regular import open_regular

INDEX = "model.safetensors.index.json"


def report(*paths: Path) -> dict[str, Any]:
    status, out, err = run_main("norm", "--json", *paths)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def check(path: Path) -> None:
    """Hold every figure of a file against the arrays in it."""
    arrays = cli_files.load(path)
    found = report(path)
    whole = gradclip.global_norm(list(arrays.values()))
    assert (found["norm"], found["norm_dtype"]) == (float(whole), whole.dtype.name)
    assert {tensor["name"] for tensor in found["tensors"]} == set(arrays)
    for tensor in found["tensors"]:
        array = arrays[tensor["name"]]
        norm = gradclip.global_norm(array)
        assert (tensor["norm"], tensor["norm_dtype"]) == (float(norm), norm.dtype.name)
        assert tensor["shape"] == list(array.shape)
        wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
        assert tensor["largest"] == np.abs(wide).max(initial=0)
        assert (tensor["nan"], tensor["inf"]) == (0, 0)
        assert tensor["share"] == pytest.approx(float(norm) ** 2 / float(whole) ** 2, rel=1e-6)


# ---- figures ----


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", cli_files.NUMPY_DTYPES)
def test_npy_and_npz(tmp_path: Path, dtype: str) -> None:
    array = random(dtype, 17, 31)
    check(save(tmp_path / "a.npy", {"a": array}))
    check(save(tmp_path / "f.npy", {"a": np.asfortranarray(array)}))
    check(save(tmp_path / "a.npz", {"a": array, "b": random(dtype, 5), "c/d": random("f4", 7)}))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("code", cli_files.SAFETENSORS_DTYPES)
@pytest.mark.parametrize("name", ["a.safetensors", INDEX])
def test_safetensors(tmp_path: Path, name: str, code: str) -> None:
    dtype = cli_files.numpy_dtype(code)
    arrays = {"a": random(dtype, 17, 31), "b": random(dtype, 5), "c": random("f4", 3)}
    check(save(tmp_path / name, arrays))


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_scalars_and_empty_arrays(tmp_path: Path, name: str) -> None:
    arrays = {"scalar": np.array(3.0), "empty": np.zeros((0, 4), "f4"), "also": np.array([4.0])}
    check(save(tmp_path / name, arrays))


def test_compressed_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=random("f4", 1000), b=np.zeros(10**5))
    check(tmp_path / "a.npz")


def test_a_header_that_leaves_the_data_unaligned(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   '
    raw = len(text).to_bytes(8, "little") + text + np.float32([3, 4]).tobytes()
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert len(raw) % 4
    assert report(tmp_path / "a.safetensors")["norm"] == 5


def test_several_files_have_one_norm(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / "a.npy", {"a": random("f8", 100)}),
        save(tmp_path / "b.npz", {"a": random("f4", 100), "b": random("c8", 100)}),
        save(tmp_path / "c.safetensors", {"a": random(ml_dtypes.bfloat16, 100)}),
    ]
    leaves = [array for path in paths for array in cli_files.load(path).values()]
    found = report(*paths)
    assert found["norm"] == float(gradclip.global_norm(leaves))
    assert [tensor["file"] for tensor in found["tensors"]] == [
        str(paths[place]) for place in (0, 1, 1, 2)
    ]
    assert math.fsum(tensor["share"] for tensor in found["tensors"]) == pytest.approx(1)


def test_counts_of_nan_and_inf(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    real = np.float32([nan, inf, -inf, 3, -4])
    parts = [complex(nan, inf), complex(inf, 1), complex(inf, -inf), complex(1, nan), 3 + 4j]
    path = save(tmp_path / "a.npz", {"a": real, "c": np.array(parts, np.complex64)})
    found = report(path)
    assert (found["norm"], found["nan"], found["inf"]) == ("nan", 3, 4)
    assert [(t["norm"], t["nan"], t["inf"]) for t in found["tensors"]] == [
        ("nan", 1, 2),
        ("nan", 2, 2),
    ]
    assert [t["largest"] for t in found["tensors"]] == [4, 5]
    assert [t["share"] for t in found["tensors"]] == [None, None]


def test_a_norm_too_large_for_its_dtype_is_inf_without_any_inf(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.full(4, 3e38, np.float32)})
    found = report(path)
    assert (found["norm"], found["inf"], found["tensors"][0]["share"]) == ("inf", 0, 1.0)


def test_a_norm_of_zero_has_no_shares(tmp_path: Path) -> None:
    found = report(save(tmp_path / "a.npy", {"a": np.zeros(4)}))
    assert (found["norm"], found["tensors"][0]["share"]) == (0, None)


def test_what_is_not_counted_is_listed(tmp_path: Path) -> None:
    arrays = {
        "step": np.array(7),
        "mask": np.array([True]),
        "word": np.array(["ä"]),
        "w": np.array([3.0, 4]),
        "long": np.ones(1, np.longdouble),
        "bf16": np.ones(2, ml_dtypes.bfloat16),
    }
    path = save(tmp_path / "a.npz", arrays)
    found = report(path)
    assert found["norm"] == 5
    assert {t["name"]: t["counted"] for t in found["tensors"]} == dict.fromkeys(arrays, False) | {
        "w": True
    }
    _, out, _ = run_main("norm", path)
    assert out.splitlines()[-3:] == [
        "global norm 5.0 (float64) of 1 tensor, 16 bytes",
        "not counted: 3 tensors, 13 bytes, no floating point (<U1, bool, int64)",
        "not counted: 2 tensors, 20 bytes, a dtype gradclip cannot read (float128, |V2)",
    ]


def test_a_dtype_of_the_library_that_gradclip_does_not_clip_is_listed(tmp_path: Path) -> None:
    raw = {"e8m0": np.ones(4, np.uint8), "w": np.array([3.0, 4])}
    text = json.dumps(
        {
            "e8m0": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
            "w": {"dtype": "F64", "shape": [2], "data_offsets": [4, 20]},
        }
    ).encode()
    parts = [len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in raw.values())]
    (tmp_path / "a.safetensors").write_bytes(b"".join(parts))
    found = report(tmp_path / "a.safetensors")
    assert [(t["dtype"], t["counted"]) for t in found["tensors"]] == [
        ("F8_E8M0", False),
        ("float64", True),
    ]


def test_a_file_of_no_tensors(tmp_path: Path) -> None:
    found = report(save(tmp_path / "a.safetensors", {}))
    assert (found["norm"], found["norm_dtype"], found["tensors"]) == (0, "float32", [])


# ---- text ----


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.npz"), {"head": np.float32([[3, 0]]), "step": np.array(7), "t": np.float32([4])})
    assert run_main("norm", "a.npz") == (0, TABLE, "")


TABLE = """\

 tensor  dtype     shape  norm  share %  largest  NaN  inf
 ─────────────────────────────────────────────────────────
 head    float32     1x2   3.0    36.00        3    0    0
 step    int64    scalar     -        -        -    -    -
 t       float32       1   4.0    64.00        4    0    0

global norm 5.0 (float32) of 2 tensors, 12 bytes
not counted: 1 tensor, 8 bytes, no floating point (int64)
"""


def test_the_table_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.npz"), {"w": np.float32([3])})
    save(Path("b.npy"), {"w": np.float64([4])})
    save(Path(INDEX), {"v": np.float32([math.nan]), "w": np.float32([12])})
    _, out, _ = run_main("norm", "a.npz", "b.npy", INDEX)
    assert out == SEVERAL


SEVERAL = """\

 tensor  dtype    shape  norm  share %  largest  NaN  inf
 ────────────────────────────────────────────────────────
 a.npz
   w     float32      1   3.0        -        3    0    0
 b.npy   float64      1   4.0        -        4    0    0
 m-0.safetensors
   v     float32      1   nan        -        0    1    0
 m-1.safetensors
   w     float32      1  12.0        -       12    0    0

global norm nan (float64) of 4 tensors, 20 bytes
"""


def test_names_are_shown_as_they_are_but_for_control_characters(tmp_path: Path) -> None:
    name = "[red]ä\x1b[31m\n\u202e😀"
    path = save(tmp_path / "a.safetensors", {name: np.float32([1])})
    _, out, _ = run_main("norm", path)
    assert " [red]ä\\x1b[31m\\n\\u202e😀 " in out
    assert "\x1b" not in out
    assert report(path)["tensors"][0]["name"] == name


def test_columns_stay_in_line_under_wide_and_combining_signs(tmp_path: Path) -> None:
    # Of four columns each.
    names = ["abcd", "\u5b57\u5b57", "a\u0308bcd", "\U0001f600cd", "\uff21\uff22"]
    path = save(tmp_path / "a.safetensors", {name: np.float32([1]) for name in names})
    _, out, _ = run_main("norm", path)
    assert all(f" {name}    float32      1   1.0  " in out for name in names)


def test_names_in_an_encoding_that_cannot_write_them(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"ä": np.float32([1])})
    done = run_process("norm", path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe4" in done.stdout


def test_no_escapes_in_a_pipe(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.float32([math.nan])})
    done = run_process("norm", path, FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout


def test_a_terminal_has_a_bar_and_colour(tmp_path: Path) -> None:
    status, seen = run_on_terminal("norm", save(tmp_path / "a.npy", {"a": np.float32([math.nan])}))
    assert status == 0
    assert "measuring" in seen
    assert "\x1b[31m" in seen
    assert "global norm nan (float32) of 1 tensor, 4 bytes" in seen


def test_no_color(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.float32([math.nan])})
    _, seen = run_on_terminal("norm", path, NO_COLOR="1")
    assert "\x1b[31m" not in seen
    assert "\x1b[38" not in seen


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    names = [f"model.layers.{n}.self_attention.query.weight" for n in range(3)]
    path = save(tmp_path / "m.safetensors", {name: random("f4", 256, 256) for name in names})
    _, seen = run_on_terminal("norm", path, columns=columns, NO_COLOR="1")
    table = seen.partition("tensor")[2].replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, table.splitlines())) <= columns
    assert all(name in table for name in names)


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", {f"{n}": np.ones(1) for n in range(1500)})
    with subprocess.Popen(
        cli_files.command("norm", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_to_a_full_disk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.ones(1)})
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            cli_files.command("norm", path), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (2, b"gradclip: No space left on device\n")


# ---- without extras ----


@pytest.mark.parametrize("module", ["safetensors", "ml_dtypes"])
def test_without_a_format_s_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    path = save(tmp_path / "a.safetensors", {"a": np.ones(1, ml_dtypes.bfloat16)})
    monkeypatch.setitem(sys.modules, module, None)
    message = f"gradclip: {module} is not installed: pip install {module} (all: gradclip[cli])\n"
    assert run_main("norm", path) == (2, "", message)


# ---- errors ----


def _npy(array: Any = (1.0, 2.0), **options: Any) -> bytes:
    path = Path(options.pop("folder")) / "raw.npy"
    np.save(path, array, **options)
    return path.read_bytes()


def test_missing_folder_and_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "d.npy").mkdir()
    kinds = ".npy, .npz, .safetensors, .pt, .pth, .bin, .ckpt"
    formats = f"{kinds} files, and the .safetensors.index.json or .bin.index.json of shards"
    for name, message in {
        "no.npy": "No such file or directory",
        "d.npy": f"is a folder with no index and none of {kinds} in it",
        "a.txt": f"is of another format; gradclip reads {formats}",
    }.items():
        path = tmp_path / name
        assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")
    message = "argument FILE: the path is empty; see gradclip norm --help"
    assert run_main("norm", "") == (2, "", f"gradclip: {message}\n")


@pytest.mark.parametrize("kind", cli_files.NO_REGULAR_FILES)
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", INDEX])
def test_what_is_no_regular_file(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    message = {
        "a folder": "is a folder with no index and none of .npy, .npz, .safetensors, .pt, .pth, "
        ".bin, .ckpt in it",
        "a link to itself": "Too many levels of symbolic links",
    }.get(kind, f"is {kind}, no regular file")
    with cli_files.no_regular_file(path, kind):
        assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")


@pytest.mark.parametrize("kind", cli_files.NO_REGULAR_FILES)
def test_a_shard_that_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    shard = tmp_path / "shard.safetensors"
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "linked.safetensors"}}')
    (tmp_path / "linked.safetensors").symlink_to(shard)
    message = f"is {kind}, no regular file"
    if kind == "a link to itself":
        message = "Too many levels of symbolic links"
    expected = f"gradclip: {tmp_path / INDEX}: its shard linked.safetensors: {message}\n"
    with cli_files.no_regular_file(shard, kind):
        assert run_main("norm", tmp_path / INDEX) == (2, "", expected)
        arguments = ("--clip-norm", 1, "-o", tmp_path / "out")
        assert run_main("clip", tmp_path / INDEX, *arguments) == (2, "", expected)


def test_a_fifo_that_comes_after_the_look_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.npy", {"a": np.ones(1)})
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda *_args, **_more: regular)

    def too_late(_number: int, _frame: object) -> None:
        raise TimeoutError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(10)
    try:
        with pytest.raises(ValueError, match=r"^is a FIFO, no regular file$"), open_regular(path):
            pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_folders(tmp_path: Path) -> None:
    arrays = {"a": np.float32([3]), "b": np.float32([4])}
    index = save(tmp_path / INDEX, arrays)
    (tmp_path / "other.npy").touch()
    assert run_main("norm", tmp_path) == run_main("norm", index)
    assert report(tmp_path)["norm"] == 5
    for n in range(4):
        (tmp_path / f"{n}.safetensors.index.fp16.json").touch()
    names = ", ".join(f"{n}.safetensors.index.fp16.json" for n in range(3))
    message = f"is a folder with 5 indexes; name the file: {names} and 2 more"
    assert run_main("norm", tmp_path) == (2, "", f"gradclip: {tmp_path}: {message}\n")


def test_a_folder_without_an_index_is_all_files_in_it(tmp_path: Path) -> None:
    save(tmp_path / "w10.npy", {"a": np.float32([12])})
    assert run_main("norm", tmp_path) == run_main("norm", tmp_path / "w10.npy")
    save(tmp_path / "w2.npz", {"b": np.float32([3])})
    save(tmp_path / "W.npz", {"a": np.float32([4])})
    (tmp_path / "config.json").touch()
    status, out, err = run_main("norm", tmp_path, "--json")
    note = f"gradclip: {tmp_path} has no index; read in it: W.npz, w2.npz, w10.npy"
    assert (status, err) == (0, f"{note}\n")
    assert json.loads(out)["norm"] == 13
    (tmp_path / "w1.npz").touch()
    status, _, err = run_main("norm", tmp_path, "--json")
    note = note.replace("w2.npz, w10.npy", "w1.npz, w2.npz and 1 more")
    bad = f"gradclip: {tmp_path / 'w1.npz'}: File is not a zip file"
    assert (status, err) == (1, f"{note}\n{bad}\n")


def test_beside_safetensors_nothing_else_of_a_folder_is_read(tmp_path: Path) -> None:
    for name, number in (("m2", 4), ("m1", 3)):
        save(tmp_path / f"{name}.safetensors", {name: np.float32([number])})
    for name in ("optimizer.pt", "training_args.bin"):
        (tmp_path / name).touch()
    status, out, err = run_main("norm", tmp_path, "--json")
    read = "read in it: m1.safetensors, m2.safetensors; left out: optimizer.pt, training_args.bin"
    assert (status, err) == (0, f"gradclip: {tmp_path} has no index; {read}\n")
    assert json.loads(out)["norm"] == 5


def test_a_folder_of_two_formats_has_its_safetensors_read(tmp_path: Path) -> None:
    index = save(tmp_path / INDEX, {"a": np.float32([3]), "b": np.float32([4])})
    (tmp_path / "pytorch_model.bin.index.json").touch()
    note = f"gradclip: {tmp_path} has 2 indexes: {INDEX} is read\n"
    assert run_main("norm", tmp_path) == (0, run_main("norm", index)[1], note)


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.npy", {"a": np.ones(3)})

    @contextlib.contextmanager
    def progress(_label: str, _total: float) -> Iterator[Callable[[float], None]]:
        yield lambda _amount: save(path, {"a": np.ones(4)})

    monkeypatch.setattr("gradclip.cli.norm.progress", progress)
    message = f"gradclip: {path}: has changed while gradclip read it\n"
    assert run_main("norm", path) == (2, "", message)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, {"w": random("f4", 10**6)})
    # In a process of its own: where a file is mapped, this ends it without a word.
    done = cli_files.run([sys.executable, "-c", CUTS_OFF, path])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gradclip: {path}: ")
    assert done.stderr.count("\n") == 1


CUTS_OFF = """
import contextlib, os, sys
from gradclip.cli import _pieces, main, norm
_pieces.PIECE = 1 << 16

@contextlib.contextmanager
def progress(label, total):
    yield lambda amount: os.truncate(sys.argv[1], 5000)

norm.progress = progress
sys.exit(main(["norm", sys.argv[1]]))
"""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.ones(1)})
    path.chmod(0)
    assert run_main("norm", path) == (2, "", f"gradclip: {path}: Permission denied\n")


def test_damaged_npy(tmp_path: Path) -> None:
    good = _npy(folder=tmp_path)
    objects = _npy(np.array([{}], object), folder=tmp_path, allow_pickle=True)
    path = tmp_path / "a.npy"
    for raw, message in {
        good[:-1]: "holds 15 bytes of data; float64 of shape (2,) takes 16",
        good + good: "holds 160 bytes of data; float64 of shape (2,) takes 16",
        good.replace(b"(2,)", b"(-2,)"): "has the shape (-2,)",
        objects: "holds pickled Python objects, which gradclip does not load",
    }.items():
        path.write_bytes(raw)
        assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    good = _npy(folder=tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", good[:-1])
    message = "w.npy: holds 15 bytes of data; float64 of shape (2,) takes 16"
    assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", good)
    path.write_bytes(path.read_bytes().replace(good, good[:-1] + b"x"))
    message = "Bad CRC-32 for file 'w.npy'"
    assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("w.npy", good)
    assert run_main("norm", path) == (2, "", f"gradclip: {path}: has two members of one name\n")


def test_damaged_index(tmp_path: Path) -> None:
    path = tmp_path / INDEX
    save(tmp_path / "m.safetensors", {"a": np.ones(1), "b": np.ones(1)})
    for weights, message in {
        "[]": "has no weight_map of tensors to files",
        '{"a": 1}': "has no weight_map of tensors to files",
        '{"a": "../m.safetensors"}': "names '../m.safetensors', which is no .safetensors file "
        "beside it",
        '{"a": "m.safetensors"}': "and m.safetensors differ on whether 'b' is in it",
    }.items():
        path.write_text(f'{{"weight_map": {weights}}}')
        assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")
    path.write_text('{"weight_map": {"a": "n.safetensors"}}')
    message = "its shard n.safetensors: No such file or directory"
    assert run_main("norm", path) == (2, "", f"gradclip: {path}: {message}\n")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".safetensors.index.json"])
@pytest.mark.parametrize("raw", [b"", b"garbage", pickle.dumps({}), b"\xff" * 99, b"[" * 10**5])
def test_garbage(tmp_path: Path, suffix: str, raw: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw)
    status, out, err = run_main("norm", path)
    assert (status, out) == (2, "")
    assert err.startswith(f"gradclip: {path}: ")
    assert err.count("\n") == 1


def test_two_names_of_one_file_are_measured_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {"a": np.float32([3, 4])})
    soft, hard, other = tmp_path / "soft.npy", tmp_path / "hard.npy", tmp_path / "other.npy"
    soft.symlink_to(path)
    hard.hardlink_to(path)
    other.write_bytes(path.read_bytes())  # as large and as old, but another file
    status, out, err = run_main("norm", path, soft, path, hard, other, "--json")
    assert (status, json.loads(out)["norm"]) == (0, float(np.sqrt(np.float32(50))))
    assert [t["file"] for t in json.loads(out)["tensors"]] == [str(path), str(other)]
    assert json.loads(out)["given_again"] == [
        {"file": str(each), "same_as": str(path)} for each in (soft, path, hard)
    ]
    assert err.splitlines() == [
        f"gradclip: {soft} is the same file as {path}; it is measured once",
        f"gradclip: {path} is given again; it is measured once",
        f"gradclip: {hard} is the same file as {path}; it is measured once",
    ]


def test_an_index_and_its_shards_are_measured_once(tmp_path: Path) -> None:
    index = save(tmp_path / INDEX, {"a": np.float32([3]), "b": np.float32([4])})
    shard, again = tmp_path / "m-1.safetensors", "it is measured once"
    expected = run_main("norm", index)
    for arguments, note in {
        (tmp_path, index): f"{index} is given again; {again}",
        (index, shard): f"{shard} is given again; {again}",
    }.items():
        assert run_main("norm", *arguments) == (0, expected[1], f"gradclip: {note}\n")
    _, out, err = run_main("norm", shard, index, "--json")
    assert (json.loads(out)["norm"], err) == (5, f"gradclip: {shard} is given again; {again}\n")


def test_a_wrong_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "many")
    path = save(tmp_path / "a.npy", {"a": np.ones(1)})
    message = "GRADCLIP_NUM_THREADS is 'many'; it must be a number above 0"
    assert run_main("norm", path) == (2, "", f"gradclip: {message}\n")


@pytest.mark.parametrize("arguments", [["--json"], ["norm"], ["nrom"], ["norm", "--jsno", "a.npy"]])
def test_wrong_usage_takes_one_line(arguments: list[str]) -> None:
    status, out, err = run_main(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("gradclip: ")
    assert err.endswith("--help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["norm", "clip", "compare", "env"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main_help(name)
    assert stopped.value.code == 0
    assert f"example: gradclip {name}" in capsys.readouterr().out


def run_main_help(name: str) -> None:
    from gradclip.cli import main

    main([name, "--help"])


# ---- memory ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak")
@pytest.mark.parametrize("size", [2**28, pytest.param(3 * 2**28, marks=pytest.mark.long)])
def test_a_large_file_takes_little_memory(tmp_path: Path, size: int) -> None:
    path = cli_files.sparse_npy(tmp_path / "a.npy", size)
    assert cli_files.peak_memory("norm", "--json", path) < 200e6


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak")
def test_a_large_compressed_file_takes_little_memory(tmp_path: Path) -> None:
    array = cli_files.sparse_npy(tmp_path / "a.npy", 2**27)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(array, "a.npy")
    assert cli_files.peak_memory("norm", "--json", tmp_path / "a.npz") < 300e6
