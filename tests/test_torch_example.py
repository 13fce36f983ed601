"""`examples/torch_characters.py`: three ways to clip train the same network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from host import run_script, run_script_in_turn

pytest.importorskip("torch")
# Its first import on a machine says on stderr that it looks for fonts.
pytest.importorskip("matplotlib.font_manager")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples" / "torch_characters.py"


@pytest.mark.long
def test_the_three_runs_are_one(tmp_path: Path) -> None:
    picture = tmp_path / "characters.png"
    done = run_script(EXAMPLE, tmp_path, "--quick", "--out", str(picture), timeout=500)
    assert done.stderr == ""
    assert done.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]

    def row(label: str) -> list[float]:
        (line,) = re.findall(rf"^ {re.escape(label)}  +(.*)$", done.stdout, re.MULTILINE)
        return [float(cell.rstrip("%")) for cell in line.split()]

    for phase in ("forward", "backward", "clipping", "step", "all of these"):
        assert all(time > 0 for time in row(f"{phase}, ms")), done.stdout
    assert all(0 < share < 100 for share in row("steps clipped")), done.stdout
    assert len(set(row("steps clipped"))) == 1, done.stdout
    assert all(loss < 4 for loss in row("final loss (mean of last 20 steps)")), done.stdout
    (difference,) = re.findall(
        r"^largest difference between the losses: (\S+), in step \d+$", done.stdout, re.MULTILINE
    )
    assert 0 <= float(difference) < 1e-4, done.stdout


def test_what_cannot_be_done_is_said_before_training(tmp_path: Path) -> None:
    wrong = [["--steps", "2"], ["--out", "missing/characters.png"]]
    done = run_script_in_turn(EXAMPLE, wrong, tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended with 2\n" * 2)
    assert done.stderr.count("error: --steps must be 3 or more") == 2
