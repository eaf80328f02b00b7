"""The doctor's rows: states follow from what was found, a check that raises hides no other, nothing is left behind."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmcode import doctor
from lmcode.doctor import Row

CHECKOUT = Path(__file__).parents[1]
GOOD = {name: "99.0" for name in (*doctor.REQUIRED, *doctor.OPTIONAL)}


def states(rows: list[Row]) -> dict[str, str]:
    return {row.name: row.state for row in rows}


def test_lowest_versions_are_those_of_setup_cfg() -> None:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    assert dict(line.split(">=") for line in lines) == doctor.REQUIRED


@pytest.mark.parametrize(("version", "lowest", "older"), [
    ("2.9.1", "2.10", True), ("2.10", "2.10", False), ("2.10.0+cpu", "2.10", False), ("3.0", "2.10", False),
    ("0.19.7", "0.19.8", True), ("2.9.1+cu126", "2.10", True),
])
def test_versions_compare_as_numbers(version: str, lowest: str, older: bool) -> None:
    assert doctor.is_older(version, lowest) is older


def test_packages_are_ok_missing_or_too_old() -> None:
    rows = states(doctor.package_rows({**GOOD, "torch": "2.9.1+cpu"} | {}))
    assert rows.pop("torch") == "fail"
    assert set(rows.values()) == {"ok"}
    without = {name: version for name, version in GOOD.items() if name not in ("deepspeed", "mpi4py")}
    rows = states(doctor.package_rows(without))
    assert (rows["deepspeed"], rows["mpi4py"]) == ("fail", "warn")


@pytest.mark.parametrize(("builds", "state"), [
    ((), "warn"), (("faiss-cpu",), "ok"), (("faiss-gpu",), "ok"), (("faiss-cpu", "faiss-gpu"), "fail"),
])
def test_exactly_one_build_of_faiss_is_right(builds: tuple[str, ...], state: str) -> None:
    assert doctor.faiss_build_row(dict.fromkeys(builds, "1.15.1")).state == state


def test_installed_versions_leaves_out_what_is_not_there() -> None:
    assert set(doctor.installed_versions(["torch", "no-such-distribution"])) == {"torch"}


def test_a_check_that_raises_is_one_failed_row() -> None:
    def broken() -> list[Row]:
        raise RuntimeError("two\nlines")

    assert doctor.guarded("it", broken) == [Row("it", "fail", "RuntimeError: two lines")]


def test_only_a_failure_makes_the_exit_code_1() -> None:
    ok, warn, fail = (Row(state, state, "") for state in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert doctor.exit_code([ok, warn]) == 0
    assert doctor.exit_code([ok, fail, warn]) == 1


def test_table_and_json_say_the_same() -> None:
    rows = [Row("first", "ok", "fine"), Row("a longer name", "fail", "not fine")]
    table, parsed = doctor.to_table(rows).splitlines(), json.loads(doctor.to_json(rows))
    assert parsed["ok"] is False
    assert [Row(**check) for check in parsed["checks"]] == rows
    assert table[-1] == "1 ok, 0 warn, 1 fail"
    assert table[0].index("fine") == table[1].index("not fine")


def test_the_file_system_check_leaves_nothing_behind_and_creates_no_run_folder(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "deep" / "folder"
    rows = doctor.file_system_rows(wanted)
    assert not any(row.state == "fail" for row in rows if row.name != "free space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "fsync", refused)
    rows = doctor.guarded("run folder", lambda: doctor.file_system_rows(tmp_path))
    assert [(row.name, row.state) for row in rows] == [("run folder", "fail")]
    assert "read-only" in rows[0].detail


def test_locks_that_exclude_nobody_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.locks_exclude(tmp_path / "lock")
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)
    assert not doctor.locks_exclude(tmp_path / "lock")


def test_missing_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert doctor.shared_memory_row(tmp_path / "none").state == "warn"


def test_a_search_that_returns_wrong_hits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_index = pytest.importorskip("lmcode.memory.faiss_index")
    pytest.importorskip("faiss")
    assert doctor.faiss_search_row().state == "ok"
    search = faiss_index.search_flat

    def wrong(*arguments: object) -> tuple:
        score_HNK, id_HNK, slot_HNK = search(*arguments)
        id_HNK[0] += 1
        return score_HNK, id_HNK, slot_HNK

    monkeypatch.setattr(faiss_index, "search_flat", wrong)
    row = doctor.faiss_search_row()
    assert row.state == "fail" and row.detail.startswith("640 of 1280")


def test_the_command_prints_json_and_ends_with_the_state(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-m", "lmcode", "doctor", "--json", "--run-dir", str(tmp_path)],
                          cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    found = {check["name"]: check for check in report["checks"]}
    assert found["collectives"]["state"] == "ok"
    assert re.search(r"1 ranks gathered \[0\]", found["collectives"]["detail"])
