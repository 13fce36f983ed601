"""``gradclip norm``: which tensors it shows, in which order, and files that cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_files import run_main, save
from gradclip.cli._files import natural


def layers(folder: Path) -> Path:
    sizes = {"layers.10.w": 3, "layers.2.w": 12, "layers.1.w": 4, "step": 7}
    arrays = {name: np.float32([size]) for name, size in sizes.items()}
    return save(folder / "a.npz", arrays | {"step": np.array(7)})


def names(*arguments: Any) -> list[str]:
    _, out, _ = run_main("norm", "--json", *arguments)
    return [tensor["name"] for tensor in json.loads(out)["tensors"]]


def test_names_are_in_their_natural_order(tmp_path: Path) -> None:
    path = layers(tmp_path)
    in_order = ["layers.1.w", "layers.2.w", "layers.10.w", "step"]
    assert names(path) == names(path, "--sort", "name") == in_order
    assert names(path, "--sort", "name", "--top", 2) == in_order[:2]
    for name, lower in (("2", "10"), ("a2b", "a10b"), ("a", "a1"), ("", "1"), ("a1.9", "a1.b")):
        assert natural(name) < natural(lower)
    assert natural("a007b") == natural("a7b") < natural("a0010")


def test_numbers_of_any_length_in_names_have_their_order(tmp_path: Path) -> None:
    long = "9" * 5000  # of which Python makes no int
    path = save(tmp_path / "a.safetensors", {n: np.ones(1) for n in (f"{long}1", long, "10")})
    assert names(path) == ["10", long, f"{long}1"]


def test_the_largest_come_first_where_asked_for(tmp_path: Path) -> None:
    path = layers(tmp_path)
    largest = ["layers.2.w", "layers.1.w", "layers.10.w", "step"]
    assert names(path, "--sort", "norm") == names(path, "--sort", "share") == largest
    assert names(path, "--top", 1) == largest[:1]
    found = json.loads(run_main("norm", path, "--top", 1, "--json")[1])
    assert (found["norm"], found["not_shown"]) == (13, 3)
    wild = save(tmp_path / "b.npz", {"i": np.float32([math.inf]), "n": np.float32([math.nan])})
    assert names(path, wild, "--top", 3) == ["n", "i", "layers.2.w"]


def test_the_table_of_the_largest_names_their_files(tmp_path: Path) -> None:
    first, second = layers(tmp_path), save(tmp_path / "b.npz", {"v": np.float32([5])})
    _, out, _ = run_main("norm", first, second, "--top", 2)
    lines = out.splitlines()
    assert lines[3].startswith(f" {first}: layers.2.w ")
    assert lines[4].startswith(f" {second}: v ")
    assert lines[6:8] == [
        "2 of 5 tensors are shown",
        "global norm 13.928389 (float32) of 4 tensors, 16 bytes",
    ]


def test_only_what_holds_a_nan_or_inf(tmp_path: Path) -> None:
    wild = {"b": np.float32([math.nan]), "a": np.float32([1]), "c": np.float32([1, math.inf])}
    path = save(tmp_path / "a.npz", wild)
    assert names(path, "--only-nonfinite") == ["b", "c"]
    _, out, _ = run_main("norm", path, "--only-nonfinite")
    assert "2 of 3 tensors are shown" in out
    assert names(layers(tmp_path), "--only-nonfinite") == []


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5"])
def test_a_wrong_number_of_tensors(tmp_path: Path, number: str) -> None:
    message = f"argument --top: {number!r} is no number above 0; see gradclip norm --help"
    done = run_main("norm", layers(tmp_path), f"--top={number}")
    assert done == (2, "", f"gradclip: {message}\n")


# ---- files that cannot be read, among others ----


def test_what_cannot_be_read_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    good = save(tmp_path / "a.npy", {"a": np.float32([3, 4])})
    cut = tmp_path / "cut.npy"
    cut.write_bytes(good.read_bytes()[:-1])
    bad = tmp_path / "bad.npz"  # which shows only when it is read to its end
    raw = save(bad, {"a": np.append(np.zeros(10**5, "f4"), np.float32(5))}).read_bytes()
    bad.write_bytes(raw.replace(np.float32([5]).tobytes(), np.float32([6]).tobytes()))
    empty = tmp_path / "empty"
    empty.mkdir()
    none = tmp_path / "none.npy"
    status, out, err = run_main("norm", none, cut, good, bad, empty, "--json")
    reasons = {
        none: "No such file or directory",
        cut: "holds 7 bytes of data; float32 of shape (2,) takes 8",
        empty: "is a folder with no index and none of .npy, .npz, .safetensors, .pt, .pth, .bin, "
        ".ckpt in it",
        bad: "Bad CRC-32 for file 'a.npy'",
    }
    assert status == 1
    assert err == "".join(f"gradclip: {file}: {reason}\n" for file, reason in reasons.items())
    found = json.loads(out)
    assert (found["norm"], [tensor["file"] for tensor in found["tensors"]]) == (5, [str(good)])
    assert found["unreadable"] == [
        {"file": str(file), "reason": reason} for file, reason in reasons.items()
    ]
    status, out, again = run_main("norm", none, cut, bad, empty)
    assert (status, out, again) == (2, "", err)
