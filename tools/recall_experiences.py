"""python tools/recall_experiences.py [--count 10000] [--ranks 1 2] [--scripts] [data.path=books/*.txt ...]

The share of stored sentences that their first half finds at rank 1, with a randomly initialised `tiny` model, on real gloo
processes: fresh, and after saving and loading into another model on another number of ranks. Sentences come from docstrings
of the default corpus (from all text with data.path). They are distinct, and none begins with the first half of another:
a question that fits two sentences has no right answer. The share of sentences left out for that is printed.

With --scripts: 1,000 made sentences (`sentences.py`) in each of eight scripts, stored together in one model on one rank,
and asked for as they are and with letters and marks taken apart (NFD). Exit code 1 if a script has less than 90 %.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from sentences import LISTS, sentences

from lmcode import LMCODE, LMCODEConfig, dist
from lmcode.data.sources import open_source
from lmcode.memories.files import load_memory, make_folders, save_memory
from lmcode.presets import load_run_config

WORDS = range(6, 61)  # in a sentence
SMALLEST = LMCODEConfig(vocab_size=258, hidden_size=16, num_layers=1, num_heads=1, memory_head_dim=8, context_length=128)
EACH, WANTED = 1_000, 0.90  # made sentences of a script, and the share of them to be found


def texts_in(source: str) -> Iterator[str]:
    """Docstrings of a Python file; the whole text of anything else."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        yield source
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def sentences_in(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            if len(sentence.split()) in WORDS:
                yield sentence


def first_half(sentence: str) -> str:
    """Of its words; of its characters if it has no spaces."""
    between = " " if " " in sentence else ""
    units = sentence.split() if between else list(sentence)
    return between.join(units[:(len(units) + 1) // 2])


def apart(found: list[str], count: int) -> list[str]:
    """The first `count` of the sentences, passing over those of which one half begins another."""
    chosen: list[str] = []
    halves: set[str] = set()
    beginnings: set[str] = set()
    for sentence in found:
        half, own = first_half(sentence), {sentence[:end] for end in range(1, len(sentence) + 1)}
        if half not in beginnings and not own & halves:
            chosen.append(sentence)
            halves.add(half)
            beginnings |= own
    if len(chosen) < count:
        raise SystemExit(f"of {len(found):,} sentences only {len(chosen):,} can be told apart by their first half")
    return chosen[:count]


def choose(overrides: list[str], count: int) -> list[str]:
    """`count` sentences drawn from those whose first half begins no other sentence."""
    documents = open_source(load_run_config("tiny", overrides).data).read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the standard library tests invalid escapes
        found = sorted({one for _, text in documents for part in texts_in(text) for one in sentences_in(part)})
    clear = []
    for sentence in found:
        half = first_half(sentence)
        first = bisect.bisect_left(found, half)
        if not any(other.startswith(half) and other != sentence for other in found[first:first + 2]):
            clear.append(sentence)
    print(f"{len(found):,} distinct sentences, {1 - len(clear) / len(found):.1%} left out: their first half is not theirs "
          "alone", flush=True)
    if len(clear) < count:
        raise SystemExit(f"the corpus has {len(clear):,} such sentences: fewer than --count {count:,}")
    return random.Random(0).sample(clear, count)


def ask(model: LMCODE, sentences: list[str], name: str, group: dist.Group) -> list[int]:
    """Asks for every sentence; the ids at rank 1."""
    started = time.perf_counter()
    ids = [int(model.query_memory(first_half(sentence), top_k=1)[1][0]) for sentence in sentences]
    share = sum(id == place for place, id in enumerate(ids)) / len(ids)
    if group.rank == 0:
        print(f"  {name}: {share:.2%} at rank 1, {(time.perf_counter() - started) / len(ids) * 1e3:.1f} ms a question",
              flush=True)
    return ids


def work(rank: int, ranks: int, port: int, sentences: list[str], folder: Path, load: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.start()
    group, config = dist.Group.world(), load_run_config("tiny")
    torch.manual_seed(int(load))  # another model on purpose: keys do not depend on it
    model = LMCODE(config.model, memory=config.memory, group=group)
    if load:
        load_memory(folder, model.memories)
        ids = ask(model, sentences, f"loaded on {ranks} rank(s)", group)
    else:
        started = time.perf_counter()
        stored = model.store_experience(sentences)
        if stored != list(range(len(sentences))):
            raise SystemExit("a fresh memory numbers experiences from 0")
        if rank == 0:
            evicted = len(sentences) - len(model.experiences.held) if ranks == 1 else 0
            print(f"{ranks} rank(s): stored {len(sentences):,} in {time.perf_counter() - started:.0f} s, "
                  f"{evicted} of them evicted", flush=True)
            make_folders(folder, model.memories)
        ids = ask(model, sentences, "fresh", group)
        save_memory(folder, model.memories)
    if rank == 0:
        torch.save(ids, folder / f"ids-{'loaded' if load else 'fresh'}.pt")
    dist.stop()


def scripts() -> bool:
    """Prints the table of all scripts; whether each has its share."""
    model = LMCODE(SMALLEST, memory=load_run_config("tiny").memory)  # keys do not depend on the model
    good = True
    stored = {script: apart(sentences(script, 10 * EACH), EACH) for script in LISTS}
    first = {script: model.store_experience(texts)[0] for script, texts in stored.items()}
    print("| script | asked as stored | asked in NFD | lowest score |\n|---|---|---|---|")
    for script, texts in stored.items():
        shares, lowest = [], 1.0
        for form in ("NFC", "NFD"):
            hits = [model.query_memory(unicodedata.normalize(form, first_half(text)), top_k=1)[0][0] for text in texts]
            shares.append(sum(hit.id == first[script] + place for place, hit in enumerate(hits)) / EACH)
            lowest = min(lowest, *(hit.score for hit in hits))
        print(f"| {script} | {shares[0]:.1%} | {shares[1]:.1%} | {lowest:.2f} |", flush=True)
        good = good and min(shares) >= WANTED
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scripts", action="store_true")
    arguments, overrides = parser.parse_known_args()
    if arguments.scripts:
        sys.exit(0 if scripts() else 1)
    sentences = choose(overrides, arguments.count)
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for ranks, others in zip(arguments.ranks, arguments.ranks[1:] + arguments.ranks[:1], strict=True):
            folder = Path(scratch) / str(ranks)
            folder.mkdir()
            for size, load in ((ranks, False), (others, True)):
                torch.multiprocessing.spawn(work, (size, dist.free_port(), sentences, folder, load), nprocs=size)
                kind = "loaded" if load else "fresh"
                answers[ranks, kind] = torch.load(folder / f"ids-{kind}.pt")
    same = all(ids == answers[arguments.ranks[0], "fresh"] for ids in answers.values())
    print(f"the answers are {'the same' if same else 'NOT the same'} everywhere")


if __name__ == "__main__":
    main()
