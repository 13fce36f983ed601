"""``gradclip watch``: one frame of a record, and a run followed while it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import run_main, run_process
from gradclip.cli.watch import RECENT, lines, look, recent, sparkline
from gradclip.record import History
from recorded import EXPLODES, names, planted, quiet, write


def once(path: Path) -> str:
    status, out, err = run_main("watch", path, "--once")
    assert (status, err) == (0, "")
    return out


# ---- one frame ----


def test_one_frame(tmp_path: Path) -> None:
    norms = planted(6000)
    out = once(write(tmp_path / "run.db", norms[:1502], every=10, limit=4.0))
    assert out.startswith("run.db: step 1,501, ")
    assert re.search(r"\nnorm    \S{60,}\n", out)
    norm = np.linalg.norm(norms[1501])
    assert f"\n        {norm:,.0f}"[:12] in out
    assert "\nlimit   4\nfactor  0.00" in out
    assert "(clip)" in out
    assert re.search(r"\nlast 1,502 steps: [\d.]+ % clipped, 0 skipped, 0 NaN or inf\n", out)
    largest = out.index("largest norms, step 1,501")
    assert out.index(names(36)[EXPLODES]) > largest
    assert f"\n  spike  steps 1,500\u20131,501: {names(36)[EXPLODES]} jumped from " in out


def test_nan_is_seen(tmp_path: Path) -> None:
    out = once(write(tmp_path / "run.db", planted(2000)[:1001]))
    assert "\n        NaN " in out
    assert "(skip)" in out
    assert re.search(r"\nnorm    .*x\n", out)
    assert re.search(r"largest norms, step 1,000\n  h.0.mlp.c_fc.weight +NaN\n", out)
    assert "\n  NaN    step 1,000: NaN in h.0.mlp.c_fc.weight and h.0.mlp.c_proj.weight" in out


def test_a_record_without_tensors_or_limits(tmp_path: Path) -> None:
    out = once(write(tmp_path / "run.db", quiet(50, 3), every=0, limit=None))
    assert "\nlimit   none known\n" in out
    assert "no norms of tensors in these steps" in out
    assert "no events in these steps" in out
    assert "step 0, " in once(write(tmp_path / "one.db", quiet(1, 3)))


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    with History.open(write(tmp_path / "run.db", planted(2000)[:1001])) as history:
        shown = lines(look("run.db", history), width, time.time())
    assert max(len(text) for text, _ in shown) <= width


def test_the_line_shows_the_highest_of_each_part(tmp_path: Path) -> None:
    norms = np.ones((100, 1))
    norms[33], norms[66] = 1000, np.nan
    with History.open(write(tmp_path / "run.db", norms)) as history:
        assert sparkline(history, 10) == "\u2581\u2581\u2581\u2588\u2581\u2581x\u2581\u2581\u2581"


def test_json(tmp_path: Path) -> None:
    norms = planted(2000)[:1001]
    path = write(tmp_path / "run.db", norms, limit=4.0)
    status, out, err = run_main("watch", path, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    events = found.pop("events")
    assert [event["kind"] for event in events] == ["spike", "NaN"]
    largest = found.pop("largest")
    assert [each["norm"] for each in largest[:3]] == ["nan", "nan", np.nanmax(norms[1000])]
    clipped = found.pop("clipped")
    assert 0 < clipped < 1001
    assert found == {
        "version": 1,
        "name": "run.db",
        "step": 1000,
        "time": 1.7e9 + 250,
        "norm": "nan",
        "limit": 4.0,
        "factor": 0.0,
        "action": "skip",
        "steps": 1001,
        "skipped": 1,
        "nonfinite": 1,
        "tensor_step": 1000,
    }


def test_errors(tmp_path: Path) -> None:
    nothing = tmp_path / "none.db"
    empty = write(tmp_path / "empty.db", np.ones((0, 3)))
    for arguments, words in (
        ((nothing, "--once"), f"there is no record {nothing}"),
        ((empty, "--once"), f"{empty} has no steps yet; nothing was recorded"),
        ((empty,), "watch draws on a terminal, and the output is none; add --once or --json"),
    ):
        assert run_main("watch", *arguments) == (2, "", f"gradclip: {words}\n")


@pytest.mark.slow
def test_without_rich_it_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", quiet(50, 3))
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from gradclip.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run = [cli_files.sys.executable, "-c", code, "watch", path]
    done = cli_files.run([*run, "--once"])
    message = "gradclip: rich is not installed: pip install rich (all: gradclip[cli])\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert cli_files.run([*run, "--json"]).stdout == run_process("watch", path, "--json").stdout


# ---- a run that goes on ----


def test_only_the_last_steps_are_looked_at_as_the_file_is_now(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", quiet(5000, 3))
    with History.open(path) as history:
        latest = int(history.steps[-1])
        now = recent(history, latest)
        assert (len(now), int(now.steps[-1])) == (RECENT, 4999)
        write(path, quiet(100, 3), first=5000, run=2)
        now = recent(history, latest)
        assert (len(now), int(now.steps[-1])) == (RECENT, 5099)
        # From here on the run begins again, far behind what was seen.
        write(path, quiet(10, 3), first=1000, run=3)
        now = recent(history, 5099)
        assert (len(now), int(now.steps[-1])) == (1010, 1009)


class Watching:
    """``gradclip watch`` on a terminal, and what it has drawn."""

    def __init__(self, path: Path):
        self.ours, theirs = pty.openpty()
        settings = {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
        with cli_files.heeded(signal.SIGINT):
            self.process = subprocess.Popen(
                cli_files.command("watch", path),
                env=os.environ | settings,
                stdout=theirs,
                stderr=theirs,
            )
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self.drawn = ""

    def until(self, words: str) -> None:
        """Wait until something is drawn, and forget it."""
        stop = time.monotonic() + 60
        while words not in self.drawn:
            assert time.monotonic() < stop, self.drawn[-2000:]
            assert self.process.poll() is None, self.drawn
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self.ours, 65536).decode(errors="replace")
                self.drawn += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", piece)
            time.sleep(0.02)
        self.drawn = ""

    def end(self) -> int:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(30)
        os.close(self.ours)
        return status


@pytest.mark.slow
def test_a_run_is_waited_for_and_followed(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    watching = Watching(path)
    watching.until(f"gradclip: waiting for {path.name}"[:20])
    with gradclip.Record(path, per_tensor_every=1) as record:
        for step in range(60):
            record(step, gradclip.norms({"a": np.ones(4), "b": np.ones(9)}), limit=2.0)
        record.flush()
        watching.until("run.db: step 59, ")
        bad = {"a": np.ones(4), "b": np.full(9, np.nan)}
        record(60, gradclip.norms(bad), limit=2.0)
        record.flush()
        watching.until("NaN    step 60: NaN in b")
    assert watching.end() == 0


@pytest.mark.slow
def test_ctrl_c_while_it_waits(tmp_path: Path) -> None:
    watching = Watching(tmp_path / "run.db")
    watching.until("waiting for")
    assert watching.end() == 0
