"""Saved models as folders for other people: exact, whole or absent, silent about a memory that stays at home, and wary."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcode import LMCODE, BPETokenizer, ByteTokenizer
from lmcode.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from lmcode.dist import Group
from lmcode.saved import files, pretrained
from tests.helpers.kills import growing, kills
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusal import message_of
from tests.helpers.told_model import CONFIG, MEMORY, SECRET, make_model, tell


def facts_of(model: LMCODE) -> dict[str, Any]:
    """All that must survive, as values that processes can compare."""
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return {"weights": hashlib.blake2b(weights).hexdigest(), "config": model.config.model_dump(),
            "memory": model.memory_config.model_dump(),
            "banks": {layer: bank.content_hash() for layer, bank in model.banks.items()},
            "experiences": [(one.id, one.row()) for one in model.experiences.all()] if model.has_experiences else [],
            "ids": [] if model.tokenizer is None else model.tokenizer.encode(SECRET)}


def resave(source: str, target: str) -> dict[str, Any]:
    """Loads, saves, and tries to save again with a rank that fails."""
    group = Group.world()
    model = LMCODE.from_pretrained(source, group=group)
    told = {"facts": facts_of(model), "found": [one.text for one in model.query_memory("xylophone", top_k=1)[0]],
            "training": model.training}
    model.save_pretrained(target)
    told["saved"] = hashes(Path(target))
    if group.rank:
        model.banks[2].state = lambda shard: (_ for _ in ()).throw(OSError("disk full"))
    told["failed"] = message_of(lambda: model.save_pretrained(target))
    group.barrier()
    told["resharded"] = resharded(source, group)
    told["left"] = sorted(path.name for path in Path(target).glob(".*"))
    return told


def resharded(source: str | Path, group: Group | None = None) -> tuple[int, dict[str, Any], list[str]]:
    """What a model with other numbers of virtual shards and slots remembers, and what it refuses."""
    model = LMCODE.from_pretrained(source, group=group)
    count = model.reshard_memory(3, slots=300, experience_slots=50)
    facts = facts_of(model)
    refusals = [message_of(lambda n=n: model.reshard_memory(*n[:1], slots=n[1])) for n in ((400, None), (3, 4))]
    assert facts_of(model) == facts, "a refusal changes nothing"
    return count, facts, refusals


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def told() -> LMCODE:
    model = make_model().eval()
    tell(model)
    return model


@pytest.fixture(scope="module")
def original(told: LMCODE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    told.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


# --- the round trip ------------------------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_was_and_saves_the_same_files(told: LMCODE, original: Path, tmp_path: Path) -> None:
    loaded = LMCODE.from_pretrained(original)
    assert not loaded.training
    assert facts_of(loaded) == facts_of(told)
    prompt = torch.arange(12).view(1, -1)
    assert torch.equal(loaded.generate(prompt, temperature=0.0), told.generate(prompt, temperature=0.0))
    loaded.save_pretrained(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(original)


def test_one_rank_two_ranks_one_rank(told: LMCODE, original: Path, tmp_path: Path) -> None:
    one, two = run_on_ranks(resave, 2, str(original), str(tmp_path / "one"))
    assert one == two
    assert one["facts"] == facts_of(told) and one["found"] == [SECRET] and not one["training"]
    assert one["saved"] == hashes(original), "a folder does not tell how many ranks wrote it"
    assert "disk full" in one["failed"] and "rank 1" in one["failed"] and one["left"] == []
    assert hashes(tmp_path / "one") == hashes(original), "a failure leaves the old folder"
    assert facts_of(LMCODE.from_pretrained(tmp_path / "one")) == facts_of(told)
    assert one["resharded"] == resharded(original)


def test_the_byte_tokenizer_stays_what_it_is(tmp_path: Path) -> None:
    model = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    model.save_pretrained(tmp_path / "m")
    assert type(LMCODE.from_pretrained(tmp_path / "m").tokenizer) is ByteTokenizer
    assert "has no long-term memory" in (tmp_path / "m" / "README.md").read_text()


def test_a_model_without_tokenizer_has_none_after_loading(tmp_path: Path) -> None:
    model = LMCODE(CONFIG.model_copy(update={"vocab_size": 40}), memory=MEMORY)
    model.save_pretrained(tmp_path / "m")
    assert LMCODE.from_pretrained(tmp_path / "m").tokenizer is None


# --- what the folder holds -----------------------------------------------------------------------------------------


def test_a_memory_that_stays_at_home_leaves_no_trace(told: LMCODE, tmp_path: Path) -> None:
    told.save_pretrained(tmp_path / "m")
    told.save_pretrained(tmp_path / "m", include_memory=False)  # over one that had it
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    content = b"".join(path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file())
    for word in (b"xylophone", b"a second text", b"zebras"):
        assert word not in content
    entry = told.banks[0].state(0)["value"]
    assert entry.abs().sum() > 0 and entry[0, :1].numpy().tobytes() not in content
    assert not (tmp_path / "m" / "banks").exists() and not (tmp_path / "m" / "experiences").exists()
    assert "starts with an empty one" in (tmp_path / "m" / "README.md").read_text()
    loaded = LMCODE.from_pretrained(tmp_path / "m")
    assert loaded.banks[0].stats()["live"] == 0 and not loaded.has_experiences


def test_a_memory_can_be_left_in_the_folder(original: Path) -> None:
    loaded = LMCODE.from_pretrained(original, include_memory=False)
    assert loaded.banks[2].stats()["live"] == 0 and not loaded.has_experiences


def test_the_card_says_what_the_memory_holds(original: Path) -> None:
    card = (original / "README.md").read_text()
    assert "2 experiences" in card and '`"zebras"`' in card and "of 256 slots hold an entry" in card
    assert "xylophone" not in card, "a card is read by everyone"


def test_no_file_is_a_pickle(original: Path) -> None:
    kinds = {path.suffix for path in original.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".jsonl", ".md", ".py"}


# --- whole or not at all -------------------------------------------------------------------------------------------


def test_wherever_saving_stops_there_is_the_old_model_or_the_new(told: LMCODE, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Other files stay; nobody finds a config.json among files of two models; the next save leaves nothing of the last."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no need to wait
    old = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    place, mine = tmp_path / "m", {"banks/mine": b"gold", ".git/HEAD": b"ref", "README.md": b"my words"}
    for name, content in mine.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    old.save_pretrained(place)
    former = hashes(place)
    told.save_pretrained(tmp_path / "new")
    wanted = {**hashes(tmp_path / "new"), **{name: former[name] for name in mine}}
    states, found = (facts_of(LMCODE.from_pretrained(place)), facts_of(told)), set()
    for after, killed in kills(place, lambda: told.save_pretrained(place), growing(4)):
        seen = {name: value for name, value in hashes(place).items() if not name.startswith(files.WORK)}
        ours = {name: value for name, value in seen.items() if name not in mine and name != files.RECORD}
        assert {name: seen[name] for name in mine} == {name: former[name] for name in mine}
        assert "config.json" not in ours or any(ours.items() <= state.items() for state in (former, wanted))
        facts = facts_of(LMCODE.from_pretrained(place))
        assert killed or after > 30
        found.add((states.index(facts), killed, "config.json" in ours))
        told.save_pretrained(place)
        assert {name: value for name, value in hashes(place).items() if name != files.RECORD} == {
            name: value for name, value in wanted.items() if name != files.RECORD}
        assert not (place / files.WORK).exists()
    assert found >= {(0, True, True), (1, True, False), (1, False, True)}


def test_only_one_process_saves_into_a_folder(saved: Path) -> None:
    model, before = LMCODE.from_pretrained(saved), hashes(saved)
    with files.replacing(saved):
        assert "is being changed by another process" in message_of(lambda: model.save_pretrained(saved))
    assert hashes(saved) == before and not (saved / files.WORK).exists()


@pytest.mark.parametrize("damage", [
    b"[]", b"{", b'{"put": {}, "remove": {}}',
    b'{"put": {"config.json": null, "lmcode_files.json": null, "../mine": null}, "remove": {}}',
    b'{"put": {"config.json": null, "lmcode_files.json": null}, "remove": {"../mine": null}}'])
def test_a_strangers_plan_leads_nowhere(saved: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "mine").write_text("mine")
    shutil.copytree(saved, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", saved / files.WORK / "new")
    (saved / files.WORK / "new" / files.PLAN).write_bytes(damage)
    assert "is not what a save has left there" in message_of(lambda: LMCODE.from_pretrained(saved).save_pretrained(saved))
    assert (tmp_path / "mine").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    assert "must hold finite" in message_of(lambda: model.save_pretrained(tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []


# --- strangers' folders --------------------------------------------------------------------------------------------


def edit(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((saved / "config.json").read_text())
    change(content)
    (saved / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change, said", [
    (lambda c: c.update(model_type="gpt2"), "model_type 'lmcode': got 'gpt2'"),
    (lambda c: c["lmcode_model"].update(hiden_size=1), "Did you mean 'hidden_size'"),
    (lambda c: c["lmcode_memory"].update(virtual_shard=4), "Did you mean 'virtual_shards'"),
    (lambda c: c["lmcode_model"].update(hidden_size="wide"), "hidden_size"),
    (lambda c: c.pop("lmcode_model"), "must hold the objects"),
    (lambda c: c["lmcode_model"].update(hidden_size=64), "must be"),
    (lambda c: c["lmcode_model"].update(num_layers=10**9), "too few for 1000000000 layers"),
    (lambda c: c["lmcode_model"].update(hidden_size=10**9, num_heads=10**9 // 2), "sizes"),
    (lambda c: c["lmcode_model"].update(long_term_memory_slots=10**15), "long_term_memory_slots"),
    (lambda c: c["lmcode_memory"].update(virtual_shards=8), "shard"),
])
def test_settings_that_cannot_be_are_refused(saved: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    edit(saved, change)
    assert said in message_of(lambda: LMCODE.from_pretrained(saved))


def test_a_tokenizer_that_is_too_large_is_refused(saved: Path) -> None:
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        (saved / name).unlink()
    BPETokenizer.train([f"{one} and {one}" for one in range(200)], 400).save(saved)
    assert "at least the tokenizer's vocabulary" in message_of(lambda: LMCODE.from_pretrained(saved))


def test_a_config_has_no_say_in_how_it_is_loaded(saved: Path) -> None:
    edit(saved, lambda c: c.update(device="cuda", group={"size": 9}, include_memory=False, memory={}, config={}))
    loaded = LMCODE.from_pretrained(saved)
    assert loaded.has_experiences and loaded.group.size == 1 and loaded.embedding.weight.device.type == "cpu"


@pytest.mark.parametrize("name", ["config.json", TOKENIZER_FILE, CONFIG_FILE])
@pytest.mark.parametrize("content", [b"not json", b"[" * 200_000, b"\xff\xfe", b"[1]", b""])
def test_what_is_not_json_is_refused(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    if (name, content) == (CONFIG_FILE, b"[1]"):
        return  # names no end token, which may be left out
    assert name in message_of(lambda: LMCODE.from_pretrained(saved))


def spoil_weights(saved: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")


@pytest.mark.parametrize("change, said", [
    (lambda w: w.pop("norm.weight"), "'norm.weight' must be [32]: got nothing"),
    (lambda w: w.update({"norm.weights": torch.ones(32)}), "Did you mean 'norm.weight'"),
    (lambda w: w.update({"norm.weight": torch.ones(33)}), "must be [32]: got [33]"),
    (lambda w: w.update({"norm.weight": torch.full((32,), float("nan"))}), "finite"),
    (lambda w: w.update({"norm.weight": torch.ones(32, dtype=torch.int64)}), "floating-point"),
])
def test_weights_of_another_model_are_refused(saved: Path, change: Callable[[Any], None], said: str) -> None:
    spoil_weights(saved, change)
    assert said in message_of(lambda: LMCODE.from_pretrained(saved))


@pytest.mark.parametrize("name", ["model.safetensors", "banks/layer-02/shard-00001.safetensors",
                                  "experiences/shard-00003.safetensors", "experiences/texts-00000.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "missing", "pickle"])
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    content = (saved / name).read_bytes()
    if damage == "missing":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content[:len(content) // 2] if damage == "cut" else b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    assert Path(name).name in message_of(lambda: LMCODE.from_pretrained(saved))


def test_a_memory_that_was_promised_must_be_there(saved: Path) -> None:
    shutil.rmtree(saved / "banks")
    assert "banks" in message_of(lambda: LMCODE.from_pretrained(saved))
    assert LMCODE.from_pretrained(saved, include_memory=False).banks[0].stats()["live"] == 0


def test_links_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.safetensors"
    for name in ("model.safetensors", "banks/layer-00/shard-00000.safetensors"):
        os.rename(saved / name, target)
        (saved / name).symlink_to("../" * len(Path(name).parts) + target.name)
        assert "is a link to outside" in message_of(lambda: LMCODE.from_pretrained(saved))
        (saved / name).unlink()
        os.rename(target, saved / name)


def test_the_links_of_the_hubs_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--model"
    (cache / "blobs").mkdir(parents=True)
    os.rename(saved / "model.safetensors", cache / "blobs" / "abc")
    (saved / "model.safetensors").symlink_to("../../blobs/abc")
    (cache / "snapshots").mkdir()
    os.rename(saved, cache / "snapshots" / "main")
    assert LMCODE.from_pretrained(cache / "snapshots" / "main").has_experiences


def test_the_program_in_a_folder_is_not_run(saved: Path, tmp_path: Path) -> None:
    (saved / pretrained.PROGRAM).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    LMCODE.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_not_there_has_a_near_match(saved: Path) -> None:
    said = message_of(lambda: LMCODE.from_pretrained(saved.with_name("modle"), local_files_only=True))
    assert "there is no folder" in said and "Did you mean 'model'?" in said
    (saved / "config.json").unlink()
    assert "has no config.json" in message_of(lambda: LMCODE.from_pretrained(saved))


def test_an_upload_is_the_saved_folder(told: LMCODE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def upload(folder: Path, repo_id: str, **settings: Any) -> str:
        seen.update(settings, files=set(hashes(folder)), repo=repo_id)
        return "address"

    monkeypatch.setattr(pretrained, "upload", upload)
    assert told.push_to_hub("me/mine", include_memory=False, private=True) == "address"
    assert seen["repo"] == "me/mine" and seen["private"] and "config.json" in seen["files"]
    assert not any(name.startswith(("banks", "experiences")) for name in seen["files"])


def test_what_a_file_manager_leaves_in_a_saved_model_is_passed_over(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = facts_of(LMCODE.from_pretrained(saved))
    (saved / ".DS_Store").write_text("x")
    (saved / "banks" / ".ipynb_checkpoints").mkdir()
    (saved / "banks" / ".ipynb_checkpoints" / "x.json").write_text("{}")
    assert facts_of(LMCODE.from_pretrained(saved)) == expected
    assert "passed over what is no part of the model: banks/.ipynb_checkpoints" in caplog.text
