"""python tools/merged_experiences.py [--count 2000] [--threshold 0.1] [--rounds 3] [--steps 100] [data.path=books/*.txt ...]

What it costs that consolidation keeps the entries of one experience apart from all others: how many entries of stored
sentences (those of `recall_experiences.py`) merge in some rounds, and how many would if they were all of unknown document,
as entries of one namespace once were. The model is `tiny`, with a tokenizer made from the sentences and trained on them for
some steps.
"""

from __future__ import annotations

import argparse

import torch
from recall_experiences import choose

from lmcode import LMCODE, MemoryAwareTrainer, MemoryDataset
from lmcode.data.tokenizer import BPETokenizer
from lmcode.memory import LongTermMemory, lifecycle
from lmcode.memory.entry import UNKNOWN
from lmcode.presets import load_run_config


def merge(bank: LongTermMemory, threshold: float, rounds: int, name: str) -> None:
    before, merged = bank.stats()["live"], 0
    for number in range(1, rounds + 1):
        merged += bank.consolidate(threshold).merged
        print(f"  {name}: {merged:,} of {before:,} entries merged after round {number} ({merged / before:.1%})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments, overrides = parser.parse_known_args()
    sentences, config = choose(overrides, arguments.count), load_run_config("tiny")
    torch.manual_seed(0)
    model = LMCODE(config.model.model_copy(update={"long_term_memory_slots": 200 * arguments.count}), memory=config.memory)
    model.tokenizer = BPETokenizer.train(sentences, config.model.vocab_size)
    if arguments.steps:
        trainer = MemoryAwareTrainer(model, {"total_steps": arguments.steps, "sequence_length": 64, "warmup_steps": 5,
                                             "learning_rate": 3e-3})
        trainer.train(MemoryDataset(sentences, tokenizer=model.tokenizer), batch_size=32)
        for bank in model.banks.values():
            bank.delete(predicate=lambda columns: columns["id"] >= 0)
    model.store_experience(sentences)
    for layer, bank in model.banks.items():
        print(f"layer {layer}:")
        together = lifecycle.fork(bank, empty=False)
        together.shard.columns["document"][:] = UNKNOWN
        for one, name in ((bank, "each experience by itself"), (together, "all together")):
            merge(one, arguments.threshold, arguments.rounds, name)


if __name__ == "__main__":
    main()
