"""A run of a very small model in the ranks of a test: its text, its settings, its session."""

from __future__ import annotations

from pathlib import Path

from lmcode import dist
from lmcode.config import RunConfig, build
from lmcode.train.session import Session
from lmcode.train.start import set_up

STEPS = 5


def write_corpus(folder: Path) -> Path:
    """Twenty documents of repetitive words, so that there is something to recall and a few windows to walk."""
    text = folder / "text"
    text.mkdir()
    for number in range(20):
        words = [f"w{(number * 7 + place * place) % 23}" for place in range(60 + 5 * number)]
        (text / f"{number:02d}.txt").write_text(" ".join(words))
    return text


def settings(folder: Path, name: str, **sections: dict) -> dict:
    """A run of a very small model; 12 streams, so that 1, 2, 3 and 4 ranks can share it."""
    base = {
        "model": {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 16,
                  "short_term_memory_size": 4, "short_term_dim": 8, "short_term_segment": 8, "memory_layers": [1],
                  "memory_heads": 2, "memory_head_dim": 8, "memory_top_k": 4, "memory_bias": 0.0,
                  "long_term_memory_slots": 480},
        "memory": {"virtual_shards": 12},
        "data": {"path": str(folder / "text"), "tokenizer": "bytes", "held_out_share": 0.2,
                 "cache": str(folder / "cache")},
        "train": {"learning_rate": 3e-3, "warmup_steps": 2, "total_steps": STEPS, "streams": 12, "sequence_length": 16,
                  "log_every": 1, "run_dir": str(folder / "runs" / name)},
        "eval": {"every": 0, "streams": 12, "windows": 2, "final_windows": 2},
    }
    for section, changes in sections.items():
        base[section].update(changes)
    return base


def start(values: dict) -> Session:
    return set_up(build(RunConfig, values), dist.discover())
