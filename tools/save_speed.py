"""python tools/save_speed.py [--slots 100000] [--rounds 5] [--folder FOLDER] [section.key=value ...]

How fast a checkpoint is saved (hashed, every file and folder forced to disk) and loaded (verified, then into model,
optimizer and bank), beside `dd` with conv=fsync of the same bytes to the same disk, and `dd` reading them; alternating, the
page cache emptied of the files before each read. One process, one thread.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import torch

from lmcode.files import durable
from lmcode.train import loop, resuming, saving

WAYS = ("save, all of it", "pause of training", "dd conv=fsync", "verify", "verify and load", "dd reading")


def fill(session: Any) -> None:
    """A training step, so that the optimizer has moments, and a full bank."""
    loop.train_step(session)
    for bank in session.model.banks.values():
        for start in range(0, bank.slots, 10_000):
            count = min(10_000, bank.slots - start)
            key, value = torch.randn(2, bank.heads, count, bank.head_dim).unbind()
            bank.write(key, value, torch.zeros(count, dtype=torch.int64))


def forget(folder: Path) -> None:
    """Asks the system to drop these files' pages, so that a read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def dd(*words: str) -> None:
    subprocess.run(["dd", "bs=1M", "status=none", *words], check=True)


def measure_once(session: Any) -> dict[str, float]:
    """One round: the seconds of each way."""
    source, scratch = session.run_folder / "same.bin", session.run_folder / "dd.bin"
    pause = seconds(lambda: saving.start(session))
    whole = pause + seconds(lambda: saving.settle(session, wait=True))
    folder = session.saved
    source.write_bytes(b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()))
    wrote = seconds(lambda: dd(f"if={source}", f"of={scratch}", "conv=fsync"))
    forget(folder)
    verified = seconds(lambda: durable.verify(folder))
    forget(folder)
    loaded = seconds(lambda: (durable.verify(folder), resuming.restore(session, folder)))
    forget(session.run_folder)
    read = seconds(lambda: dd(f"if={scratch}", "of=/dev/null"))
    scratch.unlink()
    return dict(zip(WAYS, (whole, pause, wrote, verified, loaded, read), strict=True))


def measure(values: dict[str, Any], rounds: int, overrides: list[str]) -> tuple[int, list[dict[str, float]]]:
    """Bytes of a checkpoint, and the seconds of each way in each round."""
    for override in overrides:
        name, _, value = override.partition("=")
        section, key = name.split(".")
        values[section][key] = value
    session = chaos.resumed(values)
    fill(session)
    times = []
    for _ in range(rounds):
        session.step += 1
        times.append(measure_once(session))
    size = durable.read_manifest(session.saved).total_bytes
    session.close()
    return size, times


def main(argv: list[str] | None = None) -> None:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--slots", type=int, default=100_000, help="of the bank, 2 heads x 64 x key and value in fp32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args(argv)
    with chaos.place(arguments.folder) as folder:
        values = chaos.settings(folder, "speed", model={
            "long_term_memory_slots": arguments.slots, "memory_head_dim": 64, "hidden_size": 192, "num_layers": 4})
        (size, times), = chaos.on_ranks(measure, 1, values, arguments.rounds, overrides, folder=folder)
    medians = {way: statistics.median(one[way] for one in times) for way in WAYS}
    print(chaos.table([(f"{size / 1e6:.1f} MB, {arguments.rounds} rounds", "median ms", "MB/s", "rounds, ms"),
                       *((way, f"{1000 * medians[way]:.0f}", f"{size / 1e6 / medians[way]:.0f}",
                          ", ".join(f"{1000 * one[way]:.0f}" for one in times)) for way in WAYS)]))
    print(f"save / dd: {medians['save, all of it'] / medians['dd conv=fsync']:.2f} times its time; verify and load / dd "
          f"reading: {medians['verify and load'] / medians['dd reading']:.2f}")


if __name__ == "__main__":
    main()
