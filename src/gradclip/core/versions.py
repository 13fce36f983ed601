"""The lowest version of a framework that its part of gradclip works with."""

from __future__ import annotations

import re


def require(floor: str, found: str) -> None:
    """Refuse a framework that is too old, before something that it lacks is looked for.

    Args:
        floor: a requirement as ``pyproject.toml`` has it, ``"torch>=2.6"``.
        found: the version that is installed.

    Raises:
        ImportError: it is below the floor.
    """
    lacking = too_old(floor, found)
    if lacking is not None:
        raise ImportError(lacking)


def too_old(floor: str, found: str) -> str | None:
    """What to say of a version that is below the floor; None where it is not."""
    name, _, lowest = floor.partition(">=")
    below = is_below(lowest, found)
    return f"gradclip needs {floor}, this is {name} {found}" if below else None


def is_below(lowest: str, found: str) -> bool:
    """If a version that is installed is older than another."""
    return _numbers(found) < _numbers(lowest)


def _numbers(version: str) -> tuple[int, ...]:
    """The release alone: a build of ``2.6.0a0+git`` has what 2.6 has."""
    release = re.match(r"\d+(\.\d+)*", version)
    assert release is not None, f"{version!r} begins with no number"
    return tuple(map(int, release.group().split(".")))
