"""The cache: reading token by token gives what reading whole windows gives, wherever each stream stands."""

from __future__ import annotations

import pytest
import torch

from lmcode.config import LMCODEConfig
from lmcode.model.cache import Cache
from lmcode.model.generation.decode import Decoder
from lmcode.model.generation.generate import StreamReader
from lmcode.model.lm import LMCODEOutput, MemoryLM
from tests.helpers.models import far_from_initial
from tests.helpers.oracle_retriever import random_retriever

V, WINDOW, EOS = 61, 11, 60  # the window is a multiple of neither segment nor stride
SHAPE = {"vocab_size": V, "hidden_size": 24, "num_heads": 3, "num_layers": 3, "context_length": 16,
         "short_term_memory_size": 5, "short_term_dim": 12, "short_term_segment": 4, "memory_layers": (0, 2),
         "memory_heads": 2, "memory_head_dim": 8, "memory_top_k": 6, "memory_update_rate": 0.9}
READS = [{"successor_values": successor, "retrieval_stride": stride, "positions": positions}
         for successor in (True, False) for stride in (1, 4) for positions in ("rotary", "learned")]
LENGTHS = (1, 7, 11, 26)  # in the middle of the first window, at its end, and in the third


def build(**changes: object) -> MemoryLM:
    """A model far from its small initial values, so that every path carries weight, over banks of random entries."""
    torch.manual_seed(3)
    config = LMCODEConfig(**(SHAPE | changes))
    banks = {index: random_retriever(config, num_entries=40, num_namespaces=len(LENGTHS), seed=index, value_scale=2.0)
             for index in config.memory_layer_indices}
    return far_from_initial(MemoryLM(config, banks)).eval()


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, EOS, (length,), generator=generator).tolist() for length in lengths]


def reader(model: MemoryLM, rows: list[list[int]], *, use_cache: bool, namespaces: list[int] | None = None,
           committed: list[LMCODEOutput] | None = None) -> StreamReader:
    return StreamReader(model, [list(row) for row in rows], window=WINDOW, state=None, use_cache=use_cache,
                  namespace_B=torch.tensor(namespaces or list(range(len(rows)))), device=torch.device("cpu"),
                  commit=None if committed is None else committed.append)


@torch.no_grad()
@pytest.mark.parametrize("read", READS + [{"short_term_memory_size": 0}, {"short_term_segment": 1}],
                         ids=lambda read: "-".join(map(str, read.values())))
def test_a_step_gives_the_logits_of_the_whole_window(read: dict) -> None:
    """For streams that stand at different places, over several segments and windows, with one that ends on the way."""
    model, generator = build(**read), torch.Generator().manual_seed(1)
    cached, whole = (reader(model, prompts(), use_cache=use_cache) for use_cache in (True, False))
    for step in range(2 * WINDOW + 5):
        got_BV, expected_BV = cached.logits(), whole.logits()
        live = torch.tensor(whole.live)
        torch.testing.assert_close(got_BV[live], expected_BV[live], rtol=0, atol=1e-5 * float(expected_BV.abs().max()))
        tokens = torch.randint(0, EOS, (len(LENGTHS),), generator=generator).tolist()
        tokens[1] = EOS if step == 6 else tokens[1]
        for each in (cached, whole):
            each.append(tokens, EOS)
    assert cached.live == [True, False, True, True] and len(cached.rows[1]) == LENGTHS[1] + 7


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stream_does_not_notice_its_neighbours(use_cache: bool, stride: int) -> None:
    model = build(retrieval_stride=stride)
    together = reader(model, prompts(), use_cache=use_cache)
    alone = [reader(model, [row], use_cache=use_cache, namespaces=[b]) for b, row in enumerate(prompts())]
    for _ in range(WINDOW + 5):
        logits_BV = together.logits()
        for b, one in enumerate(alone):
            torch.testing.assert_close(logits_BV[b], one.logits()[0], rtol=1e-4, atol=1e-4)
            one.append([int(logits_BV[b].argmax())], None)
        together.append(logits_BV.argmax(-1).tolist(), None)


@torch.no_grad()
def test_windows_are_closed_as_if_the_text_had_been_read_by_hand() -> None:
    """State and candidates, surprise included, are bitwise those of ordinary passes over the windows."""
    model, committed = build(), []
    one = reader(model, prompts((26,)), use_cache=True, committed=committed)
    for _ in range(10):
        one.append([int(one.logits()[0].argmax())], None)
    state, (row,) = one.finish(), one.rows
    expected_state, num_windows = None, -(-len(row) // WINDOW)
    assert len(row) == 36 and len(committed) == num_windows == 4
    for index in range(num_windows):
        ids = torch.tensor([row[index * WINDOW:(index + 1) * WINDOW]])
        following = (row[index * WINDOW + 1:(index + 1) * WINDOW + 1] + [-100])[:ids.shape[1]]
        output = model(ids, targets_BT=torch.tensor([following]), state=expected_state)
        expected_state = output.state
        for layer, memory in output.memory.items():
            for part, expected in zip(committed[index].memory[layer].candidates, memory.candidates, strict=True):
                assert torch.equal(part, expected)
    assert all(map(torch.equal, state.slots + state.pending_key, expected_state.slots + expected_state.pending_key))


@torch.no_grad()
def test_every_pass_asks_every_bank_once_and_for_new_tokens_only() -> None:
    model = build(retrieval_stride=4)
    each, bank = reader(model, prompts(), use_cache=True), model.layers[2].long_term_memory
    each.logits()
    for _ in range(6):
        each.append([0] * len(LENGTHS), None)
        closes = any(length % WINDOW == 1 and length > WINDOW for length in map(len, each.rows))
        before = bank.num_searches
        each.logits()
        assert bank.num_searches - before == 1 + closes == len({len(q[1]) for q in bank.queries[before:]})
        assert bank.queries[-1][0].shape[1] == len(LENGTHS)


@torch.no_grad()
def test_a_cache_refuses_what_it_cannot_hold() -> None:
    model, ids = build(), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token: got 0"):
        Cache(0)
    for window in (4, 17):
        with pytest.raises(ValueError, match=f"must lie between .*got {window}"):
            model(ids, cache=Cache(window))
    cache, namespaces = Cache(6), torch.arange(2)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"empty cache: this one has streams of \[5, 5\] tokens"):
        model(ids, cache=cache)
    decoder = Decoder(model, rows=2, copies=False)
    logits_BV = decoder(ids[:, 0], cache, namespace_B=namespaces, valid=[True, True])
    assert logits_BV.shape == (2, V) and cache.lengths == [6, 6]
    with pytest.raises(ValueError, match="must be restarted"):
        decoder(ids[:, 0], cache, namespace_B=namespaces, valid=[True, True])
    with pytest.raises(ValueError, match="one token for each of the cache's streams: expected 2, got 1"):
        decoder(ids[:1, 0], cache, namespace_B=namespaces, valid=[True])
    assert cache.lengths == [6, 6]


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 4])
def test_a_step_in_bf16_is_as_close_to_fp32_as_a_whole_window_is(stride: int) -> None:
    exact, rounded = build(retrieval_stride=stride), build(retrieval_stride=stride).bfloat16()
    error = {True: 0.0, False: 0.0}
    readers = reader(exact, prompts(), use_cache=False), *(reader(rounded, prompts(), use_cache=cached) for cached in error)
    for _ in range(WINDOW + 3):
        expected_BV, *got = (each.logits().float() for each in readers)
        for cached, got_BV in zip(error, got, strict=True):
            error[cached] += float((got_BV - expected_BV).square().mean())
        for each in readers:
            each.append(expected_BV.argmax(-1).tolist(), None)
    assert 0 < error[True] < 1.5 * error[False]
