"""No prediction can look up its own answer: not in an earlier epoch, another pass, or a copy of the same document.

By construction: every token of the documents here is unique to a text and a place in it, so the tokens themselves say which
entry was written from where, whatever the code under test believes. Entries are followed by their ids through real commits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lmcode import LMCODE, LMCODEConfig, MemoryAwareTrainer, MemoryDataset
from lmcode.config import MemoryConfig
from lmcode.data.corpus import Documents
from lmcode.data.streams import Batch, StreamSampler
from lmcode.dist import Group
from lmcode.eval.held_out import evaluate
from lmcode.memory import lifecycle, measure, searcher
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import UNKNOWN
from lmcode.protocol import Hits, LayerMemory
from lmcode.train import loop
from lmcode.train.session import StepResult
from tests.helpers.ranks import run_on_ranks

END, LENGTH, TEXTS, COPIES = 0, 20, 6, 2  # the first texts occur twice
LAYER, WINDOW, STREAMS, EPOCHS = 1, 6, 4, 2
TOKENS = 1 + TEXTS * LENGTH


class Place(NamedTuple):
    """Where a token stands: in which text, and how far into it."""

    text: int
    position: int


class Count(NamedTuple):
    """Predictions that were made; of those, how many could see an entry of their text from before them, or their answer."""

    predictions: int
    own: int
    leaks: int

    def plus(self, other: Count) -> Count:
        return Count(*(one + another for one, another in zip(self, other, strict=True)))


def text_tokens(text: int) -> list[int]:
    return list(range(1 + text * LENGTH, 1 + (text + 1) * LENGTH))


def documents() -> Documents:
    texts = [[END, *text_tokens(text % TEXTS), END] for text in range(TEXTS + COPIES)]
    return Documents(np.concatenate(texts).astype(np.uint16), np.cumsum([0, *map(len, texts)]), list(map(str, texts)))


def place_of(token: int) -> Place:
    return Place(*divmod(token - 1, LENGTH))


def queries(batch: Batch, stride: int) -> list[Place | None]:
    """The place of the first token that each query answers for; None for padding."""
    places = []
    for ids, targets, valid in zip(batch.input_ids_BT.tolist(), batch.targets_BT.tolist(), batch.valid_BT.tolist(),
                                   strict=True):
        for at in range(0, len(ids), stride):
            place = place_of(targets[at] if ids[at] == END else ids[at]) if valid[at] else None
            places.append(place._replace(position=-1) if place and ids[at] == END else place)
    return places


class Ledger:
    """Which place the value of each entry came from, and what the hits of each step could see."""

    def __init__(self) -> None:
        self.written: dict[int, Place] = {}
        self.counted = Count(0, 0, 0)

    def read(self, asked: Iterable[Place | None], hits: Hits) -> None:
        for place, ids in zip(asked, hits.id_HNK.transpose(0, 1).flatten(1).tolist(), strict=True):
            if place is not None:
                own = [self.written[id].position for id in ids if id >= 0 and self.written[id].text == place.text]
                before, after = (any(side) for side in zip(*((at < place.position, at >= place.position) for at in own),
                                                           strict=True)) if own else (False, False)
                self.counted = self.counted.plus(Count(1, before, after))

    def write(self, group: Group, first_id: int, batches: list[Batch], reads: list[LayerMemory]) -> None:
        mine = [place_of(token) for batch, read in zip(batches, reads, strict=True)
                for token in batch.input_ids_BT.flatten()[read.candidates.valid_N].tolist()]
        everyones = [place for part in group.all_gather_object(mine) for place in part]
        self.written.update(enumerate(everyones, start=first_id))


class Listed:
    """Reads the entries of some namespaces: of all that there are."""

    def __init__(self, bank: LongTermMemory) -> None:
        self._bank, self.top_k = bank, bank.top_k

    def search(self, query_HND: torch.Tensor, namespace_N: torch.Tensor, document_N: torch.Tensor | None = None) -> Hits:
        return self._bank.search(query_HND, namespace_N, document_N, scope=list(range(2 * EPOCHS * (TEXTS + COPIES))))

    def attend(self, query_HND: torch.Tensor, hits: Hits) -> tuple[torch.Tensor, torch.Tensor]:
        return self._bank.attend(query_HND, hits)

    def fetch(self, hits: Hits) -> tuple[torch.Tensor, ...]:
        return self._bank.fetch(hits)


def make_model(*, stride: int = 1, group: Group | None = None, **memory: Any) -> LMCODE:
    torch.manual_seed(0)
    shape = LMCODEConfig(vocab_size=TOKENS, hidden_size=16, num_layers=2, num_heads=2, context_length=LENGTH + 2,
                         short_term_memory_size=0, memory_layers=(LAYER,), memory_heads=2, memory_head_dim=8, memory_top_k=8,
                         memory_bias=0.0, long_term_memory_slots=900, retrieval_stride=stride)
    return LMCODE(shape, memory=MemoryConfig(virtual_shards=4, **memory), group=group)


def read_epochs(shuffle: bool, settings: dict[str, Any], stride: int = 1, checkpointing: bool = False,
                listed: bool = False, packed: bool = False) -> Count:
    """Reads all documents for two epochs as training does, forward, backward and commit; every rank its streams."""
    group = Group.world()
    model, ledger, state = make_model(stride=stride, group=group, **settings), Ledger(), None
    model.activation_checkpointing, bank = checkpointing, model.banks[LAYER]
    if listed:
        model.set_retrievers({LAYER: Listed(bank)})
    sampler = StreamSampler(documents(), streams=STREAMS, sequence_length=WINDOW, seed=3, epochs=EPOCHS, shuffle=shuffle,
                            packed=packed)
    for step in range(sampler.num_steps):
        batch = sampler.batch(step, rank=group.rank, world_size=group.size)
        output = model(batch.input_ids_BT, targets_BT=batch.targets_BT, state=state, reset_B=batch.reset_B,
                       valid_BT=batch.valid_BT, **batch.reading())
        output.loss.backward()
        read, state = output.memory[LAYER], output.state
        ledger.read(queries(batch, stride), read.hits)
        ledger.write(group, bank.next_id, [batch], [read])
        bank.commit([read.candidates], [read.hits], step=step)
        assert measure.recall(bank) == 1.0, "what is checked is hidden from the check, too"
    return ledger.counted


def read_all_ways() -> list[Count]:
    return [read_epochs(True, {"scope": "global", "tier": tier, "exchange": exchange, "fetch": fetch, "group_size": size})
            for tier, exchange, fetch, size in (("exact", "all_gather", "sums", 0), ("faiss-flat", "all_to_all", "rows", 0),
                                                ("exact", "all_gather", "sums", 1))]


def check(counted: Count) -> None:
    assert counted.predictions == EPOCHS * (TEXTS + COPIES) * (LENGTH + 1), "every one is looked at"
    assert counted.own > 0, "what this reading has written is found"
    assert counted.leaks == 0


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("scope", ["document", "global", "listed"])
@pytest.mark.parametrize("tier", ["exact", "faiss-flat"])
def test_no_epoch_shows_a_prediction_its_answer(tier: str, scope: str, shuffle: bool) -> None:
    settings = {"scope": "document" if scope == "listed" else scope, "tier": tier}
    check(read_epochs(shuffle, settings, listed=scope == "listed"))


def test_nor_does_it_on_several_ranks_or_in_memory_groups() -> None:
    alone = read_epochs(True, {"scope": "global", "tier": "exact"})
    for rank in zip(*run_on_ranks(read_all_ways, 2), strict=True):
        whole = rank[0].plus(rank[1])
        check(whole)
        assert whole == alone


def test_nor_where_layers_are_recomputed_or_vectors_travel_as_they_are() -> None:
    plain = read_epochs(True, {"scope": "global"}, checkpointing=False)
    check(plain)
    assert read_epochs(True, {"scope": "global", "fetch": "rows"}, checkpointing=True) == plain


@pytest.mark.parametrize("scope", ["document", "global"])
def test_nor_where_documents_share_a_window(scope: str) -> None:
    check(read_epochs(True, {"scope": scope}, packed=True))


def test_nor_with_a_stride() -> None:
    counted = read_epochs(True, {"scope": "global"}, stride=3)
    assert counted.predictions > 0 and counted.own > 0 and counted.leaks == 0


@pytest.mark.parametrize("scope", ["global", "listed"])
def test_without_the_rule_this_file_would_see_the_leak(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    monkeypatch.setattr(searcher, "hidden_rows", lambda *_: [])
    settings = {"scope": "document" if scope == "listed" else scope}
    assert read_epochs(True, settings, listed=scope == "listed").leaks > 50


# --- the training loop ---------------------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Follows what the loop reads and commits from now on."""
    ledger, update = Ledger(), loop.update

    def follow(session: Any) -> StepResult:
        bank, accumulation = session.model.banks[LAYER], session.config.train.gradient_accumulation_steps
        batches = [session.sampler.batch(session.step, micro=micro, num_micro=accumulation) for micro in range(accumulation)]
        first_id, result = bank.next_id, update(session)
        reads = result.reads[LAYER]
        for batch, read in zip(batches, reads, strict=True):
            reading = batch._replace(valid_BT=batch.valid_BT & ~batch.replayed_B[:, None])
            ledger.read(queries(reading, 1), read.hits)
            assert not read.candidates.valid_N[batch.replayed_B.repeat_interleave(WINDOW)].any(), "replay writes nothing"
            assert not read.hits.valid_HNK[:, batch.replayed_B.repeat_interleave(WINDOW)].any(), "nor does it read"
        ledger.write(session.group, first_id, batches, reads)
        return result

    monkeypatch.setattr(loop, "update", follow)
    return ledger


@pytest.mark.parametrize(("ratio", "scope"), [(0.0, "global"), (0.25, "global"), (0.25, "document")])
def test_no_pass_of_a_trainer_shows_a_prediction_its_answer(monkeypatch: pytest.MonkeyPatch, ratio: float,
                                                            scope: str) -> None:
    ledger, model = watched(monkeypatch), make_model(scope=scope, tier="exact")
    settings = {"sequence_length": WINDOW, "gradient_accumulation_steps": 2, "warmup_steps": 0, "total_steps": 1000}
    texts = [text_tokens(text) for text in range(TEXTS)]
    for samples, epochs in ((texts, 2), (texts[::-1], 1), ([*texts[2:], texts[2]], 1)):  # all three count as new documents
        if samples is texts or samples[0] == texts[-1]:
            trainer = MemoryAwareTrainer(model, settings)  # the second one finds what the first has left in the bank
        trainer.train(MemoryDataset(samples, ratio), num_epochs=epochs, batch_size=STREAMS)
    assert ledger.counted.predictions == (3 * TEXTS + TEXTS - 1) * (LENGTH - 1)
    assert ledger.counted.own > 0 and ledger.counted.leaks == 0
    # Where the same texts are read only to be measured, what training wrote from them is hidden, too.
    measured = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **named: measured.append(forward(*args, **named)) or measured[-1])
    sampler = StreamSampler(MemoryDataset(texts).as_documents(), streams=STREAMS, sequence_length=WINDOW, seed=0, epochs=1,
                            shuffle=False)
    known, ledger.counted, next_id = dict(ledger.written), Count(0, 0, 0), model.banks[LAYER].next_id
    evaluate(model, sampler, banks=model.banks, group=model.group, windows=sampler.num_steps)
    next_id = 0 if scope == "document" else next_id  # those banks begin empty
    ledger.written = {} if scope == "document" else known
    for step, output in enumerate(measured):
        batch, read = sampler.batch(step), output.memory[LAYER]
        ledger.read(queries(batch, 1), read.hits)
        ledger.write(model.group, next_id, [batch], [read])
        next_id += int(read.candidates.valid_N.sum())
    assert ledger.counted.predictions == TEXTS * (LENGTH - 1)
    assert ledger.counted.own > 0 and ledger.counted.leaks == 0


# --- the search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["exact", "faiss-flat"])
@pytest.mark.parametrize("scope", ["global", [0, 1, 2]])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_search_hides_other_readings_of_its_document_and_nothing_else(tier: str, scope: Any, dtype: str) -> None:
    chance = torch.Generator().manual_seed(0)
    bank = LongTermMemory(heads=2, head_dim=8, slots=700, top_k=6, config=MemoryConfig(virtual_shards=4, dtype=dtype))
    E, N = 600, 300
    namespace_E, document_E = (torch.randint(least, 4, (E,), generator=chance) for least in (0, -1))
    bank.write(torch.randn(2, E, 8, generator=chance), torch.randn(2, E, 8, generator=chance), namespace_E,
               document_E=document_E)
    query, namespace_N, document_N = (torch.randn(2, N, 8, generator=chance), torch.randint(-1, 4, (N,), generator=chance),
                                      torch.randint(-1, 4, (N,), generator=chance))
    found = bank.search(query, namespace_N, document_N, scope=scope, tier=tier)
    for name in range(4):
        for document in range(-1, 4):
            chosen_N = (namespace_N == name) & (document_N == document)
            seeing = lifecycle.fork(bank, empty=False)
            hidden_E = (document_E == document) & (namespace_E != name) & (document_E >= 0)
            seeing.delete(ids=hidden_E.nonzero().flatten().tolist())
            wanted = seeing.search(query, namespace_N, scope=scope, tier=tier)
            assert torch.equal(found.id_HNK[:, chosen_N], wanted.id_HNK[:, chosen_N])
            torch.testing.assert_close(found.score_HNK[:, chosen_N], wanted.score_HNK[:, chosen_N])
    unknown = bank.search(query, namespace_N, torch.full((N,), UNKNOWN), scope=scope, tier=tier)
    plain = bank.search(query, namespace_N, scope=scope, tier=tier)
    assert torch.equal(unknown.id_HNK, plain.id_HNK) and torch.equal(unknown.score_HNK, plain.score_HNK)
    untouched = document_N < 0
    assert torch.equal(found.score_HNK[:, untouched], plain.score_HNK[:, untouched]), "bit for bit, beside masked ones"
    assert not found.valid_HNK[:, namespace_N < 0].any()


def test_the_short_way_of_decoding_hides_the_same() -> None:
    chance = torch.Generator().manual_seed(1)
    bank = LongTermMemory(heads=2, head_dim=8, slots=99, top_k=4, config=MemoryConfig(virtual_shards=4, scope="global"))
    names = torch.arange(60) % 3
    bank.write(torch.randn(2, 60, 8, generator=chance), torch.randn(2, 60, 8, generator=chance), names,
               document_E=torch.arange(60) % 2)
    query = torch.randn(2, 3, 8, generator=chance)
    for document_N in (torch.tensor([0, 1, -1]), torch.tensor([-1, -1, -1]), None):
        found = bank.look_up(query, names[:3], document_N)
        wanted = bank.attend(query, bank.search(query, names[:3], document_N))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_documents_have_one_number_a_query() -> None:
    bank = LongTermMemory(heads=2, head_dim=8, slots=99, top_k=4, config=MemoryConfig(virtual_shards=4))
    with pytest.raises(ValueError, match=r"namespaces and documents \[N\]: got \(2, 3, 8\), \(3,\) and \(2,\)"):
        bank.search(torch.randn(2, 3, 8), torch.zeros(3).long(), torch.zeros(2).long())
