"""Whether what a recipe trains learns to read its memory: a small backbone, texts that repeat themselves far away.

    python tools/longmem_gain.py [--recipe longmem] [--seeds 0 1 2] [--text 'FOLDER/*.py'] [--backbone-steps N] [--steps N]

A small Llama is trained on single windows and frozen. The same part (the side network of longmem, the read of lmcode), from
the same start and on the same texts, is trained with its memory and without. A text has some windows that are only read,
then those that are learned from. Scored are the latter in fresh texts, nats per token. A line is printed as soon as it is
known.

Without `--text`, texts are random symbols: three windows, then the same three again; what repeats lies 96 tokens back, where
neither the window (32) nor the cache (8) reaches, and within a window nothing does; the backbone has learned to copy within
a window. To guess blindly costs log 64 = 4.159. With it, texts are excerpts of 16 windows of 64 tokens, of which all but the
first four are scored; those that are scored are of documents that neither the backbone nor the recipe was trained on.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lmcode.config import DataConfig
from lmcode.data.corpus import Documents, prepare_corpus
from lmcode.recipes.attach import attach

STREAMS, SCORED = 16, 32  # texts of a training step; fresh texts that are scored


class Texts(Protocol):
    """Where texts come from. first: windows that are only read. width: of the backbone. distance: at which longmem reads
    what it finds, one that the backbone has learned from."""

    vocab: int
    window: int
    cache: int
    first: int
    width: int
    distance: int

    def batch(self, count: int, *, fresh: bool = False) -> Tensor:
        """Ids [count, T] of whole texts, drawn by torch's generator."""

    def windows(self, count: int) -> Tensor:
        """Ids [count, T] for the backbone to learn from."""


class Symbols:
    """Random symbols, said twice."""

    vocab, window, cache, first, width, distance = 64, 32, 8, 3, 64, 16

    def batch(self, count: int, *, fresh: bool = False) -> Tensor:
        half_BT = torch.randint(0, self.vocab, (count, self.first * self.window))
        return torch.cat([half_BT, half_BT], dim=1)

    def windows(self, count: int) -> Tensor:
        half_BT = torch.randint(0, self.vocab, (count, self.window // 2))
        return torch.cat([half_BT, half_BT], dim=1)


class Excerpts:
    """Pieces of documents."""

    vocab, window, cache, first, width, distance, length = 1024, 64, 16, 4, 128, 64, 16 * 64

    def __init__(self, path: str, folder: Path) -> None:
        corpus = prepare_corpus(DataConfig(path=path, tokenizer="bpe"), vocab_size=self.vocab, folder=folder)
        self.corpus = corpus

    def batch(self, count: int, *, fresh: bool = False) -> Tensor:
        return self._cut(self.corpus.held_out if fresh else self.corpus.train, count, self.length)

    def windows(self, count: int) -> Tensor:
        return self._cut(self.corpus.train, count, 2 * self.window)

    @staticmethod
    def _cut(documents: Documents, count: int, length: int) -> Tensor:
        long = np.flatnonzero(np.diff(documents.offsets) >= length)
        rows = []
        for at in long[torch.randint(0, len(long), (count,)).numpy()]:
            tokens = documents.document(int(at))
            start = int(torch.randint(0, len(tokens) - length + 1, ()))
            rows.append(torch.from_numpy(tokens[start:start + length].astype(np.int64)))
        return torch.stack(rows)


def trained_backbone(texts: Texts, seed: int, steps: int) -> Any:
    """A model that has learned from single windows."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=texts.vocab, hidden_size=texts.width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=2 * texts.width, max_position_embeddings=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        ids_BT = texts.windows(64)
        loss = model(ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"seed {seed}: backbone, step {step}: {float(loss.detach()):.3f}", flush=True)
    return model.eval()


def read(model: Any, texts: Texts, ids_BT: Tensor, *, optimizer: Any = None, memory: bool, namespace: int) -> float:
    """Reads texts window by window, in namespaces from this one on: the mean loss of the windows behind the first ones. With
    an optimizer each of those is a training step."""
    backbone, state, losses, window = model.lmcode, None, [], texts.window
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -100)], dim=1)
    namespace_B = torch.arange(namespace, namespace + len(ids_BT))
    with backbone.reading_from(backbone.banks if memory else {}):
        for number, start in enumerate(range(0, ids_BT.shape[1], window)):
            part, counts = slice(start, start + window), number >= texts.first
            with torch.set_grad_enabled(optimizer is not None and counts):
                output = backbone(ids_BT[:, part], targets_BT=targets_BT[:, part], state=state, namespace_B=namespace_B)
            state = output.state
            if counts:
                losses.append(float(output.loss.detach()))
                if optimizer is not None:
                    optimizer.zero_grad()
                    output.loss.backward()
                    optimizer.step()
            if memory:
                backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=start)
    return sum(losses) / len(losses)


def fresh_loss(model: Any, texts: Texts, *, memory: bool) -> float:
    """The loss on texts that no training has seen, the same for every model."""
    with torch.random.fork_rng():
        torch.manual_seed(10**6)
        ids_BT = texts.batch(SCORED, fresh=True)
    model.lmcode.eval()
    return read(model, texts, ids_BT, memory=memory, namespace=10**9)


def run(texts: Texts, recipe: str, seed: int, backbone_steps: int, steps: int) -> None:
    """One backbone, and what the recipe trains, with memory and without."""
    backbone = trained_backbone(texts, seed, backbone_steps)
    options = {"distance": texts.distance} if recipe == "longmem" else {}
    for memory, kind in ((True, "with"), (False, "without")):
        torch.manual_seed(seed)
        model = attach(copy.deepcopy(backbone), recipe, sinks=0, cache=texts.cache, long_term_memory_slots=4096,
                       memory={"virtual_shards": 4}, **options)
        optimizer = torch.optim.AdamW(model.lmcode.recipe.parameters(), lr=1e-3)
        if memory:
            print(f"seed {seed}: frozen backbone {fresh_loss(model, texts, memory=False):.3f}", flush=True)
        torch.manual_seed(seed + 1)
        started = time.monotonic()
        for step in range(steps):
            model.lmcode.train()
            loss = read(model, texts, texts.batch(STREAMS), optimizer=optimizer, memory=memory, namespace=step * STREAMS)
            if step % 25 == 24:
                print(f"seed {seed}: {kind} memory, {step + 1} batches: {loss:.3f} in training, "
                      f"{time.monotonic() - started:.0f} s", flush=True)
        print(f"seed {seed}: trained {kind} memory: {fresh_loss(model, texts, memory=memory):.3f}", flush=True)
        if memory:
            off = fresh_loss(model, texts, memory=False)
            print(f"seed {seed}: the same, its memory switched off: {off:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("longmem", "lmcode"), default="longmem")
    parser.add_argument("--text", help="files to cut texts from; random symbols if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts: Texts = Excerpts(arguments.text, Path(folder)) if arguments.text else Symbols()
        for seed in arguments.seeds:
            run(texts, arguments.recipe, seed, arguments.backbone_steps, arguments.steps)


if __name__ == "__main__":
    main()
