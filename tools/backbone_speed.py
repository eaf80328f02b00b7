"""How fast a frozen transformers model with a memory is, beside the same model plain and its attention over long contexts.

    python tools/smollm2.py models/smollm2
    python tools/backbone_speed.py models/smollm2 --slots 1000 100000 --contexts 512 1024 2048 4096 8000 --results speed.json

Generated: tokens per second of `generate`, greedy, one stream, behind so many tokens in transformers' own cache, which are
not timed; with a memory there are 128. Read: tokens per second of a further window of 128, with its losses, without
gradient: behind that cache, or as `lmcode eval` reads, behind sinks and cache, and what leaves these is written to the
banks. The banks are full of random entries of the namespace that is read, so a write evicts, and the next search looks at
other rows. Texts are random, too. All ways take turns in every round, first in generating, then in reading; figures are
medians of the rounds, with the lowest and the highest. The last lines say from which context on a memory is faster.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lmcode.backbone_config import read_sizes
from lmcode.bench.turns import check_result, in_turns, timed, to_table, write_json
from lmcode.config import ConfigError
from lmcode.recipes import foreign
from lmcode.recipes.attach import attach
from lmcode.recipes.attached import Attached

PROMPT = WINDOW = 128
AT_ONCE = 50_000  # entries
KINDS = ("generated", "read")


class Context:
    """A model behind so many tokens of a text that its cache holds, to which it comes back after each turn."""

    def __init__(self, model: Any, ids_1T: torch.Tensor, tokens: int) -> None:
        self.model, self.ids_1T, self.tokens = model, ids_1T, tokens
        self.cache = foreign.new_cache(model)
        self.settings = {foreign.cache_name(model): self.cache, "use_cache": True}
        with torch.no_grad():
            for start in range(0, tokens, 512):
                model(input_ids=ids_1T[:, start:min(start + 512, tokens)], logits_to_keep=1, **self.settings)

    def generate(self, new: int) -> float:
        """Seconds a token; what is behind the cache begins with one token that was given."""
        ids_1T = self.ids_1T[:, :self.tokens + 1]
        spent = timed(lambda: self.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new,
                                                  min_new_tokens=new, do_sample=False, pad_token_id=0, **self.settings))
        self._back(new)
        return spent.wall / new

    def read(self) -> float:
        """Seconds a token of a window."""
        ids_T = self.ids_1T[0, self.tokens:self.tokens + WINDOW + 1]

        def window() -> None:
            with torch.no_grad():
                logits_TV = self.model(input_ids=ids_T[None, :-1], **self.settings).logits[0]
                torch.nn.functional.cross_entropy(logits_TV.float(), ids_T[1:], reduction="none")

        spent = timed(window)
        self._back(WINDOW)
        return spent.wall / WINDOW

    def _back(self, more: int) -> None:
        if self.cache.get_seq_length() != self.tokens + more:
            raise RuntimeError(f"the cache must hold {self.tokens} + {more} tokens: it has {self.cache.get_seq_length()}")
        self.cache.crop(-more)


class Stream:
    """A stream that reads windows in our way, always the same one behind a full row of sinks and cache, from banks or from
    none; what it reads is written to them."""

    def __init__(self, backbone: Attached, ids_1T: torch.Tensor, *, banks: Mapping[int, Any]) -> None:
        self.backbone, self.banks, self.state = backbone, banks, None
        for start in range(0, backbone.places + 1, WINDOW):
            self.state = self._output(ids_1T[:, start:start + WINDOW + 1]).state
        self.ids_1T = ids_1T[:, :WINDOW + 1]

    def read(self) -> float:
        """Seconds a token of a window, with its writes."""
        return timed(self._read_and_write).wall / WINDOW

    def _read_and_write(self) -> None:
        output = self._output(self.ids_1T)
        if self.banks:
            self.backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=0)

    def _output(self, ids_1T: torch.Tensor) -> Any:
        with torch.no_grad(), self.backbone.reading_from(self.banks):
            return self.backbone(ids_1T[:, :-1], targets_BT=ids_1T[:, 1:], state=self.state,
                                 namespace_B=torch.zeros(1, dtype=torch.int64))


def fill(backbone: Attached) -> None:
    """Writes random entries until no slot is free, all of them where transformers' calls read, in namespace 0."""
    draw = torch.Generator().manual_seed(0)
    for bank in backbone.banks.values():
        while bank.stats()["live"] < bank.slots:  # virtual shards fill up one by one
            shape = bank.heads, min(AT_ONCE, bank.slots), bank.head_dim
            key_HED = torch.nn.functional.normalize(torch.randn(shape, generator=draw), dim=-1)
            bank.write(key_HED, torch.randn(shape, generator=draw), torch.zeros(shape[1], dtype=torch.int64))


Ways = dict[str, Callable[[], float]]  # by name, each gives seconds a token


def ways_of(arguments: argparse.Namespace, ids_1T: torch.Tensor) -> tuple[Ways, Ways, dict[str, Any]]:
    """Who generates, who reads, and what the memories are."""
    def load() -> Any:
        return foreign.load(arguments.folder, dtype=getattr(torch, arguments.dtype)).eval()

    generating, reading, about, plain = Ways(), Ways(), dict[str, Any](), load()
    for tokens in arguments.contexts:
        context = Context(plain, ids_1T, tokens)
        generating[plain_way(tokens)] = functools.partial(context.generate, arguments.new)
        reading[plain_way(tokens)] = context.read
    for slots in arguments.slots:
        model = attach(load(), arguments.recipe, memory={"scope": arguments.scope}, long_term_memory_slots=slots)
        backbone: Attached = model.lmcode.eval()
        if not about:
            about = {"memory layers": len(backbone.banks), "top_k": backbone.config.memory_top_k}
            name = f"sinks and cache of {backbone.options.cache}, no memory"
            reading[name] = Stream(backbone, ids_1T, banks={}).read
        fill(backbone)
        context = Context(model, ids_1T, PROMPT)
        generating[memory_way(slots)] = functools.partial(context.generate, arguments.new)
        reading[memory_way(slots)] = Stream(backbone, ids_1T, banks=backbone.banks).read
    return generating, reading, about


def plain_way(tokens: int) -> str:
    return f"plain, {tokens:,} tokens in its cache"


def memory_way(slots: int) -> str:
    return f"memory of {slots:,} entries a layer"


def faster_from(memory: float, contexts: Mapping[int, float]) -> str:
    """From which context on a memory that takes so many seconds a token is faster than attention, which takes those of
    `contexts`; faster at all longer ones, too. Between two of them seconds are taken to grow evenly."""
    ordered = sorted(contexts)
    slower = [tokens for tokens in ordered if contexts[tokens] <= memory]
    if not slower:
        return f"from {ordered[0]:,} tokens or fewer"
    if (before := slower[-1]) == ordered[-1]:
        return f"not up to {before:,} tokens"
    behind = ordered[ordered.index(before) + 1]
    share = (memory - contexts[before]) / (contexts[behind] - contexts[before])
    return f"from {before + share * (behind - before):,.0f} tokens on"


def report(seconds: Mapping[str, Mapping[str, list[float]]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prints a table, and the lines below it; returns the rows."""
    median = {kind: {name: statistics.median(of_round) for name, of_round in some.items()} for kind, some in seconds.items()}
    rows = []
    for name in seconds["read"]:
        row: dict[str, Any] = {"tokens/s": name}
        for kind, some in seconds.items():
            found = (median[kind][name], max(some[name]), min(some[name])) if name in some else ()
            row |= dict(zip((kind, f"{kind}, lowest", f"{kind}, highest"), (1 / one for one in found), strict=False))
        rows.append(row)
    print(", ".join(f"{name} {value}" for name, value in settings.items()) + "\n")
    print(to_table(rows) + "\n")
    for name in map(memory_way, settings["slots"]):
        said = [f"{kind}, {faster_from(some[name], {tokens: some[plain_way(tokens)] for tokens in settings['contexts']})}"
                for kind, some in median.items()]
        print(f"{name}, faster than attention: {'; '.join(said)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a transformers model")
    parser.add_argument("--recipe", default="camelot", help="%(default)s")
    parser.add_argument("--slots", nargs="+", type=int, default=[1000, 100_000], help="of each memory layer, by memory")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8000], help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model (%(default)s)")
    parser.add_argument("--scope", choices=("document", "global"), default="document", help="memory.scope (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.contexts = sorted({PROMPT, *arguments.contexts})
    try:
        if arguments.results is not None:
            check_result(arguments.results, "--results")
    except ConfigError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)  # FAISS takes as many
    sizes, most = read_sizes(arguments.folder), arguments.contexts[-1] + max(WINDOW, arguments.new)
    if most > sizes["positions"]:
        parser.error(f"a context and what follows it must not exceed the model's {sizes['positions']:,} positions: {most:,}")
    ids_1T = torch.randint(0, sizes["vocab_size"], (1, most + 1), generator=torch.Generator().manual_seed(0))
    *ways, about = ways_of(arguments, ids_1T)
    seconds = {kind: in_turns(some, arguments.rounds) for kind, some in zip(KINDS, ways, strict=True)}
    settings = {**vars(arguments), **about, "transformers": transformers.__version__}
    rows = report(seconds, settings)
    if arguments.results is not None:
        write_json(arguments.results, settings, rows)


if __name__ == "__main__":
    main()
