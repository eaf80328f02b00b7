"""Capacity, efficiency and the flow of one sequence: true numbers, nothing changed, the same on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lmcode import analyze_memory_capacity, compute_memory_efficiency
from lmcode.dist import Group
from lmcode.language_model import LMCODE
from lmcode.report.analysis import entry_columns, mass_share, read_items
from lmcode.report.flow import memory_flow
from lmcode.report.sequences import token_sequences
from tests.helpers.models import TEXTS, ids_of, remember, small_model
from tests.helpers.ranks import run_on_ranks

RANDOM = np.random.default_rng(0).integers(0, 257, (6, 33)).tolist()  # texts in which no context occurs twice


def contents(model: LMCODE) -> dict[int, str]:
    return {layer: bank.content_hash() for layer, bank in model.banks.items()}


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = small_model().train()
    remember(model, TEXTS)
    before = contents(model)
    analyze_memory_capacity(model, TEXTS)
    compute_memory_efficiency(model)
    memory_flow(model, TEXTS[0][:20])
    assert contents(model) == before and model.training
    assert all(model.layers[layer].long_term_memory is bank for layer, bank in model.banks.items())


@pytest.mark.parametrize("shape", [{}, {"retrieval_stride": 4}, {"successor_values": False},
                                   {"successor_values": False, "retrieval_stride": 4}, {"positions": "learned"}])
def test_every_item_is_found_where_it_was_written(shape: dict[str, Any]) -> None:
    """Queries start out as copies of keys, so in a text without repetition an item's own query finds it first. This pairs
    each query with the right entry for every stride and successor rule, or recall would be at chance."""
    model = small_model(**shape)
    curves = analyze_memory_capacity(model, RANDOM)
    for curve in curves["layers"].values():
        assert curve["recall_at_1"][0] > 0.9 and curve["next_at_1"][0] > 0.9
        assert all(first <= among for first, among in zip(curve["recall_at_1"], curve["recall_at_k"], strict=True))


def test_items_stand_for_the_tokens_that_follow() -> None:
    model = small_model()
    items = read_items(model, [ids_of(TEXTS[0])[:30], ids_of(TEXTS[1])[:12]])[0]
    # The last token of a text has no successor and the one before it none that is read: two items fewer than tokens.
    expected = ids_of(TEXTS[0])[1:29] + ids_of(TEXTS[1])[1:11]
    assert items.next_X.tolist() == expected and items.key_HXD.shape == items.query_HXD.shape == (2, 38, 16)


def test_a_full_bank_forgets_and_the_curve_says_so() -> None:
    model = small_model()
    curve = analyze_memory_capacity(model, RANDOM, slots=36)["layers"][0]
    assert curve["stored"] == [64, 128, 186] and all(live <= 36 for live in curve["live"])
    for stored, live, found in zip(curve["stored"], curve["live"], curve["recall_at_k"], strict=True):
        assert found <= live / stored + 0.1
    roomy = analyze_memory_capacity(model, RANDOM, slots=600)["layers"][0]
    assert roomy["live"] == roomy["stored"] and roomy["recall_at_k"][-1] > curve["recall_at_k"][-1]


def test_sizes_are_the_callers_if_they_fit() -> None:
    model = small_model()
    assert analyze_memory_capacity(model, RANDOM, sizes=[100, 10])["layers"][2]["stored"] == [10, 100]
    for sizes in ([0], [187], []):
        with pytest.raises(ValueError, match=r"sizes must lie in 1\.\.186"):
            analyze_memory_capacity(model, RANDOM, sizes=sizes)


def test_efficiency_agrees_with_the_bank_and_the_weights() -> None:
    model = small_model()
    remember(model, TEXTS)
    found = compute_memory_efficiency(model, thresholds=(0.05, 0.5))
    named = dict(model.named_parameters())
    assert found["parameters"] == sum(p.numel() for p in named.values())
    assert found["memory_parameters"] == sum(p.numel() for name, p in named.items() if "short_term" in name or
                                             "long_term" in name)
    assert found["memory_parameter_share"] == found["memory_parameters"] / found["parameters"]
    assert found["bank_bytes"] == sum(one["bank_bytes"] for one in found["layers"].values())
    for layer, bank in model.banks.items():
        stats, one = bank.stats(), found["layers"][layer]
        assert (one["entries"], one["slots"], one["fill"]) == (stats["live"], stats["slots"], stats["fill"])
        assert one["namespaces"] == len(TEXTS) and one["near_duplicate_share"][0.05] <= one["near_duplicate_share"][0.5]
        mass = bank.shard.columns["hit_mass"][bank.shard.live_M]
        assert one["never_hit_share"] == pytest.approx((mass == 0).mean()) and (mass > 0).any()
        tables = bank.shard.key_HMD, bank.shard.value_HMD, bank.shard.addend_M, *bank.shard.columns.values()
        rows = sum(table.nbytes for table in tables)
        assert one["bank_bytes"] == rows


def test_twins_are_near_duplicates_and_strangers_are_not() -> None:
    model = small_model(memory_layers=(0,))
    bank, key_HED = model.banks[0], torch.nn.functional.normalize(torch.eye(16)[None, :8].repeat(2, 1, 1), dim=-1)
    bank.write(key_HED, key_HED, torch.zeros(8, dtype=torch.int64))
    assert compute_memory_efficiency(model)["layers"][0]["near_duplicate_share"] == {0.1: 0.0}
    bank.write(key_HED, key_HED, torch.zeros(8, dtype=torch.int64))
    assert compute_memory_efficiency(model)["layers"][0]["near_duplicate_share"] == {0.1: 0.5}


def test_concentration() -> None:
    assert mass_share(np.ones(100), 0.1) == pytest.approx(0.1)
    assert mass_share(np.array([0, 0, 5, 0]), 0.01) == 1.0
    assert math.isnan(mass_share(np.zeros(4), 0.1)) and math.isnan(mass_share(np.zeros(0), 0.1))


def test_an_empty_bank_and_no_bank_are_no_special_cases() -> None:
    empty = compute_memory_efficiency(small_model())["layers"][0]
    assert empty["entries"] == 0 and math.isnan(empty["never_hit_share"]) and math.isnan(empty["near_duplicate_share"][0.1])
    none = compute_memory_efficiency(small_model(long_term_memory_slots=0))
    assert none["layers"] == {} and none["bank_bytes"] == 0 and none["memory_parameters"] > 0


def test_capacity_needs_a_bank_and_text() -> None:
    with pytest.raises(ValueError, match="no bank whose capacity"):
        analyze_memory_capacity(small_model(long_term_memory_slots=0), TEXTS)
    with pytest.raises(ValueError, match="at least one text or id sequence: got none"):
        analyze_memory_capacity(small_model(), [])
    with pytest.raises(ValueError, match="too short: no token of theirs has a successor"):
        analyze_memory_capacity(small_model(), [[1, 2]])


@pytest.mark.parametrize("data, message", [
    ("a text", "expected a list, tensor or dataset"), (5, "expected a list, tensor or dataset"),
    ([[1]], "item 0 needs at least 2 tokens: got 1"), ([""], "item 0 needs at least 2 tokens: got 0"),
    ([[1, 257]], r"must lie in 0\.\.256: item 0 has 1\.\.257"), ([[1, -1]], r"item 0 has -1\.\.1"),
    ([[0.5, 1.5]], "one-dimensional sequence of integer"), ([torch.zeros(2, 2, dtype=torch.int64)], "one-dimensional"),
    ([{"ids": [1, 2]}], r"must have 'input_ids': got \['ids'\]"), ([7], "a text or a sequence of token ids: got int"),
])
def test_sequences_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_sequences(small_model(), data)


def test_sequences_come_in_many_forms() -> None:
    model, rows = small_model(), [[1, 2, 3], [4, 5, 6]]
    forms = [rows, torch.tensor(rows), [torch.tensor(row) for row in rows], [{"input_ids": row} for row in rows],
             np.array(rows), iter(rows), ["\x01\x02\x03", "\x04\x05\x06"]]
    assert all(token_sequences(model, form) == rows for form in forms)
    small = small_model(vocab_size=40)
    with pytest.raises(ValueError, match="item 0 is a text and the model has no tokenizer"):
        token_sequences(small, ["text"])


def test_the_flow_of_a_sequence_adds_up() -> None:
    model = small_model(retrieval_stride=4)
    remember(model, TEXTS)
    flow = memory_flow(model, TEXTS[0][:22])
    assert flow.layers == (0, 2) and "".join(flow.tokens) == TEXTS[0][:22]
    assert flow.gate_XT.shape == flow.bank_XT.shape == flow.own_XT.shape == (2, 22)
    np.testing.assert_allclose(flow.bank_XT + flow.own_XT + flow.null_XT, 1.0, atol=1e-5)
    assert flow.own_XT.min() > -1e-6 and flow.bank_XT.max() > 0.05
    assert (flow.bank_XT[:, 4:8] == flow.bank_XT[:, 4:5]).all() and (flow.bank_XT[:, :4] == 0).all(), "chunks of a stride"
    assert memory_flow(small_model(), [1, 2]).own_XT[:, 0] == pytest.approx([0, 0], abs=1e-6), "a first token has no past"


def test_the_flow_reads_everything_or_one_document() -> None:
    model = small_model()
    remember(model, TEXTS[:2])
    for bank in model.banks.values():
        bank.delete(namespace=0)
    assert memory_flow(model, TEXTS[0][:20]).bank_XT.max() > 0.05
    assert memory_flow(model, TEXTS[0][:20], namespace=1).bank_XT.max() > 0.05
    assert memory_flow(model, TEXTS[0][:20], namespace=0).bank_XT.max() == 0.0
    assert memory_flow(small_model(long_term_memory_slots=0), TEXTS[0][:20]).bank_XT.max() == 0.0


def test_flows_that_are_refused() -> None:
    model = small_model()
    for sequence, message in (([], "at least 1 tokens"), (list(range(33)), "at most context_length = 32 tokens: got 33"),
                              (7, "got int")):
        with pytest.raises(ValueError, match=message):
            memory_flow(model, sequence)
    with pytest.raises(ValueError, match="a namespace is a number from 0 .*got -1"):
        memory_flow(model, [1, 2], namespace=-1)
    with pytest.raises(ValueError, match="no memory layer"):
        memory_flow(small_model(memory_layers=()), [1, 2])
    assert memory_flow(model, torch.tensor([[1, 2, 3]])).gate_XT.shape == (2, 3), "a batch of one is a sequence"


def analyse_on_a_rank() -> list[tuple[Any, ...]]:
    return [analyse(group_size) for group_size in (0, 1)]


def analyse(group_size: int) -> tuple[Any, ...]:
    model = small_model(Group.world(), memory={"group_size": group_size})
    remember(model, TEXTS, count_hits=False)
    columns = {layer: {name: column.tolist() for name, column in entry_columns(bank).items()}
               for layer, bank in model.banks.items()}
    return columns, compute_memory_efficiency(model), analyze_memory_capacity(model, RANDOM, slots=60)


def test_three_ranks_find_what_one_does() -> None:
    (alone, _), = run_on_ranks(analyse_on_a_rank, 1)
    for found in [one for rank in run_on_ranks(analyse_on_a_rank, 3) for one in rank]:
        assert found[0] == alone[0] and found[2] == alone[2]
        assert str(found[1]) == str(alone[1]), "nan is not equal to itself"
