"""What a memory costs, how much of it is used, and how many items it can hold apart.

Every number is over all ranks of the model's group, and both functions are collectives: all ranks call them with the
same arguments. The model's banks are only read; what has to be written goes to forks that are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone, forward_batch
from lmcode.data.streams import StreamSampler
from lmcode.data.tokenizer import Tokenizer
from lmcode.memory import lifecycle
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import MASS_UNIT, METADATA, importance_of
from lmcode.model.mode import in_eval_mode
from lmcode.protocol import RecordingRetriever
from lmcode.report.sequences import as_documents, device_of, token_sequences

QUERIES = 256  # entries that are asked for at each point of the curve
STREAMS = 8  # windows that are read in one forward pass


def entry_columns(bank: LongTermMemory) -> dict[str, np.ndarray]:
    """The metadata of all live entries, the columns of `entry.METADATA` in id order, on every rank. A collective.

    Some 60 bytes an entry, so a bank of many millions is better described by `stats`.
    """
    live_M = bank.shard.live_M
    mine = {name: column[live_M] for name, column in bank.shard.columns.items()}
    parts = bank.inside.all_gather_object(mine)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in METADATA}
    order_E = np.argsort(whole["id"])
    return {name: column[order_E] for name, column in whole.items()}


def mass_share(mass_E: np.ndarray, top: float) -> float:
    """Share of all hit mass that went to the `top` share of entries that received most, at least one; nan without mass."""
    total = float(mass_E.sum())
    most = np.sort(mass_E)[::-1][:max(1, round(top * len(mass_E)))]
    return float(most.sum()) / total if total else float("nan")


def bank_bytes(bank: LongTermMemory) -> int:
    """Bytes of a whole bank over all ranks: keys, values, addends to scores and metadata."""
    row = bank.heads * 2 * bank.head_dim * bank.shard.key_HMD.element_size() + bank.shard.addend_M.element_size()
    return bank.slots * (row + sum(np.dtype(kind).itemsize for kind in METADATA.values()))


def near_duplicate_share(bank: LongTermMemory, threshold: float) -> float:
    """Share of the live entries that one round of consolidation would merge away, tried on a copy; nan if it is empty.

    Raises:
        ValueError: for a threshold outside (0, 2].
    """
    report = lifecycle.fork(bank, empty=False).consolidate(threshold)
    return report.merged / report.before if report.before else float("nan")


def compute_memory_efficiency(model: Backbone, *, thresholds: Sequence[float] = (0.1,)) -> dict[str, Any]:
    """What the memory costs and how well it is used. A collective.

    Args:
        thresholds: cosine distances at which near-duplicates are counted. Each takes a copy of a bank and time that grows
            with the square of a namespace's entries; () leaves them out.

    Returns:
        parameters, memory_parameters, memory_parameter_share: all weights, those of both memories (read, write, gate), and
            their share. Slots are state, not parameters.
        bank_bytes: over all layers and ranks.
        layers: for each layer with a bank: slots, entries, fill, evicted, merged, bank_bytes, never_hit_share (of the
            entries: written, never read), near_duplicate_share ({threshold: share of the entries that one round of
            consolidation would merge away}), top_1_percent_share and top_10_percent_share (of the attention that went to
            the entries read most), namespaces. Shares are nan in an empty bank.

    Raises:
        ValueError: for a threshold outside (0, 2].
    """
    counts = [(name, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]  # ds_numel: ZeRO-3
    total, memory = sum(n for _, n in counts), sum(n for name, n in counts if "_term" in name)
    return {"parameters": total, "memory_parameters": memory, "memory_parameter_share": memory / total,
            "bank_bytes": sum(bank_bytes(bank) for bank in model.banks.values()),
            "layers": {layer: _bank_efficiency(bank, thresholds) for layer, bank in model.banks.items()}}


def _bank_efficiency(bank: LongTermMemory, thresholds: Sequence[float]) -> dict[str, Any]:
    stats, columns = bank.stats(), entry_columns(bank)
    mass_E = columns["hit_mass"]
    never = float((mass_E == 0).mean()) if len(mass_E) else float("nan")
    return {"slots": stats["slots"], "entries": stats["live"], "fill": stats["fill"], "evicted": stats["evicted"],
            "merged": stats["merged"], "bank_bytes": bank_bytes(bank), "never_hit_share": never,
            "near_duplicate_share": {one: near_duplicate_share(bank, one) for one in thresholds},
            "top_1_percent_share": mass_share(mass_E, 0.01), "top_10_percent_share": mass_share(mass_E, 0.1),
            "namespaces": len(np.unique(columns["namespace"]))}


def attention_received(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Units of attention that each entry has received so far, fp64: 1 is the whole softmax of one token and head."""
    return columns["hit_mass"] / MASS_UNIT


class Items(NamedTuple):
    """Entries of some text beside the query that stands at each one's key. P positions, in reading order.

    key_HXD, value_HXD, query_HXD: fp32. importance_X: fp32. next_X: int64, the token after the key's.
    """

    key_HXD: Tensor
    value_HXD: Tensor
    query_HXD: Tensor
    importance_X: Tensor
    next_X: Tensor


@contextmanager
def quietly(model: Backbone) -> Any:
    """Without gradient and in evaluation mode; the mode it came in afterwards."""
    with in_eval_mode(model), torch.no_grad():
        yield


def read_items(model: Backbone, sequences: list[list[int]]) -> dict[int, Items]:
    """Reads the sequences, cut into windows that know nothing of each other, and collects each bank's items.

    Nothing is retrieved while reading, so an item does not depend on which others were stored before.
    """
    length, stride = model.config.context_length, model.config.retrieval_stride
    pieces = [one[start:start + length + 1] for one in sequences for start in range(0, len(one) - 1, length)]
    sampler = StreamSampler(as_documents(pieces), streams=min(STREAMS, len(pieces)), seed=0, epochs=1, shuffle=False,
                            sequence_length=min(length, max(map(len, pieces)) - 1))
    recorders = {layer: RecordingRetriever() for layer in model.banks}
    found: dict[int, list[Items]] = {layer: [] for layer in model.banks}
    with quietly(model), model.reading_from(recorders):
        for step in range(sampler.num_steps or 0):
            batch = sampler.batch(step).to(device_of(model))
            output = forward_batch(model, batch)
            for layer, recorder in recorders.items():
                found[layer].append(_items(model, batch, output.memory[layer].candidates, recorder.queries.pop(), stride))
    return {layer: Items(*(torch.cat(part, dim=0 if part[0].ndim == 1 else 1) for part in zip(*parts, strict=True)))
            for layer, parts in found.items()}


def _items(model: Backbone, batch: Any, candidates: Any, query_HND: Tensor, stride: int) -> Items:
    """Pairs each query with the candidate whose key stands at the token that asks; both are b-major."""
    B, T = batch.input_ids_BT.shape
    asks_X = torch.arange(query_HND.shape[1] // B) * stride - int(stride > 1)  # a chunk asks with the token before it
    entry_X = asks_X + model.config.successor_values
    kept_X = (asks_X >= 0) & (entry_X < T)
    asks_X, entry_X = asks_X[kept_X], entry_X[kept_X]
    rows_BX = torch.arange(B)[:, None] * T
    query_BX = (torch.arange(B)[:, None] * len(kept_X) + kept_X.nonzero().squeeze(1)).to(query_HND.device)
    at_N = (rows_BX + entry_X).flatten().to(query_HND.device)
    valid_N = candidates.valid_N[at_N]
    at_X, query_X = at_N[valid_N], query_BX.flatten()[valid_N]
    importance_X = torch.from_numpy(importance_of(candidates.surprise_N[at_X].cpu().numpy()))
    next_X = batch.targets_BT.flatten()[(rows_BX + asks_X).flatten().to(query_HND.device)[valid_N]]
    return Items(candidates.key_HND[:, at_X].float(), candidates.value_HND[:, at_X].float(), query_HND[:, query_X].float(),
                 importance_X, next_X)


def analyze_memory_capacity(model: Backbone, test_sequences: Iterable[Any], *, sizes: Sequence[int] | None = None,
                            slots: int | None = None, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Recall against the number of stored items, for each bank. A collective; the model's banks are left alone.

    The sequences are read once, in windows of at most `context_length` tokens; every token gives one item, the key that
    would be stored there, and the query that the model asks there. The first n items are written to an empty fork and up to
    256 of them, evenly spread, are asked for among *all* items stored, whatever the bank's scope. Items that the fork had
    to evict count as not found, so the curve bends where the bank is full.

    Args:
        test_sequences: see `token_sequences`; more text gives a longer curve.
        sizes: numbers of items; powers of two from 64 up to what the text gives, and all of it, when None.
        slots: of the fork; the bank's own number when None.
        tokenizer: for texts; the model's own when None.

    Returns:
        top_k, slots, and layers: for each layer lists of equal length: stored, live (items still there), recall_at_1 (share
        of the items asked for that came back first, mean over heads), recall_at_k (among the best top_k) and next_at_1
        (share of the first hits that were followed by the right token, be it another item).

    Raises:
        ValueError: a model without a bank; sequences that do not fit (see `token_sequences`); sizes out of range.
    """
    if not model.banks:
        raise ValueError("the model has no bank whose capacity could be measured: long_term_memory_slots is 0")
    items = read_items(model, token_sequences(model, test_sequences, tokenizer=tokenizer))
    bank, total = next(iter(model.banks.values())), len(next(iter(items.values())).next_X)
    if not total:
        raise ValueError("the sequences are too short: no token of theirs has a successor to store")
    sizes = default_sizes(total) if sizes is None else sorted(set(sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] > total:
        raise ValueError(f"sizes must lie in 1..{total}, the number of items in these sequences: got {list(sizes)}")
    return {"top_k": bank.top_k, "slots": bank.slots if slots is None else slots,
            "layers": {layer: _curve(model.banks[layer], one, sizes, slots) for layer, one in items.items()}}


def default_sizes(total: int) -> list[int]:
    """64, 128, ... below `total`, and `total` itself."""
    return [size for size in (2**power for power in range(6, 40)) if size < total] + [total]


def _curve(bank: LongTermMemory, items: Items, sizes: Sequence[int], slots: int | None) -> dict[str, list[float]]:
    fork, id_X = lifecycle.fork(bank, empty=True, slots=slots), torch.empty(0, dtype=torch.int64)
    curve: dict[str, list[float]] = {"stored": [], "live": [], "recall_at_1": [], "recall_at_k": [], "next_at_1": []}
    for size in sizes:
        new = slice(len(id_X), size)
        id_E = fork.write(items.key_HXD[:, new], items.value_HXD[:, new], torch.zeros(size - len(id_X), dtype=torch.int64),
                          items.importance_X[new])
        id_X = torch.cat([id_X, id_E])
        asked_N = torch.linspace(0, size - 1, min(QUERIES, size)).round().long()
        hits = fork.search(items.query_HXD[:, asked_N], torch.zeros(len(asked_N), dtype=torch.int64), scope="global")
        found_HNK = hits.id_HNK.cpu() == id_X[asked_N][None, :, None]
        # Ids count up from 0 in the order of writing, rejected ones included, so an id is also the item's position.
        next_HN = items.next_X.cpu()[hits.id_HNK[..., 0].cpu().clamp(min=0)]
        right_HN = (next_HN == items.next_X.cpu()[asked_N]) & hits.valid_HNK[..., 0].cpu()
        row = {"stored": size, "live": fork.stats()["live"], "recall_at_1": float(found_HNK[..., 0].float().mean()),
               "recall_at_k": float(found_HNK.any(-1).float().mean()), "next_at_1": float(right_HN.float().mean())}
        for name, value in row.items():
            curve[name].append(value)
    return curve
