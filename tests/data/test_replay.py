"""Experience replay: who pauses is a function of the step, what is stored is the same everywhere, and it costs no stream a
token."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode import dist
from lmcode.config import ConfigError, RunConfig, build
from lmcode.data.replay import FILE, Replay, ReplaySampler, load_replay, replay_part
from lmcode.data.streams import Batch, Pauses, StreamSampler
from lmcode.files.durable import verify
from lmcode.train import loop, saving
from lmcode.train.session import Session
from lmcode.train.start import open_run, set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings as run_settings
from tests.helpers.small_run import write_corpus
from tests.helpers.streams import DOCUMENTS, equal, make_documents, make_sampler, read_back, visits

RATIO = Fraction(1, 4)


# Pauses


@settings(max_examples=80, deadline=None)
@given(ratio=st.fractions(0, Fraction(99, 100), max_denominator=100), streams=st.integers(1, 30), first=st.integers(0, 5),
       steps=st.integers(1, 60))
def test_the_share_is_exact_and_streams_take_turns(ratio: Fraction, streams: int, first: int, steps: int) -> None:
    pauses = Pauses(ratio, streams, first)
    at = np.array([[pauses.at(b, step) for b in range(streams)] for step in range(first + steps)])
    assert not at[:first].any()
    counted = np.cumsum(at, axis=0)
    for step in range(first + steps):
        assert [pauses.before(b, step + 1) for b in range(streams)] == counted[step].tolist()
        assert counted[step].sum() == (max(0, step + 1 - first) * ratio * streams).__floor__()
        assert counted[step].max() - counted[step].min() <= 1


@settings(max_examples=40, deadline=None)
@given(ratio=st.fractions(0, Fraction(9, 10), max_denominator=20), stream=st.integers(0, 6), windows=st.integers(0, 40))
def test_the_end_of_a_stream_is_the_first_step_with_its_windows_behind(ratio: Fraction, stream: int, windows: int) -> None:
    pauses = Pauses(ratio, 7)
    read = [step - pauses.before(stream, step) for step in range(600)]
    assert pauses.end(stream, windows) == next(step for step in range(600) if read[step] >= windows)


def test_a_stream_loses_nothing_to_its_pauses() -> None:
    plain = make_sampler(DOCUMENTS, streams=6, epochs=2)
    paused = make_sampler(DOCUMENTS, streams=6, epochs=2, pauses=Pauses(RATIO, 6), first_step=10, first_namespace=1000)
    assert paused.num_steps > plain.num_steps
    batches = [paused.batch(10 + step) for step in range(paused.num_steps)]
    assert not any((batch.replayed_B & batch.valid_BT.any(1)).any() for batch in batches)
    before, after = visits([plain.batch(step) for step in range(plain.num_steps)]), visits(batches)
    assert [namespace + 1000 for namespace in sorted(before)] == sorted(after)
    for namespace, windows in before.items():
        assert read_back(after[namespace + 1000]) == read_back(windows)
        assert {row for _, _, row in after[namespace + 1000]} == {row for _, _, row in windows}
    assert not paused.batch(10 + paused.num_steps).valid_BT.any()
    with pytest.raises(ValueError, match="at or beyond the first, 10: got 9"):
        paused.batch(9)


# The store


def make_replay(slots: int = 8, sampler: str = "importance", seed: int = 3) -> Replay:
    return Replay(slots=slots, sequence_length=4, vocab_size=5000, sampler=sampler, seed=seed)


def filled(slots: int = 8, count: int = 8, sampler: str = "importance") -> Replay:
    """Spans with importance 1, 2, ... in the order of storage, each with a namespace of its own."""
    replay = make_replay(slots, sampler)
    streams = StreamSampler(make_documents([5] * count), streams=count, sequence_length=4, seed=0, epochs=1, shuffle=False)
    replay.store(streams.batch(0), np.arange(1.0, count + 1)[:, None], step=0)
    return replay


def test_the_oldest_span_leaves_first_whatever_its_importance() -> None:
    replay = filled(slots=4, count=7)
    assert sorted(replay.columns["number"]) == [3, 4, 5, 6] and len(replay) == 4 and replay.written == 7
    replay.update(np.array([3]), np.array([1e9]), step=1)
    oldest = replay.columns["number"].argmin()
    replay.update(np.array([oldest]), np.array([1e9]), step=1)
    replay.store(make_sampler(make_documents([5]), streams=1).batch(0), np.array([[0.1]]), step=1)
    assert replay.columns["number"].min() == 4


def frequencies(replay: Replay, count: int = 1, draws: int = 4000) -> np.ndarray:
    drawn = [replay.columns["number"][replay.draw(step, count)] for step in range(draws)]
    assert all(len(set(one)) == count for one in drawn), "a step draws different spans"
    return np.bincount(np.concatenate(drawn), minlength=len(replay)) / draws


def test_draws_follow_the_sampler() -> None:
    weights = np.arange(1, 9) / 36
    assert frequencies(filled()) == pytest.approx(weights, abs=0.03)  # 4,000 draws: 4 standard deviations
    assert frequencies(filled(sampler="uniform")) == pytest.approx(np.full(8, 1 / 8), abs=0.03)
    recent = filled(sampler="recent")
    recent.columns["importance"][:] = 1.0
    assert frequencies(recent) == pytest.approx(weights, abs=0.03)
    frequencies(filled(), count=5, draws=50)


def test_draws_depend_on_seed_step_and_content_alone() -> None:
    assert filled().draw(5, 3).tolist() == filled().draw(5, 3).tolist()
    assert len({tuple(filled().draw(step, 3)) for step in range(20)}) > 10
    other = filled()
    other.seed = 4
    assert [other.draw(step, 3).tolist() for step in range(9)] != [filled().draw(step, 3).tolist() for step in range(9)]
    assert len(filled().draw(0, 99)) == 8 and len(make_replay().draw(0, 5)) == 0


def test_losses_that_are_no_numbers_store_nothing() -> None:
    replay = make_replay()
    batch = make_sampler(make_documents([5] * 3), streams=3).batch(0)
    replay.store(batch, np.array([[np.nan], [1.0], [np.inf]]), step=0)
    assert len(replay) == 1
    replay.update(np.array([0]), np.array([np.nan]), step=9)
    assert replay.columns["importance"][0] == 1.0 and replay.columns["step"][0] == 0


def test_what_is_forgotten_is_nowhere(tmp_path: Path) -> None:
    replay = filled()
    tokens = replay.token_MX[[2, 5]].copy()
    assert replay.forget([2, 5]) == 2 and len(replay) == 6
    assert replay.forget(predicate=lambda columns: columns["importance"] > 7.5) == 1 and len(replay) == 5
    assert replay.forget([2, 5]) == 0
    assert not {2, 5, 7} & {int(n) for step in range(200) for n in replay.columns["namespace"][replay.draw(step, 5)]}
    replay_part(replay)(tmp_path / FILE)
    again = make_replay()
    load_replay(tmp_path / FILE, again)
    for store in (replay, again):
        assert not np.isin(store.token_MX[store.token_MX != 999], tokens[tokens != 999]).any()
    with pytest.raises(ValueError, match="forget needs"):
        replay.forget()


@pytest.mark.parametrize("slots", [8, 5, 3, 20])
def test_a_store_comes_back_and_smaller_ones_keep_the_newest(tmp_path: Path, slots: int) -> None:
    replay = filled(slots=8, count=13)
    replay_part(replay)(tmp_path / FILE)
    again = make_replay(slots)
    load_replay(tmp_path / FILE, again)
    kept = sorted(replay.columns["number"])[-min(slots, 8):]
    assert sorted(again.columns["number"][again.columns["number"] >= 0]) == kept and again.written == 13
    for number in kept:
        here, there = (int(np.flatnonzero(store.columns["number"] == number)[0]) for store in (replay, again))
        assert (replay.token_MX[here] == again.token_MX[there]).all()
        assert all(replay.columns[name][here] == again.columns[name][there] for name in replay.columns)


def spoil(name: str, value: object) -> Replay:
    replay = filled()
    if name == "token_MX":
        replay.token_MX[3, 0] = value
    else:
        replay.columns[name][3] = value
    return replay


@pytest.mark.parametrize(("name", "value", "match"), [
    ("number", 4, "ascend"), ("number", 99, "ascend"), ("length", 0, "lengths must lie in"), ("length", 5, "lengths"),
    ("length", 2, "beyond a span's length"), ("token_MX", -1, "tokens must"), ("token_MX", 5000, "tokens must lie in"),
    ("namespace", -1, "namespaces and steps"), ("step", -1, "namespaces and steps"), ("importance", 0.0, "importance"),
    ("importance", np.nan, "importance")])
def test_a_file_that_no_run_can_have_written_is_refused(tmp_path: Path, name: str, value: object, match: str) -> None:
    replay_part(spoil(name, value))(tmp_path / FILE)
    replay = make_replay()
    with pytest.raises(ValueError, match=match):
        load_replay(tmp_path / FILE, replay)
    assert len(replay) == 0 and replay.written == 0


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / FILE
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable replay file"):
        load_replay(path, make_replay())
    save_file({"token": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="format"):
        load_replay(path, make_replay())
    save_file({"token": np.zeros(3)}, path, metadata={"lmcode": "1", "written": "0"})
    with pytest.raises(ValueError, match="tensors must be"):
        load_replay(path, make_replay())
    replay_part(filled())(path)
    with pytest.raises(ValueError, match=r"'token' must be int32 \[8, 8\]"):
        load_replay(path, Replay(slots=8, sequence_length=7, vocab_size=5000, sampler="uniform", seed=0))


# Batches


def mixed(streams: int = 12) -> ReplaySampler:
    return ReplaySampler(make_sampler(DOCUMENTS, streams=streams, pauses=Pauses(RATIO, streams)), make_replay(slots=64))


def walk(sampler: ReplaySampler, steps: int) -> list[Batch]:
    batches = []
    for step in range(steps):
        batches.append(sampler.batch(step))
        sampler.remember(step, 1.0 + batches[-1].valid_BT.sum(1, keepdim=True).double())
    return batches


def test_replayed_rows_are_windows_that_were_trained_on_and_see_no_bank() -> None:
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    replayed = 0
    for batch in walk(mixed(), 40):
        rows = [(tuple(i.tolist()), tuple(t.tolist())) for i, t in zip(batch.input_ids_BT, batch.targets_BT, strict=True)]
        inputs = [(tuple(i[v].tolist()), tuple(t[v].tolist()))
                  for i, t, v in zip(batch.input_ids_BT, batch.targets_BT, batch.valid_BT, strict=True)]
        for row in batch.replayed_B.nonzero().flatten().tolist():
            assert inputs[row] in seen
            assert batch.reset_B[row] and batch.namespace_B[row] == -1 and batch.valid_BT[row].any()
            replayed += 1
        seen |= {one for one, paused in zip(inputs, batch.replayed_B.tolist(), strict=True) if not paused}
        assert batch.global_tokens == int(batch.valid_BT.sum()) and len(rows) == 12
        assert torch.equal(batch.valid_BT, batch.targets_BT != -100)
    assert replayed == 39 * 12 // 4


@pytest.mark.parametrize(("world_size", "num_micro"), [(1, 3), (2, 1), (3, 2)])
def test_ranks_share_the_global_batch(world_size: int, num_micro: int) -> None:
    whole, parts = mixed(), [mixed() for _ in range(world_size)]
    for step in range(12):
        expected = whole.batch(step)
        came = [parts[rank].batch(step, rank=rank, world_size=world_size, micro=micro, num_micro=num_micro)
                for rank in range(world_size) for micro in range(num_micro)]
        joined = Batch(*(torch.cat(tensors) for tensors in zip(*(part[:-1] for part in came), strict=True)),
                       came[0].global_tokens)
        assert equal(joined, expected)
        for sampler in (whole, *parts):
            sampler.remember(step, 1.0 + expected.valid_BT.sum(1, keepdim=True).double())


def test_importance_is_the_mean_loss_when_last_seen_and_is_told() -> None:
    sampler = mixed()
    walk(sampler, 30)
    told = sampler.take()
    assert told["train/replay_share"] == pytest.approx(29 * 3 / (30 * 12))
    assert 1.0 < told["train/replay_loss"] <= 2.0
    assert np.isnan(sampler.take()["train/replay_loss"])
    columns = sampler.replay.columns
    assert columns["importance"] == pytest.approx(1.0 + 1.0 / columns["length"])
    assert (columns["step"] > columns["number"] // 9).any(), "some were replayed after they had been stored"


def test_an_empty_store_leaves_padding() -> None:
    sampler = mixed()
    walk(sampler, 3)
    sampler.replay.forget(predicate=lambda columns: columns["number"] >= 0)
    batch = sampler.batch(3)
    assert batch.replayed_B.sum() == 3 and not batch.valid_BT[batch.replayed_B].any()


# In the loop, on real ranks


def replaying(folder: Path, name: str, ratio: float = 0.25, **train: object) -> dict:
    changes = {"total_steps": 6, "memory_sample_ratio": ratio, "replay_slots": 40, **train}
    return run_settings(folder, name, train=changes)


def advance(session: Session, steps: int) -> list[float]:
    return [loop.train_step(session).loss for _ in range(steps)]


def outcome(session: Session) -> dict:
    columns = session.replay.columns
    return {"bank": session.model.banks[1].stats()["next_id"], "tokens": session.replay.token_MX.tolist(),
            "number": columns["number"].tolist(), "importance": columns["importance"].tolist(),
            "told": session.sampler.take()}


def train_through(whole: dict) -> tuple[list[float], dict]:
    session = set_up(build(RunConfig, whole), dist.discover())
    losses, end = advance(session, 6), outcome(session)
    session.close()
    return losses, end


def train_and_resume(whole: dict, half: dict, later: list[dict]) -> dict:
    """Losses of a run, of one that was saved in the middle, and of its continuation; and what is asked of one rank only."""
    losses, end = train_through(whole)
    session = set_up(build(RunConfig, half), dist.discover())
    first = advance(session, 3)
    saved = saving.save(session)
    session.close()
    verify(saved)
    config = build(RunConfig, half)
    session = set_up(config, dist.discover(), start=open_run(config, dist.Group.world(), "auto"))
    rest = advance(session, 3)
    again = outcome(session)
    session.close()
    again["told"] = end["told"]  # counted since the start of the process
    report = {"losses": losses, "end": end, "resumed": (first + rest, again)}
    if later:
        report.update(kept=pause_and_compare(later[0]), later=begin_replay_later(*later[1:]))
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict:
    later = [replaying(folder, "paused"), *(replaying(folder, "later", ratio) for ratio in (0.0, 0.25, 0.5))]
    return run_on_ranks(train_and_resume, 1, replaying(folder, "whole"), replaying(folder, "half"), later)[0]


def test_loss_and_store_do_not_depend_on_the_number_of_ranks(folder: Path, alone: dict) -> None:
    for R, more in ((2, {"gradient_accumulation_steps": 3}), (4, {})):
        every = run_on_ranks(train_through, R, replaying(folder, f"whole-{R}", **more))
        assert all(end == every[0][1] for _, end in every), "all ranks hold the same spans"
        losses, end = every[0]
        assert losses == pytest.approx(alone["losses"], abs=1e-5)
        assert end["tokens"] == alone["end"]["tokens"]
        assert end["importance"] == pytest.approx(alone["end"]["importance"], rel=1e-4)
    assert alone["end"]["told"]["train/replay_share"] == pytest.approx(15 / 72)


def test_a_resumed_run_is_the_run_that_never_stopped(alone: dict) -> None:
    assert alone["resumed"] == (alone["losses"], alone["end"])


def pause_and_compare(values: dict) -> list[bool]:
    """Whether each stream's carried state is untouched where it paused, and moved on where it read; for some steps."""
    session, seen = set_up(build(RunConfig, values), dist.discover()), []
    for _ in range(4):
        before = session.states.get(0)
        replayed_B = session.sampler.batch(session.step).replayed_B
        advance(session, 1)
        if before is not None:
            pairs = [*zip(before.slots, session.states[0].slots, strict=True),
                     *zip(before.pending_key, session.states[0].pending_key, strict=True),
                     (before.pending_surprise_B, session.states[0].pending_surprise_B)]
            same = [torch.tensor([torch.equal(a, b) for a, b in zip(old, new, strict=True)]) for old, new in pairs]
            seen.append(bool(replayed_B.any()) and all(torch.equal(same_B, replayed_B) for same_B in same))
    session.close()
    return seen


def test_a_paused_stream_keeps_its_state(alone: dict) -> None:
    assert alone["kept"] == [True] * 3


def begin_replay_later(without: dict, changed: dict, other: dict) -> list:
    session = set_up(build(RunConfig, without), dist.discover())
    advance(session, 2)
    saving.save(session)
    session.close()
    config = build(RunConfig, changed)
    session = set_up(config, dist.discover(), start=open_run(config, dist.Group.world(), "auto"))
    paused = [int(session.sampler.batch(step).replayed_B.sum()) for step in (2, 3, 4)]
    advance(session, 2)
    saving.save(session)
    session.close()
    try:
        open_run(build(RunConfig, other), dist.Group.world(), "auto")
    except ConfigError as error:
        return [paused, len(session.replay), str(error)]
    return [paused, len(session.replay), "nothing was refused"]


def test_replay_can_begin_at_a_resume_and_its_share_then_stays(alone: dict) -> None:
    paused, stored, refusal = alone["later"]
    assert paused == [0, 3, 3] and stored == 12 + 9
    assert "train.memory_sample_ratio must be that of the checkpoint" in refusal
