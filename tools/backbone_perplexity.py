"""Perplexity of a frozen transformers model on books: alone, with a sliding cache, with the memories of a recipe.

    python tools/smollm2.py models/smollm2
    python tools/backbone_perplexity.py models/smollm2 book.txt [book.txt ...] --windows 128 512 --marks 2048 8192
    python tools/backbone_perplexity.py models/smollm2 book.txt [book.txt ...] --recipe knn --slots 8192 131072

A book is read window by window up to the last mark, with sinks and a cache of `--cache` and no memory; what the recipe
offers meanwhile goes into the memory of every setting. At each mark a copy of each setting's memory reads on and the next
tokens are scored; all settings have the same past and are scored on the same tokens. "equal bytes" gives the bytes that a
setting's memory holds at the mark to a longer sliding cache in all layers, as far as the model has positions; "full" is one
window, which ends with the scored tokens. Lines are printed as soon as they are known, and go to a file with --results; what
stands there already is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcode.config import MemoryConfig
from lmcode.memory import lifecycle
from lmcode.memory.bank import LongTermMemory
from lmcode.recipes.attach import attach
from lmcode.recipes.attached import Attached


class Setting(NamedTuple):
    """A memory. layers: 'upper', 'all', 'own' (the recipe's) or their numbers. merge: similarity above which a newcomer
    joins its nearest slot; None: none does. cache: whether sinks and the cache stay visible beside it."""

    layers: str | tuple[int, ...] = "upper"
    merge: float | None = None
    cache: bool = True
    bias: float = -2.0
    distance: int = 256
    top_k: int = 32


SETTINGS = {"knn": Setting("own", top_k=64), "nothing merged (our default)": Setting(),
            "merged above .95": Setting(merge=0.95), "merged above .9": Setting(merge=0.9),
            "as in the paper, R .9": Setting("all", 0.9, cache=False, bias=0.0, distance=256)}
USUAL = {"camelot": [name for name in SETTINGS if name != "knn"], "knn": ["knn"]}


def stored(setting: Setting, slots: int) -> tuple[str | tuple[int, ...], float | None, int]:
    """What decides the contents of a memory."""
    return setting.layers, setting.merge, slots


def nll(logits_TV: torch.Tensor, target_T: torch.Tensor) -> float:
    """Summed loss, nats."""
    return float(torch.nn.functional.cross_entropy(logits_TV.float(), target_T, reduction="sum"))


class Lab:
    """A model with hooks, tokens of a book, and how they are scored."""

    def __init__(self, folder: str, *, recipe: str = "camelot", cache: int = 128,
                 dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.memory = MemoryConfig(importance_weight=0.0, virtual_shards=1, tier="exact", max_norm=1e6,
                                   dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        self.cache, self.layers = cache, self.model.config.num_hidden_layers
        if recipe == "camelot":
            options["memory_layers"] = tuple(range(self.layers))
        attach(self.model, recipe, memory=self.memory, cache=cache, **options)
        self.attached: Attached = self.model.lmcode

    def layers_of(self, setting: Setting) -> list[int]:
        if setting.layers == "own":
            return self.attached.config.memory_layer_indices
        if not isinstance(setting.layers, str):
            return [*setting.layers]
        return list(range(self.layers // 2 if setting.layers == "upper" else 0, self.layers))

    def equal_cache(self, setting: Setting, entries: int, window: int) -> int:
        """Tokens of a sliding cache in all layers that has the bytes of the setting's cache and of its memory of so many
        entries; no more than the model has positions for."""
        sizes, config = self.attached.anatomy.sizes, self.attached.config
        numbers = len(self.layers_of(setting)) * config.memory_heads * config.memory_head_dim * entries
        tokens = round(numbers / (self.layers * sizes["kv_heads"] * sizes["head_dim"]))
        return min((self.cache if setting.cache else 0) + tokens, sizes["positions"] - self.attached.options.sinks - window)

    def banks(self, setting: Setting, slots: int) -> dict[int, LongTermMemory]:
        config = self.memory.model_copy(update={"merge_above": setting.merge}) if setting.merge else self.memory
        return {layer: lifecycle.like(self.attached.banks[layer], slots=slots, config=config)
                for layer in self.layers_of(setting)}

    def read(self, ids_T: torch.Tensor, state: Any, banks: dict[int, LongTermMemory], *, alone: bool = False) -> Any:
        """One window; `alone`: sees neither sinks nor cache."""
        if state is not None and alone:
            state = state._replace(count_B=state.count_B * 0)
        with torch.no_grad(), self.attached.reading_from(banks):
            return self.attached(ids_T[None], state=state, namespace_B=torch.zeros(1, dtype=torch.int64))

    def use(self, setting: Setting) -> None:
        """Makes the recipe camelot read as the setting says."""
        if self.attached.config.recipe != "camelot":
            return
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
        part_T = ids_N[start:min(start + window, mark + scored) + 1]
        with torch.no_grad(), lab.attached.reading_from({}):
            total += nll(lab.model(part_T[None, :-1]).logits[0], part_T[1:])
    return total


def score_full(lab: Lab, ids_N: torch.Tensor, mark: int, scored: int, window: int) -> float:
    """One window that ends with the scored tokens."""
    begin = max(0, mark + scored - window)
    part_T = ids_N[begin:mark + scored + 1]
    with torch.no_grad(), lab.attached.reading_from({}):
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
        forks[layer] = lifecycle.like(bank)
        forks[layer].top_k = setting.top_k
        for shard in forks[layer].owned:
            forks[layer].load(shard, bank.state(shard))
    lab.use(setting)
    total = 0.0
    for start in range(mark, mark + scored, window):
        part_T = ids_N[start:min(start + window, mark + scored) + 1]
        output = lab.read(part_T[:-1], state, forks, alone=not setting.cache)
        total += nll(output.logits[0], part_T[1:])
        commit(forks, output, start, hits=True)
        state = output.state
    return total


class Rows:
    """Lines of results: said as soon as they are known, kept in a file, and not measured twice."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.known = file, set()
        for line in file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else ():
            self.known.add(self.name_of(json.loads(line)))

    @staticmethod
    def name_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("book", "window", "mark", "scored", "slots", "cache", "dtype", "setting"))

    def measure(self, row: dict[str, Any], call: Callable[[], float]) -> None:
        """Adds the perplexity of the scored tokens, whose summed loss `call` finds."""
        if self.name_of(row) in self.known:
            return
        began = time.perf_counter()
        perplexity = math.exp(call() / row["scored"])
        line = json.dumps({**row, "perplexity": round(perplexity, 3), "seconds": round(time.perf_counter() - began, 1)})
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")


def measure(lab: Lab, book: Path, window: int, arguments: argparse.Namespace, tokenizer: Any, rows: Rows) -> None:
    """All numbers of a book with windows of one length."""
    marks, scored, full = sorted(arguments.marks), arguments.scored, arguments.full
    ids_N = torch.tensor(tokenizer(book.read_text(encoding="utf-8"))["input_ids"])[:max(marks) + scored + 1]
    settings = {name: SETTINGS[name] for name in arguments.settings or USUAL[arguments.recipe]}
    banks = {stored(setting, slots): lab.banks(setting, slots) for setting in settings.values() for slots in arguments.slots}

    def said(mark: int, name: str, call: Callable[[], float], slots: int = 0) -> None:
        rows.measure({"book": book.stem[:40], "window": window, "mark": mark, "scored": scored, "slots": slots,
                      "cache": lab.cache, "dtype": arguments.dtype, "setting": name}, call)

    state, at = None, 0
    for mark in marks:
        while at < mark and banks:
            length = min(window, mark - at)
            output = lab.read(ids_N[at:at + length], state, {})
            for some in banks.values():
                commit(some, output, at, hits=False)
            state, at = output.state, at + length
        if not arguments.no_baselines:
            said(mark, "plain", functools.partial(score_plain, lab, ids_N, mark, scored, window))
            equal = {lab.equal_cache(setting, min(slots, mark), window)
                     for setting in settings.values() for slots in arguments.slots}
            for cache in sorted({lab.cache, *equal}):
                said(mark, f"sinks and cache of {cache}",
                     functools.partial(score_cache, lab, ids_N, mark, scored, window, cache))
            said(mark, f"full, {full}", functools.partial(score_full, lab, ids_N, mark, scored, full))
        for (name, setting), slots in itertools.product(settings.items(), arguments.slots):
            past = Past(state, banks[stored(setting, slots)])
            said(mark, name, functools.partial(score_memory, lab, ids_N, mark, scored, window, setting=setting, past=past),
                 slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--windows", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--marks", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--scored", type=int, default=2048, help="tokens behind each mark (%(default)s)")
    parser.add_argument("--slots", nargs="+", type=int, default=[8192], help="of a memory (%(default)s)")
    parser.add_argument("--recipe", choices=list(USUAL), default="camelot", help="whose memories (%(default)s)")
    parser.add_argument("--cache", type=int, default=128, help="tokens beside a memory (%(default)s)")
    parser.add_argument("--width", type=int, help="of the recipe knn's keys; its usual one if left out")
    parser.add_argument("--settings", nargs="*", help=f"of {', '.join(SETTINGS)}; or JSON; all of the recipe's if left out")
    parser.add_argument("--full", type=int, default=2048, help="tokens of the one full window (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (%(default)s)")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--results", type=Path, help="file that lines are added to, and whose rows are not measured again")
    arguments = parser.parse_args()
    if arguments.full < arguments.scored:
        parser.error(f"--full must be at least --scored: got {arguments.full} and {arguments.scored}")
    for name in arguments.settings or ():
        if name.startswith("{"):
            given = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(name).items()}
            SETTINGS[name] = Setting(**given)
    options = {} if arguments.width is None else {"memory_head_dim": arguments.width}
    lab = Lab(arguments.model, recipe=arguments.recipe, cache=arguments.cache,
              dtype=getattr(torch, arguments.dtype), **options)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = Rows(arguments.results)
    for window in arguments.windows:
        for book in arguments.books:
            measure(lab, book, window, arguments, tokenizer, rows)


if __name__ == "__main__":
    main()
