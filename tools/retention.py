"""Recipe mplus on a frozen backbone: are facts known after 0 to 50 later texts, by the pool alone, and by pool and bank?

    python tools/smollm2.py models/smollm2
    python tools/retention.py models/smollm2 book.txt --seeds 3

Each stream reads filler until its pool is full, then one fact ("The password of Ruth is elephant."), then pieces of the book
as later texts; there is no cache but the sinks, so all that is known of the fact goes through the memory. After some of the
later texts a copy of each stream reads the question; what is measured is the loss of the answer's first token in nats, and
how often it is the likeliest of all the answers that the streams were told. "none" reads the question alone, "context" the
fact right before it. The expected share of the fact's tokens in a pool is (1 - K/N)^t. Lines are printed as soon as they are
known, means over facts.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcode.recipes.attach import attach

NAMES = ("Ruth", "Peter", "Alice", "Henry", "Laura", "Simon", "Clara", "Oscar", "Nancy", "David", "Emily", "Frank")
ANSWERS = ("elephant", "silver", "window", "garden", "coffee", "rocket", "island", "winter", "yellow", "doctor", "bridge",
           "orange")


class Streams:
    """Streams of one model that read in step, and the memories that they write."""

    def __init__(self, model: Any, namespace_B: torch.Tensor) -> None:
        self.backbone, self.namespace_B, self.state, self.step = model.lmcode, namespace_B, None, 0

    def read(self, ids_BT: torch.Tensor) -> None:
        """One text of each stream; what the pools drop is written."""
        output = self._output(ids_BT)
        self.backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=self.step)
        self.state, self.step = output.state, self.step + 1

    def ask(self, ids_BT: torch.Tensor, *, bank: bool) -> torch.Tensor:
        """Logits [B, V] behind a question; nothing is written."""
        with self.backbone.reading_from(self.backbone.banks if bank else {}):
            logits_BV: torch.Tensor = self._output(ids_BT).logits[:, -1]
        return logits_BV

    def _output(self, ids_BT: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.backbone(ids_BT, state=self.state, namespace_B=self.namespace_B)


def told(logits_BV: torch.Tensor, answer_B: torch.Tensor) -> dict[str, float]:
    """The loss of the right answers, and the share of them that beat the others."""
    loss = torch.nn.functional.cross_entropy(logits_BV.float(), answer_B)
    best_B = logits_BV[:, answer_B].argmax(dim=1)
    return {"loss": round(float(loss), 3),
            "right": round(float((best_B == torch.arange(len(best_B))).float().mean()), 3)}


def measure(model: Any, tokenizer: Any, filler_N: torch.Tensor, *, seed: int, marks: list[int], text: int) -> None:
    """One seed: who has which password, and which pieces of the book come between."""
    draw, B = random.Random(seed), len(NAMES)
    answers, options = draw.sample(ANSWERS, B), model.lmcode.options

    def ids(texts: list[str]) -> torch.Tensor:
        return torch.tensor([tokenizer(one)["input_ids"] for one in texts])

    facts_BT = ids([f" The password of {name} is {word}." for name, word in zip(NAMES, answers, strict=True)])
    asked_BT = ids([f" The password of {name} is" for name in NAMES])
    answer_B = ids([f" {word}" for word in answers])[:, 0]

    def later() -> torch.Tensor:
        starts = [draw.randrange(len(filler_N) - text) for _ in range(B)]
        return torch.stack([filler_N[start:start + text] for start in starts])

    def say(setting: str, texts: int, logits_BV: torch.Tensor) -> None:
        share = (1 - options.compressed / options.pool) ** texts
        print(json.dumps({"seed": seed, "later texts": texts, "setting": setting, **told(logits_BV, answer_B),
                          "(1 - K/N)^t": round(share, 3)}), flush=True)

    streams = Streams(model, torch.arange(B) + seed * B)
    first_BT = later()
    streams.read(first_BT)
    say("none", 0, streams.ask(asked_BT, bank=False))
    with torch.no_grad():
        say("context", 0, model(torch.cat([first_BT, facts_BT, asked_BT], dim=1)).logits[:, -1])
    while int(streams.state.recipe[-2].min()) < options.pool:
        streams.read(later())
    say("none, full pool", 0, streams.ask(asked_BT, bank=False))
    streams.read(facts_BT)
    for texts in range(max(marks) + 1):
        if texts:
            streams.read(later())
        if texts in marks:
            say("pool", texts, streams.ask(asked_BT, bank=False))
            say("pool and bank", texts, streams.ask(asked_BT, bank=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("book", type=Path, help="text that the filler is cut from")
    parser.add_argument("--marks", nargs="+", type=int, default=[0, 1, 2, 5, 10, 20, 50], help="numbers of later texts")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pool", type=int, default=160, help="N")
    parser.add_argument("--compressed", type=int, default=16, help="K")
    parser.add_argument("--text", type=int, default=24, help="tokens of a later text")
    parser.add_argument("--bias", type=float, default=0.0, help="model.memory_bias")
    parser.add_argument("--distance", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (%(default)s)")
    parser.add_argument("--layers", choices=("upper", "all"), default="all", help="which have a memory")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    filler_N = torch.tensor(tokenizer(args.book.read_text(encoding="utf-8")[:400_000])["input_ids"])
    for seed in range(args.seeds):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        layers = model.config.num_hidden_layers
        attach(model, "mplus", memory_layers=tuple(range(layers // 2 if args.layers == "upper" else 0, layers)),
               pool=args.pool, compressed=args.compressed, sinks=4, cache=0, distance=args.distance, memory_bias=args.bias,
               memory={"virtual_shards": 1}, long_term_memory_slots=16384)
        model.lmcode.eval()
        measure(model, tokenizer, filler_N, seed=seed, marks=args.marks, text=args.text)


if __name__ == "__main__":
    main()
