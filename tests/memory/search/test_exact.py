"""Exact search against sort-everything, with ties on purpose; the same bits wherever a row lies."""

from __future__ import annotations

import pytest
import torch

from lmcode.memory.merge import merge_hits
from lmcode.memory.search import exact
from lmcode.memory.search.exact import search_by_sorting, search_exact
from lmcode.memory.search.tier import Rows
from lmcode.protocol import NO_SCORE
from tests.helpers.rows import assert_same, in_bf16, in_fp32, taken, whole_numbers, with_twins


@pytest.mark.parametrize(("N", "M", "k"), [(5, 40, 7), (300, 700, 33), (1, 1, 1), (3, 5, 20), (2, 600, 600),
                                           (20, 900, 1)])
def test_equals_sorting_everything(N: int, M: int, k: int) -> None:
    for seed in range(3):
        arguments = whole_numbers(seed, N, M)
        assert_same(search_exact(*arguments, k), search_by_sorting(*arguments, k))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = whole_numbers(3, 50, 1500)
    whole = search_exact(*arguments, 30)
    monkeypatch.setattr(exact, "CHUNK", 256)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 16)
    assert_same(search_exact(*arguments, 30), whole)
    monkeypatch.setattr(exact, "CHUNK", 10)  # fewer rows than hits wanted
    assert_same(search_exact(*arguments, 30), whole)


@pytest.mark.parametrize("louder", [0.0, 1e-3])
def test_equals_and_ever_better_rows_do_not_pile_up(louder: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows reach the bound when it is their turn."""
    query = torch.ones(1, 6, 4)
    rows = Rows(torch.ones(1, 9000, 4), louder * torch.arange(9000.0), torch.randperm(9000))
    wanted, held, as_lists = search_by_sorting(query, rows, 7), [], exact.as_lists
    monkeypatch.setattr(exact, "HELD", 300)
    monkeypatch.setattr(exact, "CHUNK", 256)

    def watched(*arguments: object) -> torch.Tensor:
        held.append(as_lists(*arguments).shape[1])
        return as_lists(*arguments)

    monkeypatch.setattr(exact, "as_lists", watched)
    assert_same(search_exact(query, rows, 7, hidden=[(torch.tensor([1, 4]), torch.arange(0))]), wanted)
    assert max(held) <= 300 + 7 + 256


def test_rows_may_be_anywhere() -> None:
    query, rows = with_twins(0, 70, 1300)
    score, found, slot = search_exact(query, rows, 20)
    assert torch.equal(rows.id_M[slot], found)
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(1))
    assert_same(search_exact(query, taken(rows, order), 20)[:2], (score, found))
    for ranks in (2, 3, 4):
        parts = [search_exact(query, taken(rows, part), 20) for part in
                 (order[rank::ranks] for rank in range(ranks))]
        merged = merge_hits(torch.cat([p[0] for p in parts], -1), torch.cat([p[1] for p in parts], -1), 20)
        assert torch.equal(merged[0], score) and torch.equal(merged[1], found)


def test_bf16_rows_are_scored_in_fp32() -> None:
    query, rows = with_twins(1, 9, 300)
    found = search_exact(query, in_bf16(rows), 5)
    assert found[0].dtype == torch.float32
    assert_same(found, search_exact(query, in_fp32(in_bf16(rows)), 5))


@pytest.mark.parametrize(("N", "M"), [(0, 10), (4, 0), (0, 0)])
def test_nothing_to_search(N: int, M: int) -> None:
    score, ids, slot = search_exact(*whole_numbers(0, N, M), 3)
    assert score.shape == ids.shape == slot.shape == (2, N, 3)
    assert ids.eq(-1).all() and slot.eq(-1).all() and score.eq(NO_SCORE).all()


def test_empty_slots_are_never_hits() -> None:
    query, rows = whole_numbers(2, 30, 200)
    score, found, slot = search_exact(query, rows, 200)
    live = int((rows.id_M >= 0).sum())
    assert (found[..., :live] >= 0).all() and found[..., live:].eq(-1).all() and slot[..., live:].eq(-1).all()
    assert score[..., live:].eq(NO_SCORE).all()


@pytest.mark.parametrize("k", [1, 4, 30, 31])
@pytest.mark.parametrize("make", [whole_numbers, with_twins])
def test_attending_to_the_best_of_stacked_rows_is_searching_unless_it_says_so(make: object, k: int) -> None:
    """Groups of different lengths, one of them empty and one of fewer rows than k, with one query each and with several."""
    query_HND, rows = make(7, 12, 90)
    key_HMD, id_M = rows.key_HMD, rows.id_M
    slots, doubts = [torch.arange(31), torch.arange(0), torch.arange(31, 34), torch.arange(34, 90)], 0
    slots = [slot_M[id_M[slot_M] >= 0] for slot_M in slots]
    value_HMD = torch.randn(len(key_HMD), 90, 5, generator=torch.Generator().manual_seed(1))
    longest = float(query_HND.norm(dim=-1).max())
    for groups, Q in ((slots, 1), (slots[3:], 12), (slots[:1], 3)):
        stack = exact.stack_rows(key_HMD, rows.addend_M, groups)
        asked_HND = query_HND[:, :len(groups) * Q]
        value_XND, lse_XN, doubtful_XN = exact.attend_best(asked_HND.reshape(-1, Q, query_HND.shape[-1]), stack,
                                                           value_HMD.flatten(0, 1), k, longest)
        assert stack.empty.tolist() == [len(slot_M) == 0 for slot_M in groups] and stack.has_empty == (Q == 1)
        for x, (head, group) in enumerate((h, g) for h in range(len(key_HMD)) for g in groups):
            if not len(group):
                continue
            part = Rows(key_HMD[head:head + 1, group], rows.addend_M[group], id_M[group])
            queries = asked_HND[head:head + 1, x % len(groups) * Q:][:, :Q]
            score_1QK, _, slot_1QK = search_by_sorting(queries, part, k)
            sure_Q = ~doubtful_XN[x]
            value_QKD = value_HMD[head, group][slot_1QK[0].clamp(min=0)]
            expected_QD = (score_1QK[0].softmax(-1).unsqueeze(1) @ value_QKD).squeeze(1)
            assert torch.allclose(value_XND[x][sure_Q], expected_QD[sure_Q], atol=1e-5)
            assert torch.allclose(lse_XN[x], score_1QK[0].logsumexp(-1), atol=1e-5)
            doubts += int(doubtful_XN[x].sum())
            ranked_QK = search_by_sorting(queries, part, k + 1)[0][0]
            equals_Q = (ranked_QK[:, k - 1] == ranked_QK[:, k]) & (len(group) > k)
            assert bool((doubtful_XN[x] | ~equals_Q).all())
    assert doubts or make is with_twins
