"""A whole model on another number of virtual shards: it remembers, finds, forgets and saves as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcode import LMCODE
from tests.helpers.banks import plain, states_of
from tests.helpers.refusal import message_of
from tests.helpers.told_model import CONFIG, MEMORY, SECRET, make_model, tell


def told() -> LMCODE:
    model = make_model().eval()
    tell(model)
    return model


def test_a_model_goes_on_as_before(tmp_path: Path) -> None:
    model, other = told(), told()
    count = other.reshard_memory(7, slots=300, experience_slots=40)
    assert count == 2 + sum(bank.stats()["live"] for bank in model.banks.values())
    assert (other.config.long_term_memory_slots, other.memory_config.virtual_shards) == (300, 7)
    assert other.config == CONFIG.model_copy(update={"long_term_memory_slots": 300})
    assert other.memory_config == MEMORY.model_copy(update={"virtual_shards": 7, "experience_slots": 40})
    for layer, bank in model.banks.items():
        assert plain(states_of(other.banks[layer])) == plain(states_of(bank))
        assert other.layers[layer].long_term_memory is other.banks[layer]
    prompt = torch.arange(12).view(1, -1)
    for one in (model, other):  # what comes later is stored under the same ids, and the token entries of 0 are still known
        one.store_experience("a third", "zebras", stored_at=1_700_000_009)
        one.delete_experiences(ids=[0])
    assert [one.row() for one in other.experiences.all()] == [one.row() for one in model.experiences.all()]
    for layer, bank in model.banks.items():
        assert plain(states_of(other.banks[layer])) == plain(states_of(bank))
    continued = [one.generate(prompt, max_new_tokens=6, temperature=0.0, namespace=7) for one in (model, other)]
    assert torch.equal(*continued)
    other.save_pretrained(tmp_path / "m")
    again = LMCODE.from_pretrained(tmp_path / "m")
    assert again.memory_config.virtual_shards == 7 and len(list((tmp_path / "m" / "experiences").glob("texts-*"))) == 7
    assert again.query_memory("a second text")[0][0].text == "a second text"


def test_a_model_that_was_told_nothing_can_be_told_something_later() -> None:
    model = make_model()
    assert model.experiences.bank.slots == 64
    model.reshard_memory(9, experience_slots=30)
    assert model.experiences.bank.config.virtual_shards == 9 and model.experiences.bank.slots == 30
    model.store_experience(SECRET)
    assert model.query_memory("xylophone")[0][0].text == SECRET


@pytest.mark.parametrize(("virtual_shards", "more", "reason"), [
    (257, {}, "slots must be at least the number of virtual shards: 256 < 257"),
    (65, {}, "experience_slots must be at least the number of virtual shards: 64 < 65"),
    (1, {"slots": 3}, r"layer 0 (slots = 3): virtual shard 0 of 1 would hold"),
    (1, {"experience_slots": 1}, "experiences (experience_slots = 1): virtual shard 0 of 1 would hold 2 live entries in 1 "
                                 "slots; 2 slots are the fewest that hold everything")])
def test_what_has_no_room_is_refused(virtual_shards: int, more: dict[str, int], reason: str) -> None:
    model = told()
    before = {layer: bank.content_hash() for layer, bank in model.banks.items()}
    assert reason in message_of(lambda: model.reshard_memory(virtual_shards, **more))
    assert {layer: bank.content_hash() for layer, bank in model.banks.items()} == before and model.memory_config == MEMORY


def test_the_number_of_slots_that_is_asked_for_is_enough_for_every_layer() -> None:
    model = told()
    model.banks[2].write(torch.ones(2, 90, 8), torch.ones(2, 90, 8), torch.zeros(90, dtype=torch.int64))
    words = message_of(lambda: model.reshard_memory(5, slots=5)).split()
    fewest = int(words[words.index("are") - 2])
    message_of(lambda: model.reshard_memory(5, slots=fewest - 1))
    model.reshard_memory(5, slots=fewest)


def test_fewer_slots_than_hits_and_no_memory_at_all_are_refused() -> None:
    assert "memory_top_k must not exceed" in message_of(lambda: make_model().reshard_memory(2, slots=3))
    bare = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    assert "has nothing to reshard" in message_of(lambda: bare.reshard_memory(2))
