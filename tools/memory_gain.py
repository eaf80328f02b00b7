"""python tools/memory_gain.py [--seeds 0 1 2] [--folder runs/memory_gain] [section.key=value ...]

What the memory is worth: the default job with a bank, read on, off and shuffled, beside the same model without a bank
(equal parameters, equal steps), for each seed, on the same held-out documents. Jobs that are already in the folder are
not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import jobs

MODELS = {"bank": [], "no-bank": ["model.long_term_memory_slots=0"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory_gain"))
    parser.add_argument("--windows", type=int, default=160, help="held-out windows per stream")
    arguments, overrides = parser.parse_known_args()
    header = f"{'seed':>6} {'no bank':>9} {'on':>9} {'off':>9} {'shuffled':>9} {'gain':>7}   far: no bank, on, gain"
    print(header)
    gains, far_gains = [], []
    for seed in arguments.seeds:
        results = {}
        for model, changes in MODELS.items():
            run = jobs.train(f"{model}-{seed}", [f"train.seed={seed}", *changes, *overrides],
                             folder=arguments.folder.resolve())
            results[model] = jobs.evaluate(run, [f"eval.final_windows={arguments.windows}"])
        bank, none = results["bank"], results["no-bank"]["on"]
        gains.append(none["loss"] - bank["on"]["loss"])
        far_gains.append(none["far_loss"] - bank["on"]["far_loss"])
        print(f"{seed:>6} {none['loss']:>9.4f} {bank['on']['loss']:>9.4f} {bank['off']['loss']:>9.4f} "
              f"{bank['shuffled']['loss']:>9.4f} {gains[-1]:>7.4f}   {none['far_loss']:.4f} "
              f"{bank['on']['far_loss']:.4f} {far_gains[-1]:.4f}", flush=True)
    print(f"mean gain {statistics.mean(gains):.4f} nats per token, smallest {min(gains):.4f}; "
          f"far {statistics.mean(far_gains):.4f}, smallest {min(far_gains):.4f}; {none['tokens']:,} held-out tokens")


if __name__ == "__main__":
    main()
