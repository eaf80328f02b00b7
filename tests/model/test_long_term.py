"""The long-term read: merging of softmaxes, the local part, queries, candidates; the whole against one big softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model import LongTermRead, MemoryLM, ReadTape, Window, merge_partials
from lmcode.model.long_term import (
    attend_own_past,
    attention_paid,
    last_keys,
    make_candidates,
    retrieval_queries,
    share_per_query,
)
from lmcode.protocol import NO_SCORE, NullRetriever
from tests.helpers.oracle_retriever import OracleRetriever, random_retriever

B, T, C, H, D, K = 3, 11, 24, 2, 8, 6


def build(**changes: object) -> tuple[LMCODEConfig, LongTermRead]:
    torch.manual_seed(2)
    shape = {"vocab_size": 32, "hidden_size": C, "num_heads": 2, "num_layers": 1, "context_length": 64,
             "short_term_memory_size": 0, "memory_heads": H, "memory_head_dim": D, "memory_top_k": K}
    config = LMCODEConfig(**(shape | changes))
    module = MemoryLM(config).layers[0].long_term_read
    torch.nn.init.normal_(module.query_key_value.weight, std=0.3)
    with torch.no_grad():  # heads that differ, and a bias that lets the bank matter
        module.log_temperature_H.copy_(torch.tensor([1.0, 0.3]))
        module.retrieved_bias_H.copy_(torch.tensor([-0.5, 0.4]))
        module.null_logit_H.copy_(torch.tensor([0.2, -0.7]))
    return config, module


def window(**changes: object) -> Window:
    return Window(torch.tensor([0, 1, 2]), torch.ones(B, dtype=torch.bool))._replace(**changes)


def padding(*lengths: int) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def test_merge_equals_one_softmax_over_the_union() -> None:
    sizes, rows = (5, 3, 1), 40
    scores = [20 * torch.randn(rows, size) for size in sizes]
    values = [torch.randn(rows, size, D) for size in sizes]
    for row in range(20):  # some rows lack one, two or all of the first two sets
        for part in range(2):
            if (row >> part) & 1:
                scores[part][row] = NO_SCORE
    present = [(score > NO_SCORE).any(1, keepdim=True) for score in scores]
    partial = [torch.einsum("nk,nkd->nd", score.softmax(1), value) * here
               for score, value, here in zip(scores, values, present, strict=True)]
    lses = [score.logsumexp(1) for score in scores]
    merged, share = merge_partials(partial, lses)
    weight = torch.cat(scores, dim=1).double().softmax(1)
    torch.testing.assert_close(merged, torch.einsum("nk,nkd->nd", weight, torch.cat(values, 1).double()).float())
    expected = torch.stack([part.sum(1) for part in weight.split(sizes, dim=1)]).float()
    torch.testing.assert_close(share, expected)


def test_merge_of_nothing_is_zero_and_finite() -> None:
    empty = torch.full((4,), NO_SCORE, requires_grad=True)
    merged, share = merge_partials([torch.zeros(4, D), torch.zeros(4, D)], [empty, empty])
    merged.sum().backward()
    assert (merged == 0).all() and share.isfinite().all() and empty.grad.isfinite().all()


def test_further_lses_belong_to_sets_of_value_zero() -> None:
    values, lses = [torch.randn(4, D)], [torch.randn(4), torch.randn(4)]
    merged, share = merge_partials(values, lses)
    torch.testing.assert_close(merged, merge_partials([*values, torch.zeros(4, D)], lses)[0])
    torch.testing.assert_close(share.sum(0), torch.ones(4))


@pytest.mark.parametrize("successor_values", [True, False])
def test_own_past_equals_the_loop(successor_values: bool) -> None:
    query, key, value = torch.randn(3, H, B, T, D)
    mixed, lse = attend_own_past(query, key, value, successor_values=successor_values)
    assert (mixed[:, :, 0] == 0).all() and (lse[:, :, 0] == NO_SCORE).all()
    for h in range(H):
        for b in range(B):
            for i in range(1, T):
                score = torch.stack([query[h, b, i] @ key[h, b, j] for j in range(i)])
                taken = torch.stack([value[h, b, j + 1 if successor_values else j] for j in range(i)])
                torch.testing.assert_close(mixed[h, b, i], score.softmax(0) @ taken, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(lse[h, b, i], score.logsumexp(0))


@pytest.mark.parametrize("stride", [1, 4])
def test_whole_read_equals_one_softmax_over_concatenated_logits(stride: int) -> None:
    config, module = build(retrieval_stride=stride)
    retriever = random_retriever(config, num_entries=17, num_namespaces=2)  # document 2 has no entry; 0 and 1 have 8-9
    x, tape = torch.randn(B, T, C), ReadTape()
    out = module(x, window=window(), retriever=retriever, tape=tape)

    query, key, value = module.query_key_value(x).view(B, T, 3, H, D).permute(2, 3, 0, 1, 4)
    query = F.normalize(query, dim=-1) * module.log_temperature_H.exp()[:, None, None, None]
    key, merged, shares = F.normalize(key, dim=-1), torch.zeros(B, T, H, D), torch.zeros(2, H, B, T)
    for b in range(B):
        for i in range(T):
            for h in range(H):
                asker = i if stride == 1 else i // stride * stride - 1
                found = (retriever.namespace_M == b) if asker >= 0 else torch.zeros(17, dtype=torch.bool)
                found_score = retriever.key_HMD[h, found] @ query[h, b, asker]
                found_score, order = found_score.sort(descending=True)
                found_score = found_score[:K] + module.retrieved_bias_H[h]
                found_value = retriever.value_HMD[h, found][order[:K]]
                score = torch.cat([key[h, b, :i] @ query[h, b, i], found_score, module.null_logit_H[h, None]])
                weight = score.softmax(0)
                merged[b, i, h] = weight @ torch.cat([value[h, b, 1:i + 1], found_value, torch.zeros(1, D)])
                shares[:, h, b, i] = torch.stack([weight[i:-1].sum(), weight[-1]])
    expected = torch.sigmoid(module.gate(x)) * module.output(merged.view(B, T, H * D))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    chunks = [torch.stack([part.mean(-1) for part in share.split(stride, dim=2)], dim=2).flatten(1)
              for share in shares.detach()]
    torch.testing.assert_close(tape.share_HN, chunks[0], atol=1e-5, rtol=1e-4)
    paid = torch.stack([part.sum(-1) for part in shares[0].detach().split(stride, dim=2)], dim=2).flatten(1)
    torch.testing.assert_close(tape.credit_HN, paid, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tape.null_share_HN, chunks[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tape.gate_BT, torch.sigmoid(module.gate(x)).detach().squeeze(-1))


def test_nothing_found_is_finite_in_value_and_gradient() -> None:
    _, module = build()
    for num_tokens in (1, T):
        x = torch.randn(B, num_tokens, C, requires_grad=True)
        out = module(x, window=window(), retriever=NullRetriever(), tape=(tape := ReadTape()))
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all() and (tape.share_HN == 0).all()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 11])
def test_strided_queries_come_from_the_chunk_before(num_tokens: int) -> None:
    query = torch.randn(H, B, num_tokens, D)
    namespace = torch.arange(B)[:, None].expand(B, num_tokens)
    query_HND, namespace_N = retrieval_queries(query, namespace, 4)
    num_chunks = -(-num_tokens // 4)
    assert query_HND.shape == (H, B * num_chunks, D) and namespace_N.shape == (B * num_chunks,)
    for b in range(B):
        assert namespace_N[b * num_chunks] == -1
        for chunk in range(1, num_chunks):
            assert torch.equal(query_HND[:, b * num_chunks + chunk], query[:, b, 4 * chunk - 1])
            assert namespace_N[b * num_chunks + chunk] == b


def test_share_per_query_is_the_mean_over_the_tokens_that_share_it() -> None:
    share = torch.rand(H, B, T)
    expected = torch.stack([share[:, :, :4].mean(-1), share[:, :, 4:8].mean(-1), share[:, :, 8:].mean(-1)], dim=-1)
    torch.testing.assert_close(share_per_query(share, 4), expected.flatten(1))
    assert torch.equal(share_per_query(share, 1), share.flatten(1))


def test_attention_paid_is_the_sum_over_the_valid_tokens_that_share_a_query() -> None:
    share, valid = torch.rand(H, B, T), padding(T, 6, 0)
    counted = share * valid
    expected = torch.stack([counted[:, :, :4].sum(-1), counted[:, :, 4:8].sum(-1), counted[:, :, 8:].sum(-1)], dim=-1)
    torch.testing.assert_close(attention_paid(share, valid, 4), expected.flatten(1))
    torch.testing.assert_close(attention_paid(share, valid, 1), counted.flatten(1))
    assert torch.equal(attention_paid(share, None, 1), share.flatten(1))


@pytest.mark.parametrize("stride", [1, 4])
def test_padding_asks_for_nothing_and_pays_nothing(stride: int) -> None:
    config, module = build(retrieval_stride=stride)
    retriever = random_retriever(config, num_entries=30, num_namespaces=3)
    tape, context = ReadTape(), window(valid_BT=padding(T, 6, 0))
    module(torch.randn(B, T, C), window=context, retriever=retriever, tape=tape)
    namespace = retriever.queries[0][1].view(B, -1)
    asks = torch.arange(T) if stride == 1 else torch.tensor([-1, 3, 7])
    assert torch.equal(namespace[1] >= 0, (asks >= 0) & (asks < 6))
    assert (namespace[2] == -1).all() and torch.equal(namespace[0] >= 0, asks >= 0)
    assert torch.equal(tape.hits.valid_HNK.any(-1).view(H, B, -1), (namespace >= 0).expand(H, -1, -1))
    paid = tape.credit_HN.view(H, B, -1)
    assert torch.equal(paid > 0, (namespace >= 0).expand(H, -1, -1))
    if stride == 4:  # of the chunk of tokens 4 to 7, stream 1 has two
        shared = 4 * tape.share_HN.view(H, B, -1)[..., 1]
        torch.testing.assert_close(paid[:, 0, 1], shared[:, 0])
        assert (paid[:, 1, 1] < shared[:, 1]).all()


def test_candidates_carry_the_key_of_the_token_before() -> None:
    key, value, pending = torch.randn(H, B, T, D), torch.randn(H, B, T, D), torch.randn(B, H, D)
    context = window(pending_valid_B=torch.tensor([True, False, True]), pending_key_BHD=pending,
                     valid_BT=padding(T, T, 4), namespace_B=torch.tensor([7, 8, 9]))
    rows = make_candidates(key, value, context, successor_values=True)
    keys, valid = rows.key_HND.view(H, B, T, D), rows.valid_N.view(B, T)
    assert torch.equal(keys[:, :, 1:], key[:, :, :-1])
    assert torch.equal(keys[:, :, 0], pending.transpose(0, 1))
    assert torch.equal(rows.value_HND.view(H, B, T, D), value)
    assert torch.equal(valid[:, 0], torch.tensor([True, False, True]))
    assert valid[:2, 1:].all() and torch.equal(valid[2], torch.arange(T) < 4)
    assert torch.equal(rows.namespace_N.view(B, T), torch.tensor([7, 8, 9])[:, None].expand(B, T))


def test_candidates_without_successors_are_each_tokens_own() -> None:
    key, value = torch.randn(H, B, T, D), torch.randn(H, B, T, D)
    context = window(pending_valid_B=torch.zeros(B, dtype=torch.bool), namespace_B=torch.tensor([0, -1, 2]))
    rows = make_candidates(key, value, context, successor_values=False)
    assert torch.equal(rows.key_HND.view(H, B, T, D), key)
    assert torch.equal(rows.valid_N.view(B, T).all(1), torch.tensor([True, False, True]))
    assert not rows.valid_N.view(B, T)[1].any()


def test_last_key_is_that_of_the_last_valid_token() -> None:
    key, pending = torch.randn(H, B, T, D), torch.randn(B, H, D)
    kept = last_keys(key, window(valid_BT=padding(T, 4, 0), pending_key_BHD=pending))
    for b, expected in enumerate((key[:, 0, T - 1], key[:, 1, 3], pending[2])):
        assert torch.equal(kept[b], expected)
    assert torch.equal(last_keys(key, window()), key[:, :, -1].transpose(0, 1))


def test_queries_are_scaled_units_in_fp32_and_everything_on_the_tape_is_detached() -> None:
    config, module = build()
    retriever = random_retriever(config, num_entries=30, num_namespaces=3)
    module = module.to(torch.bfloat16)
    out = module(torch.randn(B, T, C, dtype=torch.bfloat16), window=window(), retriever=retriever,
                 tape=(tape := ReadTape()))
    query = retriever.queries[0][0]
    assert out.dtype == torch.bfloat16 and query.dtype == torch.float32 and not query.requires_grad
    torch.testing.assert_close(query.norm(dim=-1), module.log_temperature_H.float().exp()[:, None].expand(H, B * T))
    torch.testing.assert_close(tape.candidates.key_HND.norm(dim=-1)[:, 1:T], torch.ones(H, T - 1))
    recorded = [*tape.candidates, *tape.hits[:2], tape.gate_BT, tape.share_HN, tape.null_share_HN, tape.pending_key_BHD]
    assert not any(tensor.requires_grad for tensor in recorded)
    assert tape.candidates.key_HND.dtype == tape.candidates.value_HND.dtype == torch.float32


def test_a_second_run_on_the_same_tape_does_not_search_again() -> None:
    config, module = build()
    retriever = random_retriever(config, num_entries=30, num_namespaces=3)
    x, tape = torch.randn(B, T, C), ReadTape()
    first = module(x, window=window(), retriever=retriever, tape=tape)
    recorded = dict(vars(tape))
    second = module(x, window=window(), retriever=retriever, tape=tape)
    assert torch.equal(first, second) and all(vars(tape)[name] is product for name, product in recorded.items())
    assert retriever.num_searches == 1 and retriever.num_attends == 2


def test_oracle_retriever_keeps_the_total_order_and_the_scope() -> None:
    key = F.normalize(torch.randn(1, 4, D), dim=-1).repeat(1, 2, 1)  # every key twice: ties
    retriever = OracleRetriever(key, torch.randn(1, 8, D), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), top_k=8)
    hits = retriever.search(torch.randn(1, 3, D), torch.tensor([0, 1, -1]))
    assert hits.valid_HNK.sum(-1).tolist() == [[6, 2, 0]] and set(hits.id_HNK[0, 1, :2].tolist()) == {6, 7}
    for score, index in zip(hits.score_HNK[0, 0, :6], hits.id_HNK[0, 0, :6], strict=True):
        twin = hits.id_HNK[0, 0, :6][hits.score_HNK[0, 0, :6] == score]
        assert index in twin and torch.equal(twin, twin.sort().values)
    value, lse = retriever.attend(torch.randn(1, 3, D), hits)
    assert (value[0, 2] == 0).all() and lse[0, 2] == NO_SCORE and value.isfinite().all()


def test_a_retriever_without_a_shortcut_looks_up_by_searching_and_attending() -> None:
    config, _ = build()
    retriever = random_retriever(config, num_entries=17, num_namespaces=2)
    query, names = torch.randn(config.memory_heads, 3, config.memory_head_dim, requires_grad=True), torch.tensor([0, 1, -1])
    found, wanted = retriever.look_up(query, names), retriever.attend(query, retriever.search(query, names))
    assert all(torch.equal(one, other) and not one.requires_grad for one, other in zip(found, wanted, strict=True))
    assert NullRetriever().look_up(query, names)[0].eq(0).all()
