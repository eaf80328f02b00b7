"""Perplexity of a frozen transformers model on books: alone, with a sliding cache, with the memories of recipe camelot.

    python tools/smollm2.py models/smollm2
    python tools/backbone_perplexity.py models/smollm2 book.txt [book.txt ...] --windows 128 512 --marks 2048 8192

A book is read window by window up to the last mark, with sinks and a cache of 128 and no memory; what leaves the cache
goes into the memory of every setting. At each mark a copy of each setting's memory reads on and the next tokens are
scored; all settings have the same past and are scored on the same tokens. "equal bytes" gives the memory's bytes to a
longer sliding cache in all layers; "full" reads all before it, as far as the model has positions. Lines are printed as
soon as they are known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcode.config import MemoryConfig
from lmcode.memory.bank import LongTermMemory
from lmcode.recipes.attach import attach
from lmcode.recipes.attached import Attached


class Setting(NamedTuple):
    """A memory. layers: 'upper' or 'all'. merge: similarity above which a newcomer joins its nearest slot; None: none does.
    cache: whether sinks and the cache stay visible beside it."""

    layers: str = "upper"
    merge: float | None = None
    cache: bool = True
    bias: float = -2.0
    distance: int = 256
    top_k: int = 32


SETTINGS = {"nothing merged (our default)": Setting(), "merged above .95": Setting(merge=0.95),
            "merged above .9": Setting(merge=0.9),
            "as in the paper, R .9": Setting("all", 0.9, cache=False, bias=0.0, distance=256)}


def stored(setting: Setting) -> tuple[str, float | None]:
    """What decides the contents of a memory."""
    return setting.layers, setting.merge


def nll(logits_TV: torch.Tensor, target_T: torch.Tensor) -> float:
    """Summed loss, nats."""
    return float(torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum"))


class Lab:
    """A model with hooks, tokens of a book, and how they are scored."""

    def __init__(self, folder: str, *, slots: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.memory = MemoryConfig(importance_weight=0.0, virtual_shards=1, tier="exact", max_norm=1e6)
        attach(self.model, "camelot", memory=self.memory, long_term_memory_slots=slots,
               memory_layers=tuple(range(self.model.config.num_hidden_layers)))
        self.attached: Attached = self.model.lmcode
        self.slots, self.layers = slots, self.model.config.num_hidden_layers

    def layers_of(self, setting: Setting) -> list[int]:
        return list(range(self.layers // 2 if setting.layers == "upper" else 0, self.layers))

    def banks(self, setting: Setting) -> dict[int, LongTermMemory]:
        config = self.memory.model_copy(update={"merge_above": setting.merge}) if setting.merge else self.memory
        return {layer: self.attached.banks[layer].like(config=config) for layer in self.layers_of(setting)}

    def read(self, ids_T: torch.Tensor, state: Any, banks: dict[int, LongTermMemory], *, alone: bool = False) -> Any:
        """One window; `alone`: sees neither sinks nor cache."""
        if state is not None and alone:
            state = state._replace(count_B=state.count_B * 0)
        with torch.no_grad(), self.attached.reading_from(banks):
            return self.attached(ids_T[None], state=state, namespace_B=torch.zeros(1, dtype=torch.int64))

    def use(self, setting: Setting) -> None:
        """Makes the recipe read as the setting says."""
        config = self.attached.recipe.config
        self.attached.recipe.config = config.model_copy(update={"memory_bias": setting.bias})
        self.attached.recipe.options = self.attached.options.model_copy(update={"distance": setting.distance})

    @contextlib.contextmanager
    def cache_of(self, cache: int) -> Any:
        """Reads with a sliding cache of another length inside the block."""
        former = self.attached.options
        self.attached.options = former.model_copy(update={"cache": cache})
        try:
            yield
        finally:
            self.attached.options = former


def commit(banks: dict[int, LongTermMemory], output: Any, step: int, *, hits: bool) -> None:
    """Writes what left the cache."""
    for layer, bank in banks.items():
        read = output.memory[layer]
        bank.commit([read.candidates], [read.hits] if hits else [], step=step)


def score_plain(lab: Lab, ids_N: torch.Tensor, mark: int, scored: int, window: int) -> float:
    """Windows that see nothing before themselves."""
    total = 0.0
    for start in range(mark, mark + scored, window):
        part_T = ids_N[start:start + window + 1]
        with torch.no_grad():
            total += nll(lab.model(part_T[None, :-1]).logits[0], part_T[1:])
    return total


def score_full(lab: Lab, ids_N: torch.Tensor, mark: int, scored: int) -> float:
    """All that there is before, as far as the model has positions."""
    begin = max(0, mark + scored - lab.model.config.max_position_embeddings)
    part_T = ids_N[begin:mark + scored + 1]
    with torch.no_grad():
        hidden = lab.model.base_model(part_T[None, :-1]).last_hidden_state[0, -scored:]
        return nll(lab.model.get_output_embeddings()(hidden), part_T[-scored:])


def score_cache(lab: Lab, ids_N: torch.Tensor, mark: int, scored: int, window: int, cache: int) -> float:
    """Sinks (the book's beginning) and a sliding cache, filled by reading what it can hold before the mark."""
    with lab.cache_of(cache):
        state, total, at = None, 0.0, max(0, mark - cache - window)
        state = lab.read(ids_N[:lab.attached.options.sinks], None, {}).state
        while at < mark + scored:
            length = min(window, (mark if at < mark else mark + scored) - at)
            output = lab.read(ids_N[at:at + length], state, {})
            if at >= mark:
                total += nll(output.logits[0], ids_N[at + 1:at + length + 1])
            state, at = output.state, at + length
    return total


class Past(NamedTuple):
    """What was read before a mark: the state that the stream carries, and the banks, by layer."""

    state: Any
    banks: dict[int, LongTermMemory]


def score_memory(lab: Lab, ids_N: torch.Tensor, mark: int, scored: int, window: int, *, past: Past,
                 setting: Setting) -> float:
    """On from a mark with copies of the banks, which are written as the tokens are scored."""
    forks, state = {}, past.state
    for layer, bank in past.banks.items():
        forks[layer] = bank.like()
        forks[layer].top_k = setting.top_k
        for shard in forks[layer].owned:
            forks[layer].load(shard, bank.state(shard))
    lab.use(setting)
    total = 0.0
    for start in range(mark, mark + scored, window):
        part_T = ids_N[start:start + window + 1]
        output = lab.read(part_T[:-1], state, forks, alone=not setting.cache)
        total += nll(output.logits[0], part_T[1:])
        commit(forks, output, start, hits=True)
        state = output.state
    return total


def measure(lab: Lab, book: Path, window: int, marks: list[int], scored: int, names: list[str], tokenizer: Any,
            baselines: bool) -> None:
    """All numbers of a book with windows of one length."""
    ids_N = torch.tensor(tokenizer(book.read_text(encoding="utf-8"))["input_ids"])[:max(marks) + scored + 1]
    settings = {name: SETTINGS[name] for name in names}
    banks = {stored(setting): lab.banks(setting) for setting in settings.values()}

    def say(mark: int, name: str, total: float, seconds: float) -> None:
        print(json.dumps({"book": book.stem[:40], "window": window, "mark": mark, "setting": name,
                          "perplexity": round(math.exp(total / scored), 3), "seconds": round(seconds, 1)}), flush=True)

    def timed(mark: int, name: str, call: Any) -> None:
        began = time.perf_counter()
        say(mark, name, call(), time.perf_counter() - began)

    state, at = None, 0
    for mark in sorted(marks):
        while at < mark and banks:
            length = min(window, mark - at)
            output = lab.read(ids_N[at:at + length], state, {})
            for some in banks.values():
                commit(some, output, at, hits=False)
            state, at = output.state, at + length
        if baselines:
            timed(mark, "plain", lambda mark=mark: score_plain(lab, ids_N, mark, scored, window))
            timed(mark, "sinks and cache of 128", lambda mark=mark: score_cache(lab, ids_N, mark, scored, window, 128))
            equal = 128 + min(lab.slots // 2, mark)
            timed(mark, f"sinks and cache of equal bytes, {equal}",
                  lambda mark=mark, equal=equal: score_cache(lab, ids_N, mark, scored, window, equal))
            timed(mark, "full", lambda mark=mark: score_full(lab, ids_N, mark, scored))
        for name, setting in settings.items():
            past = Past(state, banks[stored(setting)])
            timed(mark, name, lambda mark=mark, setting=setting, past=past: score_memory(
                lab, ids_N, mark, scored, window, past=past, setting=setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--windows", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--marks", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--scored", type=int, default=2048, help="tokens behind each mark (%(default)s)")
    parser.add_argument("--slots", type=int, default=8192, help="of a memory (%(default)s)")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}; or JSON")
    parser.add_argument("--no-baselines", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.settings:
        if name.startswith("{"):
            SETTINGS[name] = Setting(**json.loads(name))
    lab = Lab(arguments.model, slots=arguments.slots)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for window in arguments.windows:
        for book in arguments.books:
            measure(lab, book, window, arguments.marks, arguments.scored, arguments.settings, tokenizer,
                    not arguments.no_baselines)


if __name__ == "__main__":
    main()
