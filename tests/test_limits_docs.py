"""The code of docs/limits.md runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "limits.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_in_a_process_of_its_own(number: int) -> None:
    code = BLOCKS[number]
    for name in ("torch", "optax", "keras", "tensorflow"):
        if f"gradclip.{name}" in code:
            pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_the_page_has_a_block_for_every_door() -> None:
    for door in ("torch import clip_grad_norm_", "torch.attach", "optax.", "keras.", "tensorflow"):
        assert any(f"gradclip.{door}" in block for block in BLOCKS)
