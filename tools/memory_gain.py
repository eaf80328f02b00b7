"""python tools/memory_gain.py [--seeds 0 1 2] [--folder runs/memory_gain] [section.key=value ...]

What the memory is worth: the default job with a bank, read on, off and shuffled, beside the same model without a bank
(equal parameters, equal steps) and beside it with a cache of its last windows in every layer, as many as the bank has
bytes (Transformer-XL), for each seed. The losses are those of each job's closing evaluation, on the same held-out documents.
Jobs that are already in the folder are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import jobs

from lmcode.eval.equal_bytes import equal_cache
from lmcode.presets import load_run_config

NO_BANK = "model.long_term_memory_slots=0"
TAGS = {"on": "eval/loss", "off": "eval/loss_memory_off", "shuffled": "eval/loss_memory_shuffled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory_gain"))
    parser.add_argument("--ranks", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    windows = equal_cache(load_run_config("tiny", overrides))
    models = {"bank": [], "no-bank": [NO_BANK], "cache": [NO_BANK, f"model.cache_windows={windows}"]}
    print(f"the cache: {windows} windows")
    print(f"{'seed':>6} {'no bank':>9} {'cache':>9} {'on':>9} {'off':>9} {'shuffled':>9} {'gain':>9}")
    gains = []
    for seed in arguments.seeds:
        runs = {model: jobs.train(f"{model}-{seed}", [f"train.seed={seed}", *changes, *overrides],
                                  ranks=arguments.ranks, folder=arguments.folder.resolve())
                for model, changes in models.items()}
        none, cache = (jobs.last(runs[model], TAGS["on"]) for model in ("no-bank", "cache"))
        losses = [jobs.last(runs["bank"], tag) for tag in TAGS.values()]
        gains.append(none - losses[0])
        print(f"{seed:>6}" + "".join(f" {value:>9.4f}" for value in (none, cache, *losses, gains[-1])), flush=True)
    print(f"mean gain {statistics.mean(gains):.4f} nats per token, smallest {min(gains):.4f}")


if __name__ == "__main__":
    main()
