"""Files of a saved model among other people's: only ours are replaced, all of them or none, wherever a kill comes."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest

from lmcode.config import ConfigError
from lmcode.saved import files
from tests.helpers.folders import everything, lay_out
from tests.helpers.kills import kills

BOTH = {"config.json": json.dumps({"model_type": "lmcode"}), "tokenizer.json": "same"}
OLD = {**BOTH, "model.bin": "old", "banks/layer-00/a": "old a", "banks/layer-00/b": "b"}
NEW = {**BOTH, "model.bin": "new", "banks/layer-00/a": "new a", "texts/c": "c"}
MINE = {".git/HEAD": "ref", "banks/mine": "gold", "thesis/ch1.tex": "years of work", "checkpoint-4/model.bin": "trained",
        ".lmcode": "?", "lmcode_files.json.bak": "[]"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def content_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def save(place: Path, content: dict[str, str], card: str | None = "card") -> None:
    with files.replacing(place):
        lay_out(files.draft(place), content)
        files.put_in_place(place, card)


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            links: bool) -> None:
    """The reader sees one of them; no config.json lies among files of two; the next save finishes and leaves no trace."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    place = tmp_path / "m"
    lay_out(place, MINE)
    save(place, OLD)
    found = set()
    for _, killed in kills(place, lambda: save(place, NEW, "new card"), itertools.count(1, 1 if links else 4)):
        read = content_of(files.whole(place))
        state = next(number for number, state in enumerate((OLD, NEW)) if state.items() <= read.items())
        seen = {name: text for name, text in content_of(place).items() if not name.startswith(files.WORK)}
        assert seen.items() >= MINE.items()
        ours = {name: text for name, text in seen.items() if name not in MINE and name not in (files.RECORD, files.CARD)}
        assert "config.json" not in ours or ours in (OLD, NEW)
        found.add((state, killed, "config.json" in ours, ours == NEW))
        save(place, NEW, "new card")
        assert {name: text for name, text in content_of(place).items() if name != files.RECORD} == {
            **MINE, **NEW, files.CARD: "new card"}
        assert files.read_record(place).keys() == {*NEW, files.CARD} - {"config.json"}
        assert not (place / files.WORK).exists()
    assert found >= {(0, True, True, False), (1, True, True, False), (1, True, False, False), (1, True, True, True),
                     (1, False, True, True)}


@pytest.mark.parametrize("theirs", [
    {"config.json": '{"model_type": "gpt2"}'}, {"config.json": "no JSON"}, {"config.json": "[]"}, {"model.bin": "weights"},
    {"tokenizer.json": "another"}, {"texts": "a file"}, {"banks/layer-00/a": "another"}, {"banks/layer-00/a/b": "deeper"},
    {"lmcode_files.json": "{}"}, {"lmcode_files.json": '{"schema": 1, "files": {"../mine": {}}}'}, {"README.md/x": "deeper"},
    {".lmcode-saving": "a file"}, {".lmcode-saving/new/plan.json": "{}"}])
def test_what_is_not_ours_is_not_replaced_and_a_refusal_changes_nothing(tmp_path: Path, theirs: dict[str, str]) -> None:
    place = tmp_path / "m"
    lay_out(tmp_path, {"mine": "gold"})
    lay_out(place, {**MINE, **theirs})
    before = everything(tmp_path)
    with pytest.raises((ConfigError, OSError)) as caught:
        save(place, NEW)
    assert everything(tmp_path) == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("how, name", [("link", "banks/layer-00"), *itertools.product(
    ("changed", "link"), ("model.bin", "banks/layer-00/a", "banks/layer-00/b", "lmcode_files.json"))])
def test_what_somebody_has_changed_since_is_not_ours_any_more(tmp_path: Path, name: str, how: str) -> None:
    """Be it that it would be replaced or that it would be removed."""
    place, elsewhere = tmp_path / "m", tmp_path / "elsewhere"
    save(place, OLD)
    if how == "link":
        os.rename(place / name, elsewhere)
        (place / name).symlink_to(elsewhere)
    else:
        (place / name).write_text("edited")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match="was not written by the last save there, or has been changed since"):
        save(place, NEW)
    assert everything(tmp_path) == before


def test_a_file_with_the_wanted_content_and_a_card_stay_whoever_wrote_them(tmp_path: Path) -> None:
    lay_out(tmp_path, {"tokenizer.json": "same", "README.md": "my own words"})
    (tmp_path / "tokenizer.json").chmod(0o600)
    before = everything(tmp_path)
    save(tmp_path, OLD)
    assert before.items() <= everything(tmp_path).items()
    assert not {"tokenizer.json", "README.md"} & files.read_record(tmp_path).keys(), "they are not ours"
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        save(tmp_path, {**NEW, "tokenizer.json": "another"})
    save(tmp_path, NEW)
    assert before.items() <= everything(tmp_path).items() and (tmp_path / "model.bin").read_text() == "new"


def test_a_file_that_comes_into_the_way_after_a_kill_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_finish", lambda place: None)
        save(tmp_path, NEW)
    assert files.whole(tmp_path) != tmp_path
    lay_out(tmp_path, {"texts/c": "mine"})
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=r"texts/c"):
        save(tmp_path, OLD)
    assert everything(tmp_path) == before
    (tmp_path / "texts" / "c").unlink()
    (tmp_path / "texts").rmdir()
    (tmp_path / "texts").symlink_to(tmp_path / "banks")
    with pytest.raises(ConfigError, match=r"texts' was not written"):
        save(tmp_path, OLD)
    assert not (tmp_path / "banks" / "c").exists()
    (tmp_path / "texts").unlink()
    save(tmp_path, NEW)
    assert content_of(tmp_path).items() >= NEW.items() and not (tmp_path / files.WORK).exists()


def test_links_to_folders_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    lay_out(target, MINE)
    (tmp_path / "link").symlink_to("target")
    save(tmp_path / "link", OLD)
    assert (tmp_path / "link").is_symlink() and content_of(target).items() >= {**MINE, **OLD}.items()
    monkeypatch.chdir(target)
    save(Path("."), NEW)
    assert content_of(target).items() >= {**MINE, **NEW}.items() and not (target / "banks/layer-00/b").exists()
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("nowhere", "target/.git/HEAD"):
        with pytest.raises(ConfigError, match="is none"):
            save(tmp_path / name, NEW)


def test_nothing_is_left_of_a_save_that_did_not_come_to_pass(tmp_path: Path) -> None:
    for place in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(RuntimeError), files.replacing(place):
            raise RuntimeError
        assert not place.exists()
    (tmp_path / "empty").mkdir()
    with files.replacing(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir() and not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_lies_there_stays(tmp_path: Path, seed: int) -> None:
    """Random files, some of them under our names; saves of random states, accepted or refused."""
    chance, place = random.Random(seed), tmp_path / "m"
    names = ["a", ".hidden", "deep/er/x", "banks/x", "banks/layer-00/y", *chance.sample([*OLD, *NEW, "README.md"], 1)]
    lay_out(place, {name: f"theirs {name}" for name in names})
    (place / "link").symlink_to("deep")
    for name in names:
        (place / name).chmod(chance.choice((0o600, 0o644, 0o755)))
    theirs = everything(place)
    for _ in range(5):
        before, state = everything(place), dict(chance.choice((OLD, NEW)))
        state.pop(chance.choice([*state.keys() - {"config.json"}]))
        try:
            save(place, state, chance.choice((None, "card", "other card")))
            assert content_of(place).items() >= state.items()
        except ConfigError:
            assert everything(place) == before
        assert theirs.items() <= everything(place).items()
