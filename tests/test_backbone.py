"""A second backbone of a few lines, not LMCODE: training, evaluation, checkpoints, experiences take it as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode import MemoryAwareTrainer, MemoryDataset, create_synthetic_dataset, generate_memory_report, opening
from lmcode.backbone import Backbone
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, RunConfig
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.eval.held_out import evaluate
from lmcode.eval.reading import MODES
from lmcode.protocol import Candidates, EntryShape, LayerMemory, NullRetriever, Retriever
from lmcode.report.facts import gather
from lmcode.report.flow import memory_flow
from tests.helpers.ranks import run_on_ranks

SHAPES = {0: EntryShape(1, 4, 4), 1: EntryShape(3, 6, 6)}
CONFIG = LMCODEConfig(backbone="toy", vocab_size=257, context_length=8, long_term_memory_slots=480, memory_top_k=4)


class ToyState(NamedTuple):
    """The mean of what a stream has read."""

    mean_BC: Tensor
    pending_valid_B: Tensor


class ToyOutput(NamedTuple):
    logits: Tensor
    loss: Tensor | None
    token_loss: Tensor | None
    state: ToyState
    memory: dict[int, LayerMemory]


class ToyRead(nn.Module):
    """Adds what the memory says to each token; a token's entry is its key and its own vector as the value."""

    def __init__(self, width: int, shape: EntryShape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.heads * shape.key_width
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.output = nn.Linear(inner, width)
        object.__setattr__(self, "retriever", NullRetriever())

    def forward(self, x_BTC: Tensor, namespace_N: Tensor, document_N: Tensor | None, valid_N: Tensor
                ) -> tuple[Tensor, LayerMemory]:
        def heads(linear: nn.Linear) -> Tensor:
            return linear(x_BTC).view(-1, self.shape.heads, self.shape.key_width).transpose(0, 1)

        query_HND, key_HND = F.normalize(heads(self.query), dim=-1), F.normalize(heads(self.key), dim=-1)
        hits = self.retriever.search(query_HND, namespace_N, document_N)
        value_HND, logsumexp_HN = self.retriever.attend(query_HND, hits)
        share_HN = torch.sigmoid(logsumexp_HN)
        read_BTC = self.output((value_HND * share_HN.unsqueeze(-1)).transpose(0, 1).reshape(*x_BTC.shape[:2], -1))
        share_HN = share_HN.detach()
        candidates = Candidates(key_HND.detach(), heads(self.value).detach(), namespace_N, torch.zeros(len(namespace_N)),
                                valid_N, document_N)
        return x_BTC + read_BTC, LayerMemory(hits._replace(credit_HN=share_HN), candidates,
                                             torch.ones(x_BTC.shape[:2]), share_HN, 1.0 - share_HN)


class Toy(Backbone):
    """Two layers that see their own token, the mean of the stream so far, and the memory."""

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.begin(config, memory, group=group, device=device)
        self.embedding = nn.Embedding(config.vocab_size, 16)
        self.reads = nn.ModuleList(ToyRead(16, shape) for shape in SHAPES.values())
        self.head = nn.Linear(16, config.vocab_size)
        self.set_retrievers(self.banks)

    @classmethod
    def memory_shapes(cls, config: LMCODEConfig) -> dict[int, EntryShape]:
        return SHAPES

    def set_retrievers(self, retrievers: Mapping[int, Retriever]) -> None:
        for layer, read in enumerate(self.reads):
            object.__setattr__(read, "retriever", retrievers.get(layer, NullRetriever()))

    @contextmanager
    def reading_from(self, retrievers: Mapping[int, Retriever]) -> Iterator[None]:
        former = {layer: read.retriever for layer, read in enumerate(self.reads)}
        self.set_retrievers(retrievers)
        yield
        self.set_retrievers(former)

    def blank_state(self, num_streams: int, *, device: torch.device | None = None) -> ToyState:
        return ToyState(torch.zeros(num_streams, 16), torch.zeros(num_streams, dtype=torch.bool))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, targets_BT: Tensor | None = None,
                state: ToyState | None = None, reset_B: Tensor | None = None, namespace_B: Tensor | None = None,
                document_B: Tensor | None = None, valid_BT: Tensor | None = None, piece_BT: Tensor | None = None
                ) -> ToyOutput:
        B, T = input_ids.shape
        state = state or self.blank_state(B)
        valid_BT = torch.ones_like(input_ids, dtype=torch.bool) if valid_BT is None else valid_BT
        kept_B = 1.0 if reset_B is None else (~reset_B).float()[:, None]
        embedded_BTC = self.embedding(input_ids)
        x_BTC = embedded_BTC + (state.mean_BC * kept_B)[:, None]
        memory = {}
        for layer, read in enumerate(self.reads):
            document_N = None if document_B is None else document_B.repeat_interleave(T)
            x_BTC, memory[layer] = read(x_BTC, namespace_B.repeat_interleave(T), document_N, valid_BT.flatten())
        logits_BTV, loss_BT = self.head(x_BTC), None
        if targets_BT is not None:
            loss_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view(B, T)
        return ToyOutput(logits_BTV, None if loss_BT is None else loss_BT.mean(), loss_BT,
                         ToyState(embedded_BTC.detach().mean(1), valid_BT.any(1) | state.pending_valid_B), memory)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy(CONFIG, memory=MemoryConfig(virtual_shards=4, experience_slots=8))


def data(seed: int = 0) -> MemoryDataset:
    return MemoryDataset(create_synthetic_dataset(12, 40, vocab_size=64, seed=seed), 0.25)


def losses(model: Toy) -> dict[str, float]:
    sampler = StreamSampler(data(1).as_documents(), streams=4, sequence_length=8, seed=0, epochs=1, shuffle=False)
    return {mode: evaluate(model, sampler, banks=model.banks, group=model.group, mode=mode).loss for mode in MODES}


def hashes(model: Toy) -> list[str]:
    return [bank.content_hash() for bank in model.banks.values()]


def train_and_open(folder: Path) -> dict[str, Any]:
    """Trains a toy, saves it, and goes on in two ways: a new trainer, and whatever opens a path."""
    opening.BACKBONES["toy"] = Toy
    model, settings = toy(), {"learning_rate": 1e-2, "warmup_steps": 0, "sequence_length": 8, "log_every": 1}
    trainer = MemoryAwareTrainer(model, {**settings, "memory_consolidation_interval": 3})
    history = trainer.train(data(), num_epochs=3, batch_size=4)
    trainer.save_checkpoint(folder / "toy.pt")
    again = MemoryAwareTrainer(toy(1), settings)
    again.load_checkpoint(folder / "toy.pt")
    opened = opening.open_model(folder / "toy.pt").model
    state = trainer._session.states[0]
    return {"losses": history["loss"], "written": [bank.next_id for bank in model.banks.values()],
            "hashes": [hashes(one) for one in (model, again.model, opened)],
            "evaluated": [losses(one) for one in (model, again.model, opened)],
            "states": torch.equal(state.mean_BC, again._session.states[0].mean_BC), "kind": type(opened).__name__}


def test_what_is_not_lmcode_is_trained_measured_saved_and_opened(tmp_path: Path) -> None:
    came, = run_on_ranks(train_and_open, 1, tmp_path)
    assert all(map(math.isfinite, came["losses"])) and came["losses"][-1] < came["losses"][0]
    assert min(came["written"]) > 100 and came["hashes"][0] == came["hashes"][1] == came["hashes"][2]
    assert came["evaluated"][0] == came["evaluated"][1] == came["evaluated"][2]
    assert len(set(came["evaluated"][0].values())) == len(MODES), "each mode reads another memory"
    assert came["states"] and came["kind"] == "Toy"


def test_its_entries_have_the_shape_that_it_declares() -> None:
    model = toy()
    assert {layer: (bank.heads, bank.head_dim) for layer, bank in model.banks.items()} == {0: (1, 4), 1: (3, 6)}


def test_it_has_experiences() -> None:
    model = toy()
    first, second = model.store_experience([[5, 6, 7, 8, 9], [10, 11, 12]], namespace=["a", "b"])
    assert model.query_memory([6, 7, 8], top_k=1)[0][0].id == first
    assert [bank.stats()["live"] for bank in model.banks.values()] == [8, 8]
    assert model.delete_experiences(ids=[first]).entries == 10
    assert model.inspect_experience(second)["token_entries"][1]["live"] == 3


def test_a_report_shows_what_it_has() -> None:
    """Its layers, and no learned numbers, as it has none that the report knows."""
    model, documents = toy().eval(), create_synthetic_dataset(4, 40, vocab_size=64, seed=0).tolist()
    before = hashes(model)
    facts = gather(model, documents, title="toy")
    assert [bank.layer for bank in facts.banks] == list(SHAPES) and facts.banks[0].temperature_H == []
    assert "layer 1" in str(generate_memory_report(model, documents)) and hashes(model) == before
    assert memory_flow(model, documents[0][:8]).layers == tuple(SHAPES)


def test_values_wider_than_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, 1, EntryShape(3, 6, 12))
    with pytest.raises(ConfigError, match="keys and values must have one width: those of layer 1 have 6 and 12"):
        toy()


def test_an_unknown_backbone_is_refused() -> None:
    config = RunConfig(model=LMCODEConfig(backbone="lmcod"))
    with pytest.raises(ConfigError, match=r"model.backbone must be one of lmcode.*: got 'lmcod'. Did you mean 'lmcode'"):
        opening.make_model(config, group=Group(), device=torch.device("cpu"))
