"""The chaos tools in their small form: the same harnesses, fewer blows; and that a harness sees what it is there to see."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "tools"))

import chaos
import chaos_bank
import chaos_crash
import chaos_disk
import chaos_flip
import chaos_inputs
import chaos_kill
import chaos_reshard
import save_speed
import soak
import traced
from traced import Op

from lmcode.files import durable


def test_killed_saves_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = chaos_kill.main(["--kills", "3", "--ranks", "2", "--index-kills", "2", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "holds: 3 kills x R = 2: 0 acknowledged commits lost, 0 unloadable runs" in said
    assert "of 2 kills within faiss.write_index" in said


def test_crashes_and_power_cuts_leave_the_old_or_the_new(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = chaos_crash.main(["--ranks", "1", "--cuts", "40", "--every", "25", "--folder", str(tmp_path)])
    assert code == 0, capsys.readouterr().out


def test_flipped_bits_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert chaos_flip.main(["--flips", "40", "--ranks", "1", "--folder", str(tmp_path)]) == 0, capsys.readouterr().out


def test_a_disk_that_refuses_harms_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = chaos_disk.main(["--points", "4", "--ranks", "2", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0 and "intact 12 of 12" in said, said


def test_other_ranks_find_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = chaos_reshard.main(["--ranks", "1", "2", "--stages", "zero3", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0 and "4 of 4" in said, said


def test_hostile_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = chaos_inputs.main(["--inputs", "900", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    count = next(int(line.split(": ")[1].split()[0]) for line in said.splitlines() if "paths that lead" in line)
    assert count >= 60


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bank_follows_its_plain_double(tmp_path: Path, capsys: pytest.CaptureFixture, ranks: int) -> None:
    code = chaos_bank.main(["--operations", "6000", "--ranks", str(ranks), "--folder", str(tmp_path)])
    assert code == 0, capsys.readouterr().out


def test_a_soak_leaves_no_file_and_its_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # So short a run is all warm-up: its memory says nothing yet.
    code = soak.main(["--steps", "30", "--every", "10", "--allowed", "1000", "--folder", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
    rows = (tmp_path / "rss.csv").read_text().splitlines()
    assert rows[0] == "second,step,mib" and len(rows) > 5


def test_save_speed_has_a_row_for_each_way(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_speed.main(["--slots", "480", "--rounds", "1", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert all(f"\n{way}" in said for way in save_speed.WAYS)


# The harnesses themselves


def recorded(root: Path, *, sync_file: bool, sync_folder: bool) -> list[Op]:
    """A file that takes its name by a rename, with or without what makes that last."""
    root.mkdir()
    with traced.Recorder(root) as recorder:
        handle = os.open(root / "new", os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"content")
        if sync_file:
            os.fsync(handle)
        os.close(handle)
        os.rename(root / "new", root / "name")
        if sync_folder:
            durable.sync(root)
    return recorder.ops


def outcomes(ops: list[Op], folder: Path) -> Iterator[bytes | None]:
    """What `name` holds after power cuts at the end."""
    disk = traced.Disk()
    for op in ops:
        disk.do(op)
    for number in range(60):
        root = folder / f"cut-{number}"
        root.mkdir()
        disk.cut(root, random.Random(number) if number else None)
        yield (root / "name").read_bytes() if (root / "name").exists() else None


def test_a_power_cut_takes_what_was_not_forced_to_disk(tmp_path: Path) -> None:
    safe = recorded(tmp_path / "safe", sync_file=True, sync_folder=True)
    unnamed = recorded(tmp_path / "unnamed", sync_file=True, sync_folder=False)
    hollow = recorded(tmp_path / "hollow", sync_file=False, sync_folder=True)
    assert [op.kind for op in safe] == ["create", "write", "fsync", "rename", "fsync"]
    assert {*outcomes(safe, tmp_path)} == {b"content"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert {*outcomes(unnamed, tmp_path / "a")} == {b"content", None}
    seen = {*outcomes(hollow, tmp_path / "b")}
    assert b"" in seen and b"content" in seen and None not in seen


def test_a_trace_with_a_hole_is_not_complete(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "commits").mkdir(parents=True)
    with traced.Recorder(root) as recorder:
        with durable.commit(durable.step_folder(root / "commits", 1), durable.CommitFacts(1, 1, 1, "0" * 64, {})) as place:
            (place / "data").write_text("x" * 10)
    ops = [Op("mkdir", "commits"), *recorder.ops]
    assert traced.complete(ops, root, "commits")
    assert not traced.complete([op for op in ops if op.kind != "write"], root, "commits")


def test_a_lost_acknowledged_commit_is_seen() -> None:
    record = chaos_kill.Record()
    for message in (("saving", 5, "a"), ("saved", 5, 0.1), ("resumed", 4, "b")):
        record.note(message)
    assert "step 5 was acknowledged" in record.failures[0]
    record.note(("resumed", 5, "b"))
    assert "not the one that was saved" in record.failures[-1]


def test_a_wrong_bank_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = chaos_bank.Trial(0, tmp_path)
    for _ in range(5):
        trial.write()
    trial.search()
    trial.compare()
    assert not trial.wrong
    monkeypatch.setattr(trial.bank.shard, "delete", lambda mask: 0)
    trial.plain.delete(lambda one: one["id"] % 2)
    trial.search()
    trial.compare()
    assert trial.wrong


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*ValueError: no"):
        chaos.on_ranks(fail_on_rank_1, 2, folder=tmp_path)


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no")
