"""The doctor's rows of one host: states follow from what was found, a check that raises hides no other, nothing is left."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmcode import estimate, processor
from lmcode.config import RunConfig
from lmcode.doctor import folder, host, row
from lmcode.doctor.folder import GIB, Space
from lmcode.doctor.row import Row
from lmcode.presets import load_run_config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

GOOD = {name: "99.0" for name in (*host.REQUIRED, *host.OPTIONAL)}


@pytest.fixture
def tiny() -> RunConfig:
    return load_run_config("tiny", [])


def states(rows: list[Row]) -> dict[str, str]:
    return {one.name: one.state for one in rows}


def test_lowest_versions_are_those_of_setup_cfg() -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    assert dict(line.split(">=") for line in lines) == host.REQUIRED


@pytest.mark.parametrize(("version", "lowest", "older"), [
    ("2.9.1", "2.10", True), ("2.10", "2.10", False), ("2.10.0+cpu", "2.10", False), ("3.0", "2.10", False),
    ("0.19.7", "0.19.8", True), ("2.9.1+cu126", "2.10", True),
])
def test_versions_compare_as_numbers(version: str, lowest: str, older: bool) -> None:
    assert host.is_older(version, lowest) is older


def test_packages_are_ok_missing_or_too_old() -> None:
    rows = states(host.package_rows({**GOOD, "torch": "2.9.1+cpu"} | {}))
    assert rows.pop("torch") == "fail"
    assert set(rows.values()) == {"ok"}
    without = {name: version for name, version in GOOD.items() if name not in ("deepspeed", "mpi4py")}
    rows = states(host.package_rows(without))
    assert (rows["deepspeed"], rows["mpi4py"]) == ("fail", "warn")


@pytest.mark.parametrize(("builds", "state"), [
    ((), "warn"), (("faiss-cpu",), "ok"), (("faiss-gpu",), "ok"), (("faiss-cpu", "faiss-gpu"), "fail"),
])
def test_exactly_one_build_of_faiss_is_right(builds: tuple[str, ...], state: str) -> None:
    assert host.faiss_build_row(dict.fromkeys(builds, "1.15.1")).state == state


def test_installed_versions_leaves_out_what_is_not_there() -> None:
    assert set(host.installed_versions(["torch", "no-such-distribution"])) == {"torch"}


def test_a_check_that_raises_is_one_failed_row() -> None:
    def broken() -> list[Row]:
        raise RuntimeError("two\nlines")

    assert row.guarded("it", broken) == [Row("it", "fail", "RuntimeError: two lines")]


def test_only_a_failure_makes_the_exit_code_1() -> None:
    ok, warn, fail = (Row(state, state, "") for state in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert row.exit_code([ok, warn]) == 0
    assert row.exit_code([ok, fail, warn]) == 1


def test_table_and_json_say_the_same() -> None:
    rows = [Row("first", "ok", "fine"), Row("a longer name", "fail", "not fine"),
            Row("third", "warn", "so so", ("n0", "n1"))]
    table, parsed = row.to_table(rows).splitlines(), json.loads(row.to_json(rows))
    assert parsed["ok"] is False
    assert [row.from_dict(check)._replace(hosts=tuple(check.get("hosts", ()))) for check in parsed["checks"]] == rows
    assert table[2].endswith("n0, n1: so so")
    assert table[-1] == "1 ok, 1 warn, 1 fail"
    assert table[0].index("fine") == table[1].index("not fine")


def test_the_file_system_check_leaves_nothing_behind_and_creates_no_run_folder(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "deep" / "folder"
    rows = folder.file_system_rows(wanted)
    assert not any(one.state == "fail" for one in rows if one.name != "free space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "fsync", refused)
    rows = row.guarded("run folder", lambda: folder.file_system_rows(tmp_path))
    assert states(rows) == {"run folder": "fail"}
    assert "read-only" in rows[0].detail


def test_locks_that_exclude_nobody_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.locks_exclude(tmp_path / "lock")
    monkeypatch.setattr(folder.fcntl, "flock", lambda *_: None)
    assert not folder.locks_exclude(tmp_path / "lock")


@pytest.mark.parametrize(("free", "state"), [(0, "fail"), (2 * GIB - 1, "fail"), (2 * GIB, "warn"), (3 * GIB - 1, "warn"),
                                             (3 * GIB, "ok")])
def test_room_is_needed_for_one_checkpoint_beside_another_and_wanted_for_all_that_are_kept(free: int, state: str) -> None:
    assert folder.free_space_row(free, Path("/x"), Space(GIB, 3 * GIB)).state == state


def test_the_space_of_a_run_is_what_estimate_says_of_its_checkpoints(tiny: RunConfig) -> None:
    kept = tiny.model_copy(update={"train": tiny.train.model_copy(update={"save_total_limit": 4})})
    one = sum(estimate.estimate(tiny, 1).checkpoint.values())
    assert folder.space_of(tiny) == Space(one, (tiny.train.save_total_limit + 1) * one)
    assert folder.space_of(kept) == Space(one, 5 * one)


@pytest.mark.parametrize(("of_torch", "faiss", "of_faiss", "state"), [
    (None, "faiss-cpu", None, "ok"), ("12.6", "faiss-cpu", None, "warn"), ("12.6", "faiss-gpu", "12", "ok"),
    ("13.0", "faiss-gpu", "12", "warn"), (None, "faiss-gpu", "12", "fail"), ("12.6", "faiss-gpu", None, "ok")])
def test_torch_and_faiss_are_of_one_major_version_of_cuda(of_torch: str | None, faiss: str, of_faiss: str | None,
                                                          state: str) -> None:
    assert host.cuda_row(of_torch, {faiss: "1.15.1"}, of_faiss).state == state


@pytest.mark.parametrize(("found", "state"), [
    ({"open files": None, "locked memory": None, "processes": None}, "ok"), ({"open files": 1023}, "warn"),
    ({"open files": 1024, "processes": 1024, "locked memory": 8}, "ok"), ({"processes": 100}, "warn")])
def test_low_limits_are_a_warning(found: dict[str, int | None], state: str) -> None:
    assert host.limits_row(found).state == state
    assert set(host.limits()) == {"open files", "locked memory", "processes"}


def test_missing_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert host.shared_memory_row(tmp_path / "none").state == "warn"


def test_a_search_that_returns_wrong_hits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = pytest.importorskip("lmcode.memory.search.flat")
    pytest.importorskip("faiss")
    assert host.faiss_search_row().state == "ok"
    search = flat.search_flat

    def wrong(*arguments: object) -> tuple:
        score_HNK, id_HNK, slot_HNK = search(*arguments)
        id_HNK[0] += 1
        return score_HNK, id_HNK, slot_HNK

    monkeypatch.setattr(flat, "search_flat", wrong)
    found = host.faiss_search_row()
    assert found.state == "fail" and found.detail.startswith("640 of 1280")


def test_the_command_prints_json_and_ends_with_the_state(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-m", "lmcode", "doctor", "--json", "--run-dir", str(tmp_path)],
                          cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    found = {check["name"]: check for check in report["checks"]}
    assert found["collectives"]["state"] == "ok"
    assert re.search(r"1 ranks gathered \[0\]", found["collectives"]["detail"])


@pytest.mark.parametrize(("text", "able"), [("flags\t\t: fpu avx2 avx512f\n", False), ("flags : avx512_bf16 fpu\n", True),
                                            ("Features\t: fp asimd bf16 i8mm\n", True), ("Features : fp asimd\n", False),
                                            ("processor : 0\n", None), (None, None)])
def test_bf16_is_looked_up_in_what_the_processor_says(text: str | None, able: bool | None, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor.has_bf16(tmp_path / "cpuinfo") is able
    monkeypatch.setattr(processor, "has_bf16", lambda: able)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [row.state for row in host.bf16_rows()] == {True: ["ok"], False: ["warn"], None: []}[able]
