"""How a folder of files becomes a commit that is there whole or not at all, and how a reader finds out which one it has.

The one thing to know: a folder is a commit if `verify` accepts it, whatever its name says. It is written under a temporary
name, every file and folder is forced to disk, and only then is it renamed:

    .step-00000300.tmp/...      files, each fsynced; then manifest.json, fsynced; then the folders, fsynced
    step-00000300/...           one rename, and an fsync of the parent
    step-00000300.1/...         the same step again, with another memory: a revision, which counts as newer

A kill at any point leaves the earlier commits, or those and the new one; the next commit removes a temporary folder.
`manifest.json` holds {"schema": 1, "step", "world_size", "virtual_shards", "config": blake2b of the settings,
"versions": {name: version}, "files": {relative path: {"bytes", "blake2b"}}, "self": blake2b of the rest}, in one spelling
only. A commit holds no other files than those it lists, except what file managers and editors leave anywhere (`STRAYS`),
which is ignored.

Pure file protocol: no torch, no ranks. Several writers may fill one temporary folder; each seals the files it wrote, and
one of them publishes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

log = logging.getLogger("lmcode")
SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20  # a file of this name that is longer was not written here
STEP_NAME = re.compile(r"step-(\d{1,18})(?:\.([1-9]\d{0,8}))?")  # step and revision

STRAYS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.ipynb_checkpoints|\.nfs[0-9a-f]+")  # one part of a path

Seals = dict[str, dict[str, Any]]  # relative path -> {"bytes", "blake2b"}
Parts = dict[str, Callable[[Path], object]]  # relative path -> writes the file there


class DamagedCheckpoint(ValueError):
    """A folder that is not a whole commit; the message is one line that names the file and the reason."""


class Locked(ValueError):
    """Another process writes into the folder; the message names it."""


@dataclass(frozen=True)
class CommitFacts:
    """What a manifest says about a commit as a whole.

    step: optimizer steps behind it. world_size: ranks that wrote it. virtual_shards: S of its banks. config: blake2b of
    its settings. versions: of the programs that wrote it.
    """

    step: int
    world_size: int
    virtual_shards: int
    config: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read and judged; `files` in the order of their names."""

    facts: CommitFacts
    files: Seals

    @property
    def total_bytes(self) -> int:
        """Size of all files together, the manifest excepted."""
        return sum(seal["bytes"] for seal in self.files.values())


def step_folder(parent: Path, step: int, revision: int = 0) -> Path:
    """Where the commit of a step lies, or a later revision of it."""
    return parent / (f"step-{step:08d}" + (f".{revision}" if revision else ""))


def step_of(path: Path) -> tuple[int, int]:
    """The step and the revision that a commit's name says; ValueError for another name."""
    named = STEP_NAME.fullmatch(path.name)
    if named is None:
        raise ValueError(f"a commit is called step-<number> or step-<number>.<revision>: got '{path.name}'")
    return int(named[1]), int(named[2] or 0)


def temporary_of(final: Path) -> Path:
    """Where a commit is written before it takes its name; a kill leaves it behind, and `begin` sweeps it."""
    return final.with_name(f".{final.name}.tmp")


def digest(path: Path) -> str:
    """blake2b (32 bytes, hexadecimal) of a file's content."""
    state = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, and forces each new name to disk."""
    for one in reversed([one for one in (folder, *folder.parents) if not one.is_dir()]):
        one.mkdir(exist_ok=True)
        sync(one.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a new file and forces it to disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(text.encode("utf-8", "backslashreplace"))  # a path may hold bytes that are no UTF-8
        while rest:
            rest = rest[os.write(handle, rest):]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON that people can read, too."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Gives a file new content so that a reader, or a kill, finds the old or the new."""
    temporary = temporary_of(path)
    write_text(temporary, text)
    os.rename(temporary, path)
    sync(path.parent)


def seal(folder: Path, names: Iterable[str]) -> Seals:
    """Forces these files of `folder` to disk and returns their sizes and hashes."""
    seals: Seals = {}
    for name in names:
        path = folder / name
        sync(path)
        seals[name] = {"bytes": os.stat(path).st_size, "blake2b": digest(path)}
    return seals


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) if the file system of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"a checkpoint takes about {needed:,} bytes and {free:,} are free", str(folder))


def begin(final: Path) -> Path:
    """Sweeps what killed commits left beside `final` and returns an empty temporary folder for it.

    Raises:
        FileExistsError: if `final` is there: a commit is never written over.
        OSError: whatever the file system says.
    """
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, "a checkpoint is never written over", str(final))
    make_folder(final.parent)
    temporary = temporary_of(final)
    for leftover in final.parent.glob(".*.tmp"):
        if leftover == temporary or STEP_NAME.fullmatch(leftover.name[1:-len(".tmp")]):
            shutil.rmtree(leftover)
    os.mkdir(temporary)
    return temporary


def publish(temporary: Path, final: Path, facts: CommitFacts, seals: Mapping[str, Mapping[str, Any]]) -> None:
    """Completes a commit: seals the files that nobody has sealed, writes the manifest, and gives the folder its name."""
    _, names, folders = _walk(temporary)
    own = {name for name in names if not is_stray(name)}
    files = {**seals, **seal(temporary, sorted(own - {*seals}))}
    write_text(temporary / MANIFEST, render(facts, files))
    for folder in sorted(folders, key=len, reverse=True):
        sync(temporary / folder)
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)


def render(facts: CommitFacts, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a manifest."""
    content = {"schema": SCHEMA, **asdict(facts), "files": dict(sorted(files.items()))}
    own = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()
    return json.dumps({**content, "self": own}, indent=1, sort_keys=True) + "\n"


@contextmanager
def commit(final: Path, facts: CommitFacts) -> Iterator[Path]:
    """Gives one writer a temporary folder to fill; on leaving the block it becomes `final`, or after an error nothing."""
    temporary = begin(final)
    try:
        yield temporary
        publish(temporary, final, facts, {})
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Removes a commit; a kill in between leaves a temporary folder and never half a commit.

    Raises:
        DamagedCheckpoint: if the folder holds anything but a commit's own files; nothing is removed then.
    """
    survey(folder)
    temporary = temporary_of(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def set_aside(folder: Path) -> Path:
    """Renames a commit that must not be found any more, and keeps it; returns its new place."""
    number = 0
    while os.path.lexists(place := folder.with_name(f"set-aside-{folder.name}-{number}")):
        number += 1
    os.rename(folder, place)
    sync(folder.parent)
    return place


def steps(parent: Path) -> list[Path]:
    """What bears the name of a commit in `parent`, oldest first, verified or not."""
    return sorted((path for path in parent.glob("step-*") if STEP_NAME.fullmatch(path.name)), key=step_of)


def newest_verified(parent: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest commit in `parent` that verifies, or None; and the newer ones that do not, each with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in reversed(steps(parent)):
        try:
            if path.is_symlink():
                raise DamagedCheckpoint(f"{path}: is a symbolic link")
            verify(path)
            return path, skipped
        except DamagedCheckpoint as error:
            skipped.append((path, str(error)))
    return None, skipped


def verify(folder: Path) -> Manifest:
    """Reads every byte of a commit and compares it with its manifest.

    Raises:
        DamagedCheckpoint: no manifest, or one that is not JSON, of another schema or ill-formed; a path that leaves the
            folder; a file that is missing, additional, a link or no file; a wrong size or hash; a folder named for
            another step. What a file manager has left (`STRAYS`) is passed over with a warning.
    """
    manifest = survey(folder)
    try:
        for name, expected in manifest.files.items():
            if digest(folder / name) != expected["blake2b"]:
                raise DamagedCheckpoint(f"{folder / name}: the content does not have the hash of the manifest")
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return manifest


def survey(folder: Path) -> Manifest:
    """Compares the names and sizes of a commit's files with its manifest; a cut file is found without reading others.

    Raises:
        DamagedCheckpoint: as `verify`, but for hashes.
    """
    manifest = read_manifest(folder)
    links, names, _ = _walk(folder)
    strays = sorted(name for name in names | links if is_stray(name) and name not in manifest.files)
    if strays:
        log.warning("'%s': passed over what is no part of the checkpoint: %s", folder, ", ".join(strays))
    links, names = links.difference(strays), names.difference(strays)
    for link in sorted(links):
        raise DamagedCheckpoint(f"{folder / link!s}: neither a file nor a folder (a symbolic link?)")
    for name in sorted({*manifest.files} - names):
        raise DamagedCheckpoint(f"{folder}: {name!r} is in the manifest and missing from the folder")
    for name in sorted(names - {*manifest.files, MANIFEST}):
        raise DamagedCheckpoint(f"{folder}: {name!r} is in the folder and missing from the manifest")
    try:
        for name, expected in manifest.files.items():
            if (size := os.stat(folder / name).st_size) != expected["bytes"]:
                raise DamagedCheckpoint(f"{folder / name}: expected {expected['bytes']} bytes, got {size}")
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads and judges the manifest alone; says nothing about the files.

    Raises:
        DamagedCheckpoint: as `verify`, as far as it can be seen in the manifest.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"{path}: missing")
        if os.stat(path).st_size > MAX_MANIFEST_BYTES:
            raise DamagedCheckpoint(f"{path}: longer than {MAX_MANIFEST_BYTES:,} bytes")
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except DamagedCheckpoint:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedCheckpoint(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None
    manifest = _judge(path, content)
    if text != render(manifest.facts, manifest.files):
        raise DamagedCheckpoint(f"{path}: the content does not have its own hash")
    return manifest


def _judge(path: Path, content: Any) -> Manifest:
    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise DamagedCheckpoint(f"{path}: {rule}")

    require(isinstance(content, dict), "must hold an object")
    schema = content.get("schema")
    require(type(schema) is int and schema == SCHEMA, f"schema must be {SCHEMA}: got {repr(schema)[:40]}")
    keys = {"schema", "files", "self", *CommitFacts.__dataclass_fields__}
    require({*content} == keys, f"must have the keys {', '.join(sorted(keys))}")
    for name, lowest in (("step", 0), ("world_size", 1), ("virtual_shards", 1)):
        value = content[name]
        require(type(value) is int and lowest <= value < 2**63, f"{name} must be an integer from {lowest} on")
    require(_is_digest(content["config"]), "config must be a blake2b of 64 hexadecimal digits")
    require(_is_dict_of(content["versions"], str), "versions must map names to text")
    require(_is_dict_of(content["files"], dict), "files must map paths to objects")
    for name, facts in content["files"].items():
        require(stays_inside(name), f"the path {name[:200]!r} must stay inside the folder and name a file in it")
        fine = {*facts} == {"bytes", "blake2b"} and type(facts["bytes"]) is int and _is_digest(facts["blake2b"])
        require(fine, f"{name[:200]!r} must have its bytes and its blake2b")
    named = STEP_NAME.fullmatch(path.parent.name)
    require(named is None or int(named[1]) == content["step"], f"is of step {content['step']}, unlike the folder's name")
    facts = CommitFacts(**{name: content[name] for name in CommitFacts.__dataclass_fields__})
    return Manifest(facts, dict(sorted(content["files"].items())))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_dict_of(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(one, kind) for one in value.values())


def stays_inside(name: str) -> bool:
    """Whether a path is relative, in its only spelling, and leads down: no '..', '.', '//', NUL, backslash or drive."""
    parts = name.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and not any(char in name for char in "\0\\:")
    return plain and name != MANIFEST and PurePosixPath(name).as_posix() == name


def is_stray(name: str) -> bool:
    """Whether a relative path is, or lies in, something that a file manager or an editor leaves in any folder."""
    return any(STRAYS.fullmatch(part) for part in name.split("/"))


def _walk(folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Relative paths of everything in a folder: (neither file nor folder, files, folders); follows no link."""
    others: set[str] = set()
    files: set[str] = set()
    folders: set[str] = set()

    def descend(prefix: str) -> None:
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.add(name)
                    descend(name + "/")
                else:
                    (files if entry.is_file(follow_symlinks=False) else others).add(name)

    try:
        descend("")
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename}: cannot be read: {error.strerror}") from None
    return others, files, folders


class Lock:
    """The right to write into a folder, held until `close` or until this process ends, however it ends.

    Raises:
        Locked: if another process holds it; the message names its host and process number.
        ValueError: if a file of that name is none of these; it stays as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "writer.lock"
        self._made = not os.path.lexists(self.path)
        self._handle: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._handle, 300, 0).decode("utf-8", "replace").strip() or "an unnamed process"
            self.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise Locked(f"'{folder}' is being written by {holder}; stop that, or give another train.run_dir") from None
        if not (self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(self._handle))):
            self.close()
            raise Locked(f"'{folder}' has just been given back by another process: try again")
        if re.fullmatch(rb"(process \d+ on host .*\n)?", os.pread(self._handle, 300, 0)) is None:
            self.close()
            raise ValueError(f"'{self.path}' was not written by this program: give another train.run_dir")
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Gives the right back; the file stays, since removing it would race with the next holder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def withdraw(self) -> None:
        """Gives the right back before anything was written: the file goes, too, if it was made for this."""
        if self._made and self._handle is not None:
            self.path.unlink(missing_ok=True)
        self.close()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """The right to replace the folder of a file, as long as everybody who does so holds that file.

    Raises:
        Locked: if another process holds it, or has just replaced it.
    """
    handle = os.open(file, os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise Locked(f"'{file.parent}' is being changed by another process") from None
        if not os.path.samestat(os.stat(file), os.fstat(handle)):
            raise Locked(f"'{file.parent}' has just been changed by another process: try again")
        yield
    finally:
        os.close(handle)
