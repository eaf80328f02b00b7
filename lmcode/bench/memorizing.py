"""The package memorizing-transformers-pytorch as a peer of a training step, where it is installed; its one importer.

Its model gets the same sizes, batches, optimizer and memory layers, and as many memories as the bank has slots, in an index
for each stream that is emptied when a document begins, or when it is full. Ranks average gradients and share no memory. It
has no short-term memory, one key and value for all heads, and sees no border between documents in a window.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.bench.turns import timed
from lmcode.config import RunConfig
from lmcode.data.corpus import Documents
from lmcode.data.replay import make_sampler
from lmcode.data.streams import IGNORED, PassStart
from lmcode.dist import Group

NAME = "memorizing-transformers-pytorch"
_MODULE = NAME.replace("-", "_")


def missing() -> str:
    """Why the package is no peer here; empty if it is one."""
    try:
        importlib.import_module(_MODULE)
    except ImportError as error:  # it is not there, or lacks another package
        return f"left out: {error}"
    return ""


class Memorizing:
    """Its model in training, on one of the ranks of a group.

    Args:
        folder: for its files of keys and values, one folder for each rank.
    """

    def __init__(self, config: RunConfig, documents: Documents, group: Group, folder: Path) -> None:
        from memorizing_transformers_pytorch import MemorizingTransformer

        shape, train = config.model, config.train
        torch.manual_seed(train.seed)
        self._group, self._clip, self._step = group, train.gradient_clip, 0
        self._sampler = make_sampler(config, documents, None, data_pass=PassStart())
        streams = train.streams // group.size
        self._model: Any = MemorizingTransformer(
            num_tokens=shape.vocab_size, dim=shape.hidden_size, depth=shape.num_layers, heads=shape.num_heads,
            dim_head=shape.hidden_size // shape.num_heads, num_retrieved_memories=shape.memory_top_k, pad_id=IGNORED,
            memorizing_layers=tuple(layer + 1 for layer in shape.memory_layer_indices),
            max_knn_memories=max(1, shape.long_term_memory_slots // train.streams), knn_memories_directory=str(folder))
        self._memories = self._model.create_knn_memories(batch_size=streams)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=train.learning_rate, betas=train.betas,
                                            weight_decay=train.weight_decay)

    @property
    def weights(self) -> int:
        """How many its model has."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def turn(self, steps: int) -> dict[str, float]:
        """Some steps: tokens of all ranks, seconds on the wall and of the processor. Collective."""
        coming = range(self._step, self._step + steps)
        self._step += steps
        self._group.barrier()

        def train() -> None:
            for step in coming:
                self._update(step)

        spent = timed(train)
        return {"tokens": float(sum(map(self._sampler.global_tokens, coming))), "wall": spent.wall, "cpu": spent.cpu}

    def _update(self, step: int) -> None:
        batch = self._sampler.batch(step, rank=self._group.rank, world_size=self._group.size)
        self._memories.clear_memory(batch.reset_B.nonzero().flatten().tolist())
        loss: Tensor = self._model(batch.input_ids_BT, knn_memories=self._memories, labels=batch.targets_BT)
        self._optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        mean = self._group.all_reduce(torch.cat([one.flatten() for one in gradients]), phase="gradients") / self._group.size
        for one, part in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
            one.copy_(part.view_as(one))
        if self._clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
