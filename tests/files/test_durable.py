"""Commits of files: whole or absent after a crash at any point, and nothing damaged, swapped or foreign verifies."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcode.files import durable
from lmcode.files.commit import drop_old
from lmcode.files.durable import CommitFacts, DamagedCheckpoint, Lock, Locked
from tests.helpers.sources import CHECKOUT

STEPPING = ("open", "write", "fsync", "mkdir", "rename", "close")  # what a commit asks of the operating system


def facts_of(step: int) -> CommitFacts:
    return CommitFacts(step=step, world_size=2, virtual_shards=4, config="0" * 64, versions={"lmcode": "0"})


def content_of(step: int) -> dict[str, bytes]:
    return {"model.bin": bytes([step]) * 300, "banks/layer-01/shard": b"s%d" % step, "banks/empty": b"",
            "trainer.json": json.dumps({"step": step}).encode()}


def commit(parent: Path, step: int) -> Path:
    """The commit of a step, with its content; file by file through `os`, so that every write can fail."""
    final = durable.step_folder(parent, step)
    with durable.commit(final, facts_of(step)) as folder:
        os.mkdir(folder / "banks")
        os.mkdir(folder / "banks" / "layer-01")
        for name, content in content_of(step).items():
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.write(handle, content)
            os.close(handle)
    return final


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != durable.MANIFEST}


class Crash(BaseException):
    """The process ends here: nothing after it runs."""


class Counted:
    """Replaces functions of `os`; `act` happens at the k-th call, before or after the call itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], *, at: int, after: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = []
        for name in STEPPING:
            monkeypatch.setattr(durable.os, name, self._wrap(name, getattr(os, name), act, at, after))

    def _wrap(self, name: str, real: Callable[..., Any], act: Callable[[], None], at: int, after: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[0]))
            due = len(self.calls) == at
            if due and not after:
                act()
            result = real(*args, **kwargs)
            if due and after:
                act()
            return result

        return call


def crash() -> None:
    raise Crash


def number_of_calls(tmp_path: Path) -> int:
    commit(tmp_path / "count", 1)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch, crash, at=0)
        commit(tmp_path / "count", 2)
    return len(counted.calls)


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, after: bool) -> None:
    total, seen = number_of_calls(tmp_path), set()
    assert total > 30
    for at in range(1, total + 1):
        parent = tmp_path / f"{at}"
        commit(parent, 1)
        with pytest.MonkeyPatch.context() as patch:
            Counted(patch, crash, at=at, after=after)
            with pytest.raises(Crash):
                commit(parent, 2)
        found, skipped = durable.newest_verified(parent)
        assert found is not None and skipped == []
        step = durable.verify(found).facts.step
        assert read(found) == content_of(step)
        seen.add(step)
        commit(parent, 3)  # sweeps what the crash left
        assert {path.name for path in parent.iterdir()} <= {f"step-{n:08d}" for n in (1, 2, 3)}
    assert seen == {1, 2}


def test_a_crash_while_removing_an_old_commit_leaves_no_half_of_it(tmp_path: Path) -> None:
    for at in range(1, 3):
        parent = tmp_path / f"{at}"
        commit(parent, 1)
        commit(parent, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable.shutil, "rmtree", lambda *args, **kwargs: crash())
            with pytest.raises(Crash):
                durable.discard(parent / "step-00000001")
        assert [path.name for path in durable.steps(parent)] == ["step-00000002"]
        commit(parent, 3)
        assert sorted(path.name for path in parent.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_call_leaves_older_commits_alone_and_nothing_behind(tmp_path: Path, code: int) -> None:
    parent = tmp_path / "run"
    commit(parent, 1)
    for at in range(1, number_of_calls(tmp_path) + 1):
        def fail() -> None:
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch, fail, at=at)
            with pytest.raises(OSError, match=os.strerror(code)):
                commit(parent, 2)
        assert read(parent / "step-00000001") == content_of(1)
        found, skipped = durable.newest_verified(parent)
        assert skipped == []
        renamed = "rename" in [name for name, _ in counted.calls[:at - 1]]
        assert [path.name for path in sorted(parent.iterdir())] == [f"step-{n:08d}" for n in (1, 2)[:1 + renamed]]
        if renamed:  # all was on disk; only the parent's entry was not yet forced
            assert read(found) == content_of(2)
            shutil.rmtree(found)


def test_everything_is_on_disk_before_the_name_is_given(tmp_path: Path) -> None:
    synced: list[str] = []
    places: dict[int, str] = {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def remember(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = real_open(path, *args, **kwargs)
        places[handle] = str(path)
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.os, "open", remember)
        patch.setattr(durable.os, "fsync", lambda handle: (real_fsync(handle), synced.append(places[handle])))
        patch.setattr(durable.os, "rename", lambda a, b: (real_rename(a, b), synced.append("renamed")))
        final = commit(tmp_path / "run", 1)
    before, after = synced[:synced.index("renamed")], synced[synced.index("renamed") + 1:]
    temporary = str(durable.temporary_of(final))
    everything = {temporary + str(path).removeprefix(str(final)) for path in final.rglob("*")} | {temporary}
    assert everything <= set(before)
    assert max(map(before.index, (p for p in everything if Path(p).name == durable.MANIFEST))) > max(
        before.index(temporary + "/" + name) for name in content_of(1)), "the manifest comes after what it lists"
    assert after == [str(final.parent)]


def test_a_commit_is_never_written_over(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(FileExistsError, match="never written over"):
        commit(tmp_path, 1)
    assert read(tmp_path / "step-00000001") == content_of(1)


def test_nothing_but_what_a_commit_has_written_is_removed(tmp_path: Path) -> None:
    """A folder made by hand, a commit that somebody has put a file into, other temporary files, a lock that is none."""
    mine = {"step-00000003/notes": b"mine", ".cache.tmp/x": b"mine", "step-00000002/notes": b"mine", "writer.lock": b"mine"}
    for step in (1, 2):
        commit(tmp_path, step)
    for name, content in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for step in (2, 3):
        with pytest.raises(DamagedCheckpoint):
            durable.discard(tmp_path / f"step-{step:08d}")
    with pytest.raises(ValueError, match="was not written by this program"):
        Lock(tmp_path)
    for step in (4, 5):
        commit(tmp_path, step)
    drop_old(tmp_path, keep=1)
    assert [path.name for path in durable.steps(tmp_path)] == [f"step-{step:08d}" for step in (2, 3, 5)]
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    assert content_of(2).items() <= {str(path.relative_to(tmp_path / "step-00000002")): path.read_bytes()
                                     for path in (tmp_path / "step-00000002").rglob("*") if path.is_file()}.items()


def test_a_set_aside_commit_is_kept_and_not_found(tmp_path: Path) -> None:
    places = []
    for _ in range(2):
        places.append(durable.set_aside(commit(tmp_path, 1)))
    assert durable.newest_verified(tmp_path) == (None, []) and len(set(places)) == 2
    assert all(read(place) == content_of(1) for place in places)


def test_several_writers_seal_what_they_wrote(tmp_path: Path) -> None:
    final = durable.step_folder(tmp_path, 7)
    temporary = durable.begin(final)
    for name in "abc":
        (temporary / name).write_text(name)
    seals = {**durable.seal(temporary, ["a"]), **durable.seal(temporary, ["b"])}
    (temporary / "a").write_text("x")  # written to after it was sealed: must be seen
    durable.publish(temporary, final, facts_of(7), seals)
    with pytest.raises(DamagedCheckpoint, match="step-00000007/a: the content"):
        durable.verify(final)
    (final / "a").write_text("a")
    assert sorted(durable.verify(final).files) == ["a", "b", "c"]
    assert durable.verify(final).total_bytes == 3


def test_space_is_checked() -> None:
    durable.check_space(Path("/"), 1)
    with pytest.raises(OSError, match="a checkpoint takes about") as caught:
        durable.check_space(Path("/"), 2**62)
    assert caught.value.errno == errno.ENOSPC


# Reading


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_no_flipped_bit_passes(tmp_path: Path) -> None:
    old, new, chance = commit(tmp_path, 1), commit(tmp_path, 2), random.Random(0)
    files = [path for path in sorted(new.rglob("*")) if path.is_file() and path.stat().st_size]
    weights = [path.stat().st_size for path in files]
    hit = set()
    for number in range(300):
        path = files[number] if number < len(files) else chance.choices(files, weights)[0]
        bit = chance.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(DamagedCheckpoint) as caught:
            durable.verify(new)
        found, ((skipped, reason),) = durable.newest_verified(tmp_path)
        assert (found, skipped) == (old, new) and "\n" not in reason
        if path.name == durable.MANIFEST:
            assert "step-00000002" in str(caught.value)  # a flip in a path or hash names the file it speaks of
        else:
            assert str(path) in str(caught.value)
        hit.add(path.name)
        flip(path, bit)
    assert len(hit) == len(files)
    durable.verify(new)


def remove(folder: Path) -> None:
    (folder / "model.bin").unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / "model.bin", 299)


def add(folder: Path) -> None:
    (folder / "banks" / "more").write_text("")


def swap(folder: Path) -> None:
    shutil.copy(folder.parent / "step-00000001" / "model.bin", folder / "model.bin")


def link(folder: Path) -> None:
    (folder / "model.bin").rename(folder.parent / "elsewhere")
    (folder / "model.bin").symlink_to(folder.parent / "elsewhere")


def link_of_folder(folder: Path) -> None:
    (folder / "banks").rename(folder.parent / "elsewhere")
    (folder / "banks").symlink_to(folder.parent / "elsewhere")


def link_of_all(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "model.bin").unlink()
    os.mkfifo(folder / "model.bin")


def folder_for_file(folder: Path) -> None:
    (folder / "model.bin").unlink()
    (folder / "model.bin").mkdir()


def no_manifest(folder: Path) -> None:
    (folder / durable.MANIFEST).unlink()


def linked_manifest(folder: Path) -> None:
    (folder / durable.MANIFEST).rename(folder.parent / "elsewhere")
    (folder / durable.MANIFEST).symlink_to(folder.parent / "elsewhere")


def other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


@pytest.mark.parametrize(("damage", "reason"), [
    (remove, "'model.bin' is in the manifest and missing"), (cut, "model.bin: expected 300 bytes, got 299"),
    (add, "'banks/more' is in the folder and missing from the manifest"), (swap, "model.bin: the content"),
    (link, "model.bin: neither a file nor a folder"), (link_of_folder, "banks: neither a file nor a folder"),
    (link_of_all, "is a symbolic link"), (pipe, "model.bin: neither"), (folder_for_file, "'model.bin' is in the manifest"),
    (no_manifest, "manifest.json: missing"), (linked_manifest, "manifest.json: missing"),
    (other_step, "is of step 1, unlike the folder's name"),
])
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    old, new = commit(tmp_path, 1), commit(tmp_path, 2)
    damage(new)
    found, ((skipped, why),) = durable.newest_verified(tmp_path)
    assert (found, skipped) == (old, new)
    assert reason in why and "step-00000002" in why and "\n" not in why


@pytest.mark.parametrize("name", [
    "../model.bin", "banks/../../model.bin", "..", ".", "", "/etc/passwd", "//etc/passwd", "banks/..", "./model.bin",
    "banks//layer", "banks/", "a\0b", "\0", "..\\model.bin", "C:/model.bin", "C:model.bin", "banks/./layer", "/", "~/../x",
    durable.MANIFEST, "../step-00000001/model.bin", "a/../../../../../../../etc/passwd", "\ud800",
])
def test_no_path_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = commit(tmp_path / "checkpoints", 1)
    (tmp_path / "model.bin").write_text("outside")
    content = json.loads((folder / durable.MANIFEST).read_text())
    content["files"][name] = durable.seal(tmp_path, ["model.bin"])["model.bin"]
    (folder / durable.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint) as caught:
        durable.verify(folder)
    message = str(caught.value)
    assert ("must stay inside" in message or name == "\ud800") and "\n" not in message and "\0" not in message
    message.encode()


@pytest.mark.parametrize(("change", "reason"), [
    (lambda c: {**c, "schema": 2}, "schema must be 1: got 2"), (lambda c: {**c, "schema": True}, "schema must be 1"),
    (lambda c: {**c, "schema": "1" * 10_000}, "schema must be 1"), (lambda c: [c], "must hold an object"),
    (lambda c: None, "must hold an object"), (lambda c: {**c, "more": 1}, "must have the keys"),
    (lambda c: {k: v for k, v in c.items() if k != "config"}, "must have the keys"),
    (lambda c: {**c, "step": -1}, "step must be an integer"), (lambda c: {**c, "step": 1.0}, "step must be"),
    (lambda c: {**c, "step": 10**30}, "step must be"), (lambda c: {**c, "world_size": 0}, "world_size must be"),
    (lambda c: {**c, "world_size": None}, "world_size"), (lambda c: {**c, "virtual_shards": "4"}, "virtual_shards"),
    (lambda c: {**c, "config": "xyz"}, "config must be"), (lambda c: {**c, "versions": {"a": 1}}, "versions must"),
    (lambda c: {**c, "files": []}, "files must map"), (lambda c: {**c, "files": {"a": 1}}, "files must map"),
    (lambda c: {**c, "files": {"a": {}}}, "'a' must have its bytes"),
    (lambda c: {**c, "files": {"a": {"bytes": True, "blake2b": "0" * 64}}}, "'a' must have its bytes"),
    (lambda c: {**c, "files": {"a": {"bytes": 1, "blake2b": "0" * 64, "x": 1}}}, "'a' must have its bytes"),
])
def test_an_ill_formed_manifest_is_refused(tmp_path: Path, change: Callable[[Any], Any], reason: str) -> None:
    folder = commit(tmp_path, 1)
    path = folder / durable.MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DamagedCheckpoint, match="manifest.json: ") as caught:
        durable.verify(folder)
    assert reason in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1, "schema": 1}', b"9" * 10_000,
                                  b"null", b'{"schema": 1' + b" " * 100])
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = commit(tmp_path, 1)
    (folder / durable.MANIFEST).write_bytes(text)
    with pytest.raises(DamagedCheckpoint, match="manifest.json: "):
        durable.verify(folder)


def test_other_names_are_no_commits(tmp_path: Path) -> None:
    commit(tmp_path, 9)
    commit(tmp_path, 10)
    for name in ("step-", "step-x", "step-00000099.old", ".step-00000098.tmp", "latest"):
        shutil.copytree(tmp_path / "step-00000010", tmp_path / name)
    assert [path.name for path in durable.steps(tmp_path)] == ["step-00000009", "step-00000010"]
    assert durable.newest_verified(tmp_path)[0] == tmp_path / "step-00000010"
    assert durable.newest_verified(tmp_path / "nowhere") == (None, [])


# Processes


CHILD = """
import sys
from pathlib import Path
from tests.files.test_durable import commit
from lmcode.files import durable
parent = Path(sys.argv[1])
for step in range(int(sys.argv[2]), 10**6):
    commit(parent, step)
    print(step, flush=True)
    for old in durable.steps(parent)[:-2]:
        durable.discard(old)
"""


def test_kill_at_random_moments_loses_no_acknowledged_commit(tmp_path: Path) -> None:
    chance, first = random.Random(0), 1
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(first)], text=True,
                                   stdout=subprocess.PIPE, cwd=CHECKOUT)
        acknowledged = int(process.stdout.readline())
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        found, skipped = durable.newest_verified(tmp_path)
        step = durable.verify(found).facts.step
        assert skipped == [] and step >= acknowledged and read(found) == content_of(step)
        first = step + 1


@pytest.fixture
def other_holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    code = ("import sys; from pathlib import Path; from lmcode.files.durable import Lock\n"
            "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, cwd=CHECKOUT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_has_one_writer_and_a_dead_one_is_no_obstacle(tmp_path: Path, other_holder: subprocess.Popen) -> None:
    with pytest.raises(Locked, match=f"is being written by process {other_holder.pid} on host ") as caught:
        Lock(tmp_path)
    assert os.uname().nodename in str(caught.value) and "\n" not in str(caught.value)
    other_holder.kill()
    other_holder.wait()
    mine = Lock(tmp_path)
    with pytest.raises(Locked, match=f"process {os.getpid()} "):
        Lock(tmp_path)
    mine.close()
    Lock(tmp_path).close()


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    durable.replace_text(path, "old")
    for at in range(1, 20):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch, crash, at=at)
            try:
                durable.replace_text(path, "new and longer")
            except Crash:
                pass
        assert path.read_text() in ("old", "new and longer")
        if len(counted.calls) < at:
            break
        durable.replace_text(path, "old")
    assert path.read_text() == "new and longer" and [one.name for one in tmp_path.iterdir()] == ["config.yaml"]


def test_what_a_file_manager_leaves_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = commit(tmp_path, 2)
    for name in (".DS_Store", "banks/._a", "Thumbs.db", ".nfs00000001"):
        (new / name).write_text("x")
    (new / ".ipynb_checkpoints").mkdir()
    (new / ".ipynb_checkpoints" / "trainer-checkpoint.json").write_text("{}")
    (tmp_path / "._.step-00000003.tmp").write_text("x")
    durable.verify(new)
    assert ".DS_Store, .ipynb_checkpoints/trainer-checkpoint.json, .nfs00000001, Thumbs.db, banks/._a" in caplog.text
    (new / "model.bin").write_bytes(b"y" * 300)
    with pytest.raises(DamagedCheckpoint, match="model.bin: the content"):
        durable.verify(new)
    assert commit(tmp_path, 3).is_dir(), "nor do they stop the next commit"


def test_what_a_file_manager_leaves_while_a_commit_is_written_is_no_part_of_it(tmp_path: Path) -> None:
    final = tmp_path / "step-00000001"
    with durable.commit(final, facts_of(1)) as place:
        (place / "model.bin").write_text("x")
        (place / ".DS_Store").write_text("x")
    assert [*durable.read_manifest(final).files] == ["model.bin"]
    (final / ".DS_Store").unlink()
    durable.verify(final)
