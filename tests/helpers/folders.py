"""Folders of small files: how they are laid out, and all that lies in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def lay_out(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def everything(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What lies in a folder: bytes, mode, and where links lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = (path.lstat().st_mode, what)
    return found
