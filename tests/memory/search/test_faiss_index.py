"""FAISS as a proposer (`flat`): the same hits as exact search, in total order, whatever FAISS makes of ties and batches."""

from __future__ import annotations

import pytest
import torch

from lmcode.config import ConfigError, MemoryConfig
from lmcode.memory.merge import merge_hits
from lmcode.memory.search import exact, faiss_index, flat
from lmcode.memory.search.choice import AUTO_FAISS_SLOTS, choose_tier
from lmcode.memory.search.exact import search_by_sorting, search_exact
from lmcode.memory.search.flat import search_flat
from lmcode.memory.search.tier import Rows
from tests.helpers.rows import assert_same, in_bf16, in_fp32, taken, whole_numbers, with_twins
from tests.helpers.same_hits import assert_same_hits

faiss = pytest.importorskip("faiss")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("N", "M", "k"), [(5, 40, 7), (300, 700, 33), (1, 1, 1), (3, 5, 20), (2, 600, 600),
                                           (20, 900, 1), (0, 10, 3), (4, 0, 3)])
def test_equals_sorting_everything(N: int, M: int, k: int) -> None:
    for seed in range(3):
        arguments = whole_numbers(seed, N, M)
        assert_same(search_flat(*arguments, k), search_by_sorting(*arguments, k) if M else search_exact(*arguments, k))


def test_blocks_of_queries_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, asked, knn = with_twins(0, 200, 1500), [], faiss_index.knn
    whole = search_flat(*arguments, 32)
    monkeypatch.setattr(flat, "QUERY_BLOCK", 64)
    monkeypatch.setattr(faiss_index, "knn", lambda query, *rest: asked.append(len(query)) or knn(query, *rest))
    assert_same(search_flat(*arguments, 32), whole)
    assert max(asked) == 64


def test_agrees_with_exact_on_real_numbers() -> None:
    arguments = with_twins(0, 200, 1500)
    score, ids, _ = search_flat(*arguments, 32)
    wanted_score, wanted_id, _ = search_exact(*arguments, 32)
    assert torch.allclose(score, wanted_score, atol=1e-5)
    assert_same_hits((score, ids), (wanted_score, wanted_id), tolerance=1e-5)


def test_the_same_bits_however_rows_and_queries_are_batched() -> None:
    query, rows = with_twins(1, 70, 1300)
    score, found, slot = search_flat(query, rows, 20)
    assert torch.equal(rows.id_M[slot], found)
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(1))
    for ranks in (2, 3, 4):
        parts = [search_flat(query, taken(rows, part), 20) for part in
                 (order[rank::ranks] for rank in range(ranks))]
        merged = merge_hits(torch.cat([p[0] for p in parts], -1), torch.cat([p[1] for p in parts], -1), 20)
        assert torch.equal(merged[0], score) and torch.equal(merged[1], found)
    one_by_one = [search_flat(query[:, at:at + 1], rows, 20) for at in range(5)]
    assert torch.equal(torch.cat([one[1] for one in one_by_one], 1), found[:, :5])
    assert torch.equal(torch.cat([one[0] for one in one_by_one], 1), score[:, :5])


def test_scores_and_order_of_faiss_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another BLAS rounds differently and lists equals otherwise; what it fails to find it calls -1."""
    query, rows = with_twins(1, 70, 1300)
    wanted = search_flat(query, rows, 20)
    knn, generator = faiss_index.knn, torch.Generator().manual_seed(0)

    def rounded_otherwise(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        score, slot = knn(*arguments)
        score = score + 2e-6 * (torch.rand(score.shape, generator=generator) - 0.5)
        order = score.argsort(descending=True)
        return score.gather(1, order), slot.gather(1, order)

    monkeypatch.setattr(faiss_index, "knn", rounded_otherwise)
    assert_same(search_flat(query, rows, 20), wanted)
    monkeypatch.setattr(faiss_index, "knn", lambda query, key, k: (torch.full((len(query), k), -3.4e38),
                                                                    torch.full((len(query), k), -1)))
    _, found, slot = search_flat(query, rows, 20)
    assert found.eq(-1).all() and slot.eq(-1).all()


def test_what_rounding_may_hide_from_faiss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are tied but for a few times the last bit, of which FAISS rates all but K as low as its rounding may."""
    k, generator = 20, torch.Generator().manual_seed(0)
    query = torch.randn(1, 40, 32, generator=generator)
    key = torch.randn(1, 1, 33, generator=generator) + 1e-6 * torch.randn(1, 600, 33, generator=generator)
    addend, key = key[0, :, -1], key[..., :-1].contiguous()
    ids, favoured = (torch.randperm(600, generator=generator) for _ in range(2))
    rows, slack_N1 = Rows(key, addend, ids), 0.9 * flat.ROUNDING * (query[0].norm(dim=1, keepdim=True)
                                                                    * key[0].norm(dim=1).max() + 10)

    def unfair(query_NE: torch.Tensor, key_ME: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        score_NM = query_NE.double() @ key_ME.double().T - slack_N1
        score_NM[:, favoured[:k]] += slack_N1
        score_NK, slot_NK = score_NM.topk(wanted)
        return score_NK.float(), slot_NK

    wanted = exact.search_head(query[0], rows.of_head(0), k)
    monkeypatch.setattr(faiss_index, "knn", unfair)
    assert_same([part[0] for part in search_flat(query, rows, k)], wanted)


def test_unclear_cuts_are_redone_and_clear_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    redone = []
    redo = flat.search_head
    monkeypatch.setattr(flat, "search_head", lambda query, *rest: redone.append(len(query)) or redo(query, *rest))
    query, rows = with_twins(2, 100, 800)
    rows.key_HMD[:, 1:], rows.addend_M[1:] = rows.key_HMD[:, :1], rows.addend_M[0]  # every row is a twin
    search_flat(query, rows, 8)
    assert sum(redone) == 200
    redone.clear()
    search_flat(query, Rows(torch.randn_like(rows.key_HMD), rows.addend_M, rows.id_M), 8)
    assert sum(redone) < 10


def test_bf16_rows_are_scored_in_fp32() -> None:
    """Of bf16 keys by the routine for pairs in fp64, so in other bits."""
    query, rows = with_twins(1, 9, 300)
    came, wanted = search_flat(query, in_bf16(rows), 5), search_flat(query, in_fp32(in_bf16(rows)), 5)
    assert came[0].dtype == torch.float32
    assert_same_hits(came[:2], wanted[:2], tolerance=1e-5)


def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            search_flat(*whole_numbers(0, 30, 100), 3)
            assert faiss.omp_get_max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [0, -1, 2049])
def test_refuses_k_that_faiss_cannot_return(k: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.2048: got {k}"):
        search_flat(*whole_numbers(0, 2, 3000), k)


def test_the_largest_k() -> None:
    arguments = whole_numbers(0, 2, 3000)
    assert_same(search_flat(*arguments, 2048), search_by_sorting(*arguments, 2048))


def test_choice_of_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, many = MemoryConfig(), AUTO_FAISS_SLOTS
    assert choose_tier(auto, "global", many, CPU) == "faiss-flat"
    assert choose_tier(auto, "global", many - 1, CPU) == choose_tier(auto, "document", many, CPU) == "exact"
    for tier in ("exact", "faiss-flat"):
        assert choose_tier(MemoryConfig(tier=tier), "document", many, CPU) == tier


def test_without_faiss(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(faiss_index, "available", lambda device: False)
    with pytest.raises(ConfigError, match="faiss-flat needs a FAISS build for cpu"):
        choose_tier(MemoryConfig(tier="faiss-flat"), "document", 100, CPU)
    assert choose_tier(MemoryConfig(scope="global"), "global", AUTO_FAISS_SLOTS, CPU) == "exact"
    assert "no FAISS build" in caplog.text
