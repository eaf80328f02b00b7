"""python tools/fingerprint.py [--steps 50] [--folder runs/fingerprint] [--out before.json] [--compare before.json]

What the default job computes, to the last bit, on 1 and 2 ranks: every step's training loss, the held-out losses, the
evictions, and a hash of each kind of file in the last checkpoint (weights, optimizer, and of the banks all tensors: keys,
values, ids, hits, importance). A refactoring is proven by `--out` before it and `--compare` after it, on the same machine:
another processor rounds differently. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jobs
import torch
from safetensors.torch import load_file

RANKS = (1, 2)


def digest(files: list[Path]) -> str:
    """blake2b over the names and bytes of all tensors in some safetensors files, by file and name."""
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        for name, tensor in sorted(load_file(file).items()):
            whole.update(f"{file.name} {name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def fingerprint(run: Path) -> dict[str, object]:
    """The numbers of a finished run, as JSON values that are equal only if every bit is."""
    rows = jobs.metrics(run)
    checkpoint = max((run / "checkpoints").glob("step-*"))
    kinds = {name: digest([path for path in (checkpoint / name).rglob("*.safetensors")] if name != "weights"
                          else [checkpoint / "model.safetensors"]) for name in ("weights", "optimizer", "banks", "streams")}
    last = {key: jobs.last(run, key) for key in sorted({key for row in rows for key in row})
            if key.startswith("eval/") or key.endswith(("/evicted", "/fill", "/rejected", "/merged"))}
    return {"train/loss": [row["train/loss"] for row in rows if "train/loss" in row], **last, **kinds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/fingerprint"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    arguments, overrides = parser.parse_known_args()
    shared = [f"train.total_steps={arguments.steps}", "train.warmup_steps=10", "train.log_every=1", "eval.every=0",
              "eval.final_windows=4", *overrides]
    found = {str(ranks): fingerprint(jobs.train(f"ranks-{ranks}", shared, ranks=ranks, folder=arguments.folder.resolve()))
             for ranks in RANKS}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = found if arguments.compare is None else json.loads(arguments.compare.read_text(encoding="utf-8"))
    different = []
    for ranks, numbers in found.items():
        for name, value in numbers.items():
            same = value == expected[ranks].get(name) or value != value
            different += [] if same else [f"{name} on {ranks} rank(s)"]
            shown = f"{value[-1]!r} after {len(value)} steps" if isinstance(value, list) else value
            print(f"{ranks} rank(s)  {name:<28} {shown}{'' if same else '   DIFFERENT'}")
    print("different: " + ", ".join(different) if different else "nothing is different")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
