"""`lmcode memory` on a real run of two ranks: what it says, what it refuses, and that no change is ever half done."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lmcode import LMCODE, dist, opening
from lmcode.cli import command as cli
from lmcode.config import ConfigError, RunConfig, build
from lmcode.data.replay import ReplaySampler
from lmcode.eval.run import evaluate_path
from lmcode.files import durable
from lmcode.memories.experiences import VISITS, spelled
from lmcode.memory import LongTermMemory
from lmcode.presets import load_run_config
from lmcode.saved import amend, checkpoint, files, pretrained
from lmcode.train import loop
from lmcode.train.start import open_run
from tests.helpers.banks import plain, states_of
from tests.helpers.kills import growing, is_killed
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings, write_corpus

KINDS = ("add", "search", "stats", "inspect", "export", "import", "delete", "expire", "consolidate", "reshard", "verify")
TEXTS = ["The key is under the mat", "Call me Ishmael, some years ago", "A whale is no fish\nsays nobody"]


def train(values: dict[str, Any], *resumes: str | None) -> list[int]:
    """Exit codes of jobs one after the other."""
    return [loop.run(build(RunConfig, values), resume=resume) for resume in resumes]


def values_of(folder: Path, run: Path, total_steps: int) -> dict[str, Any]:
    """A quarter of each batch is replayed."""
    return settings(folder, "x", memory={"experience_slots": 60}, eval={"final_windows": 8},
                    train={"total_steps": total_steps, "save_every": 2, "memory_sample_ratio": 0.25, "replay_slots": 100,
                           "run_dir": str(run)})


def train_and_listen(values: dict[str, Any], *resumes: str | None) -> tuple[list[int], list[list[int]]]:
    """Exit codes as `train`, and the tokens of all rows that were replayed."""
    heard, mix = [], ReplaySampler._mix

    def listening(self: ReplaySampler, step: int) -> Any:
        batch, place_N = mix(self, step)
        heard.extend(batch.input_ids_BT[row].tolist() for row in torch.nonzero(batch.replayed_B).flatten())
        return batch, place_N

    ReplaySampler._mix = listening
    return train(values, *resumes), heard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/trained: four steps on two ranks, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("memory")
    write_corpus(folder)
    assert run_on_ranks(train, 2, values_of(folder, folder / "runs" / "trained", 4), None) == [[0]] * 2
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
    model, *_ = opening.open_model(path, group=dist.Group(), device=torch.device("cpu"))
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


def spans_of(path: Path) -> dict[int, list[bytes]]:
    """What a checkpoint keeps for replay, by namespace: the tokens of each span as they lie in the file."""
    spans = load_file(path / "replay.safetensors")
    found: dict[int, list[bytes]] = {}
    for namespace, length, token_X in zip(spans["namespace"], spans["length"], spans["token"], strict=True):
        found.setdefault(int(namespace), []).append(token_X[:length + 1].tobytes())
    return found


def content_of(path: Path) -> bytes:
    """Every byte of every file."""
    return b"".join(file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file())


def loaded_bank(path: Path) -> LongTermMemory:
    return opening.open_model(path, group=dist.Group(), device=torch.device("cpu"))[0].banks[1]


def secrets_of(path: Path, namespace: int) -> list[bytes]:
    """What a memory and a replay store hold of a namespace and of nothing else: vectors of the bank, and spans."""
    shard = loaded_bank(path).shard
    names, vectors = shard.columns["namespace"], [row.numpy().tobytes() for row in shard.value_HMD[0]]
    mine = [vectors[slot] for slot in np.flatnonzero(names == namespace) if vectors.count(vectors[slot]) == 1]
    assert mine
    return [*mine, *spans_of(path)[namespace]]


def test_training_goes_on_without_what_was_deleted_and_resharded(folder: Path, run: Path, said: Callable[..., str]) -> None:
    """What is deleted is in no byte of what is left and is not replayed; a job that is started with the words of before the
    reshard goes on with what that made, again and again."""
    folders = run / "checkpoints"
    said("add", run, *TEXTS[:2])
    namespace = next(name for name, mine in spans_of(folders / "step-00000004.1").items() if len(mine) > 1)
    assert namespace >= VISITS
    said("add", run, TEXTS[2], "--namespace", spelled(namespace))
    before = folders / "step-00000004.2"
    spans, gone = spans_of(before).pop(namespace), [b"A whale is no fish", *secrets_of(before, namespace)]
    kept = [span for name, some in spans_of(before).items() if name != namespace for span in some]
    entries = int((loaded_bank(before).shard.columns["namespace"] == namespace).sum())
    content = content_of(before)
    assert all(secret in content for secret in [*gone, *kept])

    done = json.loads(said("delete", run, "--namespace", spelled(namespace), "--json"))
    assert (done["count"], done["entries"], done["replay_spans"]) == (1, entries, len(spans))
    assert "slots are the fewest that hold everything" in said("reshard", run, "--virtual-shards", 5, "--slots", 5, code=2)
    assert "from 12 to 5 virtual shards, 600 slots a layer" in said("reshard", run, "--virtual-shards", 5, "--slots", 600)
    assert checkpoints(run) == ["step-00000002", "step-00000004.4"]
    content = content_of(folders / "step-00000004.4")
    assert not [secret for secret in gone if secret in content] and all(span in content for span in kept)

    stored = said("export", run)
    ranks = run_on_ranks(train_and_listen, 2, values_of(folder, run, 6), "auto", "auto")
    assert [codes for codes, _ in ranks] == [[0, 0]] * 2, "a finished run stays finished"
    replayed = [np.array(row, np.int32).tobytes() for row in ranks[0][1]]
    assert replayed and not [row for row in replayed for span in spans if row.startswith(span[:-4])]
    assert checkpoints(run) == ["step-00000004.4", "step-00000006"]
    assert "experiences" in {path.name for path in (folders / "step-00000006").iterdir()}
    content = content_of(folders / "step-00000006")
    assert not [secret for secret in gone if secret in content]
    assert said("export", run) == stored and TEXTS[0] in said("search", run, "key under")
    check_what_resumes(folder, run)


def check_what_resumes(folder: Path, run: Path) -> None:
    """After a reshard from 12 to 5 virtual shards and from 480 to 600 slots."""
    for name, number, goes_on in (("memory.virtual_shards", 12, True), ("memory.virtual_shards", 5, True),
                                  ("memory.virtual_shards", 6, False), ("model.long_term_memory_slots", 480, True),
                                  ("model.long_term_memory_slots", 700, False)):
        config = checkpoint.with_numbers(build(RunConfig, values_of(folder, run, 6)), {name: number})
        if goes_on:
            start = open_run(config, dist.Group(), "auto")
            start.close()
            assert checkpoint.stored_sizes(checkpoint.with_numbers(config, start.resharded)) == {
                "memory.virtual_shards": 5, "memory.experience_slots": 60, "model.long_term_memory_slots": 600}
            continue
        with pytest.raises(ConfigError, match=f"{name} must be that of the checkpoint"):
            open_run(config, dist.Group(), "auto")


def found_in(run: Path) -> list[tuple[int, float, str]]:
    model, *_ = opening.open_model(run, group=dist.Group(), device=torch.device("cpu"))
    return [(one.id, one.score, one.text) for one in model.query_memory("Ishmael, some years")[0]]


def test_a_reshard_changes_where_things_lie_and_nothing_else(run: Path, said: Callable[..., str]) -> None:
    said("add", run, *TEXTS, "--namespace", "house")
    folder = run / "checkpoints" / "step-00000004.1"
    bank, found = loaded_bank(folder), found_in(run)
    assert "12 virtual shards" in said("stats", run)
    done = json.loads(said("reshard", run, "--virtual-shards", 30, "--slots", 900, "--experience-slots", 90, "--json"))
    assert done == {"count": 3 + bank.stats()["live"], "former": 12, "virtual_shards": 30, "slots": 900,
                    "experience_slots": 90, "checkpoint": "step-00000004.2", "older_checkpoints": ["step-00000002"]}
    new = run / "checkpoints" / "step-00000004.2"
    assert plain(states_of(loaded_bank(new))) == plain(states_of(bank))
    stats = json.loads(said("stats", run, "--json"))
    assert (stats["virtual_shards"], stats["banks"]["layer 1"]["slots"], stats["experiences"]["slots"]) == (30, 900, 90)
    assert found_in(run) == found
    assert said("verify", run) == "step-00000002: ok\nstep-00000004.2: ok\n"
    facts = durable.read_manifest(new).facts
    assert facts.virtual_shards == 30 and facts.config == durable.digest(new / "config.yaml")
    assert load_run_config(new / "config.yaml").memory.virtual_shards == 30
    values = values_of(run.parent, run, 6)
    values["memory"]["virtual_shards"] = 31
    with pytest.raises(ConfigError, match="memory.virtual_shards must be that of the checkpoint"):
        open_run(build(RunConfig, values), dist.Group(), "auto")


def test_spans_go_with_the_namespace_of_what_is_deleted(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    """By id, by age, by namespace; and only those: a text that is older than its neighbours takes theirs along."""
    spans = spans_of(run / "checkpoints" / "step-00000004")
    first, second, third, *_ = spans
    rows = [{"text": f"text {name}", "namespace": spelled(name) if name in spans else name, "stored_at": moment}
            for name, moment in ((first, 5), (first, int(time.time())), (second, 5), ("house", 5))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said("import", run, file)
    assert "deleted 1 experiences, 9 entries of layers' banks and 0 replay spans" in said("delete", run, "--id", 3)
    done = json.loads(said("expire", run, "--older-than", "1h", "--namespace", spelled(first), "--json"))
    assert (done["count"], done["replay_spans"]) == (1, len(spans.pop(first)))
    assert spans_of(run / "checkpoints" / done["checkpoint"]) == spans
    done = json.loads(said("expire", run, "--older-than", "1h", "--json"))
    assert (done["count"], done["replay_spans"]) == (1, len(spans.pop(second)))
    live = loaded_bank(run / "checkpoints" / done["checkpoint"]).shard.columns["namespace"]
    assert (live == second).any() and (live == third).any(), "a document's entries have no time of day"
    done = json.loads(said("delete", run, "--namespace", spelled(third), "--json"))
    assert (done["count"], done["entries"]) == (0, int((live == third).sum()))
    assert done["replay_spans"] == len(spans.pop(third))
    assert spans_of(run / "checkpoints" / done["checkpoint"]) == spans
    assert "nothing is stored under the namespace" in said("delete", run, "--namespace", spelled(third), code=2)


def test_a_saved_model_is_looked_at_and_resharded_into_another_folder(run: Path, said: Callable[..., str], tmp_path: Path
                                                                      ) -> None:
    said("add", run, *TEXTS)
    model, *_ = opening.open_model(run, group=dist.Group(), device=torch.device("cpu"))
    old, new = tmp_path / "old", tmp_path / "new"
    model.save_pretrained(old)
    before, stored = content_of(old), said("export", old)
    assert stored == said("export", run) and "12 virtual shards" in said("stats", old)
    assert "--out must be a new folder, got none" in said("reshard", old, "--virtual-shards", 5, "--slots", 600, code=2)
    assert "which exists" in said("reshard", old, "--virtual-shards", 5, "--slots", 600, "--out", run, code=2)
    assert "slots are the fewest" in said("reshard", old, "--virtual-shards", 1, "--slots", 5, "--out", new, code=2)
    done = json.loads(said("reshard", old, "--virtual-shards", 5, "--slots", 600, "--out", new, "--json"))
    assert (done["virtual_shards"], done["folder"]) == (5, str(new)) and content_of(old) == before
    assert "5 virtual shards" in said("stats", new) and said("export", new) == stored
    assert "runs/trained" not in str(old) and not (old / "writer.lock").exists()
    model.save_pretrained(tmp_path / "without", include_memory=False)
    LMCODE(model.config.model_copy(update={"long_term_memory_slots": 0})).save_pretrained(tmp_path / "bare")
    for name, reason in (("without", "was saved without its memory"), ("bare", "has no long-term memory")):
        assert reason in said("reshard", tmp_path / name, "--virtual-shards", 5, "--out", new / "x", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "new", "old", "run", "without"]


def broken_off(source: Path, *argv: str) -> Iterator[tuple[Path, int | None]]:
    """Copies of a folder after a command of which every call that changes the file system was in turn the last one; its
    exit code, which is None but for the last copy."""
    codes: list[int] = []
    for last in growing():
        copy = source.with_name(f"killed-{last}")
        shutil.copytree(source, copy)
        killed = is_killed(lambda copy=copy: codes.append(cli.main(["memory", argv[0], str(copy), *argv[1:]])), last,
                           ("rename", "link", "mkdir", "fsync", "open"))
        yield copy, None if killed else codes[0]
        shutil.rmtree(copy, ignore_errors=True)
        if not killed:
            break
    assert last > 20 and codes == [0]


def test_a_change_that_breaks_off_leaves_the_old_memory_or_the_new(run: Path) -> None:
    assert cli.main(["memory", "add", str(run), TEXTS[0]]) == 0
    before, outcomes = memory_of(run), set()
    for copy, _ in broken_off(run, "delete", "--id", "0"):
        found, skipped = durable.newest_verified(copy / "checkpoints")
        assert skipped == [] and durable.step_of(found)[0] == 4
        outcomes.add((durable.step_of(found)[1], len(memory_of(found)[0])))
        if durable.step_of(found)[1] == 1:
            assert memory_of(found) == before
    assert outcomes == {(1, 1), (2, 0)}


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


def test_generation_reads_the_namespace_it_is_told(run: Path, said: Callable[..., str], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    said("add", run, *TEXTS, "--namespace", "house")
    model, *_ = opening.open_model(run, group=dist.Group(), device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "model")
    asked, call = [], LMCODE.generate
    monkeypatch.setattr(LMCODE, "generate", lambda *given, **words: (asked.append(words["namespace"]),
                                                                     call(*given, **words))[1])
    texts = []
    for place in (run, tmp_path / "model"):
        for namespace in ("house", "999"):
            assert cli.main(["generate", str(place), "--prompt", "The key", "--namespace", namespace]) == 0
            texts.append(capsys.readouterr().out)
        assert cli.main(["generate", str(place), "--prompt", "x", "--namespace", "huose"]) == 2
        assert "Did you mean 'house'?" in capsys.readouterr().err
    assert asked == ["house", 999, "huose"] * 2 and texts[:2] == texts[2:]


def test_all_of_another_text_is_evaluated_and_how_much_of_how_much_is_said(run: Path, tmp_path: Path) -> None:
    own = json.loads(evaluate_path(run, [], as_json=True))
    assert own["same_corpus"] and own["on"]["tokens"] < own["tokens_in_all"], "as many windows as the settings say"
    assert f"{own['on']['tokens']:,} of {own['tokens_in_all']:,} held-out tokens" in evaluate_path(run, [])
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"The key is under the {name}. " * 20)
    here, lone = f"data.path={tmp_path}/*.txt", f"data.held_out={tmp_path / 'valid.txt'}"
    size = sum(len((tmp_path / f"{name}.txt").read_bytes()) + 1 for name in ("train", "valid"))
    other = json.loads(evaluate_path(run, [here], as_json=True))
    assert other["on"]["tokens"] == other["off"]["tokens"] == other["tokens_in_all"] == size
    lone_file = json.loads(evaluate_path(run, [lone], as_json=True))
    assert lone_file["on"]["tokens"] == len((tmp_path / "valid.txt").read_bytes()) + 1
    assert f" of {size:,} tokens" in evaluate_path(run, [here, "eval.final_windows=3"])
    assert json.loads(evaluate_path(run, [here, "eval.final_windows=3"], as_json=True))["on"]["tokens"] == 2 * 3 * 16


def test_consolidation_says_what_it_does_to_held_out_loss(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    model, *_ = opening.open_model(run, group=dist.Group(), device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "model")
    before = json.loads(evaluate_path(run, [], as_json=True))["on"]["loss"]
    done = json.loads(said("consolidate", run, "--threshold", "0.5", "--measure", "--json"))
    assert done["held_out_loss_before"] == before and done["count"] > 0
    assert before != done["held_out_loss"] == pytest.approx(before, rel=0.1)
    assert "held-out loss" in said("consolidate", run, "--measure")
    assert "is a saved model without any" in said("consolidate", tmp_path / "model", "--measure", code=2)


def test_eval_says_what_its_documents_cannot_tell(run: Path) -> None:
    words = ["eval.streams=1", "eval.final_windows=4"]
    found = json.loads(evaluate_path(run, words, as_json=True))
    assert found["shuffled"] is None and found["on"]["far_loss"] is None and found["off"]["loss"] > 0
    assert "no two held-out documents are read side by side" in found["not_measurable"]["shuffled"]
    text = evaluate_path(run, words)
    assert "memory shuffled  not measurable: no two" in text and "far 0.0" not in text
    assert "far is not measurable: no held-out document was read as far as 16 windows" in text


@pytest.fixture(params=["saved model", "checkpoint"])
def lone(request: pytest.FixtureRequest, run: Path, tmp_path: Path) -> Path:
    """What `run` remembers as a saved model, or as a checkpoint that lies in no run."""
    place, newest = tmp_path / "lone", run / "checkpoints" / "step-00000004"
    if request.param == "checkpoint":
        return Path(shutil.copytree(newest, place))
    model, *_ = opening.open_model(newest, group=dist.Group(), device=torch.device("cpu"))
    model.save_pretrained(place)
    (place / "generation_config.json").write_text("{}")  # somebody else's file
    return place


def remembered(place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not (place / "config.json").exists():
        rows, hashes = memory_of(place)
    else:
        model = LMCODE.from_pretrained(place)
        rows, hashes = [one.row() for one in model.experiences.all()], []  # steps differ: a saved model has none
    return [{key: value for key, value in row.items() if key != "stored_at"} for row in rows], hashes


def test_a_lone_folder_lives_as_a_run_does(lone: Path, run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    """The same commands leave the same memory, say the same, and touch nothing else."""
    memory = ("banks", "experiences", "replay.safetensors", "README.md", "manifest.json", files.RECORD)
    others = {path: path.read_bytes() for path in lone.rglob("*")
              if path.is_file() and path.relative_to(lone).parts[0] not in memory}
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "from a file", "namespace": 7}))
    for words in (["add", *TEXTS, "--namespace", "house"], ["search", "key under"], ["delete", "--id", "1"],
                  ["add", "again"], ["export"], ["import", tmp_path / "more.jsonl"], ["consolidate", "--threshold", "0.5"],
                  ["stats"], ["delete", "--namespace", "0"], ["expire", "--older-than", "9w"]):
        json_too = [] if words[0] == "export" else ["--json"]
        here, there = (said(words[0], place, *words[1:], *json_too) for place in (lone, run))
        if words[0] not in ("export", "search", "stats"):
            facts, expected = json.loads(here), json.loads(there)
            assert facts.pop("folder") == str(lone)
            ours = {"checkpoint", "older_checkpoints", *(["replay_spans"] if (lone / "config.json").exists() else [])}
            assert {**facts, **{name: expected[name] for name in ours & expected.keys()}} == expected  # it replays nothing
        (rows, hashes), (expected_rows, expected_hashes) = remembered(lone), remembered(run)
        assert rows == expected_rows and hashes in ([], expected_hashes)
        assert said("verify", lone) == "lone: ok\n"
    assert {path: path.read_bytes() for path in others} == others
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_card_says_what_is_held_unless_somebody_has_edited_it(lone: Path, said: Callable[..., str]) -> None:
    if not (card := lone / "README.md").exists():
        pytest.skip("a checkpoint has no card")
    assert "0 experiences" in card.read_text()
    said("add", lone, *TEXTS)
    assert "3 experiences" in card.read_text()
    card.write_text("my own words")
    said("add", lone, "more")
    assert card.read_text() == "my own words"


def test_a_lone_folder_is_changed_whole_or_not_at_all(lone: Path, said: Callable[..., str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in lone.rglob("*") if path.is_file()}
    model = (lone / "config.json").exists()
    with files.replacing(lone) if model else durable.held(lone / "config.yaml"):
        assert "is being changed by another process" in said("add", lone, "x", code=2)
    for module in (pretrained, amend):
        monkeypatch.setattr(module, "save_memory", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in said("add", lone, "x", code=2)
    assert {path: path.read_bytes() for path in lone.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    if model:
        return  # see test_pretrained
    lone.rename(tmp_path / "away")
    (tmp_path / ".lone.saving").mkdir()
    (tmp_path / "away").rename(tmp_path / ".lone.saving" / "new")  # a kill between the two renames
    assert said("verify", lone) == "lone: ok\n" and not lone.exists()
    assert "stored 1 experiences" in said("add", lone, "x")
    assert [row["text"] for row in remembered(lone)[0]] == ["x"] and not (tmp_path / ".lone.saving").exists()


def test_a_change_of_a_lone_folder_that_breaks_off_leaves_the_old_memory_or_the_new(
        lone: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """The next command sees one of them, whole, and leaves nothing beside it."""
    said("add", lone, TEXTS[0])
    outcomes = set()
    for copy, code in broken_off(lone, "delete", "--id", "0"):
        capsys.readouterr()
        texts = [json.loads(line)["text"] for line in said("export", copy).splitlines()]
        outcomes.add((tuple(texts), code))
        said("add", copy, "another one")
        assert [row["text"] for row in remembered(copy)[0]] == [*texts, "another one"]
        assert not (copy.parent / f".{copy.name}.saving").exists() and not (copy / files.WORK).exists()
    assert outcomes >= {((TEXTS[0],), None), ((), 0)}


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
    (["delete", "RUN", "--namespace", "nowhere"], "nothing is stored under the namespace 'nowhere'"),
    (["reshard", "RUN"], "--virtual-shards"), (["reshard", "RUN", "--virtual-shards", "0"], "expected 1 or more: got 0"),
    (["reshard", "RUN", "--virtual-shards", "4.5"], "invalid int value: '4.5'"),
    (["reshard", "RUN", "--virtual-shards", "481"], "slots must be at least the number of virtual shards: 480 < 481"),
    (["reshard", "RUN", "--virtual-shards", "61"], "experience_slots must be at least the number of virtual shards: 60"),
    (["reshard", "RUN", "--virtual-shards", "2", "--slots", "4"], "slots are the fewest that hold everything"),
    (["reshard", "RUN", "--virtual-shards", "2", "--out", "x"], "--out is for saved models"),
    (["reshard", "RUNN", "--virtual-shards", "2"], "there is no run folder"),
    (["reshard", "RUN/checkpoints/step-00000002", "--virtual-shards", "2"], "only the newest checkpoint can be changed"),
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
