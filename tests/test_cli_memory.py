"""`lmcode memory` on a real run of two ranks: what it says, what it refuses, and that no change is ever half done."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_loop import settings, write_corpus

from lmcode import cli, dist
from lmcode.config import RunConfig, build
from lmcode.train import checkpoint, durable, loop

KINDS = ("add", "search", "stats", "inspect", "export", "import", "delete", "expire", "consolidate", "verify")
TEXTS = ["The key is under the mat", "Call me Ishmael, some years ago", "A whale is no fish\nsays nobody"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def train(values: dict[str, Any], *resumes: str | None) -> list[int]:
    """Exit codes of jobs one after the other."""
    dist.stop = lambda: None  # the process group is that of the test
    return [loop.run(build(RunConfig, values), resume=resume) for resume in resumes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/trained: four steps on two ranks, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("memory")
    write_corpus(folder)
    values = settings(folder, "trained", train={"total_steps": 4, "save_every": 2}, memory={"experience_slots": 60})
    assert run_on_ranks(train, 2, values, None) == [[0]] * 2
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "runs" / "trained", tmp_path / "run"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*argv: Any, code: int = 0) -> str:
        assert cli.main(["memory", *map(str, argv)]) == code
        out, err = capsys.readouterr()
        if code != 2:
            return out
        assert out == "" and err.startswith("lmcode: error: ") and err.count("\n") == 1
        return err
    return call


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def memory_of(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The experiences and the hashes of the banks of a run or checkpoint."""
    model, *_ = checkpoint.load_model(path, [], group=dist.Group(), device=torch.device("cpu"))
    return [one.row() for one in model.experiences.all()], [bank.content_hash() for bank in model.banks.values()]


def test_a_life_of_a_memory(run: Path, said: Callable[..., str]) -> None:
    assert "stored 2 experiences" in said("add", run, *TEXTS[:2], "--namespace", "house", "--importance", 2)
    assert checkpoints(run) == ["step-00000002", "step-00000004.1"]
    done = json.loads(said("add", run, TEXTS[2], "--json"))
    assert done == {"count": 1, "ids": [2], "checkpoint": "step-00000004.2", "older_checkpoints": ["step-00000002"]}
    first = said("search", run, "Ishmael, some years").splitlines()
    assert first[0].split() == ["score", "id", "namespace", "importance", "age", "text"] and TEXTS[1] in first[1]
    hit, = json.loads(said("search", run, "key", "--namespace", "0", "--json"))
    assert (hit["text"], hit["namespace"], hit["layer"]) == (TEXTS[2], 0, [1])
    facts = json.loads(said("inspect", run, 1, "--json"))
    assert (facts["text"], facts["importance"], facts["token_entries"]["1"]["live"]) == (TEXTS[1], 2.0, len(TEXTS[1]) - 1)
    assert TEXTS[1] in said("inspect", run, 1)
    stats = json.loads(said("stats", run, "--json"))
    assert stats["experiences"]["live"] == 3 and stats["experiences"]["namespaces"] == {"0": 1, "house": 2}
    assert "house" in said("stats", run)
    assert json.loads(said("delete", run, "--namespace", "house", "--json"))["count"] == 2
    assert json.loads(said("expire", run, "--older-than", "1h", "--json"))["count"] == 0
    assert [one["text"] for one in map(json.loads, said("export", run).splitlines())] == [TEXTS[2]]
    merged = json.loads(said("consolidate", run, "--threshold", 0.5, "--json"))
    assert 0 < merged["count"] < merged["before"] and merged["merged_by_layer"] == {"1": merged["count"]}
    assert said("verify", run) == "step-00000002: ok\nstep-00000004.5: ok\n"
    assert checkpoints(run) == ["step-00000002", "step-00000004.5"]
    assert said("export", run / "checkpoints" / "step-00000002") == ""


def test_export_and_import_give_the_same_bytes(run: Path, said: Callable[..., str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (
        {"text": TEXTS[2], "namespace": "caf\u00e9", "importance": 0.1, "stored_at": 5},
        {"ids": [1, 2, 256], "namespace": 7, "importance": 3.0, "stored_at": 6}))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert "imported 2" in said("import", run, "-")
    assert said("export", run) == content
    other = shutil.copytree(run, tmp_path / "other")
    file = tmp_path / "memory.jsonl"
    said("export", run, "--output", file)
    said("delete", other, "--id", 0, 1)
    said("import", other, file)
    assert said("export", other) == content == file.read_text(encoding="utf-8")
    assert "cannot be written" in said("export", run, "--output", file, code=2)


def test_training_goes_on_with_the_experiences(folder: Path, run: Path, said: Callable[..., str]) -> None:
    said("add", run, *TEXTS)
    stored = said("export", run)
    values = settings(folder, "x", memory={"experience_slots": 60},
                      train={"total_steps": 6, "save_every": 2, "run_dir": str(run)})
    assert run_on_ranks(train, 2, values, "auto", "auto") == [[0, 0]] * 2, "a finished run stays finished"
    assert checkpoints(run) == ["step-00000004.1", "step-00000006"]
    assert said("export", run) == stored and TEXTS[0] in said("search", run, "key under")
    assert "experiences" in {path.name for path in (run / "checkpoints" / "step-00000006").iterdir()}


def test_a_change_that_breaks_off_leaves_the_old_memory_or_the_new(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the file system is in turn the last one before a kill."""
    class Killed(BaseException):
        pass

    assert cli.main(["memory", "add", str(run), TEXTS[0]]) == 0
    before, outcomes, last = memory_of(run), set(), 0
    names = ("rename", "link", "mkdir", "fsync", "open")
    while True:
        copy, calls = run.with_name(f"killed-{last}"), 0
        shutil.copytree(run, copy)

        def counted(real: Callable[..., Any], last: int = last) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Killed
                return real(*args, **more)
            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                code = cli.main(["memory", "delete", str(copy), "--id", "0"])
            except Killed:
                code = None
        found, skipped = durable.newest_verified(copy / "checkpoints")
        assert skipped == [] and durable.step_of(found)[0] == 4
        outcomes.add((durable.step_of(found)[1], len(memory_of(found)[0])))
        if durable.step_of(found)[1] == 1:
            assert memory_of(found) == before
        shutil.rmtree(copy)
        if code == 0:
            break
        last += 1 + last // 8
    assert outcomes == {(1, 1), (2, 0)} and last > 20


def test_a_full_disk_is_said_in_one_line(run: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_of(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5))
    assert "5 are free" in said("add", run, "x", code=2)
    assert checkpoints(run) == ["step-00000002", "step-00000004"] and memory_of(run) == before


def test_links_are_made_where_nothing_changes(run: Path, said: Callable[..., str]) -> None:
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    inode, facts = weights.stat().st_ino, durable.read_manifest(weights.parent).facts
    said("add", run, "x")
    new = run / "checkpoints" / "step-00000004.1"
    assert (new / "model.safetensors").stat().st_ino == inode and durable.verify(new).facts == facts


def test_one_writer_at_a_time(run: Path, said: Callable[..., str]) -> None:
    lock = durable.Lock(run)
    assert "is being written by process" in said("add", run, "x", code=2)
    assert said("search", run, "x") == "nothing is stored\n", "reading needs no lock"
    lock.close()
    said("add", run, "x")


def test_verify_names_what_is_damaged(run: Path, said: Callable[..., str]) -> None:
    said("add", run, "x")
    path = next((run / "checkpoints" / "step-00000004.1" / "experiences").glob("texts-*"))
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    text = said("verify", run, code=1)
    assert "step-00000002: ok" in text and path.name in text
    assert json.loads(said("verify", run, "--json", code=1))["step-00000002"] is None
    assert path.name in said("search", run / "checkpoints" / "step-00000004.1", "x", code=2)


BAD_LINES = [('{"text": "a"}\n{"text": ""}', "line 2: text must hold more than white space"),
             ('{"text": "a"}\n{"text": "b", "importance": 11}', "line 2: importance must lie in"),
             ('{"text": "a", "namespace": "7"}', "line 1: a namespace is a number"),
             ('{"txt": "a"}', "line 1: unknown key 'txt'"), ('{"text": "a"', "line 1: not JSON"), ("", "at least one line"),
             ('{"text": "a", "stored_at": 5}', "line 1: 'stored_at' belongs to import"),
             ('{"ids": [999]}', "ids must lie in")]


def test_a_bad_line_changes_nothing(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    for content, reason in BAD_LINES:
        file = tmp_path / "bad.jsonl"
        file.write_text(content)
        assert reason in said("add", run, "--file", file, code=2)
        assert checkpoints(run) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(("argv", "reason"), [
    (["add", "RUN"], "either texts or --file: got neither"), (["add", "RUN", "x", "--file", "y"], "got both"),
    (["add", "RUN", ""], "more than white space"), (["add", "RUN", "--file", "nowhere"], "cannot be read"),
    (["add", "RUN", "x", "--namespace", " "], "a namespace is a number"), (["delete", "RUN"], "needs --id or --namespace"),
    (["delete", "RUN", "--id", "5"], "no experience with the id 5; 0 are stored"),
    (["search", "RUN", "x", "--namespace", "nowhere"], "nothing is stored under the namespace 'nowhere'"),
    (["search", "RUN", "x", "--top-k", "0"], "expected 1 or more"), (["inspect", "RUN", "3"], "no experience with the id 3"),
    (["expire", "RUN", "--older-than", "soon"], "such as 30d"), (["expire", "RUN"], "--older-than"),
    (["consolidate", "RUN", "--threshold", "3"], "2 or less"), (["forget", "RUN"], "has no command 'forget'"),
    (["stats", "RUN", "--jsn"], "Did you mean '--json'"), (["stats", "RUNN"], "there is no run folder"),
    (["add", "RUN/checkpoints/step-00000002", "x"], "only the newest checkpoint can be changed")])
def test_what_cannot_work_is_refused(argv: list[str], reason: str, folder: Path, said: Callable[..., str]) -> None:
    trained = folder / "runs" / "trained"
    assert reason in said(*(word.replace("RUN", str(trained)) for word in argv), code=2)
    assert checkpoints(trained) == ["step-00000002", "step-00000004"]


def test_one_process_only(folder: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "runs in one process: got 2 ranks" in said("stats", folder / "runs" / "trained", code=2)


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_examples_that_are_understood(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["memory", kind, "--help"])
    text = capsys.readouterr().out
    assert f"usage: lmcode memory {kind} RUN" in text
    examples = text.split("examples:\n")[1].splitlines()
    for line in filter(None, examples):
        words = shlex.split(line)
        assert cli.parse(words[1:]).parser.prog == f"lmcode memory {kind}"
