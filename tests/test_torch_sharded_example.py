"""`examples/torch_sharded.py`: shards are clipped as the gathered gradients are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import since_torch
from host import run_script, run_script_in_turn

pytest.importorskip("torch")
# Its first import on a machine says on stderr that it looks for fonts.
pytest.importorskip("matplotlib.font_manager")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples" / "torch_sharded.py"


@pytest.mark.long
@since_torch("2.7", "fully_shard needs a GPU")
def test_shards_are_clipped_as_the_whole(tmp_path: Path) -> None:
    picture = tmp_path / "sharded.png"
    done = run_script(EXAMPLE, tmp_path, "--steps", "21", "--out", str(picture))
    assert done.stderr == ""
    assert done.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]

    def row(label: str) -> list[str]:
        (line,) = re.findall(rf"^ {re.escape(label)}  +(.*)$", done.stdout, re.MULTILINE)
        return re.split(" {2,}", line.rstrip())

    assert row("gradclip, shards and gathered: equal to the bit") == ["3 of 3"] * 2, done.stdout
    alone, apart = map(float, row("torch.nn.utils, shards and gathered: apart by up to"))
    assert alone == 0, done.stdout
    assert apart < 1e-5, done.stdout
    shares = [float(cell.rstrip("%")) for cell in row("steps clipped")]
    assert all(0 < share <= 100 for share in shares), done.stdout
    losses = [float(cell) for cell in row("final loss (mean of last 21 steps)")]
    assert all(loss < 4.5 for loss in losses), done.stdout
    (difference,) = re.findall(
        r"^1 process and 2: norms apart by up to (\S+), in step \d+;$", done.stdout, re.MULTILINE
    )
    assert 0 <= float(difference) < 1e-3, done.stdout


def test_what_cannot_be_done_is_said_before_training(tmp_path: Path) -> None:
    wrong = [["--steps", "2"], ["--out", "missing/sharded.png"]]
    done = run_script_in_turn(EXAMPLE, wrong, tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended with 2\n" * 2)
    assert done.stderr.count("error: --steps must be 3 or more") == 2
