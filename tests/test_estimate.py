"""Estimates: held against models, banks and collectives that are really made, and against what more ranks must change.

Whole runs are compared by tools/estimate_check.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from lmcode.cli import command as cli
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, RunConfig, TrainConfig
from lmcode.dist import Group
from lmcode.estimate import (
    COLUMN_BYTES,
    GIB,
    Estimate,
    bank_bytes,
    checkpoint_bytes,
    count_parameters,
    estimate,
    to_table,
)
from lmcode.language_model import LMCODE
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.search import faiss_index
from lmcode.presets import ALL, load_run_config
from lmcode.protocol import Candidates
from tests.helpers.ranks import run_on_ranks


def config_of(**memory: object) -> RunConfig:
    return RunConfig(
        model=LMCODEConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, context_length=8, memory_layers=(1,),
                           short_term_memory_size=4, short_term_dim=8, long_term_memory_slots=48, memory_heads=2,
                           memory_head_dim=4, memory_top_k=3),
        memory=MemoryConfig(virtual_shards=4, tier="exact", recall_queries=0, **memory),
        train=TrainConfig(streams=4, sequence_length=8, deepspeed="zero2"))


def test_parameters_are_those_of_the_model() -> None:
    config = config_of()
    assert count_parameters(config) == sum(p.numel() for p in LMCODE(config.model, memory=config.memory).parameters())


def test_a_bank_is_as_large_as_its_tensors_and_columns() -> None:
    config = config_of()
    shard = LMCODE(config.model, memory=config.memory).banks[1].shard
    columns = sum(column.nbytes for column in shard.columns.values())
    assert columns == COLUMN_BYTES * 48
    rows = shard.key_HMD.nbytes + shard.value_HMD.nbytes + shard.addend_M.nbytes
    assert bank_bytes(config, 1, "cpu")["bank"] == rows + columns


def test_a_checkpoints_bank_is_as_large_as_the_states_in_it() -> None:
    config = config_of()
    bank = LMCODE(config.model, memory=config.memory).banks[1]
    state = sum(tensor.nbytes for shard in bank.owned for tensor in bank.state(shard).values() if tensor.ndim)
    assert checkpoint_bytes(config, 1)["banks"] == state


def counted_bytes(configs: list[RunConfig]) -> list[dict[str, int]]:
    group = Group.world()
    return [counted_by(group, config) for config in configs]


def counted_by(group: Group, config: RunConfig) -> dict[str, int]:
    """What one rank's group counts in one read, its gradient and one commit, all tokens valid."""
    model, train = config.model, config.train
    H, D, N = model.memory_heads, model.memory_head_dim, train.streams // group.size * train.sequence_length
    bank = LongTermMemory(heads=H, head_dim=D, slots=model.long_term_memory_slots, top_k=model.memory_top_k,
                          config=config.memory, group=group)
    random_HND = torch.randn(H, N, D, generator=torch.Generator().manual_seed(group.rank))
    vectors = torch.nn.functional.normalize(random_HND, dim=-1)
    namespace_N = torch.zeros(N, dtype=torch.int64)
    offered = Candidates(vectors, vectors, namespace_N, torch.rand(N), torch.ones(N, dtype=torch.bool))
    query_HND = vectors.clone().requires_grad_()
    hits = bank.search(query_HND.detach(), namespace_N)
    bank.attend(query_HND, hits)[0].sum().backward()
    bank.commit([offered], [hits], step=0)
    return group.take()[1]


def test_traffic_is_what_the_group_counts() -> None:
    settings = [{}, {"exchange": "all_to_all", "dtype": "bf16"}, {"write": "every_nth"}, {"fetch": "rows"},
                {"group_size": 1}, {"scope": "global"}]
    configs = [config_of(**memory) for memory in settings]
    for counted in run_on_ranks(counted_bytes, 2, configs):
        for config, memory, phases in zip(configs, settings, counted, strict=True):
            made = estimate(config, 2).traffic
            for phase in ("queries", "hits", "values", "gradients", "writes"):
                # Which rank an entry goes to is a matter of its id, and how many slots win one of what is asked; of few.
                tolerance = 0.02 if phase != "writes" else 0.6
                assert made[phase] == pytest.approx(phases.get(phase, 0), rel=tolerance), (memory, phase)


def test_one_rank_receives_nothing() -> None:
    assert estimate(config_of(), 1).traffic == {}


@pytest.mark.parametrize("preset", ALL)
def test_zero_divides_what_it_says_it_divides(preset: str) -> None:
    def memory(stage: str, ranks: int) -> dict[str, int]:
        return estimate(load_run_config(preset, [f"train.deepspeed={stage}"]), ranks).memory

    for stage, divided in (("zero1", {"optimizer"}), ("zero2", {"optimizer", "gradients"}),
                           ("zero3", {"optimizer", "gradients", "weights"})):
        one, four = memory(stage, 1), memory(stage, 4)
        for part in ("weights", "gradients", "optimizer"):
            assert four[part] == pytest.approx(one[part] / (4 if part in divided else 1), abs=1), (stage, part)


def test_banks_and_activations_shrink_with_ranks_and_checkpoints_do_not() -> None:
    one, four = (estimate(load_run_config("tiny"), ranks) for ranks in (1, 4))
    for part in ("bank", "activations", "logits"):
        assert four.memory[part] == pytest.approx(one.memory[part] / 4, rel=0.01)
    assert one.checkpoint == four.checkpoint


def test_a_memory_group_holds_the_whole_bank_and_reads_for_itself() -> None:
    two, four, eight = (estimate(load_run_config("small", [f"memory.group_size={size}"]), 8) for size in (2, 4, 8))
    assert eight == estimate(load_run_config("small"), 8)
    for less, more in ((two, four), (four, eight)):
        assert less.memory["bank"] == pytest.approx(2 * more.memory["bank"], rel=0.01)
        assert less.checkpoint == more.checkpoint
        for phase in ("queries", "hits", "values", "gradients"):
            assert less.traffic[phase] < more.traffic[phase], phase
        assert less.traffic["writes"] > more.traffic["writes"], "hits are added up between groups"


def test_offloading_moves_the_states_from_a_gpu_to_its_host() -> None:
    config = load_run_config("base", ["train.deepspeed=zero3_offload"])
    on_gpu, on_cpu = (estimate(config, 8, device=device) for device in ("gpu", "cpu"))
    moved = {"optimizer", "weights", "saving"}
    assert set(on_gpu.host_memory) == moved and not moved & set(on_gpu.memory)
    assert on_cpu.host_memory == {} and moved <= set(on_cpu.memory)


def total(made: Estimate) -> int:
    return sum(made.memory.values())


def test_it_warns_when_ranks_do_not_fit_into_what_they_share() -> None:
    config = load_run_config("tiny")
    need = total(estimate(config, 4))
    def warned(memory_bytes: float, **more: object) -> str:
        return " ".join(estimate(config, 4, memory_bytes=int(memory_bytes), **more).warnings)  # type: ignore[arg-type]

    assert warned(4 * need / 0.85) == ""
    assert "may not fit" in warned(4 * need / 0.95)
    assert "will not fit" in warned(3 * need) and "4 ranks" in warned(3 * need)
    assert warned(3 * need, ranks_per_host=2) == ""
    assert estimate(config, 4).warnings == ()


def test_the_command_prints_the_same_numbers_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "--preset", "small", "--world", "8", "--device", "gpu", "--memory", "1", "train.streams=16"]
    assert cli.main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    expected = estimate(load_run_config("small", ["train.streams=16"]), 8, device="gpu", memory_bytes=GIB)
    assert made == json.loads(json.dumps(expected.to_dict()))
    assert made["memory_total"] == total(expected) and made["warnings"]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert table == to_table(expected) + "\n" and "warning: will not fit" in table


@pytest.mark.parametrize(("words", "message"), [
    ([], "--world"), (["--world", "0"], "1 or more"), (["--world", "3"], "8 % (3 x 1)"),
    (["--world", "2", "--device", "tpu"], "tpu"), (["--world", "2", "model.hidden=3"], "hidden"),
    (["--world", "4", "memory.group_size=3"], "4 % 3 != 0")])
def test_what_cannot_be_estimated_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_ranks_that_cannot_share_a_run_have_no_estimate() -> None:
    with pytest.raises(ConfigError, match="streams"):
        estimate(config_of(), 3)


def test_bf16_on_a_processor_that_emulates_it_is_a_warning() -> None:
    config = load_run_config("tiny", ["train.precision=bf16"])
    assert "bf16 is emulated" in " ".join(estimate(config, 1, has_bf16=False).warnings)
    for warnings in (estimate(config, 1, has_bf16=True).warnings, estimate(config, 1, has_bf16=False, device="gpu").warnings,
                     estimate(load_run_config("tiny"), 1, has_bf16=False).warnings):
        assert warnings == ()


def test_graphs_are_counted_where_they_are_made_and_as_large_as_they_are() -> None:
    faiss = pytest.importorskip("faiss")
    assert "graphs" not in bank_bytes(config_of(scope="global"), 1, "cpu")
    memory = MemoryConfig(virtual_shards=4, tier="hnsw", scope="global")
    config = config_of().model_copy(update={"memory": memory})
    assert "graphs" not in bank_bytes(config.model_copy(update={"memory": MemoryConfig(tier="hnsw")}), 1, "cpu")
    key = torch.randn(4000, 4)
    size = faiss.serialize_index(faiss_index.build_graph(key.numpy(), unwanted=lambda: False)).nbytes / 4000
    told = bank_bytes(config, 1, "cpu")["graphs"] / (48 * 2) - 4 * 4  # without the copies that graphs are made from
    assert 0.9 * size < told < 1.1 * size
