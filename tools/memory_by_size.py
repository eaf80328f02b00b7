"""python tools/memory_by_size.py RUN... [--sizes 1024 4096 16384 65536 262144] [--windows 48]

Held-out loss of finished runs, in nats per token: in all, on words last seen more than a window ago, and by how far into its
document a token stands; for a run with a bank by the size of the bank that is written and read, too. Every run must have the
same corpus. One process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lmcode.data.corpus import load_corpus
from lmcode.eval.language import EDGES, LossProfile, profile, words_of
from lmcode.opening import open_model

COLUMNS = ("all", "returning", "from 0", *(f"from {edge}" for edge in EDGES))


def row(name: str, found: LossProfile) -> str:
    values = (found.loss, found.returning, *found.by_position)
    return f"{name:>28}" + "".join(f" {'-' if value is None else f'{value:.4f}':>10}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 4096, 16384, 65536, 262144])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--streams", type=int, default=8)
    arguments = parser.parse_args()
    print(f"{'':>28}" + "".join(f" {column:>10}" for column in COLUMNS))
    counted = False
    for run in arguments.runs:
        opened = open_model(run, memory=False)
        corpus = load_corpus(opened.config)
        words = words_of([corpus.tokenizer.decode([token]) for token in range(opened.config.model.vocab_size)])
        sizes = arguments.sizes if opened.model.banks else []
        reads = {f"{run.name} {slots:,} slots": slots for slots in sizes} or {run.name: None}
        for name, slots in reads.items():
            found = profile(opened.model, corpus.held_out, words=words, streams=arguments.streams, windows=arguments.windows,
                            slots=slots)
            if not counted:
                print(f"{'tokens':>28}" + "".join(f" {count:>10,}" for count in found.tokens))
            counted = True
            print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
