"""Banks that are full, so that whatever is written evicts somebody: of random entries, in documents of one length."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lmcode.memory.bank import LongTermMemory

DOCUMENT = 2048  # entries of one namespace
AT_ONCE = 50_000


def fill(bank: LongTermMemory, *, seed: int, aging: bool = False) -> None:
    """Writes entries until no slot is free, into the namespaces 0, 1 and so on, of an importance that surprise could have
    given them, 0.5 to 1.5. Collective.

    Virtual shards are of equal size, their shares of the ids are not: the last free slots take more entries than slots.

    Args:
        aging: a document is written in each step, 0, 1 and so on, instead of all in step 0.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 0
    while bank.stats()["live"] < bank.slots:
        key_HED = F.normalize(torch.randn(bank.heads, AT_ONCE, bank.head_dim, generator=generator), dim=-1)
        importance_E = 0.5 + torch.rand(AT_ONCE, generator=generator)
        bank.write(key_HED, key_HED, (count + torch.arange(AT_ONCE)) // DOCUMENT, importance_E,
                   step=count // DOCUMENT if aging else 0)
        count += AT_ONCE
