"""Runs of tokens as entries, against lists and loops."""

from __future__ import annotations

import pytest
import torch

from lmcode.recipes.chunks import Waiting, attend_chunks, chunk_query, in_chunks
from lmcode.recipes.recipe import Left
from tests.helpers.oracle_retriever import OracleRetriever

GENERATOR = torch.Generator()


@pytest.mark.parametrize(("chunk", "fill_up"), [(4, False), (3, False), (1, False), (4, True)])
def test_no_token_is_lost_and_none_is_moved(chunk: int, fill_up: bool) -> None:
    """Tokens are numbers, in keys, in values with another sign, in surprises; streams of different pace, one at a stop."""
    GENERATOR.manual_seed(0)
    B, T, P, width = 3, 6, chunk - 1, 2
    row = torch.zeros(B, 1, P, width)
    waiting = Waiting(row, row, torch.zeros(B, P), torch.zeros(B, dtype=torch.int64))
    held: list[list[int]] = [[] for _ in range(B)]
    for step in range(7):
        length_B = torch.randint(0, T + 1, (B,), generator=GENERATOR)
        length_B[2] = 0
        number_BT = torch.arange(T).float() + 100 * torch.arange(B)[:, None] + 10 * step + 1
        key_BHTD = number_BT[:, None, :, None].expand(-1, 1, -1, width)
        valid_BT = torch.arange(T) < length_B[:, None]
        made, waiting = in_chunks(waiting, Left(key_BHTD, -key_BHTD, number_BT, valid_BT), chunk=chunk, fill_up=fill_up)
        for stream in range(B):
            tokens = [*held[stream], *number_BT[stream, valid_BT[stream]].tolist()]
            if fill_up:
                tokens += tokens[-1:] * (-len(tokens) % chunk)
            whole, held[stream] = tokens[:len(tokens) // chunk * chunk], tokens[len(tokens) // chunk * chunk:]
            got = made.valid_BN[stream]
            assert made.key_BHNX[stream, 0, got].flatten().tolist() == [one for one in whole for _ in range(width)]
            assert torch.equal(made.value_BHNX[stream, 0, got], -made.key_BHNX[stream, 0, got])
            torch.testing.assert_close(made.surprise_BN[stream, got], torch.tensor(whole).view(-1, chunk).mean(1))
            assert waiting.count_B[stream] == len(held[stream])
            assert waiting.surprise_BM[stream, :len(held[stream])].tolist() == held[stream]
    assert held[2] == [] and (fill_up or chunk == 1 or any(held))


def test_chunks_are_found_by_their_mean_key_and_read_token_by_token() -> None:
    """Against loops over every query, chunk and token."""
    GENERATOR.manual_seed(1)
    H, N, M, K, chunk, D = 2, 5, 9, 3, 4, 6
    key_HMCD, value_HMCD = torch.randn(2, H, M, chunk, D, generator=GENERATOR).unbind()
    query_HND = torch.randn(H, N, D, generator=GENERATOR).requires_grad_()
    retriever = OracleRetriever(key_HMCD.flatten(2), value_HMCD.flatten(2), torch.zeros(M, dtype=torch.int64), top_k=K)
    namespace_N = torch.zeros(N, dtype=torch.int64)
    namespace_N[3] = -1
    hits = retriever.search(chunk_query(query_HND.detach(), chunk), namespace_N)
    answer_HND = attend_chunks(query_HND, *retriever.fetch(hits), valid_HNK=hits.valid_HNK, chunk=chunk)
    for head in range(H):
        for asked in range(N):
            query_D = query_HND[head, asked].detach()
            if namespace_N[asked] < 0:
                assert not answer_HND[head, asked].any()
                continue
            means = [sum(float(key_D @ query_D) for key_D in key_CD) / chunk for key_CD in key_HMCD[head]]
            best = sorted(range(M), key=lambda one: -means[one])[:K]
            assert hits.id_HNK[head, asked].tolist() == best
            key_JD, value_JD = key_HMCD[head, best].flatten(0, 1), value_HMCD[head, best].flatten(0, 1)
            expected_D = (key_JD @ query_D).softmax(0) @ value_JD
            torch.testing.assert_close(answer_HND[head, asked], expected_D)
    answer_HND.sum().backward()
    assert query_HND.grad is not None and query_HND.grad.abs().sum() > 0 and not query_HND.grad[:, 3].any()
