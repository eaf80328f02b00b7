"""Experiences: verbatim, found by half, there whole or not at all, the same on any number of ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode import LMCODE, Retrieved, dist
from lmcode.config import ConfigError, RunConfig, build
from lmcode.data.tokenizer import BPETokenizer
from lmcode.memories.experience_files import experience_parts, from_jsonl, load_experiences, to_jsonl
from lmcode.memories.experiences import VISITS, Experience, Experiences, namespace_number, spelled
from lmcode.memories.remembering import Deleted
from tests.helpers.models import model_of
from tests.helpers.ranks import run_on_ranks

TEXTS = [f"On day {day} the ship {name} left the harbour of {place} with a cargo of {goods}"
         for day, (name, place, goods) in enumerate(
             (name, place, goods) for name in ("Pequod", "Rachel", "Bachelor") for place in ("Nantucket", "Lima", "Hull")
             for goods in ("oil", "salt", "rope", "tea"))]


def save_experiences(folder: Path, experiences: Experiences) -> None:
    for name, write in experience_parts(experiences).items():
        write(folder / name)


def live(model: LMCODE) -> list[int]:
    return [bank.stats()["live"] for bank in model.banks.values()]


def entries_of(model: LMCODE, id: int) -> dict[int, set[int]]:
    """The token entries of an experience that are in the banks of a model on one rank."""
    ranges = model.experiences.held[id].entries
    return {layer: set(range(*ranges[layer])) & set(bank.shard.columns["id"].tolist())
            for layer, bank in model.banks.items()}


def test_the_snippets_of_the_original_readme() -> None:
    model = model_of()
    model.store_experience("This is important information to remember")
    retrieved, indices = model.query_memory("important information", top_k=5)
    hit, = retrieved
    assert isinstance(hit, Retrieved) and hit.text == "This is important information to remember"
    assert indices.dtype == torch.int64 and indices.tolist() == [hit.id] == [0]
    assert hit.layer == (0, 1) and hit.namespace == 0 and hit.importance == 1.0 and 0 < hit.score <= 1 and hit.age >= 0


@pytest.mark.parametrize("text", ["a", "two\nlines\r\n", " padded ", "\u2028 \u00e9 e\u0301 \U0001f600", "word " * 500,
                                  "<|endoftext|>", '{"text": "x"}'])
def test_a_text_comes_back_verbatim(text: str, tmp_path: Path) -> None:
    model = model_of()
    assert model.store_experience(text) == [0]
    save_experiences(tmp_path, model.experiences)
    other = model_of()
    load_experiences(tmp_path, other.experiences)
    for one in (model, other):
        hit, = one.query_memory(text)[0]
        assert hit.text == text and abs(hit.score - 1) < 1e-5


def test_half_a_text_finds_it_with_a_random_model() -> None:
    model = model_of()
    ids = model.store_experience(TEXTS)
    assert ids == list(range(len(TEXTS)))
    for id, text in zip(ids, TEXTS, strict=True):
        found, indices = model.query_memory(text[:len(text) * 2 // 3], top_k=3)
        assert found[0].text == text and indices.tolist() == [one.id for one in found] and indices[0] == id
        assert [(-one.score, one.id) for one in found] == sorted((-one.score, one.id) for one in found)


def test_a_question_finds_the_passage_with_its_rare_words() -> None:
    """Among passages of usual length that share all its common words, where a name is one word of sixty."""
    model, draw = model_of(), random.Random(0)
    common = "who got the first of them when it was said in a year and that he had been there for time to do so".split()
    names = [f"{first}{last}" for first in ("Al", "Bor", "Cur", "Dun", "Ehr") for last in ("va", "gar", "ie", "ant", "lich")]
    passages = [draw.choices(common, k=60) for _ in names]
    for name, words in zip(names, passages, strict=True):
        words[draw.randrange(60)] = name
    model.store_experience([" ".join(words) for words in passages])
    found = [model.query_memory(" ".join([*draw.choices(common, k=8), name]), top_k=1)[1].tolist() for name in names]
    assert found == [[place] for place in range(len(names))]


def test_answers_do_not_depend_on_what_was_deleted_evicted_or_moved(tmp_path: Path) -> None:
    """How rare a word is follows from what is stored now: after deletion, loading and resharding as in a fresh memory."""
    model, asked = model_of(), "the ship Rachel with salt or tea of Lima"
    model.store_experience(TEXTS, [0, "b"] * 18, stored_at=5)
    before = model.query_memory(asked, top_k=36)[0]
    model.delete_experiences(ids=list(range(0, 36, 3)))
    left = [one for one in model.experiences.all()]
    fresh = model_of()
    fresh.store_experience([one.text for one in left], [one.namespace for one in left], stored_at=5)

    def answers(one: LMCODE, namespace: str | None) -> list[tuple[str, float]]:
        return [(hit.text, hit.score) for hit in one.query_memory(asked, top_k=36, namespace=namespace)[0]]

    wanted = {namespace: answers(fresh, namespace) for namespace in (None, "b")}
    assert wanted[None] != [(hit.text, hit.score) for hit in before if hit.id % 3]
    save_experiences(tmp_path, model.experiences)
    loaded = model_of()
    load_experiences(tmp_path, loaded.experiences)
    for one in (model, loaded):
        assert {namespace: answers(one, namespace) for namespace in (None, "b")} == wanted
    model.memories.reshard(4)
    assert {namespace: answers(model, namespace) for namespace in (None, "b")} == wanted


def test_generation_reads_what_was_stored_in_its_namespace() -> None:
    model = model_of(memory={"scope": "document"}).eval()
    id, = model.store_experience(TEXTS[0], namespace="ships")
    prompt = torch.tensor([model.tokenizer.encode(TEXTS[0])[:20]])
    seen, unseen = (model(prompt, namespace_B=torch.tensor([number])) for number in (namespace_number("ships"), 7))
    for layer, ids in entries_of(model, id).items():
        assert len(ids) == len(TEXTS[0]) - 1
        assert bool(seen.memory[layer].hits.valid_HNK.all()) and not bool(unseen.memory[layer].hits.valid_HNK.any())
        assert set(seen.memory[layer].hits.id_HNK.flatten().tolist()) <= ids
    by_name, by_number = (model.generate(prompt, max_new_tokens=3, temperature=0, namespace=one)
                          for one in ("ships", namespace_number("ships")))
    assert torch.equal(by_name, by_number)


def test_many_at_once_are_as_one_by_one() -> None:
    many, single = model_of(), model_of()
    many.store_experience(TEXTS, stored_at=5)
    for text in TEXTS:
        single.store_experience(text, stored_at=5)
    assert many.experiences.held == single.experiences.held
    assert many.experiences.bank.content_hash() == single.experiences.bank.content_hash()
    for one, other in zip(many.banks.values(), single.banks.values(), strict=True):
        assert (one.shard.columns["id"] == other.shard.columns["id"]).all()
        torch.testing.assert_close(one.shard.key_HMD, other.shard.key_HMD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("write", "counts"), [({"write": "every_nth", "write_every": 3}, [10, 3]),
                                               ({"write": "surprise", "write_share": 0.25}, [8, 3])])
def test_the_write_policy_chooses_within_each_text(write: dict[str, Any], counts: list[int]) -> None:
    model = model_of(memory=write)
    model.store_experience(["a" * 31, "b" * 10], importance=[1.0, 9.0])
    for layer, bank in model.banks.items():
        assert [len(entries_of(model, id)[layer]) for id in (0, 1)] == counts
        importance = bank.shard.columns["importance"]
        heavier = [id in entries_of(model, 1)[layer] for id in bank.shard.columns["id"].tolist()]
        assert importance[heavier].min() > importance[bank.shard.live_M & ~torch.tensor(heavier).numpy()].max()


def test_importance_decides_between_equal_texts() -> None:
    model = model_of()
    model.store_experience(["the same words"] * 3, importance=[1.0, 10.0, 0.1])
    assert model.query_memory("the same words")[1].tolist() == [1, 0, 2]


# Forgetting


def test_an_evicted_experience_is_gone_whole() -> None:
    model = model_of(memory={"experience_slots": 12})
    model.store_experience(TEXTS[:20])
    model.store_experience(TEXTS[20], importance=5.0)
    held = model.experiences.held
    assert len(held) <= 12 and 20 in held
    assert {*held} == {id for id in model.experiences.bank.shard.columns["id"].tolist() if id >= 0}
    for number, bank in enumerate(model.banks.values()):
        kept = {id for id in bank.shard.columns["id"].tolist() if id >= 0}
        assert kept == set().union(*(entries_of(model, id)[number] for id in held))
    for place, text in enumerate(TEXTS[:21]):
        assert (place in held) == (text in [one.text for one in model.query_memory(text, top_k=12)[0]])


@pytest.mark.parametrize(("conditions", "left"), [
    ({"ids": [1, 4]}, [0, 2, 3, 5]), ({"namespace": "b"}, [0, 2, 4]), ({"older_than": 1000}, [3, 4, 5]),
    ({"namespace": 0, "older_than": 1000}, [1, 3, 4, 5]), ({"ids": [0, 1], "namespace": "b"}, [0, 2, 3, 4, 5]),
    ({"older_than": 10**7}, [0, 1, 2, 3, 4, 5])])
def test_deletion_removes_what_meets_all_conditions(conditions: dict[str, Any], left: list[int], tmp_path: Path) -> None:
    model = model_of()
    old, new = model._now() - 5000, model._now()
    model.store_experience(TEXTS[:6], [0, "b"] * 3, stored_at=[old] * 3 + [new] * 3)
    gone = {id: entries_of(model, id) for id in range(6) if id not in left}
    kept = {id: entries_of(model, id) for id in left}
    assert model.delete_experiences(**conditions).experiences == 6 - len(left)
    assert sorted(model.query_memory("ship", top_k=9)[1].tolist()) == left
    for layer, bank in model.banks.items():
        ids = set(bank.shard.columns["id"].tolist())
        assert all(ids.isdisjoint(one[layer]) for one in gone.values())
        assert all(one[layer] <= ids for one in kept.values())
    save_experiences(tmp_path, model.experiences)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(TEXTS[id].encode() in content for id in gone)
    assert model.store_experience("the next one") == [6], "ids are never used again"


@pytest.mark.parametrize("namespace", ["house", 5, "visit:5"])
def test_a_namespace_alone_goes_as_a_whole(namespace: int | str) -> None:
    """What was generated in it, before there is an experience and after; nothing of its neighbours."""
    model, prompt = model_of(), [list(b"The key is under the mat")]
    model.store_experience(TEXTS[0], "ships")
    model.generate(prompt, max_new_tokens=4, seed=0, namespace=["ships"], write_memory=True)
    kept = live(model)
    for stored in (0, 1):
        model.generate(prompt, max_new_tokens=4, seed=0, namespace=[namespace], write_memory=True)
        if stored:
            model.store_experience(TEXTS[1], namespace)
        entries = sum(live(model)) - sum(kept)
        assert entries >= 2 * (len(prompt[0]) + 4 - 1) + stored
        assert model.delete_experiences(namespace=namespace) == Deleted(stored, entries, 0)
        assert live(model) == kept and [one.text for one in model.experiences.all()] == [TEXTS[0]]
        with pytest.raises(ValueError, match="nothing is stored under the namespace"):
            model.delete_experiences(namespace=namespace)


# Ranks


def lives(folder: Path) -> dict[str, Any]:
    """A life of a memory on this many ranks: stored, evicted, deleted, asked, saved; what everybody must agree on."""
    group = dist.Group.world()
    model = model_of(memory={"experience_slots": 30, "group_size": 2 if group.size == 4 else 0}, group=group)
    ids = [model.store_experience(TEXTS[:20], ["a", 3] * 10, [1.0, 2.5] * 10, stored_at=list(range(20)))]
    ids.append(model.store_experience(TEXTS[20], stored_at=7))
    deleted = model.delete_experiences(ids=[one.id for one in model.experiences.all()][3:6])
    place = folder / str(group.size)
    if group.rank == 0:
        place.mkdir()
    group.barrier()
    answers = [[(one.id, one.text, one.namespace, round(one.score, 5)) for one in model.query_memory(text, 4, namespace)[0]]
               for text in TEXTS[::3] for namespace in (None, "a", 3)]
    save_experiences(place, model.experiences)
    group.barrier()
    outcome = {"ids": ids, "deleted": deleted, "answers": answers, "stats": model.experiences.namespaces(),
               "facts": {key: value for key, value in model.inspect_experience(ids[1][0]).items() if key != "age"},
               "experiences": model.experiences.bank.content_hash(),
               "banks": [bank.content_hash() for bank in model.banks.values()]}
    refusals = [refusal(lambda call=call: call(model, group.rank)) for call in (
        lambda model, rank: model.store_experience("x" * (1 + rank)),
        lambda model, rank: model.query_memory("" if rank else "ship"),
        lambda model, rank: model.query_memory("ship", namespace="nowhere"))]
    return {**outcome, "refusals": refusals}


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def reloads(folder: Path) -> list[Any]:
    group, outcomes = dist.Group.world(), []
    for saved in (1, 2, 4):
        model = model_of(memory={"experience_slots": 30}, group=group)
        load_experiences(folder / str(saved), model.experiences)
        outcomes.append(([one.row() for one in model.experiences.all()], model.experiences.bank.content_hash()))
    broken = model_of(memory={"experience_slots": 30}, group=group)
    return [*outcomes, refusal(lambda: load_experiences(folder / "broken", broken.experiences))]


def test_nothing_depends_on_the_number_of_ranks(tmp_path: Path) -> None:
    single, *others = [one for ranks in (1, 2, 4) for one in run_on_ranks(lives, ranks, tmp_path)]
    assert single["deleted"].experiences == 3 and all(single["answers"])
    for other in others:
        for name in single.keys() - {"refusals"}:
            assert other[name] == single[name], name
        assert ["all ranks must pass the same arguments" in one for one in other["refusals"][:2]] == [True, True]
        assert "nothing is stored under the namespace 'nowhere'" in other["refusals"][2]
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (tmp_path / "1").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "texts-00002.jsonl").write_bytes(b"")
    whole, *rest = [one for ranks in (1, 3) for one in run_on_ranks(reloads, ranks, tmp_path)]
    assert whole[0][1] == single["experiences"] and whole[0] == whole[1] == whole[2]
    assert "texts-00002.jsonl" in whole[3]
    assert all(one == whole for one in rest)


# Ids and names


def test_ids_may_be_given_instead_of_text() -> None:
    model = model_of()
    text, row = "bytes of a text", list(b"bytes of a text")
    assert model.store_experience(row) == [0]
    assert model.store_experience(torch.tensor(row)) == [1]
    assert model.store_experience(torch.tensor([row, row])) == [2, 3]
    assert model.store_experience([row, text]) == [4, 5]
    assert [(one.text, one.ids) for one in model.experiences.all()] == [(text, tuple(row))] * 5 + [(text, None)]
    assert model.query_memory(row[:9])[0][0].text == text
    assert model.store_experience([256, 299]) == [6], "ids that spell no text are stored, too"
    assert model.query_memory([256, 299])[0][0].id == 6


def test_without_a_tokenizer_ids_stand_for_themselves() -> None:
    model = model_of(vocab_size=40)
    assert model.tokenizer is None
    model.store_experience([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert [one.text for one in model.query_memory([6, 7])[0]] == ["5 6 7 8", "1 2 3 4"]
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        model.store_experience("text")


def test_a_tokenizer_must_fit_the_model() -> None:
    tokenizer = BPETokenizer.train(["some words to learn from " * 9], 290)
    model = model_of()
    model.tokenizer = tokenizer
    model.store_experience("some words")
    count = len(tokenizer.encode("some words"))
    assert live(model) == [count - 1] * 2 and count < len("some words")
    with pytest.raises(ConfigError, match="model.vocab_size must be at least the tokenizer's vocabulary"):
        model_of(vocab_size=260).tokenizer = tokenizer


def test_a_name_is_a_namespace_of_its_own() -> None:
    numbers = {namespace_number(name) for name in ("a", "A", "b", " a", "0x1", "caf\u00e9")}
    assert len(numbers) == 6 and all(2**61 <= number < 2**62 for number in numbers)
    assert namespace_number("house") == 3685385260036569534, "saved entries bear these numbers"
    assert namespace_number("visit:7") == VISITS + 7 >= 2**62 and namespace_number("visits:7") < 2**62
    assert [spelled(one) for one in (7, VISITS + 7)] == ["7", "visit:7"]
    for bad in ("", " ", "7", "-7", -1, 2**61, 1.5, True, None):
        with pytest.raises(ValueError, match="a namespace is a number"):
            namespace_number(bad)


# Refusals


@pytest.mark.parametrize(("arguments", "rule"), [
    (("",), "more than white space"), ((" \n",), "more than white space"), (([],), "must not be empty"),
    ((["a", ""],), "experience 1: text must hold more"), (([[1], []],), "experience 1: text or ids must not be empty"),
    (([0, 300],), r"ids must lie in 0..299: got 0..300"), (([-1],), r"got -1..-1"), (([1.5],), "row of integer token ids"),
    ((torch.ones(3),), "integer tensor"), ((torch.ones(1, 1, 1, dtype=torch.int64),), "integer tensor"),
    ((torch.zeros(0, dtype=torch.int64),), "must not be empty"), ((7,), "expected text, token ids"),
    ((b"bytes",), "got bytes"), (("\ud800",), "lone surrogates"), (("a", -1), "a namespace is a number"),
    (("a", 0, 0.0), r"importance must lie in \(0, 10\]"), (("a", 0, 10.5), "importance must"),
    (("a", 0, float("nan")), "importance must"), ((["a", "b"], [0]), "namespace must be one value or one for each of the 2"),
    ((["a", "b"], 0, [1.0] * 3), "importance must be one value")])
def test_what_cannot_be_stored_is_refused_and_nothing_is_stored(arguments: tuple[Any, ...], rule: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=rule):
        model.store_experience(*arguments)
    assert not model.has_experiences and live(model) == [0, 0]


@pytest.mark.parametrize(("arguments", "rule"), [
    (("",), "more than white space"), (([300],), "ids must lie in"), ((torch.ones(2),), "integer tensor"),
    ((["a", "b"],), "a query is one text"), (("a", 0), "top_k"), (("a", 2049), "top_k"), (("a", 2.0), "top_k"),
    (("a", 1, "hosue"), "nothing is stored under the namespace 'hosue': expected one of 4, house. Did you mean 'house'"),
    (("a", 1, 5), "nothing is stored under the namespace 5")])
def test_what_cannot_be_asked_is_refused(arguments: tuple[Any, ...], rule: str) -> None:
    model = model_of()
    model.store_experience(["x", "y"], namespace=["house", 4])
    with pytest.raises(ValueError, match=rule):
        model.query_memory(*arguments)


@pytest.mark.parametrize(("conditions", "rule"), [
    ({}, "at least one of"), ({"ids": [7]}, "no experience with the id 7; 1 are stored"), ({"namespace": "x"}, "'x'"),
    ({"older_than": -1}, "age in seconds")])
def test_what_cannot_be_deleted_is_refused(conditions: dict[str, Any], rule: str) -> None:
    model = model_of()
    model.store_experience("a")
    with pytest.raises(ValueError, match=rule):
        model.delete_experiences(**conditions)
    assert len(model.experiences.held) == 1


def test_an_empty_memory_finds_nothing_and_a_small_one_all_it_has() -> None:
    model = model_of()
    found, indices = model.query_memory("anything", top_k=5)
    assert found == [] and indices.shape == (0,) and indices.dtype == torch.int64
    model.store_experience(TEXTS[:3])
    assert len(model.query_memory("anything", top_k=2048)[0]) == 3


def test_a_model_without_a_bank_has_no_experiences() -> None:
    model = model_of(slots=0)
    for call in (lambda: model.store_experience("a"), lambda: model.query_memory("a"),
                 lambda: model.delete_experiences(ids=[0]), lambda: model.inspect_experience(0)):
        with pytest.raises(ValueError, match="a model without a long-term memory has no experiences"):
            call()


def test_a_run_needs_a_slot_for_each_virtual_shard() -> None:
    with pytest.raises(ConfigError, match="memory.experience_slots must be at least memory.virtual_shards: 8 < 16"):
        build(RunConfig, {"memory": {"experience_slots": 8}})


# Files


def damaged(row: dict[str, Any], **changes: Any) -> bytes:
    return (json.dumps({**row, **changes}) + "\n").encode()


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda first, row: b"", "not enough values"),
    (lambda first, row: first + b"{", "line 2: not JSON"),
    (lambda first, row: first + b"\xff", "line 2: not UTF-8"),
    (lambda first, row: first, "have no text"),
    (lambda first, row: first.replace(b'"format": 1', b'"format": 2') + damaged(row), "line 1: must say"),
    (lambda first, row: first + damaged(row) * 2, "line 3: no entry of this id"),
    (lambda first, row: first + damaged(row, id=99), "line 2: no entry of this id"),
    (lambda first, row: first + damaged(row, namespace=4), "line 2: no entry of this id and namespace"),
    (lambda first, row: first + damaged(row, text=None), "line 2: must be an object"),
    (lambda first, row: first + damaged(row, more=1), "line 2: must be an object"),
    (lambda first, row: first + damaged(row, entries={"0": [1]}), "line 2: must be an object"),
    (lambda first, row: first + damaged(row, entries={"x": [1, 2]}), "line 2: must be an object"),
    (lambda first, row: first + damaged(row, ids=[1, -1]), "line 2: must be an object"),
    (lambda first, row: None, "No such file")])
def test_a_damaged_file_is_refused_by_name(damage: Callable[[bytes, dict[str, Any]], bytes | None], reason: str,
                                           tmp_path: Path) -> None:
    model = model_of()
    model.store_experience("only one", namespace="house")
    save_experiences(tmp_path, model.experiences)
    path = tmp_path / f"texts-{model.experiences.virtual_shard(0):05d}.jsonl"
    first, row = path.read_bytes().splitlines(keepends=True)
    content = damage(first, json.loads(row))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_experiences(tmp_path, model_of().experiences)
    assert path.name in str(caught.value)


CONTENT = st.one_of(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
                                           .filter(lambda text: text.strip())}),
                    st.fixed_dictionaries({"ids": st.lists(st.integers(0, 299), min_size=1, max_size=9)}))
ROW = st.tuples(CONTENT, st.fixed_dictionaries({
    "namespace": st.one_of(st.integers(0, 2**61 - 1), st.sampled_from(["house", "caf\u00e9", "a b"])),
    "importance": st.floats(2.0**-10, 10, width=32),
    "stored_at": st.integers(0, 2**40)})).map(lambda two: {**two[0], **two[1]})


@settings(max_examples=25, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_export_and_import_round_trip_exactly(rows: list[dict[str, Any]]) -> None:
    content = b"".join((json.dumps(row) + "\n").encode() for row in rows)
    exports = []
    for _ in range(2):
        model = model_of()
        read = from_jsonl(content, lambda row: None)
        assert len(read) == len(rows)
        model.store_experience([row["text"] if "text" in row else row["ids"] for row in read],
                               [row["namespace"] for row in read], [row["importance"] for row in read],
                               stored_at=[row["stored_at"] for row in read])
        content = to_jsonl(model.experiences.all()).encode()
        exports.append(content)
    assert exports[0] == exports[1]
    for row, one in zip(rows, map(json.loads, content.decode().split("\n")[:-1]), strict=True):
        assert {**row, "importance": None} == {**one, "importance": None}
        assert torch.tensor(row["importance"]) == torch.tensor(one["importance"])


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "at least one line"), (b'{"text": "a"}\n\n', "line 2: not JSON"),
    (b'{"text": "a"}\n[]\n', "line 2: expected an object"),
    (b'{"txt": "a"}', "line 1: unknown key 'txt'.*Did you mean 'text'"), (b'{"namespace": 1}', "line 1: an experience has"),
    (b'{"text": "a", "ids": [1]}', "line 1: an experience has"), (b'{"text": 1}', "line 1: 'text' must be str"),
    (b'{"text": "a", "namespace": true}', "'namespace' must be int or str"), (b'{"text": "a", "importance": NaN}', "NaN"),
    (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8"), (b"[" * 100_000, "line 1: not JSON")])
def test_a_bad_line_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_jsonl(content, lambda row: None)


def test_lines_end_at_line_feeds_only() -> None:
    one = Experience("a\u2028b\x85c\nd")
    assert from_jsonl(to_jsonl([one]).encode(), lambda row: None)[0]["text"] == one.text
