"""Which files a setting names: a file, a folder with everything below it, or a glob; each file once, in one order.

Links to files and folders are followed. A folder is entered once and a file taken once, under the name that needs no link
where there is one, so a loop of links ends. What is passed over is noted with its reason in a `PassedOver`.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lmcode.config import ConfigError, expanded, near_match

SHOWN_NAMES = 5  # of each reason
HELD_OUT_WORDS = {"val", "valid", "validation", "dev", "test", "eval", "heldout"}


class TextFile(NamedTuple):
    """A file and its name relative to the corpus, with '/' on every machine.

    chosen: whether it was named, or matched by a glob, rather than found in a folder.
    """

    name: str
    path: Path
    chosen: bool = False


class PassedOver:
    """Names of what was not read, by reason; noting one again changes nothing."""

    def __init__(self, names: dict[str, list[str]] | None = None) -> None:
        self.names = {reason: dict.fromkeys(some) for reason, some in (names or {}).items()}

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, {})[name] = None

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def as_json(self) -> dict[str, list[str]]:
        return {reason: sorted(names) for reason, names in sorted(self.names.items())}

    def describe(self) -> str:
        """'3 passed over: 2 hidden (.git, .DS_Store), 1 that links to nothing (old.txt)'; a few names each."""
        parts = []
        for reason, names in self.as_json().items():
            more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
            parts.append(f"{len(names):,} {reason} ({', '.join(names[:SHOWN_NAMES])}{more})")
        return f"{len(self):,} passed over{': ' * bool(parts)}{', '.join(parts)}"


def find(setting: str, value: str, passed_over: PassedOver) -> list[TextFile]:
    """The files that `value` of `setting` names, sorted by name.

    Raises:
        ConfigError: if there is no such path, or nothing matches.
    """
    path = expanded(setting, value)
    if path.is_file():
        return [TextFile(path.name, path, chosen=True)]
    if path.is_dir():
        return walk(path, passed_over)
    if not glob.has_magic(str(path)):
        siblings = os.listdir(path.parent) if path.parent.is_dir() else ()
        raise ConfigError(f"{setting} '{value}' does not exist.{near_match(path.name, siblings)}")
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    found = _matches(path, fixed, passed_over)
    if not found:
        raise ConfigError(f"{setting} '{value}' matches no file")
    return found


def walk(root: Path, passed_over: PassedOver, *, without: Collection[str] = ()) -> list[TextFile]:
    """Every file below `root`, sorted by name, but for hidden ones and folders called as in `without`."""
    found: list[TextFile] = []
    entered: set[tuple[int, int]] = set()
    folders, linked = deque([(root, "")]), deque[tuple[Path, str]]()
    while folders or linked:  # folders that are reached without a link come first
        folder, prefix = folders.popleft() if folders else linked.popleft()
        try:
            identity = _identity(folder)
            if identity in entered:
                passed_over.add("that link to a folder that is read already", prefix.rstrip("/"))
                continue
            entered.add(identity)
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            passed_over.add(f"that cannot be opened: {error.strerror}", prefix.rstrip("/") or str(root))
            continue
        for entry in inside:
            name = prefix + entry.name
            is_folder = os.path.isdir(entry.path)  # False, too, for a link to itself
            if is_folder and entry.name in without:
                continue
            if entry.name.startswith("."):
                passed_over.add("hidden", name)
            elif is_folder:
                (linked if entry.is_symlink() else folders).append((Path(entry.path), f"{name}/"))
            else:
                found.append(TextFile(name, Path(entry.path)))
    return _once(found, passed_over)


def _matches(pattern: Path, fixed: Path, passed_over: PassedOver) -> list[TextFile]:
    """Files below `fixed` that match; '**' stands for any number of folders."""
    if "**" in pattern.parts:  # by a walk, which ends where folders link to each other
        wanted = pattern.parts[len(fixed.parts):]
        return [file._replace(chosen=True) for file in walk(fixed, passed_over)
                if fits(tuple(file.name.split("/")), wanted)]
    found = []
    for match in map(Path, sorted(glob.glob(str(pattern)))):
        name = match.relative_to(fixed).as_posix()
        if match.is_dir():
            passed_over.add("folders, of which a glob takes none", name)
        else:
            found.append(TextFile(name, match, chosen=True))
    return _once(found, passed_over)


def fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a name match those of a glob pattern."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and fits(parts[1:], pattern[1:])


def excluded(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name relative to the corpus is left out: a pattern without '/' is met by any part of the name, another by
    the whole of it or by a folder that it lies in."""
    parts = tuple(name.split("/"))
    for pattern in patterns:
        wanted = tuple(pattern.strip("/").split("/"))
        if len(wanted) == 1 and any(fnmatch.fnmatchcase(part, pattern.strip("/")) for part in parts):
            return True
        if any(fits(parts[:end], wanted) for end in range(1, len(parts) + 1)):
            return True
    return False


def without_files(files: Sequence[TextFile], others: Sequence[TextFile]) -> list[TextFile]:
    """`files` but for those that are among `others`, under whatever name."""
    taken = {_identity(other.path) for other in others}
    return [file for file in files if _identity(file.path) not in taken]


def looks_held_out(name: str) -> bool:
    """Whether a file's stem or one of its folders is called so that it may well be kept for evaluation: 'wiki.valid.txt',
    'TinyStories-valid.txt', 'test-00000-of-00001.parquet', 'dev/a.txt'; words of letters count as a whole."""
    *folders, last = name.lower().split("/")
    stem = last.split(".")[:-1] or [last]
    return (bool(HELD_OUT_WORDS & set(re.findall(r"[^\W\d_]+", " ".join(stem))))
            or any(folder in HELD_OUT_WORDS for folder in folders))


def _once(files: Iterable[TextFile], passed_over: PassedOver) -> list[TextFile]:
    """Ordinary files, each once, sorted by name; one that is no link stands for those that link to it."""
    taken: dict[tuple[int, int], str] = {}
    kept = []
    for file in sorted(files, key=lambda file: file.path.is_symlink()):  # stable: else in the order they were found
        if not file.path.is_file():
            link = file.path.is_symlink() and not file.path.exists()
            passed_over.add("that link to nothing" if link else "that are no ordinary files", file.name)
        elif taken.setdefault(_identity(file.path), file.name) != file.name:
            passed_over.add("that are another name of a file that is read already", file.name)
        else:
            kept.append(file)
    return sorted(kept)


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
