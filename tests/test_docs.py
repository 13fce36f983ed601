"""The code of the pages runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("limits", "monitoring")}
BLOCKS = [
    (name, number, block)
    for name, page in PAGES.items()
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.long
@pytest.mark.parametrize(("page", "number", "code"), BLOCKS)
def test_a_block_runs_in_a_process_of_its_own(
    page: str, number: int, code: str, tmp_path: Path
) -> None:
    del page, number
    for name in ("torch", "optax", "keras", "tensorflow", "tensorboard"):
        if f"gradclip.{name}" in code or f"import {name}" in code or f"utils.{name}" in code:
            pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert not done.returncode, done.stderr


def test_the_page_of_limits_has_a_block_for_every_door() -> None:
    for door in ("torch import clip_grad_norm_", "torch.attach", "optax.", "keras.", "tensorflow"):
        assert any(f"gradclip.{door}" in block for page, _, block in BLOCKS if page == "limits")
