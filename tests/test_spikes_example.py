"""`examples/spikes.py`: limits of each kind at too high a learning rate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from host import run_script, run_script_in_turn

pytest.importorskip("torch")
# Its first import on a machine says on stderr that it looks for fonts.
pytest.importorskip("matplotlib.font_manager")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples" / "spikes.py"


@pytest.mark.long
def test_every_limit_has_its_row(tmp_path: Path) -> None:
    picture = tmp_path / "spikes.png"
    done = run_script(EXAMPLE, tmp_path, "--quick", "--out", str(picture), timeout=500)
    assert done.stderr == ""
    assert done.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]

    rows = dict(re.findall(r"^ (\S.*?)   +(\d.*)$", done.stdout, re.MULTILINE))
    cells = {name: row.split() for name, row in rows.items()}
    assert len(cells) == 8, done.stdout
    assert all(3 < float(loss) < 5 for row in cells.values() for loss in row[:3])
    assert all(row[3] == "0.00%" for row in cells.values())
    clipped = {name: row[4] for name, row in cells.items()}
    # The norm is 6 at first: what clips nothing, and what in the warm-up clips to 1.
    assert clipped["no limit"] == "0.0%"
    binding = ("fixed: 1", "Average(2.0)", "PerTensor(Average(1.05))")
    assert [clipped[name] for name in binding] == ["100.0%"] * 3
    assert all(row[5] == "0" and float(row[6]) > 0 for row in cells.values())


def test_what_cannot_be_done_is_said_before_training(tmp_path: Path) -> None:
    wrong = [["--steps", "0"], ["--out", "missing/spikes.png"]]
    done = run_script_in_turn(EXAMPLE, wrong, tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended with 2\n" * 2)
    assert done.stderr.count("error: --steps must be 1 or more") == 2
