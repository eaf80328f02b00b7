"""The training step against one written down anew: row by row, on one process, with torch's AdamW and no DeepSpeed.

Other tests compare jobs of different shapes with each other, which a fault that all of them share would pass. Here every
number of a step comes from a second computation: of losses, gradients, weights, banks, spans for replay, learning rate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmcode import LMCODE, dist
from lmcode.config import RunConfig, build
from lmcode.data.replay import make_replay, make_sampler
from lmcode.data.streams import PassStart
from lmcode.memories.experiences import VISITS
from lmcode.model.state import StreamState
from lmcode.train import loop, observe
from lmcode.train.engine import MOMENTS
from lmcode.train.session import Session, StepResult
from lmcode.train.start import set_up
from tests.helpers.ranks import run_on_ranks

STEPS, REFUSED = 7, 4  # the step after so many is refused
STREAMS, T = 8, 8
RATE, WARMUP, CLIP, DECAY, BETAS, SHARE = 3e-3, 3, 0.5, 0.1, (0.9, 0.95), 0.1
VARIANTS = {  # of the settings, by name; what each adds to the plain step must change no number
    "cpu": {"deepspeed": "cpu"},
    "accumulation": {"deepspeed": "cpu", "gradient_accumulation_steps": 4},
    "zero2": {"deepspeed": "zero2", "gradient_accumulation_steps": 2},
    "zero3": {"deepspeed": "zero3", "gradient_accumulation_steps": 2, "activation_checkpointing": True},
    "replay": {"deepspeed": "zero2", "gradient_accumulation_steps": 2, "memory_sample_ratio": 0.25,
               "replay_sampler": "uniform", "replay_slots": 40},
}


def write_corpus(folder: Path) -> None:
    """Documents of half a window to four, so that streams begin, end and are padded in every step; no two parts alike."""
    (folder / "text").mkdir()
    chance = np.random.default_rng(0)
    for number in range(48):
        letters = chance.integers(97, 123, 5 + 7 * number % 29).astype(np.uint8)
        (folder / "text" / f"{number:02d}.txt").write_bytes(letters.tobytes())


def settings(folder: Path, name: str, R: int) -> dict[str, Any]:
    """A very small model. K exceeds the entries of a document, so that rounding decides over no hit."""
    return {
        "model": {"vocab_size": 257, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "context_length": T,
                  "short_term_memory_size": 4, "short_term_dim": 8, "short_term_segment": 4, "memory_layers": [1],
                  "memory_heads": 2, "memory_head_dim": 8, "memory_top_k": 64, "memory_bias": 0.0,
                  "long_term_memory_slots": 240},
        "memory": {"virtual_shards": 12},
        "data": {"path": str(folder / "text"), "tokenizer": "bytes", "held_out_share": 0.1, "packing": False,
                 "cache": str(folder / "cache")},
        "train": {"learning_rate": RATE, "warmup_steps": WARMUP, "total_steps": STEPS, "streams": STREAMS,
                  "sequence_length": T, "gradient_clip": CLIP, "weight_decay": DECAY, "betas": BETAS,
                  "min_learning_rate": SHARE, "log_every": 1, "run_dir": str(folder / "runs" / f"{name}-{R}"),
                  **VARIANTS[name]},
        "eval": {"every": 0, "streams": 2, "windows": 1, "final_windows": 1}}


class PlainJob:
    """What a job is to compute. Every row is read alone, as long as it is, by a model with a bank on this process."""

    def __init__(self, config: RunConfig, documents: Any, weights: dict[str, Tensor]) -> None:
        self.model = LMCODE(config.model, memory=config.memory)
        self.model.load_state_dict(weights, strict=False)  # the head's is the embedding's
        self.bank, self.replay = self.model.banks[1], make_replay(config)
        self.sampler = make_sampler(config, documents, self.replay, data_pass=PassStart(first_namespace=VISITS))
        named = dict(self.model.named_parameters())
        flat = [name for name, one in named.items() if one.ndim < 2 or name == "embedding.weight"]
        self.optimizer = torch.optim.AdamW(
            [{"params": [one for name, one in named.items() if name not in flat], "weight_decay": DECAY},
             {"params": [named[name] for name in flat], "weight_decay": 0.0}], betas=BETAS, eps=1e-8)
        self.states: dict[int, StreamState] = {}
        self.step = 0
        self.norm = math.nan

    @property
    def rate(self) -> float:
        """Of the current step: up to the peak in a line, then down half a cosine."""
        if self.step < WARMUP:
            return RATE * (self.step + 1) / WARMUP
        return RATE * (SHARE + (1 - SHARE) * (1 + math.cos(math.pi * (self.step - WARMUP) / (STEPS - WARMUP))) / 2)

    def train(self, *, refused: bool) -> float:
        """One step; its loss. A refused one leaves no trace, but that streams start afresh."""
        batch = self.sampler.batch(self.step)
        length_G = batch.valid_BT.sum(1).tolist()
        tokens, loss_G, offered, hits = sum(length_G), torch.zeros(STREAMS, dtype=torch.float64), [], []
        states: dict[int, StreamState] = {}
        self.optimizer.zero_grad()
        self.model.train()
        for row, length in enumerate(length_G):
            replayed = bool(batch.replayed_B[row])
            before = None if batch.reset_B[row] or replayed else self.states.get(row)
            if length:
                one = slice(row, row + 1)
                output = self.model(batch.input_ids_BT[one, :length], targets_BT=batch.targets_BT[one, :length],
                                    state=before, namespace_B=batch.namespace_B[one])
                (output.token_loss.sum() / tokens).backward()
                loss_G[row] = output.token_loss.detach().double().sum()
                offered.append(output.memory[1].candidates)
                hits.append(output.memory[1].hits)
                before = self.states.get(row) if replayed else output.state
            elif replayed or not batch.reset_B[row]:
                before = self.states.get(row)
            if before is not None:
                states[row] = before
        self.hit = {one for found in hits for one in found.id_HNK.flatten().tolist()} - {-1}
        if refused:
            self.states = {}
        else:
            self._update()
            self.states = states
            self.bank.commit(offered, hits, step=self.step)
            if self.replay is not None:
                self.sampler.remember(self.step, loss_G[:, None])
        self.step += 1
        return float(loss_G.sum()) / tokens

    def _update(self) -> None:
        parameters = list(self.model.parameters())
        self.norm = math.sqrt(sum(float(one.grad.double().square().sum()) for one in parameters))
        for parameter in parameters:
            parameter.grad *= min(1.0, CLIP / self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"weight": one.detach(), **{moment: self.optimizer.state[one][moment] for moment in MOMENTS}}
                for name, one in self.model.named_parameters()}


def assert_same_parameters(came: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    """Weights, and the moments, which alone know how large gradients were: Adam's update does not."""
    assert came.keys() == wanted.keys()
    for name, parts in wanted.items():
        for part, expected in parts.items():
            off = float((came[name][part] - expected).abs().max())
            allowed = 2e-5 if part == "weight" else 1e-3 * float(expected.abs().max())
            assert off <= allowed, f"{part} of {name} is off by {off:.2g}, more than {allowed:.2g}"


def assert_same_banks(session: Session, plain: PlainJob, old: int) -> None:
    """Every entry; and of those that were there before, ids below `old`, whether they were hit in this step, by hand."""
    bank = session.model.banks[1]
    states = dict(pair for part in session.group.all_gather_object([(shard, bank.state(shard)) for shard in bank.owned])
                  for pair in part)
    for shard, state in states.items():
        expected = plain.bank.state(shard)
        for name in ("id", "namespace", "step", "last_hit", "next_id", "rejected", "count"):
            assert torch.equal(state[name], expected[name]), (name, state[name], expected[name])
        for name in ("key", "value", "importance"):
            torch.testing.assert_close(state[name], expected[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(state["hit_mass"].double(), expected["hit_mass"].double(), rtol=1e-3, atol=10.0)
        there = (state["id"] >= 0) & (state["id"] < old)
        now = state["last_hit"][there] == plain.step - 1
        assert [one in plain.hit for one in state["id"][there].tolist()] == now.tolist()


def assert_same_spans(session: Session, plain: PlainJob) -> None:
    if plain.replay is None:
        return
    assert np.array_equal(session.replay.token_MX, plain.replay.token_MX)
    for name, column in plain.replay.columns.items():
        assert np.allclose(session.replay.columns[name], column, rtol=1e-4), name


def spoil(module: Any, inputs: Any, output: Tensor) -> None:
    """Lets the gradient be NaN where losses and all that is offered are fine: only the refusal keeps them out."""
    output.register_hook(lambda grad: grad * math.nan)


def logged(session: Session, result: StepResult) -> dict[str, float]:
    """What `log_step` records."""
    seen: dict[str, float] = {}
    session.clock.add("step", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.metrics, "scalars", lambda step, values: seen.update(values))
        observe.log_step(session, result)
    return seen


def follow(name: str, values: dict[str, Any]) -> dict[str, int]:
    """Trains a job and its plain double in step; how much of what matters came up."""
    config = build(RunConfig, values)
    session = set_up(config, dist.discover())
    plain = PlainJob(config, session.corpus.train, session.engine.weights())
    passes: list[int] = []
    session.model.layers[0].feed_forward.register_forward_hook(lambda *_: passes.append(1))
    seen = {"clipped": 0, "hit": 0, "evicted": 0, "replayed": 0, "reset": 0, "padded": 0}
    for step in range(STEPS):
        at, old = f"{name}, step {step}", plain.bank.next_id
        refused = step == REFUSED and session.group.rank == session.group.size - 1  # one rank is enough
        hook = session.engine.module.embedding.register_forward_hook(spoil) if refused else None
        passes.clear()
        rate, loss = plain.rate, plain.train(refused=step == REFUSED)
        result = loop.train_step(session)
        if hook is not None:
            hook.remove()
        assert result.applied == (step != REFUSED) and result.loss == pytest.approx(loss, abs=1e-4), at
        times = 1 + config.train.activation_checkpointing
        assert len(passes) == times * config.train.gradient_accumulation_steps, f"{at}: {len(passes)} passes"
        assert_same_parameters(dict(session.engine.parameters()), plain.parameters())
        assert_same_banks(session, plain, old if result.applied else 0)
        assert_same_spans(session, plain)
        batch = plain.sampler.batch(step)
        seen["replayed"] += int(batch.replayed_B.sum())
        seen["reset"] += int((batch.reset_B & ~batch.replayed_B).sum()) * (step > 0)
        seen["padded"] += int((~batch.valid_BT).sum())
        if result.applied:
            told = logged(session, result)
            assert told["train/grad_norm"] == pytest.approx(plain.norm, rel=1e-3), at
            assert told["train/learning_rate"] == pytest.approx(rate), at
            seen["clipped"] += plain.norm > CLIP
            seen["hit"] += len(plain.hit)
    seen["evicted"] = plain.bank.stats()["evicted"]
    session.close()
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    write_corpus(folder)
    return folder


def follow_all(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {name: follow(name, values) for name, values in jobs.items()}


@pytest.mark.parametrize("R", [1, 2])
def test_a_step_computes_what_the_plain_one_does(folder: Path, R: int) -> None:
    names = {1: ("cpu", "accumulation", "replay"), 2: ("cpu", "zero2", "zero3", "replay")}[R]
    for found in run_on_ranks(follow_all, R, {name: settings(folder, name, R) for name in names}):
        for name, seen in found.items():
            assert (seen.pop("replayed") > 5) == (name == "replay") and seen.pop("clipped") > 2, name
            assert min(seen.values()) > 10, (name, seen)


def log_another_rate(values: dict[str, Any]) -> float:
    session = set_up(build(RunConfig, values), dist.discover())
    result = loop.train_step(session)
    session.engine.set_learning_rate(0.123)
    told = logged(session, result)["train/learning_rate"]
    session.close()
    return told


def test_the_logged_learning_rate_is_that_of_the_optimizer(folder: Path) -> None:
    assert run_on_ranks(log_another_rate, 1, settings(folder, "zero2", 1)) == [0.123]
