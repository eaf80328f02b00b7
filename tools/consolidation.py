"""python tools/consolidation.py RUN [--thresholds 0.05 0.1 0.2] [--every 4] [--rounds 1] [section.key=value ...]

What consolidation does to a saved run, on copies, in one process: entries of its banks before and after, and held-out
loss beside the loss without (`lmcode.eval.consolidation`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from lmcode.eval.consolidation import EVERY, held_out_loss
from lmcode.eval.documents import held_out_documents
from lmcode.eval.held_out import EvalResult, held_out_sampler
from lmcode.memory import LongTermMemory, lifecycle
from lmcode.opening import open_model


def consolidated(banks: Mapping[int, LongTermMemory], threshold: float, rounds: int) -> dict[int, LongTermMemory]:
    """Copies of the banks after some rounds; says what each round did."""
    copies = {layer: lifecycle.fork(bank, empty=False) for layer, bank in banks.items()}
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
    parser.add_argument("--every", type=int, default=EVERY, help="windows between two consolidations of an evaluation")
    parser.add_argument("--rounds", type=int, default=1, help="consolidations of the saved banks")
    arguments, overrides = parser.parse_known_args()
    opened = open_model(arguments.run, overrides)
    model, config, step = opened.model, opened.config, opened.step
    sampler = held_out_sampler(held_out_documents(opened).documents, config)
    plain, _ = held_out_loss(model, sampler, config.eval, model.banks, None)
    print(f"step {step}, {config.memory.scope} scope, {plain.tokens:,} held-out tokens\n"
          f"no consolidation: loss {plain.loss:.4f}, {far(plain)}", flush=True)
    written = plain.tokens * len(model.banks)  # about: the last token of a document has no successor
    for threshold in arguments.thresholds:
        print(f"threshold {threshold:g}:", flush=True)
        banks = consolidated(model.banks, threshold, arguments.rounds)
        result, merged = held_out_loss(model, sampler, config.eval, banks, threshold, every=arguments.every)
        print(f"  held-out loss {result.loss:.4f} ({result.loss - plain.loss:+.4f}), {far(result, plain)}; "
              f"{merged:,} of about {written:,} entries merged, "
              f"every {arguments.every} windows", flush=True)


def far(result: EvalResult, plain: EvalResult | None = None) -> str:
    """The loss far into documents, and by how much it differs from another one."""
    if result.far_loss is None:
        return "far not measurable"
    return f"far {result.far_loss:.4f}" + ("" if plain is None else f" ({result.far_loss - plain.far_loss:+.4f})")


if __name__ == "__main__":
    main()
