"""python tools/consolidation.py RUN [--thresholds 0.05 0.1 0.2] [--every 4] [--rounds 1] [section.key=value ...]

What consolidation does to a saved run, on copies, in one process: entries of its banks before and after, and held-out
loss beside the loss without. In document scope an evaluation starts with an empty bank, so there it is the evaluation's
own bank that is consolidated, after every few windows; in global scope it starts with the consolidated copy and goes on
likewise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lmcode.dist import Group
from lmcode.eval.held_out import EvalResult, evaluate, held_out_sampler
from lmcode.memory import LongTermMemory
from lmcode.train.checkpoint import load_model
from lmcode.train.corpus import load_corpus


def consolidated(banks: Mapping[int, LongTermMemory], threshold: float, rounds: int) -> dict[int, LongTermMemory]:
    """Copies of the banks after some rounds; says what each round did."""
    copies = {layer: bank.fork(empty=False) for layer, bank in banks.items()}
    for layer, bank in copies.items():
        for round_number in range(rounds):
            started = time.perf_counter()
            report = bank.consolidate(threshold)
            seconds, share = time.perf_counter() - started, 100 * report.merged / max(1, report.before)
            print(f"  saved bank of layer {layer}, round {round_number + 1}: {report.before:,} entries -> "
                  f"{report.after:,} ({share:.1f} % merged) in {seconds:.1f} s", flush=True)
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--every", type=int, default=4, help="windows between two consolidations of an evaluation")
    parser.add_argument("--rounds", type=int, default=1, help="consolidations of the saved banks")
    arguments, overrides = parser.parse_known_args()
    group = Group()
    model, config, _, step = load_model(arguments.run, overrides, group=group, device=torch.device("cpu"))
    sampler = held_out_sampler(load_corpus(config).held_out, config)

    def held_out(banks: Mapping[int, LongTermMemory], threshold: float | None) -> tuple[EvalResult, int]:
        """The loss, and how many entries of the evaluation banks were merged."""
        merged = 0

        def upkeep(window: int, bank: LongTermMemory) -> None:
            nonlocal merged
            if threshold is not None and (window + 1) % arguments.every == 0:
                merged += bank.consolidate(threshold).merged

        result = evaluate(model, sampler, banks=banks, group=group, windows=config.eval.final_windows,
                          slots=config.eval.slots, upkeep=upkeep)
        return result, merged

    plain, _ = held_out(model.banks, None)
    print(f"step {step}, {config.memory.scope} scope, {plain.tokens:,} held-out tokens\n"
          f"no consolidation: loss {plain.loss:.4f}, far {plain.far_loss:.4f}", flush=True)
    written = plain.tokens * len(model.banks)  # about: the last token of a document has no successor
    for threshold in arguments.thresholds:
        print(f"threshold {threshold:g}:", flush=True)
        result, merged = held_out(consolidated(model.banks, threshold, arguments.rounds), threshold)
        print(f"  held-out loss {result.loss:.4f} ({result.loss - plain.loss:+.4f}), far {result.far_loss:.4f} "
              f"({result.far_loss - plain.far_loss:+.4f}); {merged:,} of about {written:,} entries merged, "
              f"every {arguments.every} windows", flush=True)


if __name__ == "__main__":
    main()
