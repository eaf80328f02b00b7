"""python tools/replay_gain.py [--ratios 0 0.1 0.2 0.4] [--seeds 0 1 2] [--every 20] [--target LOSS] [section.key=value ...]

What experience replay is worth: the default job with several values of `train.memory_sample_ratio`, and after how many
steps each reaches a fixed held-out loss, read off the periodic evaluations by linear interpolation. A step costs the same
with and without replay. The target, unless given, is the loss that every job with the first ratio reaches: the highest of
their last ones. Jobs that are already in the folder are not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import jobs

Curve = list[tuple[int, float]]


def curve_of(run: Path) -> Curve:
    """(step, held-out loss) of the periodic evaluations; the closing one reads other windows and is left out."""
    rows = [(row["step"], row["eval/loss"]) for row in jobs.metrics(run) if row.get("eval/loss") is not None]
    return [row for row in rows if row[0] < rows[-1][0]]


def steps_to(curve: Curve, target: float) -> float:
    """Steps after which the curve first lies at or below `target`; infinite if it never does."""
    for (before, higher), (after, lower) in zip([(0, math.inf), *curve], curve, strict=False):
        if lower <= target:
            share = 1.0 if math.isinf(higher) else (higher - target) / (higher - lower)
            return before + share * (after - before)
    return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--target", type=float, help="held-out loss, nats per token")
    parser.add_argument("--folder", type=Path, default=Path("runs/replay_gain"))
    parser.add_argument("--ranks", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    curves: dict[tuple[float, int], Curve] = {}
    for seed in arguments.seeds:
        for ratio in arguments.ratios:
            run = jobs.train(f"ratio-{ratio:g}-{seed}", [
                f"train.seed={seed}", f"train.memory_sample_ratio={ratio}", f"eval.every={arguments.every}", *overrides],
                ranks=arguments.ranks, folder=arguments.folder.resolve())
            curves[ratio, seed] = curve_of(run)
            print(f"ran ratio {ratio:g}, seed {seed}: held-out loss {curves[ratio, seed][-1][1]:.4f}", flush=True)
    first = arguments.ratios[0]
    target = arguments.target or max(curves[first, seed][-1][1] for seed in arguments.seeds)
    print(f"\nsteps to a held-out loss of {target:.4f} (inf: not reached), by seed; last: periodic loss at the end, mean\n"
          f"{'ratio':>6}" + "".join(f"{seed:>9}" for seed in arguments.seeds) + f"{'mean':>9}{'fewer':>9}{'last':>9}")
    means: dict[float, float] = {}
    for ratio in arguments.ratios:
        steps = [steps_to(curves[ratio, seed], target) for seed in arguments.seeds]
        means[ratio] = statistics.mean(steps)
        last = statistics.mean(curves[ratio, seed][-1][1] for seed in arguments.seeds)
        print(f"{ratio:>6g}" + "".join(f"{one:>9.1f}" for one in (*steps, means[ratio]))
              + f"{100 * (1 - means[ratio] / means[first]):>8.1f}%{last:>9.4f}")


if __name__ == "__main__":
    main()
