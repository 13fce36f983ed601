"""The demo: its gradients, its figures, its picture."""

import json
import math

import numpy as np
import pytest

from cli_files import NO_REGULAR_FILES, no_regular_file
from gradclip import limits
from gradclip.cli import demo, main
from gradclip.cli.demo import kinds, network
from gradclip.cli.demo.spikes import spikes


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backpropagation_gives_the_slope_of_the_loss(monkeypatch, scale):
    monkeypatch.setattr(network, "HIDDEN", 5)
    rng = np.random.default_rng(0)
    drawn = network.initial_network(7, rng, 1.3)
    weights_of_all = network.Network(*(x.astype(np.float64) for x in drawn))
    codes = rng.integers(0, 7, (10, 3))
    batch = network.Batch(codes[:-1], codes[1:], scale)
    _, gradients = network.loss_and_gradients(weights_of_all, *batch)
    for weights, gradient in zip(weights_of_all, gradients, strict=True):
        direction = rng.standard_normal(weights.shape)
        losses = []
        for step in (1e-6, -2e-6):
            np.add(weights, step * direction, out=weights)
            losses.append(network.loss_and_gradients(weights_of_all, *batch)[0])
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
    assert network.unigram_entropy("abab") == pytest.approx(math.log(2))


# ---- limits that set themselves ----


@pytest.fixture
def early(monkeypatch):
    """Bad batches come soon enough for a short run, of a small network."""
    monkeypatch.setattr(network, "HIDDEN", 16)
    monkeypatch.setattr(network, "TIME_STEPS", 32)
    monkeypatch.setattr(kinds, "FIRST_BAD", 40)
    monkeypatch.setattr(kinds, "SHARE_OF_BAD", 0.2)
    monkeypatch.setattr(
        kinds,
        "every_limit",
        lambda: {
            "no limit": math.inf,
            "fixed": 1.0,
            "skips": limits.ZScore(4, warmup=30, log=True, beyond="skip"),
            "per tensor": limits.PerTensor(limits.Average(1.05, warmup=30)),
        },
    )


@pytest.mark.slow
@pytest.mark.usefixtures("early")
def test_limits_are_compared_on_the_same_bad_batches(tmp_path, capsys):
    picture = tmp_path / "limits.png"
    arguments = ["demo", "--limits", "--json", "--steps", "60", "--out", str(picture)]
    reports = []
    for _ in range(2):
        assert main(arguments) == 0
        reports.append(json.loads(capsys.readouterr().out))
    report, again = reports
    wrong, large = report["batches_with_shuffled_labels"], report["batches_with_scaled_inputs"]
    assert wrong > 0
    assert large > 0
    runs = report["runs"]
    assert runs["no limit"]["steps_clipped"] == 0
    assert all(0 < runs[name]["steps_clipped"] <= 1 for name in ("fixed", "skips", "per tensor"))
    assert 0 < runs["skips"]["steps_skipped"] <= 30
    assert all(runs[name]["steps_skipped"] == 0 for name in runs if name != "skips")
    assert all(run["ms_clipping"] > 0 for run in runs.values())
    assert [run["final_loss"] for run in runs.values()] == [
        run["final_loss"] for run in again["runs"].values()
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.slow
def test_the_table_has_a_row_for_every_limit(tmp_path, capsys):
    assert main(["demo", "--limits", "--steps", "3", "--out", str(tmp_path / "limits.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in kinds.every_limit():
        assert sum(line.startswith(f" {name}  ") for line in lines) == 1


def test_bad_batches_are_fixed_by_the_seed():
    wrong, large = kinds.bad_batches(2000, 3)
    assert not (wrong & large).any()
    assert not (wrong | large)[: kinds.FIRST_BAD].any()
    assert 0.8 < wrong.sum() / large.sum() < 1.25
    codes = np.arange(1000) % 50
    first, second = (
        list(kinds.spoilt(codes, 3, wrong[150:200], large[150:200], 50)) for _ in range(2)
    )
    assert all(map(np.array_equal, (b.targets for b in first), (b.targets for b in second)))
    for batch, is_wrong, is_large in zip(first, wrong[150:200], large[150:200], strict=True):
        follows = np.array_equal(batch.targets[:-1], batch.inputs[1:])
        assert follows == (not is_wrong)
        assert batch.scale == (kinds.SCALE if is_large else 1)


def test_a_step_that_is_skipped_changes_no_weight(monkeypatch):
    monkeypatch.setattr(network, "HIDDEN", 5)
    start = network.initial_network(7, np.random.default_rng(0), 1.0)
    codes = np.random.default_rng(1).integers(0, 7, (129, 3))
    good = network.Batch(codes[:-1], codes[1:])
    limit = limits.ZScore(1e-6, warmup=1, beyond="skip")
    batches = [good, good._replace(scale=50.0)]
    one = network.train(start, batches[:1], 0.1, limits.ZScore(warmup=1), lambda _: None)
    two = network.train(start, batches, 0.1, limit, lambda _: None)
    assert two.left == [one.norms[0], 0]
    assert two.norms[1] > two.limits[1]
    assert all(map(np.array_equal, one.network, two.network))


def test_spikes_are_far_from_the_losses_before():
    calm = [1.0, 1.2, 1.1, 0.9] * 5
    assert not spikes(calm, 10).any()
    assert np.flatnonzero(spikes([*calm, 9.0, 1.0], 10)).tolist() == [20]
    assert np.flatnonzero(spikes([*calm, -9.0], 10)).tolist() == [20]
    assert np.flatnonzero(spikes([*calm, math.nan], 10)).tolist() == [20]
    assert not spikes([1.0, 99.0, 1.0], 3).any()
    # Just seven deviations away, and one unit less.
    assert spikes([0.0, 2.0, 8.0], 2)[-1]
    assert not spikes([0.0, 2.0, np.nextafter(8.0, 0)], 2)[-1]
