"""Tokens per second of `generate` beside transformers' GPT-2 of the same shape, with the memories off and on.

    python tools/generation_speed.py [--shape tiny|readme] [--rounds 7] [--new 128] [--threads 1] [--document 2048]

Same vocabulary, width, layers, heads and context; random weights; greedy; each with its own KV cache. The three models take
turns in every round and each figure is the median of its rounds. "Off" has neither short-term slots nor a long-term
read; "on" has both as the shape says, with every bank full of documents of `--document` entries, of which each stream
reads its own. A second table says how large a share of each preset's weights belongs to its memories.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lmcode import LMCODE, LMCODEConfig
from lmcode.model.lm import MemoryLM
from lmcode.presets import ALL

SHAPES = {"tiny": ALL["tiny"]().model,
          "readme": LMCODEConfig(vocab_size=50257, hidden_size=512, num_layers=6, num_heads=8, short_term_memory_size=512,
                                 long_term_memory_slots=10000)}
PROMPT = 16
OFF = {"short_term_memory_size": 0, "long_term_memory_slots": 0, "memory_layers": ()}


def gpt2(shape: LMCODEConfig) -> GPT2LMHeadModel:
    """A GPT-2 of this shape with random weights."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab_size, n_embd=shape.hidden_size, n_layer=shape.num_layers,
                                      n_head=shape.num_heads, n_positions=shape.context_length, bos_token_id=None,
                                      eos_token_id=None, pad_token_id=0)).eval()


def fill(model: LMCODE, documents: int) -> None:
    """Fills every bank with random entries, spread over the documents 0..documents-1."""
    for bank in model.banks.values():
        shape = bank.heads, bank.slots, bank.head_dim
        key = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
        bank.write(key, torch.randn(shape), torch.arange(bank.slots) % documents)


def tokens_per_second(contestants: dict[str, Callable[[], object]], *, rounds: int, tokens: int) -> dict[str, list[float]]:
    """What each of the contestants, which take turns, made of `tokens` tokens in every round; the first round is not
    counted."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number:
                speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def compare(shape: LMCODEConfig, streams: int, *, rounds: int, new: int, document: int) -> None:
    """One line: medians, their ratios to GPT-2 and the lowest and highest ratio of a round."""
    torch.manual_seed(0)
    theirs = gpt2(shape)
    off, on = LMCODE(shape.model_copy(update=OFF)), LMCODE(shape)
    fill(on, max(streams, shape.long_term_memory_slots // document))
    prompt_BT = torch.randint(0, shape.vocab_size, (streams, PROMPT))
    settings = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "min_new_tokens": new}
    mask_BT = torch.ones_like(prompt_BT)
    speeds = tokens_per_second(
        {"gpt2": lambda: theirs.generate(prompt_BT, attention_mask=mask_BT, **settings),
         "off": lambda: off.generate(prompt_BT, max_new_tokens=new, temperature=0.0),
         "on": lambda: on.generate(prompt_BT, max_new_tokens=new, temperature=0.0)},
        rounds=rounds, tokens=streams * new)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    cells = [f"{median['gpt2']:.0f}"]
    for name in ("off", "on"):
        ratios = sorted(ours / other for ours, other in zip(speeds[name], speeds["gpt2"], strict=True))
        cells.append(f"{median[name]:.0f} | {median[name] / median['gpt2']:.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})")
    print(f"| {streams} | {' | '.join(cells)} |", flush=True)


def memory_share(shape: LMCODEConfig) -> tuple[int, int]:
    """How many weights belong to the memories, norms before them included, and how many there are."""
    with torch.device("meta"):
        weights = dict(MemoryLM(shape).named_parameters())
    return (sum(p.numel() for name, p in weights.items() if "short_term" in name or "long_term" in name),
            sum(p.numel() for p in weights.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=128, help="tokens that are added to each prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--document", type=int, default=2048, help="entries of a document")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"shape {chosen.shape}, {chosen.threads} thread(s), {chosen.new} new tokens, {chosen.rounds} rounds, tokens/s\n")
    print("| streams | GPT-2 | memory off | ratio | memory on | ratio |\n|---|---|---|---|---|---|")
    for streams in (1, 8):
        compare(SHAPES[chosen.shape], streams, rounds=chosen.rounds, new=chosen.new, document=chosen.document)
    print("\n| preset | weights | of the memories | share |\n|---|---|---|---|")
    for name, preset in ALL.items():
        part, whole = memory_share(preset().model)
        print(f"| {name} | {whole:,} | {part:,} | {part / whole:.2%} |")


if __name__ == "__main__":
    main()
