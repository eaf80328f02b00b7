"""python tools/chaos_inputs.py [--inputs 100000] [--seed 0] [--folder FOLDER]

Hostile input. Paths that try to leave their folder (.., absolute, links, NUL, backslash, long, Unicode) in manifests, as
parts of a checkpoint, as names beside checkpoints and in `memory import`: each must be refused or harmless, and what lies
outside must stay unread and unchanged. Then generated inputs, mutations of valid ones and noise, to the config reader, the
manifest reader and the reader of `memory import`: nothing but the errors that users see as one line, within --memory MiB
and --seconds each. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chaos

from lmcode.cli import answers
from lmcode.config import ConfigError, RunConfig, to_yaml
from lmcode.data.tokenizer import ByteTokenizer
from lmcode.files import durable
from lmcode.memories.experience_input import experiences_of
from lmcode.presets import load_run_config

SECRET = b"outside: 5f0c2e"
HOSTILE = ("../secret", "../../secret", "a/../../secret", "..", ".", "", "/", "//", "a//b", "a/", "./a", "a/./b", "a/..",
           "/etc/passwd", "//etc/passwd", "~/../secret", "..\\secret", "C:\\secret", "C:/secret", "c:secret",
           "\\\\host\\share", "a\0b", "\0", "../secret\0.bin", "a\\b", "x" * 300 + "/../../secret", "../" * 2000 + "secret",
           "\u2025/secret/../..", "..\u2215..\u2215secret/../x", "%2e%2e/../secret", "manifest.json",
           "a/\u202e/../../secret", "\ufeff../secret/..", "step/../../../secret", "...//../secret", "file:///etc/passwd/../x")

# Paths


def fresh(folder: Path) -> tuple[Path, Path]:
    """Two commits in an empty folder, and a secret beside them."""
    parent = folder / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "secret").write_bytes(SECRET)
    for step in (1, 2):
        facts = durable.CommitFacts(step, 1, 1, "0" * 64, {})
        with durable.commit(durable.step_folder(parent, step), facts) as place:
            (place / "banks").mkdir()
            for name in ("model.bin", "banks/shard"):
                (place / name).write_text(f"{name} of {step}")
    return parent, durable.step_folder(parent, 2)


def in_manifest(name: str) -> Callable[[Path], None]:
    """A manifest, right in all else, that names this file."""
    def act(commit: Path) -> None:
        manifest = durable.read_manifest(commit)
        seal = durable.seal(commit.parents[1], ["secret"])["secret"]
        (commit / durable.MANIFEST).write_text(durable.render(manifest.facts, {**manifest.files, name: seal}))

    return act


def link_to(target: str, name: str = "model.bin") -> Callable[[Path], None]:
    """Puts a symbolic link in the place of a part of a checkpoint."""
    def act(commit: Path) -> None:
        path = commit / name
        if path.exists():
            path.rename(commit.parent / "moved")
        path.symlink_to(target if target[0] == "." else commit.parents[1] / target)

    return act


def beside(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something beside the checkpoints that looks like one, or like a pointer to one."""
    def act(commit: Path) -> None:
        make(commit.parent / name)

    return act


def write(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


REFUSED = {  # the newest must be refused, and the older one taken
    **{f"manifest names {name[:40]!r}": in_manifest(name) for name in HOSTILE},
    "a part is an absolute link": link_to("secret"), "a part is a link upwards": link_to("../../secret"),
    "a part is a link to its like": link_to("./banks/shard"), "a part is a dangling link": link_to("./nothing"),
    "a part is a link to itself": link_to("./model.bin"), "a folder is a link": link_to("../step-00000001/banks", "banks"),
    "the manifest is a link": link_to("../step-00000001/manifest.json", "manifest.json"),
    "an additional link": link_to("../../secret", "more"),
    "an additional link to the root": link_to("./../../../..", "root"),
}
HARMLESS = {  # the newest must be taken all the same
    "latest says ../secret": beside("latest", write("../secret")), "latest says /etc": beside("latest", write("/etc")),
    "latest is a link": beside("latest", link("..")), "a temporary link": beside(".step-00000009.tmp", link("..")),
    "step-x/..": beside("step-x", link("..")), "step-00000009 .. with a blank": beside("step-00000009 ", link("..")),
    "step with a newline": beside("step-00000009\n", link("..")),
    "step-00000009.0 links to a commit": beside("step-00000009.0", link("step-00000001")),
    "a set-aside link": beside("set-aside-step-00000009-0", link("..")),
}
SKIPPED = {  # a newer name that leads elsewhere must be skipped, and named
    "step-00000009 links to a commit": beside("step-00000009", link("step-00000001")),
    "step-00000009 links upwards": beside("step-00000009", link("..")),
    "step-00000009 is a loop": beside("step-00000009", link("step-00000009")),
    "step-00000009 is a file": beside("step-00000009", write("x")),
    "step-00000009.1 links to /": beside("step-00000009.1", link("/")),
}
IMPORTED = ({"path": "../secret"}, {"text": "x", "file": "../secret"}, {"text": "x", "../secret": 1},
            {"text": "x", "namespace": "a\ud800/../secret"}, {"ids": ["../secret"]}, {"text": {"file": "/etc/passwd"}})


def try_paths(folder: Path) -> tuple[int, list[str]]:
    """All hostile paths; how many there are, and those that came through."""
    failures = []
    cases = [(kind, name, act) for kind, table in (("refused", REFUSED), ("harmless", HARMLESS), ("skipped", SKIPPED))
             for name, act in table.items()]
    for kind, name, act in cases:
        parent, commit = fresh(folder / "paths")
        act(commit)
        found, skipped = durable.newest_verified(parent)
        reasons = " ".join(reason for _, reason in skipped)
        expected = commit if kind != "refused" else durable.step_folder(parent, 1)
        fine = found == expected and len(skipped) == (kind != "harmless") and "\n" not in reasons and "\0" not in reasons
        if not fine or SECRET.decode() in reasons or (folder / "paths" / "secret").read_bytes() != SECRET:
            failures.append(f"{name}: takes {found}, skips {skipped}")
    for number, row in enumerate(IMPORTED):
        (folder / "paths" / "rows.jsonl").write_text(json.dumps(row))
        outcome = import_rows(folder / "paths" / "rows.jsonl")
        if outcome == "accepted":
            failures.append(f"memory import takes row {number}: {row}")
    return len(cases) + len(IMPORTED), failures


# Generated inputs

YAML_BOMB = "model:\n  hidden_size:\n  - &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  - &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
CONFIG_SEEDS = (
    "preset: mine\nmodel:\n  hidden_size: 64\n  num_heads: 4\n  memory_layers: [1]\ntrain:\n  total_steps: 10\n",
    "memory: {virtual_shards: 4, scope: document}\ndata: {path: 'books/*.txt'}\ntrain: {betas: [0.9, 0.95], seed: 3}\n",
    "eval:\n  every: 0\n  slots: null\nmodel: {long_term_memory_slots: 100, memory_top_k: 5}\n",
    YAML_BOMB, MERGE_BOMB, "model: &m\n  num_layers: *m\n", "[" * 3000, "{a: " * 3000,
    "model: {hidden_size: " + "9" * 5000 + "}\n", "train: {learning_rate: 2001-99-99}\n", "? [a, b]\n: 1\n", "1: 2\n",
    "model: !!python/object/apply:os.system ['true']\n", "train: {streams: 1e400, seed: .nan}\n", "a: !!binary '*'\n",
    "model: {memory_layers: [" + "0, " * 3000 + "]}\n", "<<: {a: 1}\nmodel: {<<: [1, 2]}\n", "--- a\n--- b\n",
    "model: !!set {a}\n")
IMPORT_SEEDS = (
    '{"text": "The key is under the mat", "namespace": "house", "importance": 2.5, "stored_at": 1700000000}\n',
    '{"ids": [1, 2, 3], "namespace": 7}\n{"text": "a\\u00e9\\n", "importance": 1}\n', "[" * 100_000, '{"text": ' * 5000,
    '{"text": "x", "importance": 1e999}\n', '{"text": "x", "importance": NaN}\n', '{"text": "\\ud800"}\n',
    '{"ids": [' + "9" * 5000 + "]}\n", '{"ids": [true, 1.0, -1]}\n', '{"text": "x", "namespace": -1}\n',
    '{"text": "x", "stored_at": 1e18}\n', '{"text": "x", "text": "y"}\n', "\ufeff{}\n", "null\n", '"' + "x" * 50_000 + '"\n')
TOKENS = (b"\0", b"\xff", b"\xc3", b"[", b"]", b"{", b"}", b":", b",", b'"', b"'", b"&a ", b"*a", b"!!int ", b"!!float ",
          b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 400, b"\n", b"\t", b"- ", b"? ", b"<<: ", b"\\ud800", b"../",
          b"0x", b"~", b"2001-99-99", b"!!timestamp ", b"1_0", b"1:99:99", b".inf", b"|\n", b"# ",
          b"%YAML 9.9\n", b"\xef\xbb\xbf", b"text")


def mutate(seeds: list[bytes], chance: random.Random) -> bytes:
    """Noise, or a valid input with a few changes: bits, spans removed, doubled or moved in from another, tokens."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(200))
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 2, 8, 40)))
        way = chance.randrange(5)
        if way == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            del content[at:end]
        elif way == 2:
            content[at:at] = content[at:end] * chance.choice((1, 2, 30))
        elif way == 3:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            content[at:end] = other[start:start + 60]
        else:
            content[at:at] = chance.choice(TOKENS)
    return bytes(content)


def read_config(path: Path) -> str:
    try:
        load_run_config(path)
    except ConfigError as error:
        return one_line(error)
    return "accepted"


def read_manifest(path: Path) -> str:
    try:
        durable.read_manifest(path.parent)
    except durable.DamagedCheckpoint as error:
        return one_line(error)
    return "accepted"


def import_rows(path: Path) -> str:
    """What `lmcode memory import` does with a file before it stores anything."""
    try:
        rows = answers.read_rows(str(path))
        columns = {name: [row.get(name, default) for row in rows]
                   for name, default in (("namespace", 0), ("importance", 1.0), ("stored_at", 0))}
        experiences_of([row["text"] if "text" in row else row["ids"] for row in rows], tokenizer=ByteTokenizer(),
                       vocab_size=257, **columns)
    except ValueError as error:
        return one_line(error)
    return "accepted"


def one_line(error: ValueError) -> str:
    """How a refusal counts: its message must be short."""
    return "refused" if len(str(error)) < 20_000 else "a message of many pages"


def seeds_of(kind: str, folder: Path) -> list[bytes]:
    if kind == "manifest":
        _, commit = fresh(folder)
        valid = (commit / durable.MANIFEST).read_bytes()
        return [valid, json.dumps(json.loads(valid)).encode(), b"[" * 50_000, b"9" * 9000, b"{}"]
    seeds = (*CONFIG_SEEDS, to_yaml(RunConfig())[:1400]) if kind == "config" else IMPORT_SEEDS
    return [seed.encode("utf-8", "surrogatepass") for seed in seeds]


class TooLong(BaseException):
    """An input that took longer than it may."""


def stop(*_: object) -> None:
    raise TooLong


def feed(kind: str, count: int, seed: int, seconds: float, memory: int, folder: Path) -> dict[str, Any]:
    """Generated inputs of one kind, the seeds first; runs in a process of its own, whose memory is limited."""
    target: Callable[[Path], str] = {"config": read_config, "manifest": read_manifest, "memory import": import_rows}[kind]
    name = {"config": "run.yaml", "manifest": durable.MANIFEST, "memory import": "rows.jsonl"}[kind]
    seeds, chance = seeds_of(kind, folder / "seeds"), random.Random(seed)
    path, outcomes, failures, slowest = folder / "step-00000002" / name, Counter[str](), dict[str, str](), 0.0
    path.parent.mkdir(parents=True)
    target(path)  # imports what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, stop)
    for content in inputs(seeds, count, chance):
        path.write_bytes(content)
        began = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        try:
            outcome = target(path)
        except BaseException as error:  # whatever it is, it is the finding
            outcome = type(error).__name__
        signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.process_time() - began
        outcome = "too slow" if took > seconds and outcome in ("accepted", "refused") else outcome
        outcomes[outcome] += 1
        slowest = max(slowest, took)
        if outcome not in ("accepted", "refused"):
            failures.setdefault(outcome, repr(content[:300]))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest, "grown": grown}


def inputs(seeds: list[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """All seeds as they are; then mutations of the short ones."""
    yield from seeds[:count]
    short = [seed for seed in seeds if len(seed) < 1500]
    for _ in range(count - len(seeds)):
        yield mutate(short, chance)


def run(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]] = [("inputs to", "given", "accepted", "refused", "anything else", "slowest, s CPU",
                                    "memory, MiB")]
    with chaos.place(arguments.folder) as folder:
        paths, failures = try_paths(folder)
        for number, kind in enumerate(("config", "manifest", "memory import")):
            count = arguments.inputs // 3 + (number < arguments.inputs % 3)
            seen, = chaos.on_ranks(feed, 1, kind, count, arguments.seed + number, arguments.seconds, arguments.memory,
                                   folder / kind, folder=folder)
            outcomes = seen["outcomes"]
            other = sum(outcomes.values()) - outcomes["accepted"] - outcomes["refused"]
            rows.append((kind, sum(outcomes.values()), outcomes["accepted"], outcomes["refused"], other,
                         f"{seen['slowest']:.2f}", f"{seen['grown']:+.0f}"))
            failures += [f"{kind}: {outcomes[what]:,} x {what}, such as {example}"
                         for what, example in seen["failures"].items()]
    print(chaos.table(rows))
    return chaos.verdict(f"{paths} paths that lead elsewhere refused or harmless; {arguments.inputs:,} generated inputs: no "
                         "crash, no hang, no memory blow-up", failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--inputs", type=int, default=10**5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of processor time that one input may take")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="that reading may take")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
