"""What torch.save has written: both its formats, measured and clipped."""

from __future__ import annotations

import collections
import json
import os
import pickle
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import run_main
from conftest import since_torch
from gradclip.cli._checkpoints import Checkpoint
from test_cli_clip import LIMITED, stopped
from test_cli_main import run_bare

FLOATS = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
CODES = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]
INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "bool"]


@pytest.fixture
def torch(framework: Any) -> Any:
    return framework("torch")


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, torch: Any) -> Any:
    """Write an object in one of the formats."""

    def write(path: Path, held: Any) -> Path:
        torch.save(held, path, _use_new_zipfile_serialization=request.param)
        return path

    return write


def report(*arguments: Any) -> dict[str, Any]:
    status, out, err = run_main("norm", "--json", *arguments)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def tensors_of(held: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor of nested dicts and lists, by the names that gradclip gives them."""
    if isinstance(held, dict | list | tuple):
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            yield from tensors_of(item, f"{name}.{key}".lstrip("."))
    elif hasattr(held, "data_ptr"):
        yield name, held.detach()


def random(torch: Any, dtype: str, *shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex128 if dtype.startswith("complex") else torch.float64
    return torch.randn(*shape, dtype=kind, generator=generator).to(getattr(torch, dtype))


def check(path: Path, held: Any) -> None:
    """Hold every figure of a file against the tensors in it."""
    tensors = dict(tensors_of(held))
    found = report(path)
    counted = {t["name"]: t for t in found["tensors"] if t["counted"]}
    floating = {k: v for k, v in tensors.items() if v.dtype.is_floating_point or v.is_complex()}
    assert counted.keys() == floating.keys()
    assert {t["name"] for t in found["tensors"]} == tensors.keys()
    assert found["norm"] == float(gradclip.global_norm([*floating.values()]))
    for name, tensor in floating.items():
        assert counted[name]["norm"] == float(gradclip.global_norm(tensor))
        assert counted[name]["shape"] == list(tensor.shape)
        assert f"torch.{counted[name]['dtype']}" == str(tensor.dtype)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(tmp_path: Path, torch: Any, save: Any, dtype: str) -> None:
    held = {"a": random(torch, dtype, 17, 31), "b": random(torch, dtype, 5, seed=1)}
    check(save(tmp_path / "a.pt", held), held)


@since_torch("2.7", "there is no float8_e8m0fnu")
def test_scales_of_8_bits_do_not_count(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2), "scales": torch.ones(2, dtype=torch.float8_e8m0fnu)}, path)
    scales = report(path)["tensors"][-1]
    assert (scales["name"], scales["dtype"], scales["counted"]) == (
        "scales",
        "float8_e8m0fnu",
        False,
    )


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", CODES)
def test_codes_of_8_bits(tmp_path: Path, torch: Any, dtype: str) -> None:
    held = {"a": random(torch, dtype, 17, 31), "b": random(torch, dtype, 5, seed=1)}
    path = tmp_path / "a.pt"
    torch.save(held, path)
    check(path, held)
    torch.save(held, path, _use_new_zipfile_serialization=False)  # which PyTorch cannot read back
    status, out, err = run_main("norm", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"gradclip: {path}: torch.load(weights_only=True) fails: AttributeError")


def test_dtypes_that_are_carried_over(tmp_path: Path, torch: Any, save: Any) -> None:
    held = {name: torch.ones(3, dtype=getattr(torch, name)) for name in INTEGERS}
    held["w"] = torch.tensor([3.0, 4.0])
    path = save(tmp_path / "a.pt", held)
    check(path, held)
    assert clip(path, tmp_path / "o.pt")["carried_over"] == len(INTEGERS)
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert all(torch.equal(found[name], held[name]) for name in INTEGERS)


def checkpoint(torch: Any) -> dict[str, Any]:
    """What a training saves: a model, its optimizer after a step, and numbers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.tag = 1
    tagged = torch.ones(3)
    tagged.tag = {"of": "mine"}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": model[0].weight,
        "attributed": [attributed, (tagged,)],
        "epoch": 3,
        "best": {"loss": 0.5, "at": None, "complex": 1j, "raw": b"\xff\0"},
        "shape": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "done": {1, 2},
        "counter": collections.Counter("abca"),
    }


def test_a_checkpoint_of_a_training(tmp_path: Path, torch: Any, save: Any) -> None:
    held = checkpoint(torch)
    path = save(tmp_path / "a.pth", held)
    check(path, held)
    names = [t["name"] for t in report(path)["tensors"]]
    assert "model.0.weight" in names
    assert "optimizer.state.0.exp_avg" in names
    assert "attributed.1.0" in names


def views(torch: Any) -> dict[str, Any]:
    base = random(torch, "float32", 40, 30)
    return {
        "base": base,
        "transposed": base.t(),
        "of its own": random(torch, "float64", 7, 5, 3, seed=1).permute(2, 0, 1),
        "column": base[:, 3],
        "rows": base[5:9],
        "steps": base[::3, 1::2],
        "expanded": torch.tensor([[2.0], [3.0]]).expand(2, 9),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 4),
        "none of it": base[:, 3:3],
        "one": base[3:4, 2:3],
        "one of a column": base[3:4, 2],
        "one that is expanded": torch.tensor(3.0).expand(1),
    }


@pytest.mark.usefixtures("_pieces")
def test_views_with_any_strides(tmp_path: Path, torch: Any, save: Any) -> None:
    held = views(torch)
    check(save(tmp_path / "a.pt", held), held)


def test_a_lone_tensor_has_the_name_of_its_file(tmp_path: Path, torch: Any, save: Any) -> None:
    path = save(tmp_path / "a.pt", torch.tensor([3.0, 4.0]))
    found = report(path)
    assert (found["norm"], found["tensors"][0]["name"]) == (5, str(path))


def test_tied_tensors_count_each(tmp_path: Path, torch: Any, save: Any) -> None:
    weight = torch.tensor([3.0])
    path = save(tmp_path / "a.pt", {"a": weight, "b": weight.view(1, 1), "c": torch.tensor([4.0])})
    assert report(path)["norm"] == float(np.sqrt(np.float32(34)))


def test_kinds_that_are_not_read_are_listed(tmp_path: Path, torch: Any, save: Any) -> None:
    held = {
        "w": torch.tensor([3.0, 4.0]),
        "coo": torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (3,), check_invariants=True),
        "meta": torch.ones(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    }
    path = save(tmp_path / "a.pt", held)
    found = report(path)
    assert {t["name"]: (t["dtype"], t["shape"]) for t in found["tensors"]} == {
        "w": ("float32", [2]),
        "coo": ("sparse_coo", [3]),
        "meta": ("meta float32", [3]),
        "nested": ("nested", []),
    }
    assert found["norm"] == 5
    message = f"gradclip: {path}: coo is sparse_coo, which gradclip cannot clip\n"
    assert run_main("clip", path, "--clip-norm", 1, "-o", tmp_path / "o.pt") == (2, "", message)


def test_lazily_changed_tensors(tmp_path: Path, torch: Any, save: Any) -> None:
    held = {
        "conj": random(torch, "complex64", 5, 3).t().conj(),
        "neg": torch._neg_view(random(torch, "float32", 5, 3)),
    }
    path = save(tmp_path / "a.pt", held)
    check(path, held)
    plain = save(tmp_path / "b.pt", {k: v.resolve_conj().resolve_neg() for k, v in held.items()})
    assert run_main("compare", path, plain, "--json")[0] == 0
    assert json.loads(run_main("compare", path, plain, "--json")[1])["same"]


def test_a_lone_storage_is_a_tensor(tmp_path: Path, torch: Any) -> None:
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.tensor([3.0, 4.0]).untyped_storage(),
        dtype=torch.float32,
        _internal=True,
    )
    torch.save({"s": storage}, tmp_path / "a.pt")
    assert report(tmp_path / "a.pt")["norm"] == 5
    assert clip(tmp_path / "a.pt", tmp_path / "o.pt", 2.5)["clipped"] == 1
    assert report(tmp_path / "o.pt")["norm"] == 2.5


def test_tensors_of_a_device_that_is_not_here(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([3.0, 4.0])}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:9"))
    assert report(path)["norm"] == 5
    assert clip(path, tmp_path / "o.pt")["action"] == "scale"


def test_bytes_that_are_not_aligned(tmp_path: Path, torch: Any) -> None:
    held = {"a": random(torch, "float64", 999)}
    torch.save(held, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for comment in range(8):
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            archive.writestr("a/odd", bytes(comment))
            for name, raw in members.items():
                archive.writestr(name, raw)
        check(tmp_path / "b.pt", held)


# ---- clipping ----


def clip(source: Path, out: Path, limit: float = 1.0, *options: str) -> dict[str, Any]:
    status, text, err = run_main("clip", source, "--max-norm", limit, "-o", out, "--json", *options)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(text)
    return found


def same(ours: Any, theirs: Any) -> bool:
    """If two tensors have the same bits, in whatever order they lie."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return (
        ours.reshape(-1).contiguous().numpy(force=True).tobytes()
        == theirs.reshape(-1).contiguous().numpy(force=True).tobytes()
    )


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "bfloat16"])
def test_clipped_bits(tmp_path: Path, torch: Any, save: Any, dtype: str) -> None:
    held = {"a": random(torch, dtype, 17, 31), "b": {"c": random(torch, dtype, 5, seed=1).t()}}
    source, out = save(tmp_path / "a.pt", held), tmp_path / "o.pt"
    clip(source, out)
    expected, _ = gradclip.clip_by_global_norm(held, 1.0)
    found = torch.load(out, weights_only=True)
    for name, tensor in tensors_of(found):
        assert same(tensor, dict(tensors_of(expected))[name]), name


def test_all_else_stays(tmp_path: Path, torch: Any, save: Any) -> None:
    held = checkpoint(torch)
    held["bf16"] = random(torch, "bfloat16", 99)
    source, out = save(tmp_path / "a.pt", held), tmp_path / "o.pt"
    if zipfile.is_zipfile(source):  # PyTorch reads codes from no others
        held["f8"] = random(torch, "float8_e5m2", 99)
        save(source, held)
    clip(source, out)
    assert zipfile.is_zipfile(out) == zipfile.is_zipfile(source)
    floating = {name: each for name, each in tensors_of(held) if each.dtype.is_floating_point}
    expected, _ = gradclip.clip_by_global_norm(floating, 1.0)
    options = [{}, {"mmap": True}] if zipfile.is_zipfile(source) else [{}]
    for option in options:
        found = torch.load(out, weights_only=True, **option)
        assert found.keys() == held.keys()
        assert found["best"] == held["best"]
        assert found["model"]._metadata == held["model"]._metadata
        assert found["attributed"][1][0].tag == {"of": "mine"}
        assert found["optimizer"]["param_groups"] == held["optimizer"]["param_groups"]
        for name, tensor in tensors_of(found):
            right = expected.get(name, dict(tensors_of(held))[name])
            assert torch.equal(tensor.double(), right.double()), name


def test_views_of_one_memory_are_scaled_once(tmp_path: Path, torch: Any, save: Any) -> None:
    held = views(torch)
    source, out = save(tmp_path / "a.pt", held), tmp_path / "o.pt"
    factor = clip(source, out)["factor"]
    found = torch.load(out, weights_only=True)
    for name, tensor in held.items():
        assert torch.allclose(found[name].double(), tensor.double() * factor, rtol=1e-6), name
        assert found[name].stride() == tensor.stride()
    assert found["base"].data_ptr() == found["transposed"].data_ptr()


def test_with_nothing_to_clip_not_a_byte_changes(tmp_path: Path, torch: Any, save: Any) -> None:
    source, out = save(tmp_path / "a.pt", views(torch)), tmp_path / "o.pt"
    assert clip(source, out, 1e6)["action"] == "keep"
    assert out.read_bytes() == source.read_bytes()


def test_tensors_of_two_dtypes_in_one_memory(tmp_path: Path, torch: Any) -> None:
    class Pair:
        def __init__(self, storage: Any, dtype: Any) -> None:
            self.arguments = (storage, 0, (2,), (1,), False, {}, dtype)

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v3, self.arguments

    storage = torch.ones(2).untyped_storage()
    path = tmp_path / "a.pt"
    torch.save([Pair(storage, torch.float32), Pair(storage, torch.float16)], path)
    assert report(path)["norm"] > 0
    message = f"gradclip: {path}: has tensors of float16 and float32 in the same bytes\n"
    assert run_main("clip", path, "--clip-norm", 0.1, "-o", tmp_path / "o.pt") == (2, "", message)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_copy_that_grows_too_large(tmp_path: Path, torch: Any, save: Any, limit: float) -> None:
    source = save(tmp_path / "a.pt", {"a": random(torch, "float32", 10**5)})
    out = tmp_path / "o.pt"
    arguments = ("clip", source, "--clip-norm", limit, "-o", out)
    done = cli_files.run([sys.executable, "-c", LIMITED, *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gradclip: cannot write {out}: ")
    assert done.stderr.endswith("File too large\n")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing(
    tmp_path: Path, torch: Any, save: Any, number: int, status: int
) -> None:
    source = save(tmp_path / "a.pt", {"a": random(torch, "float32", 2**25)})
    with cli_files.heeded(signal.SIGINT):
        assert stopped(source, tmp_path / "o.pt", number, None) == status
    assert list(tmp_path.iterdir()) == [source]


# ---- shards ----


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "m.pt.index.json"])
def test_an_index_of_shards(tmp_path: Path, torch: Any, save: Any, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    suffix = name.split(".")[1]
    places = {}
    for shard, key in enumerate("ab"):
        save(folder / f"m-{shard}.{suffix}", {key: torch.tensor([3.0 + shard])})
        places[key] = f"m-{shard}.{suffix}"
    (folder / name).write_text(json.dumps({"weight_map": places}))
    assert report(folder)["norm"] == report(folder / name)["norm"] == 5
    found = clip(folder, tmp_path / "out", 2.5)
    assert (found["norm"], report(tmp_path / "out" / name)["norm"]) == (5, 2.5)
    (folder / name).write_text(json.dumps({"weight_map": {"a": "m-0.safetensors"}}))
    message = f"names 'm-0.safetensors', which is no .{suffix} file beside it"
    assert run_main("norm", folder / name) == (2, "", f"gradclip: {folder / name}: {message}\n")


# ---- what is refused ----


class Evil:
    """An object whose pickle would make a file where it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_objects_are_refused_and_never_made(tmp_path: Path, torch: Any, save: Any) -> None:
    made = tmp_path / "made"
    for held, name in {
        np.float64(1): "numpy._core.multiarray.scalar",
        torch.nn.Linear(2, 2): "torch.nn.modules.linear.Linear",
        Evil(made): "posix.mkdir",
        os.path.join: "posixpath.join",
    }.items():
        path = save(tmp_path / "a.pt", {"w": torch.ones(2), "held": held})
        for command in (
            ("norm", path),
            ("compare", path, path),
            ("clip", path, "--clip-norm", 1, "-o", tmp_path / "o.pt"),
        ):
            status, out, err = run_main(*command)
            assert (status, out) == (2, "")
            start = f"gradclip: {path}: torch.load(weights_only=True) fails: UnpicklingError: "
            assert err.startswith(start)
            assert name in err
            assert err.endswith("; save tensors alone, as model.state_dict() has them\n")
            assert len(err) < len(start) + 200
    assert not made.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_files_that_torch_save_has_not_written(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "a.pt"
    torch.jit.script(torch.nn.ReLU()).save(path)
    script = path.read_bytes()
    torch.save({"w": torch.ones(9)}, path)
    good = path.read_bytes()
    for raw, reason in {
        script: "RuntimeError: Cannot use ``weights_only=True`` with TorchScript archives",
        b"": "EOFError: ",
        b"\x7fELF" + bytes(99): "UnpicklingError: Unsupported operand 127",
        pickle.dumps({"w": 1}, 2): "RuntimeError: Invalid magic number; corrupt file?",
        good[:-40]: "RuntimeError: PytorchStreamReader failed reading zip archive",
        good.replace(b"little", b"biggie"): "ValueError: Unknown endianness type: biggie",
        good.replace(b"K\t\x85", b"K\n\x85"): "RuntimeError: Trying to resize storage",
    }.items():
        path.write_bytes(raw)
        status, out, err = run_main("norm", path)
        assert (status, out) == (2, "")
        assert err.startswith(f"gradclip: {path}: torch.load(weights_only=True) fails: {reason}")
        assert err.count("\n") == 1
        assert len(err) < len(str(path)) + 300


def test_a_set_of_tensors(tmp_path: Path, torch: Any, save: Any) -> None:
    path = save(tmp_path / "a.pt", {"a": {"b": {torch.ones(1), torch.ones(2)}}})
    message = f"gradclip: {path}: has a set of tensors at 'a.b', which have no names; save a list\n"
    assert run_main("norm", path) == (2, "", message)


def test_a_container_that_holds_itself(tmp_path: Path, torch: Any, save: Any) -> None:
    held: dict[str, Any] = {"w": torch.ones(1)}
    held["me"] = {"again": held}
    path = save(tmp_path / "a.pt", held)
    message = f"gradclip: {path}: has a container that holds itself at 'me.again'\n"
    assert run_main("norm", path) == (2, "", message)


# ---- without PyTorch, while others write, larger than memory ----


@pytest.mark.slow
def test_without_pytorch_one_line_says_so(tmp_path: Path, torch: Any, save: Any) -> None:
    path = save(tmp_path / "a.pt", {"a": torch.tensor([3.0, 4.0])})
    other = tmp_path / "b.npy"
    np.save(other, np.float32([3, 4]))
    message = f"gradclip: {path}: is read by PyTorch, which is not installed: pip install torch\n"
    for arguments in (
        ("norm", path),
        ("compare", path, path),
        ("clip", path, "--clip-norm", 1, "-o", tmp_path / "o.pt"),
    ):
        done = run_bare(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    done = run_bare("norm", path, other, "--json")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["norm"]) == (1, message, 5)


@pytest.mark.slow
def test_other_files_import_no_pytorch(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.float32([3, 4]))
    code = (
        "import sys; from gradclip.cli import main\n"
        "main(['norm', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    )
    assert cli_files.run([sys.executable, "-c", code, tmp_path / "a.npy"]).returncode == 0


def test_a_file_that_changes_meanwhile(
    tmp_path: Path, torch: Any, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.pt", {"w": torch.ones(3)})
    opened = Checkpoint.opened

    def late(file: Checkpoint) -> Any:
        save(path, {})
        return opened(file)

    monkeypatch.setattr(Checkpoint, "opened", late)
    message = f"gradclip: {path}: has changed while gradclip read it\n"
    assert run_main("norm", path) == (2, "", message)


# Runs the command line and reports the most memory of its own, in kB, beside what files map.
OWN_MEMORY = """
import re, sys, threading
from pathlib import Path
from gradclip.cli import main
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        found = re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())
        peak = max(peak, int(found[1]))
watching = threading.Thread(target=watch)
watching.start()
status = main(sys.argv[1:])
done.set()
watching.join()
print(peak)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak")
def test_a_large_file_takes_little_memory(tmp_path: Path, torch: Any) -> None:
    torch.save({"w": torch.full((2**27,), 2.0)}, tmp_path / "a.pt")
    for arguments in (
        ("norm", tmp_path / "a.pt"),
        ("compare", tmp_path / "a.pt", tmp_path / "a.pt"),
    ):
        done = cli_files.run([sys.executable, "-c", OWN_MEMORY, *arguments])
        assert (done.returncode, done.stderr) == (0, "")
        assert int(done.stdout.split()[-1]) * 1024 < 300e6  # of which PyTorch takes 150 MB
