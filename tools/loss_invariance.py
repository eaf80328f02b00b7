"""python tools/loss_invariance.py [--steps 50] [--folder runs/loss_invariance] [section.key=value ...]

The loss of the default job after some steps, in fp32, for ZeRO stages 0-3 on two ranks and for 1, 2 and 4 ranks (also in
two memory groups), at the same global batch: all must agree to 1e-4. Exit code 1 if they do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jobs

VARIANTS = {"stage 0, 2 ranks": (2, "cpu", 0), "stage 1, 2 ranks": (2, "zero1", 0), "stage 2, 2 ranks": (2, "zero2", 0),
            "stage 3, 2 ranks": (2, "zero3", 0), "stage 3 + offload, 2 ranks": (2, "zero3_offload", 0),
            "stage 2, 1 rank": (1, "zero2", 0), "stage 2, 4 ranks": (4, "zero2", 0),
            "stage 2, 4 ranks, 2 x 2": (4, "zero2", 2)}  # ranks, sharding, ranks of a memory group
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/loss_invariance"))
    arguments, overrides = parser.parse_known_args()
    shared = [f"train.total_steps={arguments.steps}", "train.warmup_steps=10", "eval.every=0", "eval.final_windows=2",
              *overrides]
    losses = {}
    for name, (ranks, sharding, size) in VARIANTS.items():
        groups = [f"memory.group_size={size}"] if size else []
        run = jobs.train(f"{sharding}-{ranks}" + f"-{size}" * bool(size), [*shared, *groups, f"train.deepspeed={sharding}"],
                         ranks=ranks, folder=arguments.folder.resolve())
        losses[name] = jobs.last(run, "train/loss")
        print(f"{name:<28} loss after {arguments.steps} steps {losses[name]:.6f}   entries "
              f"evicted {jobs.last(run, 'memory/L3/evicted'):.0f}", flush=True)
    spread = max(losses.values()) - min(losses.values())
    print(f"largest difference {spread:.2e}, allowed {TOLERANCE:.0e}")
    return int(not spread <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
