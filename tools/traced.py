"""Shared by the chaos tools: what a program asks of a disk, written down call by call, done again, or lost in a power cut.

The one thing to know: `Recorder` sees Python's calls and safetensors' files (written in pieces in its place); that it saw
everything is not believed but checked, by doing the trace again and comparing with what the program left (`complete`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import chaos
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

PIECES = 3  # writes that a file takes where the program does not say


class Op(NamedTuple):
    """One call that changes a disk. path, other: relative to the root; other is where a rename or a link leads."""

    kind: str  # create, truncate, write, fsync, mkdir, rename, link, unlink, rmdir; note
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    when: int = 0


class Recorder:
    """Within its block, notes every call that changes something below `root`.

    Args:
        before: called with each before it happens; what it raises, the caller sees.

    Attributes:
        ops: what has happened so far.
    """

    def __init__(self, root: Path, before: Callable[[Op], None] = lambda op: None) -> None:
        self.root, self.before, self.ops = root, before, list[Op]()
        self._open: dict[int, tuple[str, str | None]] = {}  # handle -> absolute path, and relative one if below root
        self._offset: dict[int, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        real = {name: getattr(os, name) for name in ("open", "write", "close", "fsync", "mkdir", "rename", "link",
                                                      "unlink", "rmdir")}
        wrapped = {"open": self._opened, "write": self._written, "close": self._closed, "fsync": self._synced,
                   **{name: self._simple(name, real[name]) for name in ("mkdir", "unlink", "rmdir")},
                   **{name: self._pair(name, real[name]) for name in ("rename", "link")}}
        self._real = real
        for name, function in wrapped.items():
            self._stack.enter_context(mock.patch.object(os, name, function))
        for module in (safetensors.torch, safetensors.numpy):
            self._stack.enter_context(mock.patch.object(module, "serialize_file", self._serializer(module.serialize_file)))
        self._stack.enter_context(mock.patch.object(Path, "write_bytes", write_bytes))
        self._stack.enter_context(mock.patch.object(
            Path, "write_text", lambda path, text, encoding=None: write_bytes(path, text.encode(encoding or "utf-8"))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, text: str) -> None:
        """Marks this moment in the trace."""
        self.ops.append(Op("note", text, when=time.monotonic_ns()))

    def _relative(self, path: str) -> str | None:
        inside = os.path.relpath(path, self.root)
        return None if inside.startswith("..") else inside

    def _place(self, path: Any, dir_fd: int | None) -> str:
        folder = self._open[dir_fd][0] if dir_fd in self._open else os.getcwd()
        return os.path.join(folder, os.fspath(path))

    def _do(self, op: Op, act: Callable[[], Any]) -> Any:
        self.before(op)
        result = act()
        self.ops.append(op._replace(when=time.monotonic_ns()))
        return result

    def _opened(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        inside = self._relative(place)
        kind = None
        if inside is not None and flags & os.O_CREAT and not os.path.lexists(place):
            kind = "create"
        elif inside is not None and flags & os.O_TRUNC:
            kind = "truncate"

        def act() -> int:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)

        handle = act() if kind is None else self._do(Op(kind, inside), act)
        self._open[handle], self._offset[handle] = (place, inside), 0
        return handle

    def _written(self, handle: int, data: Any) -> int:
        _, inside = self._open.get(handle, ("", None))
        if inside is None:
            return self._real["write"](handle, data)
        op = Op("write", inside, offset=self._offset[handle], data=bytes(data))
        count = self._do(op, lambda: self._real["write"](handle, data))
        self._offset[handle] += count
        return count

    def _closed(self, handle: int) -> None:
        self._open.pop(handle, None)
        self._real["close"](handle)

    def _synced(self, handle: int) -> None:
        _, inside = self._open.get(handle, ("", None))
        if inside is None:
            self._real["fsync"](handle)
        else:
            self._do(Op("fsync", inside), lambda: self._real["fsync"](handle))

    def _simple(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> Any:
            inside = self._relative(self._place(path, dir_fd))
            if inside is None:
                return real(path, *args, dir_fd=dir_fd, **more)
            return self._do(Op(kind, inside), lambda: real(path, *args, dir_fd=dir_fd, **more))

        return call

    def _pair(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, other: Any, **more: Any) -> Any:
            first, second = (self._relative(self._place(one, None)) for one in (path, other))
            if first is None or second is None:
                return real(path, other, **more)
            return self._do(Op(kind, first, second), lambda: real(path, other, **more))

        return call

    def _serializer(self, real: Callable[..., Any]) -> Callable[..., None]:
        def call(tensors: Any, filename: Any, metadata: Any = None) -> None:
            if self._relative(os.path.abspath(filename)) is None:
                real(tensors, filename, metadata=metadata)
                return
            with tempfile.TemporaryDirectory() as scratch:
                real(tensors, os.path.join(scratch, "file"), metadata=metadata)
                data = Path(scratch, "file").read_bytes()
            try:
                write_bytes(Path(filename), data)
            except OSError as error:  # as the library says it
                raise SafetensorError(f"Error while serializing: I/O error: {error}") from None

        return call


def write_bytes(path: Path, data: bytes) -> int:
    """`Path.write_bytes`, through `os` and in pieces."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        size = max(1, -(-len(data) // PIECES))
        for start in range(0, len(data), size):
            os.write(handle, data[start:start + size])
    finally:
        os.close(handle)
    return len(data)


def merged(traces: Iterable[list[Op]]) -> list[Op]:
    """The calls of several processes of one machine in the order of time."""
    return sorted((op for trace in traces for op in trace), key=lambda op: op.when)


def apply(root: Path, op: Op) -> None:
    """Does a call again, below another root."""
    path = root / op.path
    if op.kind in ("create", "truncate"):
        path.write_bytes(b"")
    elif op.kind == "write":
        with path.open("r+b") as file:
            file.seek(op.offset)
            file.write(op.data)
    elif op.kind in ("rename", "link"):
        getattr(os, op.kind)(path, root / op.other)
    elif op.kind in ("mkdir", "unlink", "rmdir"):
        getattr(os, op.kind)(path)


def complete(ops: Iterable[Op], root: Path, under: str) -> bool:
    """Whether doing the trace again on an empty disk gives what the program left below `root`, in the folder `under`."""
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        for op in ops:
            apply(Path(scratch), op)
        return chaos.content_of(Path(scratch) / under) == chaos.content_of(root / under)


# Power


class File:
    """A file's content as programs see it and as it is on the disk; what was written since the last fsync may get lost."""

    def __init__(self) -> None:
        self.disk = b""
        self.pending: list[tuple[int, bytes]] = []  # offset and data; offset -1 empties the file

    def fsync(self) -> None:
        self.disk, self.pending = after(self.disk, self.pending), []


class Folder:
    """The same of a folder: entries, and changes of entries, each a list of (name, inode or None) that happens at once."""

    def __init__(self) -> None:
        self.seen: dict[str, File | Folder] = {}
        self.disk: dict[str, File | Folder] = {}
        self.pending: list[list[tuple[str, File | Folder | None]]] = []

    def change(self, *entries: tuple[str, File | Folder | None]) -> None:
        self.pending.append(list(entries))
        self.seen = entries_after(self.seen, [list(entries)])

    def fsync(self) -> None:
        self.disk, self.pending = dict(self.seen), []


def after(content: bytes, writes: Iterable[tuple[int, bytes]]) -> bytes:
    """A file's content after some writes; what lies before a write that arrived and was never written is zero."""
    buffer = bytearray(content)
    for offset, data in writes:
        if offset < 0:
            buffer.clear()
            continue
        buffer.extend(bytes(max(0, offset - len(buffer))))
        buffer[offset:offset + len(data)] = data
    return bytes(buffer)


def entries_after(entries: dict[str, File | Folder],
                  changes: Iterable[list[tuple[str, File | Folder | None]]]) -> dict[str, File | Folder]:
    result = dict(entries)
    for name, inode in (one for change in changes for one in change):
        if inode is None:
            result.pop(name, None)
        else:
            result[name] = inode
    return result


class Disk:
    """A disk that keeps what was fsynced: a file's content by an fsync of the file, a name by an fsync of its folder.

    Nothing else is promised, as in POSIX: of the rest, any part may be there, in any order (a rename within a folder is
    whole or absent).
    """

    def __init__(self) -> None:
        self.root = Folder()

    def _find(self, path: str) -> Any:
        inode: Any = self.root
        for part in path.split("/") if path not in ("", ".") else ():
            inode = inode.seen[part]
        return inode

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    def do(self, op: Op) -> None:
        """Takes in one call of a trace."""
        if op.kind == "fsync":
            self._find(op.path).fsync()
        elif op.kind == "write":
            self._find(op.path).pending.append((op.offset, op.data))
        elif op.kind == "truncate":
            self._find(op.path).pending.append((-1, b""))
        elif op.kind in ("create", "mkdir", "unlink", "rmdir"):
            folder, name = self._parent(op.path)
            folder.change((name, {"create": File, "mkdir": Folder}.get(op.kind, lambda: None)()))
        elif op.kind in ("rename", "link"):
            (folder, name), (target, new) = self._parent(op.path), self._parent(op.other)
            inode = folder.seen[name]
            if op.kind == "link" or folder is not target:
                target.change((new, inode))
            if op.kind == "rename":
                folder.change(*([(new, inode)] if folder is target else []), (name, None))

    def cut(self, root: Path, chance: random.Random | None) -> None:
        """Lays out below `root` what is there after a power cut: what is safe, and of the rest what `chance` lets through,
        every byte and name for itself; None loses it all."""
        self._lay_out(self.root, root, chance)

    def _lay_out(self, inode: Any, path: Path, chance: random.Random | None) -> None:
        if isinstance(inode, File):
            path.write_bytes(after(inode.disk, _some(inode.pending, chance, tear=True)))
            return
        path.mkdir(exist_ok=True)
        for name, one in entries_after(inode.disk, _some(inode.pending, chance)).items():
            self._lay_out(one, path / name, chance)


def _some(pending: list[Any], chance: random.Random | None, *, tear: bool = False) -> list[Any]:
    if chance is None:
        return []
    share = chance.choice((0.1, 0.5, 0.9, 1.0))
    kept = [one for one in pending if chance.random() < share]
    if tear:
        kept = [(offset, data[:chance.randint(0, len(data))]) if chance.random() < 0.3 else (offset, data)
                for offset, data in kept]
    return kept


def clear(folder: Path) -> None:
    """Empties a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
