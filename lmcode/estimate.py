"""What a run will need before it runs: memory of a rank, bytes it receives per step, size of a checkpoint.

Memory traffic and checkpoint sizes are computed from shapes and are right to a few per cent. The memory of a rank is an
upper estimate of what is allocated at the peak of a step, plus what any process of a run needs; tools/estimate_check.py
compares it with real runs. In formulas: R ranks, G of them in a memory group, N queries of a rank, C model width, H, D, K,
T, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lmcode.backbone_config import read_sizes, recipe_of
from lmcode.config import RunConfig
from lmcode.processor import BF16_IS_SLOW

Device = Literal["cpu", "gpu"]
GIB = 2**30
MIB = 2**20
# What a process has beyond the parts below. CPU: taken from runs (tools/estimate_check.py); importing everything is 264 MiB
# of it, the rest belongs to DeepSpeed, gloo and the allocator. GPU: a CUDA context and NCCL, not measured.
BASE_BYTES = {"cpu": 450 * MIB, "gpu": 1200 * MIB}
FAISS_GPU_BYTES = 256 * MIB  # the limit that memory/search/faiss_index.py sets
NODE_BYTES = 4 + 8 + 4 * 33  # of a graph, beside the key: how many levels, where its neighbours are, 33 of them on average
COLUMN_BYTES = 61  # of one slot's metadata: seven int64, one fp32, one bool
ADDEND_BYTES = 4  # of one slot's addend to its scores
FACT_BYTES = 24  # what is known of a candidate: its namespace, its document and its surprise
CUT_BYTES = 16  # per query and head, memory.exchange = all_to_all
HIT_BYTES = 12  # score and id
ROOM = 0.9  # share of the memory that a run may plan to use
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Estimate:
    """Everything in bytes; `memory` and `traffic` are those of the costliest rank.

    memory: by purpose, where the rank computes. host_memory: the same for what a rank on a GPU keeps on its host.
    traffic: received per optimizer step, by phase; the "zero ..." phases are DeepSpeed's and follow the formulas of
        Rajbhandari et al. 2020 (section 7), the others are what `lmcode.dist.Group` counts.
    checkpoint: by part.
    warnings: what will not fit, or only just; and bf16 on a processor that emulates it.
    """

    ranks: int
    device: str
    zero_stage: int
    parameters: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    traffic: dict[str, int]
    checkpoint: dict[str, int]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the sums of the parts."""
        sums = {f"{name}_total": sum(getattr(self, name).values())
                for name in ("memory", "host_memory", "traffic", "checkpoint")}
        return {**asdict(self), **sums}


def estimate(config: RunConfig, world_size: int, *, device: Device = "cpu", memory_bytes: int | None = None,
             ranks_per_host: int | None = None, has_bf16: bool | None = None) -> Estimate:
    """Adds up a run of `config` on `world_size` ranks.

    Args:
        memory_bytes: of the host (cpu) or of one GPU, to warn about; None warns about nothing.
        ranks_per_host: ranks that share a host's memory; all of them when None.
        has_bf16: whether the processor multiplies bf16; None says nothing about it.

    Raises:
        ConfigError: settings that cannot work on this number of ranks.
    """
    from lmcode.train.ds_config import resolve

    zero = resolve(config, world_size)["zero_optimization"]
    parameters, trained = count_parameters(config), count_trained(config)
    states, on_host = zero_bytes(config, world_size, zero, parameters, trained, device)
    memory = {"process": BASE_BYTES[device], **states, **step_bytes(config, world_size),
              **bank_bytes(config, world_size, device)}
    # Rank 0 gathers the weights, and every rank its part of the moments, on the host before they are written.
    (memory if device == "cpu" else on_host)["saving"] = 4 * trained + math.ceil(8 * trained / world_size)
    sharing = 1 if device == "gpu" else (ranks_per_host or world_size)
    emulated = device == "cpu" and config.train.precision == "bf16" and has_bf16 is False
    slow = [f"train.precision = bf16, and {BF16_IS_SLOW}"] if emulated else []
    return Estimate(world_size, device, zero["stage"], parameters, memory, on_host,
                    traffic_bytes(config, world_size, zero["stage"], parameters, trained),
                    checkpoint_bytes(config, trained),
                    (*fit_warnings(sum(memory.values()), memory_bytes, sharing, device), *slow))


def count_parameters(config: RunConfig) -> int:
    """The model's parameters, counted on a model without memory; those of a backbone by its config.json."""
    if config.model.recipe is not None:
        return sum(backbone_parameters(config))
    import torch

    from lmcode.model.lm import MemoryLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MemoryLM(config.model).parameters())


def backbone_parameters(config: RunConfig) -> tuple[int, int]:
    """The parameters of a backbone of transformers, and those of its recipe."""
    from lmcode.recipes.attached import count_parameters as count

    return count(config.model)


def count_trained(config: RunConfig) -> int:
    """The parameters that have gradients and an optimizer: all, but for those of a frozen backbone."""
    if config.model.recipe is None or config.model.train_backbone:
        return count_parameters(config)
    return backbone_parameters(config)[1]


def zero_bytes(config: RunConfig, R: int, zero: Mapping[str, Any], parameters: int, trained: int,
               device: Device) -> tuple[dict[str, int], dict[str, int]]:
    """Weights, gradients and optimizer of one rank under ZeRO, and the part of them that is offloaded to the host.

    Rajbhandari et al. 2020: stage 1 divides the optimizer by R, stage 2 the gradients as well, stage 3 everything. With
    ZeRO an fp32 copy of the weights belongs to the optimizer, even where the weights are fp32.
    """
    b, stage = BYTES[config.train.precision], zero["stage"]
    def part(of: int, from_stage: int) -> int:
        return math.ceil(of / R) if stage >= from_stage else of

    master = 4 * trained if stage or b == 2 else 0
    buckets = min(zero.get("reduce_bucket_size", 0), trained if device == "cpu" else 2**62) * b
    states = {"weights": part(b * parameters, 3), "gradients": part(b * trained, 2),
              "optimizer": part(8 * trained + master, 1), "ZeRO buffers": buckets}
    if stage == 3:  # what is gathered around a layer's work: the embedding is the largest
        states["ZeRO buffers"] += 2 * b * config.model.vocab_size * config.model.hidden_size
    moved = [name for key, name in (("offload_optimizer", "optimizer"), ("offload_param", "weights"))
             if device == "gpu" and zero.get(key, {}).get("device") == "cpu"]
    return {name: size for name, size in states.items() if name not in moved}, {name: states[name] for name in moved}


def streams_per_rank(config: RunConfig, R: int) -> int:
    """Streams of one micro-batch on one rank."""
    return config.train.streams // (R * config.train.gradient_accumulation_steps)


def queries_per_rank(config: RunConfig, R: int) -> int:
    """N: reads of one micro-batch on one rank, for each head."""
    shared = 1  # query heads of a token that ask the same memory head
    if config.model.recipe is not None and recipe_of(config.model.recipe).joins_attention:
        shared = config.model.num_heads // config.model.memory_heads
    return shared * streams_per_rank(config, R) * math.ceil(config.train.sequence_length / config.model.retrieval_stride)


def step_bytes(config: RunConfig, R: int) -> dict[str, int]:
    """Activations of one micro-batch at the end of the forward pass, and the logits with what their loss needs."""
    model, b = config.model, BYTES[config.train.precision]
    B, T, C = streams_per_rank(config, R), config.train.sequence_length, model.hidden_size
    inner = model.feed_forward_size or 4 * C
    # Saved per token: inputs and outputs of four norms, q, k, v before and after rotation, what enters each projection.
    per_token = 16 * C + 2 * inner
    if model.short_term_memory_size:
        per_token += 2 * C + 5 * model.short_term_dim + 3 * model.short_term_memory_size
    layer = B * T * per_token * b
    layer += B * model.cache_tokens * 7 * C * b  # of a cache of former windows: itself, before and after; q, k, v, k turned
    own_past = 3 * model.memory_heads * B * T * T * 4 + 12 * B * T * model.memory_heads * model.memory_head_dim * 4
    reads = len(model.memory_layer_indices)
    if config.train.activation_checkpointing:
        activations = model.num_layers * B * T * C * b + layer + own_past
    else:
        activations = model.num_layers * layer + reads * own_past
    # Logits, their log-softmax in fp32, and both gradients.
    return {"activations": activations, "logits": B * T * model.vocab_size * (2 * b + 8)}


def bank_bytes(config: RunConfig, R: int, device: Device) -> dict[str, int]:
    """The rank's shard of every bank, the banks of an evaluation, and one layer's search."""
    model, memory = config.model, config.memory
    layers = len(model.memory_layer_indices) if model.long_term_memory_slots else 0
    if not layers:
        return {}
    H, D, K, N = model.memory_heads, model.memory_head_dim, model.memory_top_k, queries_per_rank(config, R)
    G = memory.ranks_per_group(R)
    slot = H * 2 * D * BYTES[memory.dtype] + ADDEND_BYTES + COLUMN_BYTES
    slots, evaluation = (slots_per_rank(config, R, count) for count in
                         (model.long_term_memory_slots, config.eval.slots or model.long_term_memory_slots))
    lists = G * N * H * K * (HIT_BYTES + 8) * 2 + (G * G * N * H * K * HIT_BYTES * 2 if G > 1 else 0)
    queries = 3 * G * N * H * D * 4
    rows = H * D * 4 * slots  # a copy of the rows that a group of queries sees; in fp32
    faiss = FAISS_GPU_BYTES if device == "gpu" and memory.tier != "exact" else 0
    # Each graph has a copy of its keys in fp32, and is made from another one.
    graphs = layers * slots * H * (2 * D * 4 + NODE_BYTES) if memory.tier == "hnsw" and memory.scope == "global" else 0
    return {"bank": layers * slots * slot, "evaluation's bank": layers * evaluation * slot,
            **({"graphs": graphs} if graphs else {}),
            "search": queries + lists + (rows if memory.scope == "global" else 0) + faiss}


def slots_per_rank(config: RunConfig, R: int, slots: int) -> int:
    """Most slots that a rank holds of a bank of `slots`: a memory group of G ranks has them all."""
    shards = config.memory.virtual_shards
    return math.ceil(slots * math.ceil(shards / config.memory.ranks_per_group(R)) / shards)


def search_traffic(config: RunConfig, G: int, N: int) -> dict[str, int]:
    """Bytes that one rank receives for one search of one layer with N queries per rank: phases 1 and 3."""
    model = config.model
    H, D, K = model.memory_heads, model.memory_head_dim, model.memory_top_k
    lists = G * N * H * K * HIT_BYTES
    switched = N * H * (K * HIT_BYTES + CUT_BYTES)
    hits = {"all_gather": lists, "all_to_all": switched, "auto": min(lists, switched)}[config.memory.exchange]
    names = 8 if config.memory.scope == "document" else 16  # a namespace, and where others can be seen a document
    return {"queries": (G - 1) * N * (H * D * 4 + names), "hits": (G - 1) * hits}


def traffic_bytes(config: RunConfig, R: int, stage: int, parameters: int, trained: int) -> dict[str, int]:
    """Bytes that one rank receives per optimizer step, by phase."""
    model, memory, train = config.model, config.memory, config.train
    N, H, D, K = queries_per_rank(config, R), model.memory_heads, model.memory_head_dim, model.memory_top_k
    layers, micro = len(model.memory_layer_indices), train.gradient_accumulation_steps
    traffic: dict[str, int] = {}
    G = memory.ranks_per_group(R)
    if model.long_term_memory_slots and R > 1:
        offered = micro * streams_per_rank(config, R) * train.sequence_length
        share = {"all": 1.0, "every_nth": 1 / memory.write_every, "surprise": memory.write_share}[memory.write]
        sums = memory.fetch == "sums"
        once = {**search_traffic(config, G, N),
                "values": (G - 1) * N * H * (D if sums else 2 * D * K) * 4,
                "gradients": (G - 1) * N * H * (2 * D + 2) * 4 if sums else 0,
                "writes": (G - 1) * N * H * 4}  # the attention that each query paid
        traffic = {phase: layers * micro * size for phase, size in once.items()}
        vectors = math.ceil(share * offered) * 2 * H * D * BYTES[memory.dtype]
        # Between memory groups the hits of every slot that won are added up, 16 bytes each.
        won = min(slots_per_rank(config, R, model.long_term_memory_slots), micro * N * H * K)
        counted = (R // G - 1) * (8 + 16 * won) if G < R else 0
        traffic["writes"] += layers * ((R - 1) * (8 + offered * FACT_BYTES) + (R - 1) * vectors // G + counted)
        # A logged step measures recall on a sample: one search as it is, one exact.
        sample = math.ceil(min(memory.recall_queries, N * R) / R)
        traffic["recall"] = 2 * layers * sum(search_traffic(config, G, sample).values()) // train.log_every
    b, share_X = BYTES[train.precision], (R - 1) / R
    # Up to stage 2 gradients are all-reduced (by default stages 1 and 2, too, reduce buckets of several owners so), and from
    # stage 1 on owners send weights back; 3: weights twice and gradients once.
    passes = {"zero gradients": (1 if stage == 3 else 2) * micro,
              "zero weights": {0: 0, 1: 1, 2: 1, 3: 2 * micro}[stage]}
    if stage < 2:
        passes["zero gradients"] //= micro
    moved = {"zero gradients": trained, "zero weights": parameters if stage == 3 else trained}
    return {**traffic, **{name: int(count * share_X * moved[name] * b) for name, count in passes.items()}} if R > 1 else {}


def checkpoint_bytes(config: RunConfig, parameters: int) -> dict[str, int]:
    """Files of one checkpoint: fp32 weights, two moments, every bank in whole, what streams carry. The same for any R."""
    model = config.model
    layers = len(model.memory_layer_indices)
    slot = 2 * model.memory_heads * model.memory_head_dim * BYTES[config.memory.dtype] + COLUMN_BYTES
    row = 0  # of a backbone: sinks and cache
    if model.recipe is not None:
        sizes, options = read_sizes(model.backbone), model.recipe_options
        row = 2 * model.num_layers * sizes["kv_heads"] * sizes["head_dim"] * (options["sinks"] + options["cache"])
    carried = (row + model.num_layers * model.short_term_memory_size * model.short_term_dim
               + layers * model.memory_heads * model.memory_head_dim
               + model.num_layers * model.cache_tokens * model.hidden_size * BYTES[config.train.precision] // 4)
    return {"weights": 4 * parameters, "optimizer": 8 * parameters,
            "banks": layers * model.long_term_memory_slots * slot, "streams": 4 * config.train.streams * carried}


def fit_warnings(rank_bytes: int, memory_bytes: int | None, sharing: int, device: Device) -> list[str]:
    """What to say about `sharing` ranks in `memory_bytes`: nothing if they fit with a tenth to spare."""
    if memory_bytes is None or sharing * rank_bytes <= ROOM * memory_bytes:
        return []
    place = "a GPU" if device == "gpu" else f"a host for {sharing} rank{'s' * (sharing > 1)}"
    verdict = "will not fit" if sharing * rank_bytes > memory_bytes else "may not fit"
    return [f"{verdict}: {sharing * rank_bytes / GIB:.1f} GiB into {memory_bytes / GIB:.1f} GiB of {place}; what helps: "
            "more ranks or hosts, fewer streams or more gradient_accumulation_steps, activation_checkpointing, zero3 or "
            "zero3_offload, memory.dtype=bf16, fewer slots, a smaller eval.slots"]


def this_machine(device: Device | None = None) -> tuple[Device, int | None]:
    """Where ranks would compute here, and the memory of that; for a device that is not here the memory is unknown."""
    import psutil
    import torch

    here: Device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "gpu" or (device is None and here == "gpu"):
        return "gpu", torch.cuda.get_device_properties(0).total_memory if here == "gpu" else None
    return "cpu", psutil.virtual_memory().total


def to_table(made: Estimate) -> str:
    """Aligned text: memory, traffic, checkpoint, warnings."""
    lines = [f"{made.parameters:,} parameters, {made.ranks} rank{'s' * (made.ranks > 1)} on {made.device}, "
             f"ZeRO stage {made.zero_stage}"]
    for title, parts in (("memory of a rank", made.memory), ("on the host of its GPU", made.host_memory),
                         ("received per rank and step", made.traffic), ("checkpoint", made.checkpoint)):
        if parts:
            lines += ["", f"{title:<28}{sum(parts.values()) / MIB:>12,.1f} MiB"]
            lines += [f"  {name:<26}{size / MIB:>12,.1f}" for name, size in parts.items()]
    return "\n".join([*lines, *(f"\nwarning: {text}" for text in made.warnings)])
