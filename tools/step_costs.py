"""python tools/step_costs.py [--steps 60] [--rounds 3] [--folder runs/step_costs] [section.key=value ...]

Where a training step of the default job spends its time on two ranks, beside the same job without a bank, alternating;
and the bytes that the memory moves, counted, beside the formula of the read protocol. Medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import jobs

from lmcode.files import durable
from lmcode.presets import load_run_config

PHASES = ("step", "forward", "backward", "search", "exchange", "optimizer", "commit", "data")
RANKS = 2


def formula(overrides: list[str]) -> dict[str, float]:
    """Bytes received per rank and step for one bank, from the sizes alone (fp32 queries, all_gather, sums)."""
    config = load_run_config("tiny", overrides)
    model, n = config.model, config.train.streams * config.train.sequence_length // RANKS
    queries = n * model.memory_heads  # queries of one rank: every token asks once per head
    D, K, others = model.memory_head_dim, model.memory_top_k, RANKS - 1
    return {
        "queries (R-1) n D b, and a namespace per token": others * (queries * D * 4 + n * 8),
        "hits 12 (R-1) R n K by plain all_gather": others * 12 * RANKS * queries * K,
        "values (R-1) n D b": others * queries * D * 4,
        "gradients (R-1) n (D+2) b and (R-1) n D b": others * queries * (2 * D + 2) * 4,
        "writes: key and value, namespace and surprise": others * n * (2 * model.memory_heads * D * 4 + 16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/step_costs"))
    arguments, overrides = parser.parse_known_args()
    folder = arguments.folder.resolve()
    if folder.exists():
        durable.set_aside(folder)
    shared = [f"train.total_steps={arguments.steps}", "train.warmup_steps=10", "eval.every=0", "eval.final_windows=1",
              *overrides]
    medians = {"bank": [], "no bank": []}
    for round_number in range(arguments.rounds):
        for name, changes in (("bank", []), ("no bank", ["model.long_term_memory_slots=0"])):
            run = jobs.train(f"{name.replace(' ', '-')}-{round_number}", [*shared, *changes], ranks=RANKS, folder=folder)
            rows = [row for row in jobs.metrics(run) if "perf/step_ms" in row][1:]  # the first holds the warm-up
            medians[name].append({phase: statistics.median(row[f"perf/{phase}_ms"] for row in rows)
                                  for phase in PHASES})
            received = statistics.median(row["perf/bytes_received"] for row in rows)
            if name == "bank":
                counted = received
    print(f"{'ms per step':<12}" + "".join(f"{phase:>11}" for phase in PHASES))
    for name, rounds in medians.items():
        print(f"{name:<12}" + "".join(f"{statistics.median(r[phase] for r in rounds):>11.1f}" for phase in PHASES))
    ratios = [bank["step"] / none["step"] for bank, none in zip(medians["bank"], medians["no bank"], strict=True)]
    print(f"step with a bank / without: median {statistics.median(ratios):.3f}, "
          f"rounds {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    expected = formula(overrides)
    for name, size in expected.items():
        print(f"  {name:<52}{size:>12,}")
    print(f"  {'formula, bytes received per rank and step':<52}{sum(expected.values()):>12,}")
    print(f"  {'counted in the run (loss and metrics included)':<52}{counted:>12,.0f}")


if __name__ == "__main__":
    main()
