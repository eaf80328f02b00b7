"""python tools/compiled_layers.py [--rounds 6] [--threads 2] [section.key=value ...]

Does `torch.compile` pay? Forward and backward of `tiny` on its own corpus, as it is and with parts of its layers compiled,
in turns, in one process. A layer that reads a bank is never compiled as a whole, since the search would be traced. In ms.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lmcode.backbone import Backbone, forward_batch, token_losses
from lmcode.data.corpus import load_corpus
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.model.layer import MemoryAugmentedLayer
from lmcode.opening import make_model
from lmcode.presets import load_run_config

STEPS = 9  # of a turn; the first does not count
WAYS = ("as it is", "feed-forwards", "attention, norms, too", "layers without a bank")


def compile_parts(model: Backbone, way: str) -> None:
    for layer in (part for part in model.modules() if isinstance(part, MemoryAugmentedLayer)):
        if way == WAYS[3] and layer.long_term_read is None:
            layer.compile()
        elif way != WAYS[0]:
            layer.feed_forward.compile()
        if way == WAYS[2]:
            for name, part in layer.named_children():
                if name == "attention" or name.endswith("norm"):
                    part.compile()


def turn(model: Backbone, sampler: StreamSampler, steps: int) -> list[float]:
    """Milliseconds of each step's forward and backward pass; what the step offers is written, and no weight changes."""
    state, spent = None, []
    for step in range(steps):
        batch = sampler.batch(step)
        started = time.perf_counter()
        output = forward_batch(model, batch, state)
        token_losses(output).mean().backward()
        spent.append(1000 * (time.perf_counter() - started))
        model.zero_grad()
        model.memories.commit({layer: [read] for layer, read in output.memory.items()}, step=step)
        state = output.state
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    config = load_run_config("tiny", overrides)
    train = config.train
    sampler = StreamSampler(load_corpus(config).train, streams=train.streams, sequence_length=train.sequence_length, seed=0)
    models, first = {}, {}
    for way in WAYS:
        torch.manual_seed(0)
        models[way] = make_model(config, group=Group(), device=torch.device("cpu")).train()
        compile_parts(models[way], way)
        first[way] = sum(turn(models[way], sampler, 2))
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            spent[way] += turn(models[way], sampler, STEPS)[1:]
    print(f"{'compiled':>24} {'median':>8} {'least':>8} {'first two':>10}")
    for way in WAYS:
        print(f"{way:>24} {statistics.median(spent[way]):>8.0f} {min(spent[way]):>8.0f} {first[way]:>10.0f}")


if __name__ == "__main__":
    main()
