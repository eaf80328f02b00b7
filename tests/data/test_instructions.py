"""Instruction data: all of it is read, only answers are learned, in packed windows, replay and evaluation too."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode import dist
from lmcode.config import ConfigError, DataConfig, RunConfig, build
from lmcode.data.corpus import Corpus, Documents, prepare_corpus
from lmcode.data.instructions import Instruction, parts_of
from lmcode.data.replay import Replay, ReplaySampler, load_replay, replay_part
from lmcode.data.streams import IGNORED, Pauses, StreamSampler
from lmcode.eval.held_out import evaluate
from lmcode.train import loop
from lmcode.train.start import set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings as run_settings
from tests.helpers.streams import make_documents

ASK = {"prompt": "2 + 2 = ", "completion": "4"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
                     {"role": "assistant", "content": "Because."}, {"role": "user", "content": "Ah."},
                     {"role": "assistant", "content": "Yes."}]}
END = 256
RATIO = Fraction(1, 3)


def corpus_of(folder: Path, rows: list[dict], **settings: object) -> Corpus:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(path=str(folder / "rows.jsonl"), tokenizer="bytes", **settings)
    return prepare_corpus(config, vocab_size=257, folder=folder / "cache")


def learned(documents: Documents) -> dict[str, str]:
    """By the text of each document, what is learned of it; the end mark is written as '|'."""
    spelled = {}
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids = documents.tokens[start:end].tolist()
        counted = [1] * len(ids) if documents.counted is None else documents.counted[start:end].tolist()
        text = "".join("|" if one == END else chr(one) for one in ids)
        spelled[text[1:-1]] = "".join(one for one, counts in zip(text[1:], counted[1:], strict=True) if counts)
    return spelled


def both(corpus: Corpus) -> dict[str, str]:
    return learned(corpus.train) | learned(corpus.held_out)


CHAT_TEXT = "system: Be brief.\n\nuser: Why?\n\nassistant: Because.\n\nuser: Ah.\n\nassistant: Yes."


def test_answers_and_their_ends_are_learned_and_nothing_else(tmp_path: Path) -> None:
    asked = {**CHAT, "messages": CHAT["messages"][:-1]}
    rows = [{"text": f"plain {number}"} for number in range(8)] + [ASK, CHAT, asked]
    corpus = corpus_of(tmp_path, rows)
    found = both(corpus)
    assert found.pop("2 + 2 = 4") == "4|"
    assert found.pop(CHAT_TEXT) == " Because.\n\n Yes.|"
    assert found.pop(CHAT_TEXT.removesuffix("\n\nassistant: Yes.")) == " Because.\n\n", "no answer ends it"
    assert found == {f"plain {number}": f"plain {number}|" for number in range(8)}
    for side in (corpus.train, corpus.held_out):
        assert side.counted is None or len(side.counted) == len(side.tokens)


def test_plain_text_has_no_marks(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [{"text": "some"}, {"text": "words"}, {"text": "more", **ASK, **CHAT}])
    assert corpus.train.counted is corpus.held_out.counted is None, "the field that is asked for goes first"
    assert not list(corpus.folder.glob("*.counted")) and "counted" not in corpus.meta["train"]


def test_a_corpus_that_lost_its_marks_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [ASK, CHAT, ASK, CHAT])
    (corpus.folder / "train.counted").unlink()
    with pytest.raises(ConfigError, match="train.counted"):
        prepare_corpus(DataConfig(path=str(tmp_path / "rows.jsonl"), tokenizer="bytes"), vocab_size=257,
                       folder=tmp_path / "cache")


@pytest.mark.parametrize(("row", "match"), [
    ({"prompt": 3, "completion": "x"}, "field 'prompt' of .*must be a string"),
    ({"prompt": "x", "completion": None}, "field 'completion' of .*must be a string"),
    ({"messages": ["hello"]}, "list of objects with role and content"),
    ({"messages": [{"role": "user"}]}, "list of objects with role and content"),
    ({"messages": [{"role": "user", "content": "x"}]}, "whose role is 'assistant': got user"),
    ({"messages": []}, "whose role is 'assistant': got none"),
    ({"messages": [{"role": "assistant", "content": None}]}, "field 'content' of .*must be a string"),
    ({"messages": "hello"}, "lacks the field"), ({"prompt": "x"}, "lacks the field"),
])
def test_other_rows_are_refused_by_line(row: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        corpus_of(tmp_path, [ASK, row])
    assert "rows.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.text(max_size=5), st.booleans()), min_size=1, max_size=5))
def test_an_instruction_is_its_parts(parts: list[tuple[str, bool]]) -> None:
    text = Instruction(parts)
    assert text == "".join(part for part, _ in parts) and parts_of(text) == tuple(parts)
    assert parts_of(str(text)[:]) == ((str(text), True),)


def marked(lengths: list[int], seed: int) -> Documents:
    documents = make_documents(lengths)
    counted = np.random.default_rng(seed).integers(0, 2, len(documents.tokens), dtype=np.uint8)
    return dataclasses.replace(documents, counted=counted)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=8), packed=st.booleans(), seed=st.integers(0, 99))
def test_marks_change_targets_and_nothing_else(lengths: list[int], packed: bool, seed: int) -> None:
    documents = marked(lengths, seed)
    shape = {"streams": 4, "sequence_length": 5, "seed": 3, "epochs": 1, "packed": packed}
    sampler = StreamSampler(documents, **shape)
    plain = StreamSampler(dataclasses.replace(documents, counted=None), **shape)
    counts = dict(zip(documents.tokens.tolist(), documents.counted.tolist(), strict=True))  # of inner tokens, all unique
    total = 0
    for step in range(sampler.num_steps):
        batch, full = sampler.batch(step), plain.batch(step)
        for name in set(batch._fields) - {"targets_BT", "global_tokens"}:
            assert torch.equal(getattr(batch, name), getattr(full, name)), name
        kept = batch.targets_BT != IGNORED
        assert torch.equal(batch.targets_BT[kept], full.targets_BT[kept])
        inner = (full.targets_BT != IGNORED) & (full.targets_BT != 999)
        assert kept[inner].tolist() == [bool(counts[one]) for one in full.targets_BT[inner].tolist()]
        assert batch.global_tokens == sampler.global_tokens(step) == int(kept.sum())
        assert sum(int(sampler.batch(step, rank=rank, world_size=2).counted_BT.sum()) for rank in (0, 1)) == int(kept.sum())
        total += int(kept.sum())
    assert total == sampler.num_counted and plain.num_counted == plain.num_targets


@pytest.mark.parametrize("packed", [False, True])
def test_a_replayed_span_keeps_its_marks(packed: bool, tmp_path: Path) -> None:
    documents = marked([9, 4, 12, 5, 30, 7, 3, 8], 1)
    streams = StreamSampler(documents, streams=4, sequence_length=6, seed=3, packed=packed, pauses=Pauses(RATIO, 4))
    replay = Replay(slots=40, sequence_length=6, vocab_size=5000, sampler="uniform", seed=0)
    sampler = ReplaySampler(streams, replay)
    by_token = dict(zip(documents.tokens.tolist(), documents.counted.tolist(), strict=True))
    replayed = ignored = 0
    for step in range(30):
        batch = sampler.batch(step)
        assert batch.global_tokens == int(batch.counted_BT.sum()) == sampler.global_tokens(step)
        assert not batch.counted_BT[~batch.valid_BT].any()
        for row in batch.replayed_B.nonzero().flatten().tolist():
            ids, targets = batch.input_ids_BT[row], batch.targets_BT[row]
            inside = [(one, after, target) for one, after, target, piece, next_piece, valid in zip(
                ids[:-1].tolist(), ids[1:].tolist(), targets[:-1].tolist(), batch.piece_BT[row, :-1].tolist(),
                batch.piece_BT[row, 1:].tolist(), batch.valid_BT[row, 1:].tolist(), strict=True)
                if valid and piece == next_piece and after != 999]
            assert all(target == (after if by_token[after] else IGNORED) for _, after, target in inside)
            replayed, ignored = replayed + len(inside), ignored + sum(target == IGNORED for *_, target in inside)
        loss_BP = batch.by_piece(batch.counted_BT) * 2.0
        sampler.remember(step, loss_BP)
    live = replay.columns["number"] >= 0
    assert replayed > 20 and 0 < ignored < replayed and live.any()
    assert np.allclose(replay.columns["importance"][live], 2.0), "the mean is over targets that count"
    replay_part(replay)(tmp_path / "spans")
    again = Replay(slots=40, sequence_length=6, vocab_size=5000, sampler="uniform", seed=0)
    load_replay(tmp_path / "spans", again)
    assert (again.token_MX < 0).any() and again.draw(99, 40).size == replay.draw(99, 40).size
    assert sorted(map(tuple, again.token_MX.tolist())) == sorted(map(tuple, replay.token_MX.tolist()))


def step_and_evaluate(values: dict) -> dict:
    """One step of a job and one evaluation, with what they should be: sums over this rank's targets."""
    session = set_up(build(RunConfig, values), dist.discover())
    group, module = session.group, session.engine.module
    batch = session.sampler.batch(0, rank=group.rank, world_size=group.size)
    with torch.no_grad():
        output = module(batch.input_ids_BT, reset_B=batch.reset_B, valid_BT=batch.valid_BT, **batch.reading())
    counted_BT = batch.counted_BT
    losses = -output.logits.log_softmax(-1)[counted_BT].gather(1, batch.targets_BT[counted_BT][:, None])
    result = loop.train_step(session)
    measured = evaluate(module, session.held_out, banks={}, group=group, windows=session.held_out.num_steps)
    session.close()
    return {"sum": float(losses.sum()), "targets": len(losses), "inputs": int(batch.valid_BT.sum()), "loss": result.loss,
            "tokens": result.tokens, "held_out": (measured.tokens, session.held_out.num_counted),
            "answers": sum(map(len, learned(session.corpus.held_out).values()))}


def test_a_step_and_an_evaluation_count_answers_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} and {number} ", "completion": f"make {2 * number}"} for number in range(60)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_on_ranks(step_and_evaluate, 2, run_settings(tmp_path, "masked", data={"packing": True},
                                                            model={"long_term_memory_slots": 0}))
    total = {name: sum(rank[name] for rank in found) for name in ("sum", "targets", "inputs")}
    assert 0 < total["targets"] < total["inputs"]
    for rank in found:
        assert rank["tokens"] == total["targets"]
        assert rank["loss"] == pytest.approx(total["sum"] / total["targets"], rel=1e-5)
        assert rank["held_out"] == (rank["answers"], rank["answers"])
