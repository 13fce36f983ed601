"""`examples/jax_digits.py`: clipped in two ways, and resumed from a checkpoint to the same bits."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from host import run_script, run_script_in_turn

for _name in ("optax", "equinox", "orbax", "sklearn"):
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"{_name} is not installed", allow_module_level=True)
# Its first import on a machine says on stderr that it looks for fonts.
pytest.importorskip("matplotlib.font_manager")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples" / "jax_digits.py"


@pytest.mark.long
def test_both_learn_and_the_resumed_run_is_the_same(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    done = run_script(EXAMPLE, tmp_path, "--quick", "--out", str(picture))
    assert done.stderr == ""
    assert done.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]
    assert "resumed after step 30 in a new process: 25 results, the same bits" in done.stdout

    def row(label: str) -> list[str]:
        (line,) = re.findall(rf"^ {re.escape(label)}  +(.*)$", done.stdout, re.MULTILINE)
        return re.split(" {2,}", line)

    clipped_by_optax, clipped = row("steps clipped")
    assert clipped_by_optax == "not recorded"
    assert 0 < float(clipped.rstrip("%")) < 100
    assert all(float(loss) < 2 for loss in row("final loss (mean of last 50)")), done.stdout
    (difference,) = re.findall(
        r"^largest difference between the losses: (\S+), in step \d+$", done.stdout, re.MULTILINE
    )
    assert 0 <= float(difference) < 1e-4, done.stdout


@pytest.mark.long
def test_a_run_that_is_not_resumed_whole_is_told(tmp_path: Path) -> None:
    code = EXAMPLE.read_text()
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text(code.replace('kept["state"]', "self.state"))
    done = run_script(forgetful, tmp_path, "--steps", "6")
    assert done.returncode == 1
    assert "resumed in a new process, these differ: losses, norms, " in done.stderr
    assert ".global_norm" in done.stderr
    assert not list(tmp_path.glob("*.png"))


def test_what_cannot_be_done_is_said_before_training(tmp_path: Path) -> None:
    wrong = [["--steps", "2"], ["--out", "missing/digits.png"]]
    done = run_script_in_turn(EXAMPLE, wrong, tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended with 2\n" * 2)
    assert done.stderr.count("error: --steps must be 3 or more") == 2
