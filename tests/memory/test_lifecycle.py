"""Banks from banks: alike, forked, restored. Forks with graphs are in search/test_hnsw, states of other layouts in
test_reshard."""

from __future__ import annotations

import pytest
import torch

from lmcode.memory import lifecycle
from tests.helpers.banks import filled, twins


def test_a_fork_is_independent() -> None:
    bank, *_ = filled()
    copy, empty = lifecycle.fork(bank, empty=False), lifecycle.fork(bank, empty=True, slots=30)
    assert copy.content_hash() == bank.content_hash() and copy.next_id == 40
    assert (empty.slots, empty.next_id, empty.stats()["live"]) == (30, 0, 0)
    copy.delete(namespace=0)
    empty.write(*twins(3, 0), torch.zeros(3).long())
    assert bank.stats()["live"] == 40
    with pytest.raises(ValueError, match="slots of its original, 200: got 30"):
        lifecycle.fork(bank, empty=False, slots=30)


def test_a_bank_that_is_like_another_differs_in_what_is_given_only() -> None:
    bank, *_ = filled(max_norm=3.0)
    other = lifecycle.like(bank, slots=70, config=bank.config.model_copy(update={"virtual_shards": 7}))
    assert (other.heads, other.head_dim, other.top_k, other.device) == (bank.heads, bank.head_dim, bank.top_k, bank.device)
    assert (other.slots, other.config.virtual_shards, other.config.max_norm) == (70, 7, 3.0)
    assert (other.stats()["live"], other.plan) == (0, bank.plan)


@pytest.mark.parametrize("problem", [None, "shard 3 is damaged"])
def test_states_are_restored_together_or_not_at_all(problem: str | None) -> None:
    bank, *_ = filled()
    other, before = lifecycle.like(bank), lifecycle.like(bank).content_hash()
    states = {shard: bank.state(shard) for shard in bank.owned}
    if problem is None:
        states[3]["next_id"] += 1
    with pytest.raises(ValueError, match=problem or "must agree in"):
        lifecycle.restore(other, states, problem)
    assert other.content_hash() == before
    lifecycle.restore(other, {shard: bank.state(shard) for shard in bank.owned})
    assert other.content_hash() == bank.content_hash()
