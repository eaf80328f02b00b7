"""Whether what a recipe trains learns to read its memory: a tiny backbone, texts that repeat themselves far away.

    python tools/longmem_gain.py [--recipe longmem] [--seeds 0 1 2] [--backbone-steps 200] [--steps 150]

A backbone of four layers is trained on windows that hold 16 random symbols twice, so that it learns to copy within a window,
and frozen. A text has six windows: three of random symbols, then the same three again; what repeats lies 96 tokens back,
where neither the window (32) nor the cache (8) reaches, and within a window nothing does. The same part (the side
network of longmem, the read of lmcode), from the same start and on the same texts, is trained with its memory and
without. Scored are the last three windows of fresh texts,
nats per token; to guess blindly costs log 64 = 4.159. A line is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmcode.recipes.attach import attach

SYMBOLS, WINDOW, CACHE, FRESH = 64, 32, 8, 3
STREAMS, SCORED = 16, 32  # texts of a training step; fresh texts that are scored


def trained_backbone(seed: int, steps: int) -> Any:
    """A model that copies within a window."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        half_BT = torch.randint(0, SYMBOLS, (64, WINDOW // 2))
        ids_BT = torch.cat([half_BT, half_BT], dim=1)
        logits_BTV = model(ids_BT[:, :-1]).logits[:, WINDOW // 2:]
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, WINDOW // 2 + 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"seed {seed}: backbone, step {step}: {float(loss.detach()):.3f} where it can copy", flush=True)
    return model.eval()


def texts(count: int) -> torch.Tensor:
    """Ids [count, 2 * FRESH * WINDOW]: random ones, then the same again."""
    half_BT = torch.randint(0, SYMBOLS, (count, FRESH * WINDOW))
    return torch.cat([half_BT, half_BT], dim=1)


def read(model: Any, ids_BT: torch.Tensor, *, optimizer: Any = None, memory: bool, first: int) -> float:
    """Reads texts window by window, in namespaces from `first` on: the mean loss of the windows that repeat. With an
    optimizer each of those is a training step."""
    backbone, state, losses = model.lmcode, None, []
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -100)], dim=1)
    namespace_B = torch.arange(first, first + len(ids_BT))
    with backbone.reading_from(backbone.banks if memory else {}):
        for number, start in enumerate(range(0, ids_BT.shape[1], WINDOW)):
            part, repeats = slice(start, start + WINDOW), number >= FRESH
            with torch.set_grad_enabled(optimizer is not None and repeats):
                output = backbone(ids_BT[:, part], targets_BT=targets_BT[:, part], state=state, namespace_B=namespace_B)
            state = output.state
            if repeats:
                losses.append(float(output.loss.detach()))
                if optimizer is not None:
                    optimizer.zero_grad()
                    output.loss.backward()
                    optimizer.step()
            if memory:
                backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=start)
    return sum(losses) / len(losses)


def fresh_loss(model: Any, *, memory: bool) -> float:
    """The loss on texts that no training has seen, the same for every model."""
    with torch.random.fork_rng():
        torch.manual_seed(10**6)
        ids_BT = texts(SCORED)
    model.lmcode.eval()
    return read(model, ids_BT, memory=memory, first=10**9)


def run(recipe: str, seed: int, backbone_steps: int, steps: int) -> None:
    """One backbone, and what the recipe trains, with memory and without."""
    backbone = trained_backbone(seed, backbone_steps)
    for memory, kind in ((True, "with"), (False, "without")):
        torch.manual_seed(seed)
        model = attach(copy.deepcopy(backbone), recipe, sinks=0, cache=CACHE, long_term_memory_slots=4096,
                       memory={"virtual_shards": 4})
        optimizer = torch.optim.AdamW(model.lmcode.recipe.parameters(), lr=1e-3)
        if memory:
            print(f"seed {seed}: frozen backbone {fresh_loss(model, memory=True):.3f}", flush=True)
        torch.manual_seed(seed + 1)
        started = time.monotonic()
        for step in range(steps):
            model.lmcode.train()
            loss = read(model, texts(STREAMS), optimizer=optimizer, memory=memory, first=step * STREAMS)
            if step % 25 == 24:
                print(f"seed {seed}: {kind} memory, {step + 1} batches: {loss:.3f} in training, "
                      f"{time.monotonic() - started:.0f} s", flush=True)
        print(f"seed {seed}: trained {kind} memory: {fresh_loss(model, memory=memory):.3f}", flush=True)
        if memory:
            print(f"seed {seed}: the same, its memory switched off: {fresh_loss(model, memory=False):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("longmem", "lmcode"), default="longmem")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(arguments.recipe, seed, arguments.backbone_steps, arguments.steps)


if __name__ == "__main__":
    main()
