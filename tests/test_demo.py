"""The demo: its gradients, its figures, its picture."""

import json
import math

import numpy as np
import pytest

from cli_files import NO_REGULAR_FILES, no_regular_file
from gradclip.cli import demo, main


def test_backpropagation_gives_the_slope_of_the_loss(monkeypatch):
    monkeypatch.setattr(demo, "HIDDEN", 5)
    rng = np.random.default_rng(0)
    network = demo.Network(*(x.astype(np.float64) for x in demo.initial_network(7, rng)))
    codes = rng.integers(0, 7, (10, 3))
    _, gradients = demo.loss_and_gradients(network, codes[:-1], codes[1:])
    for weights, gradient in zip(network, gradients, strict=True):
        direction = rng.standard_normal(weights.shape)
        losses = []
        for step in (1e-6, -2e-6):
            np.add(weights, step * direction, out=weights)
            losses.append(demo.loss_and_gradients(network, codes[:-1], codes[1:])[0])
        np.add(weights, 1e-6 * direction, out=weights)
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-5, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_unclipped_run_blows_up_and_the_clipped_one_learns(tmp_path, capsys, seed):
    picture = tmp_path / "demo.png"
    arguments = ["--json", "--steps", "250", "--seed", str(seed), "--out", str(picture)]
    assert main(["demo", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    unclipped, clipped = report["unclipped"], report["clipped"]
    assert unclipped["outcome"] == f"NaN from step {unclipped['steps']}"
    assert unclipped["steps"] < 250
    assert unclipped["first_loss"] == clipped["first_loss"]
    assert clipped["steps"] == 250
    assert clipped["final_loss"] < report["unigram_entropy"] - 0.5
    assert 0 < clipped["steps_clipped"] < 1
    assert clipped["largest_norm"] > report["clip_norm"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.slow
def test_the_table_has_both_runs(tmp_path, capsys):
    assert main(["demo", "--steps", "20", "--out", str(tmp_path / "demo.png")]) == 0
    out = capsys.readouterr().out
    assert all(label in out for _, label, _ in demo.ROWS)
    assert f"picture: {tmp_path / 'demo.png'}" in out.replace("\n", "")


@pytest.mark.parametrize("name", ["missing/demo.png", "demo.jpg"])
def test_a_picture_that_cannot_be_written_ends_it_before_training(tmp_path, capsys, name):
    assert main(["demo", "--out", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", NO_REGULAR_FILES)
def test_a_picture_replaces_regular_files_only(tmp_path, capsys, kind):
    path = tmp_path / "demo.png"
    with no_regular_file(path, kind):
        assert main(["demo", "--steps", "1", "--out", str(path)]) == 2
        message = f"--out {path} is {kind}; only regular files are replaced"
        assert capsys.readouterr() == ("", f"gradclip: {message}\n")
        assert [*tmp_path.iterdir()] == [path]


@pytest.mark.slow
def test_a_picture_that_is_a_link_stays_one(tmp_path):
    link, picture = tmp_path / "demo.png", tmp_path / "picture.png"
    picture.touch()
    link.symlink_to(picture)
    assert main(["demo", "--json", "--steps", "1", "--out", str(link)]) == 0
    assert link.is_symlink()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_entropy_of_two_letters_is_one_bit():
    assert demo.unigram_entropy("abab") == pytest.approx(math.log(2))
