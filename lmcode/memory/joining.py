"""Merging at commit (`memory.merge_above`): a newcomer that joins an entry instead of taking a slot, over all ranks.

A newcomer whose keys are more similar than `merge_above` to those of the nearest entry of its own text (the mean cosine over
heads, as in `consolidate`) becomes part of that entry: vectors are count-weighted running means, counts add up, and the
entry is as old as its last part. Newcomers are compared with what was there before them, not with each other; several that
join one entry do so by ascending id. So nothing depends on the number of ranks.
With `memory.merge_keep=newest` an entry takes the vectors of the newcomer that joins it, so that what was said last about a
key is what is found; candidates that a later one of their text and step says anew (`superseded`) are not offered at all.
Letters: E newcomers that this rank is to hold, or candidates; N a block of them; X those that join an entry, here or where
they arrive, or what a block is compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory.consolidate import BLOCK, pack_columns, unit_keys
from lmcode.memory.entry import Entries
from lmcode.memory.placement import holder_of
from lmcode.memory.rounds import nearest_two
from lmcode.memory.shard import Shard
from lmcode.memory.views import runs


@torch.no_grad()
def join_nearest(entries: Entries, shard: Shard, group: Group, *, above: float, tier: str) -> Entries:
    """Merges newcomers into entries of the bank; returns those of this rank that join none. Collective.

    Args:
        entries: at least those that this rank is to hold, each with its id.
        group: the ranks of a memory group.
        above: the similarity from which on they join, in (0, 1).
        tier: of the search for neighbours.
    """
    entries = entries.take(np.flatnonzero(holder_of(entries.id_E, shard.config.virtual_shards, group.size) == group.rank))
    nearest_E, similarity_E = _nearest(entries, shard, group, tier)
    joins_E = (nearest_E >= 0) & (similarity_E > above)
    chosen, ranks = np.flatnonzero(joins_E), group.size
    to_E = holder_of(nearest_E[chosen], shard.config.virtual_shards, ranks)
    order = np.argsort(to_E, kind="stable")
    chosen = chosen[order]
    sent = np.bincount(to_E, minlength=ranks)
    all_sent = group.all_gather(torch.from_numpy(sent)[None].to(shard.device), phase="writes").cpu().numpy()  # [from, to]
    counts = sent.tolist(), all_sent[:, group.rank].tolist()
    facts = [nearest_E[chosen], entries.id_E[chosen], entries.step_E[chosen]]
    facts_X8 = np.concatenate([np.stack(facts, axis=1), pack_columns(entries.metadata(), chosen)], axis=1)
    rows = torch.from_numpy(chosen).to(shard.device)
    vector_X2HD = torch.stack([entries.key_EHD[rows], entries.value_EHD[rows]], dim=1).float()
    arrived = [group.all_to_all_rows(part, *counts, phase="writes")
               for part in (vector_X2HD, torch.from_numpy(facts_X8).to(shard.device))]
    _take_in(shard, arrived[0], arrived[1].cpu().numpy())
    return entries.take(np.flatnonzero(~joins_E))


def superseded(key_EHD: Tensor, text_E2: np.ndarray, *, above: float) -> np.ndarray:
    """Rows with a later row of the same text whose keys are more similar than `above`, bool [E].

    Args:
        text_E2: namespace and document of each row.
    """
    order_E = np.lexsort((text_E2[:, 1], text_E2[:, 0]))  # stable: within a text, the rows keep their order
    unit_ED = unit_keys(key_EHD.transpose(0, 1))
    gone_E = np.zeros(len(order_E), dtype=bool)
    for start, end, _ in zip(*runs(text_E2[order_E]), strict=True):
        rows_ED = unit_ED[torch.from_numpy(order_E[start:end]).to(unit_ED.device)]
        for first in range(0, end - start, BLOCK):  # a text may have too many rows for all pairs at once
            mean_NX = rows_ED[first:first + BLOCK] @ rows_ED[first:].T / key_EHD.shape[1]
            gone_E[order_E[start + first:min(end, start + first + BLOCK)]] = (mean_NX > above).triu(1).any(1).cpu().numpy()
    return gone_E


def _nearest(entries: Entries, shard: Shard, group: Group, tier: str) -> tuple[np.ndarray, np.ndarray]:
    """The nearest entry of its text for each newcomer, -1 where there is none, and the mean cosine of their keys, fp64."""
    E, device = len(entries.id_E), shard.device
    most = max(1, *group.all_gather_int(E, phase="writes", device=device))
    unit_ED = unit_keys(entries.key_EHD.transpose(0, 1)).to(device)
    text_E2 = torch.from_numpy(np.stack([entries.namespace_E, entries.document_E], axis=1)).to(device)
    score_E2, other_E2 = nearest_two(shard, group, unit_ED, text_E2, most=most, tier=tier)
    return other_E2[:, 0].cpu().numpy(), score_E2[:, 0].double().cpu().numpy() / shard.key_HMD.shape[0]


def _take_in(shard: Shard, vector_X2HD: Tensor, facts_X8: np.ndarray) -> None:
    """Merges what has arrived into entries that lie here: the first of each entry together, then the second, and so on."""
    order = np.lexsort((facts_X8[:, 1], facts_X8[:, 0]))
    survivor_X, step_X = facts_X8[order, 0], facts_X8[order, 2]
    starts = np.flatnonzero(np.append(True, survivor_X[1:] != survivor_X[:-1])[:len(survivor_X)])
    place_X = np.arange(len(survivor_X)) - np.repeat(starts, np.diff(np.append(starts, len(survivor_X))))
    for turn in range(int(place_X.max(initial=-1)) + 1):
        now = np.flatnonzero(place_X == turn)
        rows = torch.from_numpy(order[now]).to(vector_X2HD.device)
        shard.absorb(survivor_X[now], vector_X2HD[rows], torch.from_numpy(facts_X8[order[now], 3:]).to(vector_X2HD.device),
                     replace=shard.config.newest_above is not None)
        shard.ledger.update(shard.slots_of_ids(survivor_X[now]), {"step": step_X[now]})
