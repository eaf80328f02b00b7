"""The total order: packed sorting against concatenate-and-lexsort; winners as prefixes; what is told about a cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lmcode.memory.merge import logsumexp_of, merge_hits, order_hits, pack_cuts, unpack_cuts, winners
from lmcode.protocol import NO_SCORE


def merge_slowly(score: Tensor, ids: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    scores, wanted = [], []
    for row_score, row_id in zip(score.numpy(), ids.numpy(), strict=True):
        valid = row_id >= 0
        row_score, row_id = row_score[valid], row_id[valid]
        order = np.lexsort((row_id, -row_score))[:k]
        missing = k - len(order)
        scores.append(row_score[order].tolist() + [float(np.float32(NO_SCORE))] * missing)
        wanted.append(row_id[order].tolist() + [-1] * missing)
    return scores, wanted


def random_lists(seed: int, *, N: int = 30, L: int = 40, top: int = 2**20) -> tuple[Tensor, Tensor]:
    """Unordered lists with many equal scores, both zeros, huge and tiny scores, and invalid hits."""
    rng = np.random.default_rng(seed)
    score = rng.choice([-3e28, -7.5, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.25, 0.5, 1.0, 3e28], (N, L)).astype(np.float32)
    ids = np.stack([rng.choice(top, L, replace=False) if top < 2**22 else rng.integers(0, top, L) for _ in range(N)])
    invalid = rng.random((N, L)) < rng.choice([0.0, 0.3, 1.0], (N, 1))
    return torch.from_numpy(score), torch.from_numpy(np.where(invalid, -1, ids))


@pytest.mark.parametrize("top", [64, 2**20, 2**31, 2**40, 2**63 - 1])
@pytest.mark.parametrize("k", [1, 7, 40, 55])
def test_merging_equals_concatenate_and_sort(top: int, k: int) -> None:
    for seed in range(3):
        score, ids = random_lists(seed, top=top)
        merged_score, merged_id = merge_hits(score, ids, k)
        wanted_score, wanted_id = merge_slowly(score, ids, k)
        assert merged_id.tolist() == wanted_id
        assert merged_score.tolist() == wanted_score


def test_ids_far_from_zero_stay_exact() -> None:
    score, ids = random_lists(0)
    shifted = torch.where(ids >= 0, ids + 2**60, -1)
    merged, merged_shifted = merge_hits(score, ids, 9)[1], merge_hits(score, shifted, 9)[1]
    assert torch.equal(torch.where(merged >= 0, merged + 2**60, -1), merged_shifted)


@pytest.mark.parametrize("top", [2**20, 2**62])
def test_order_is_the_permutation_of_the_merge(top: int) -> None:
    score, ids = random_lists(4, top=top)
    order = order_hits(score, ids)
    assert torch.equal(order.sort(-1).values, torch.arange(40).expand_as(order))
    assert torch.equal(ids.gather(-1, order), merge_hits(score, ids, 40)[1])


def test_merging_in_parts_gives_the_same() -> None:
    score, ids = random_lists(5)
    parts = [merge_hits(score[:, part], ids[:, part], 6) for part in (slice(0, 11), slice(11, 13), slice(13, 40))]
    merged = merge_hits(torch.cat([s for s, _ in parts], 1), torch.cat([i for _, i in parts], 1), 6)
    whole = merge_hits(score, ids, 6)
    assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])


def test_winners_are_prefixes_that_make_up_the_merged_list() -> None:
    score, ids = random_lists(6)
    k = 8
    parts = [merge_hits(score[:, part], ids[:, part], k) for part in (slice(0, 13), slice(13, 26), slice(26, 40))]
    merged_score, merged_id = merge_hits(score, ids, k)
    won = [winners(*part, merged_score[:, -1], merged_id[:, -1]) for part in parts]
    for mask in won:
        assert (mask[:, 1:] <= mask[:, :-1]).all()
    for row in range(len(score)):
        together = [int(one) for mask, part in zip(won, parts, strict=True) for one in part[1][row][mask[row]]]
        assert sorted(together) == sorted(one for one in merged_id[row].tolist() if one >= 0)


def test_logsumexp() -> None:
    score, ids = merge_hits(torch.randn(50, 20) * 5, torch.arange(20).repeat(50, 1), 20)
    assert torch.allclose(logsumexp_of(score, ids), score.logsumexp(-1), atol=1e-5)
    assert logsumexp_of(*merge_hits(score, torch.full_like(ids, -1), 20)).eq(NO_SCORE).all()
    assert torch.equal(logsumexp_of(*merge_hits(score, ids, 33)), logsumexp_of(score, ids))  # padding adds nothing


def test_cuts_survive_the_journey_in_16_bytes() -> None:
    score, ids = merge_hits(*random_lists(7, top=2**62), 5)
    bits = pack_cuts(score, ids)
    assert bits.element_size() * bits.shape[-1] == 16
    cut_score, cut_id, lse = unpack_cuts(bits)
    assert torch.equal(cut_score, score[:, -1]) and torch.equal(cut_id, ids[:, -1])
    assert torch.equal(lse, logsumexp_of(score, ids))


def test_empty_lists() -> None:
    score, ids = merge_hits(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64), 2)
    assert ids.tolist() == [[-1, -1]] * 3 and score.eq(NO_SCORE).all()
    assert merge_hits(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64), 2)[1].shape == (0, 2)
