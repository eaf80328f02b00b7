"""Checkpoints of real small runs: a resumed run is the run that never stopped; what is damaged or foreign is refused."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lmcode import LMCODE, MemoryAwareTrainer, create_synthetic_dataset, dist, opening
from lmcode.cli import command as cli
from lmcode.config import ConfigError, LMCODEConfig, RunConfig, build
from lmcode.files import commit, durable
from lmcode.model.state import StreamState
from lmcode.saved import checkpoint
from lmcode.train import loop, resuming, saving, stream_files
from lmcode.train.metrics import drop_rows_beyond
from lmcode.train.session import Session
from lmcode.train.start import open_run, set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.same_hits import assert_same_hits
from tests.helpers.small_job import killed_after_saving, trained_to, what_was_computed, write_text
from tests.helpers.small_run import settings, start, write_corpus

STAGES = ("cpu", "zero1", "zero2", "zero3", "zero2-bf16", "zero3-bf16", "cpu-bf16")
HALF, WHOLE = 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_corpus(folder)
    return folder


def values_of(folder: Path, name: str, stage: str = "zero2", **train: Any) -> dict:
    """Dropout draws random numbers, and two micro-batches cut a rank's streams."""
    stage, _, precision = stage.partition("-")
    changes = {"total_steps": WHOLE, "deepspeed": stage, "precision": precision or "fp32",
               "gradient_accumulation_steps": 2, **train}
    return settings(folder, name, model={"dropout": 0.1, "cache_windows": 1}, train=changes)


def advance(session: Session, steps: int) -> list:
    """Loss and ids of the hits of some steps."""
    seen = []
    for _ in range(steps):
        result = loop.train_step(session)
        seen.append((result.loss, [read.hits.id_HNK.tolist() for read in result.reads[1]]))
    return seen


def outcome(session: Session) -> dict:
    """What two runs that are the same share, bit for bit, on this rank."""
    tensors = [one for state in session.states.values() for one in stream_files.named_tensors(state).values()]
    return {"bank": session.model.banks[1].content_hash(), "step": session.step,
            "weights": {name: w.numpy().tobytes() for name, w in session.engine.weights().items()},
            "random": torch.get_rng_state().tolist(), "streams": [tensor.tolist() for tensor in tensors]}


def train_whole_and_half(pairs: list[tuple[dict, dict]]) -> list:
    """Each first run goes through without a save, each second is saved in the middle and ends there."""
    results = []
    for whole, half in pairs:
        session = set_up(build(RunConfig, whole), dist.discover())
        first = advance(session, WHOLE)
        results.append((first, outcome(session)))
        session.close()
        session = set_up(build(RunConfig, half), dist.discover())
        assert advance(session, HALF) == first[:HALF]
        session.training_seconds = 7.0
        assert saving.save(session) == resuming.place_of(session)
        session.close()
    return results


def resumed(values: dict, resume: str = "auto") -> Session:
    config = build(RunConfig, values)
    start = open_run(config, dist.Group.world(), resume)
    return set_up(config, dist.discover(), start=start)


def train_rest(runs: list[dict]) -> list:
    results = []
    for values in runs:
        session = resumed(values)
        assert (session.step, session.training_seconds) == (HALF, 7.0)
        results.append((advance(session, WHOLE - HALF), outcome(session)))
        session.close()
    return results


def save_both(jobs: list[dict], target: str) -> None:
    """Trains each a little, then saves it as a checkpoint and as a model for others; the last one also after a change."""
    for number, values in enumerate(jobs):
        session = start(values)
        advance(session, 2)
        assert saving.save(session) is not None
        session.model.save_pretrained(f"{target}/{number}")
        session.close()
    with torch.no_grad():
        session.model.embedding.weight[0] = 0.25  # by hand: no longer the rounded master
    session.model.save_pretrained(f"{target}/changed")


@pytest.mark.parametrize("world_size", [1, 2])
def test_save_pretrained_writes_the_weights_that_the_optimizer_keeps(folder: Path, tmp_path: Path, world_size: int) -> None:
    stages = ("zero3-bf16", "zero3_offload-bf16", "cpu-bf16", "zero2-bf16")
    jobs = [values_of(folder, f"masters-{stage}-{world_size}", stage, gradient_accumulation_steps=1) for stage in stages]
    run_on_ranks(save_both, world_size, jobs, str(tmp_path))
    for number, (stage, job) in enumerate(zip(stages, jobs, strict=True)):
        masters = load_file(checkpoint.find(Path(job["train"]["run_dir"])) / "model.safetensors")
        given = load_file(tmp_path / str(number) / "model.safetensors")
        model = LMCODE.from_pretrained(tmp_path / str(number))
        assert given.keys() == masters.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(given[name], masters[name]) and torch.equal(parameter, masters[name]), (stage, name)
        rounded = [torch.equal(weight, weight.bfloat16().float()) for weight in masters.values()]
        assert not all(rounded), "the masters would be the parameters"
        card = (tmp_path / str(number) / "README.md").read_text(encoding="utf-8")
        assert f"{sum(weight.numel() for weight in masters.values()):,} weights" in card
    changed, name = load_file(tmp_path / "changed" / "model.safetensors"), "embedding.weight"
    assert torch.equal(changed[name][0], torch.full_like(changed[name][0], 0.25))
    assert torch.equal(changed[name][1:], masters[name][1:]), "what nobody has changed is exact"


def test_a_trained_model_is_saved_exactly_when_its_trainer_is_gone(tmp_path: Path) -> None:
    run_on_ranks(train_and_let_go, 1, str(tmp_path))
    masters = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name in ("model", "fp32", "more"):
        given = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(given[weight], masters[weight]) for weight in masters), name
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(copied[weight], masters[weight].bfloat16().float()) for weight in masters)


def train_and_let_go(target: str) -> None:
    torch.manual_seed(0)
    model = LMCODE(LMCODEConfig(vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, context_length=16,
                                long_term_memory_slots=0))
    trainer = MemoryAwareTrainer(model, {"precision": "bf16", "warmup_steps": 0, "deepspeed": "cpu", "sequence_length": 8})
    trainer.train(create_synthetic_dataset(4, 9, seed=0), num_epochs=2, batch_size=4)
    trainer.save_checkpoint(f"{target}/checkpoint")
    assert model.embedding.weight.dtype == torch.bfloat16
    del trainer
    gc.collect()
    model.save_pretrained(f"{target}/model")
    LMCODE.from_pretrained(f"{target}/model").save_pretrained(f"{target}/more")
    copy.deepcopy(model).save_pretrained(f"{target}/copy")
    model.float().save_pretrained(f"{target}/fp32")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(folder: Path, world_size: int) -> None:
    pairs = [(values_of(folder, f"whole-{stage}-{world_size}", stage),
              values_of(folder, f"half-{stage}-{world_size}", stage)) for stage in STAGES]
    straight = run_on_ranks(train_whole_and_half, world_size, pairs)
    rest = run_on_ranks(train_rest, world_size, [half for _, half in pairs])
    for rank in range(world_size):
        for stage, (seen, end), (seen_later, later) in zip(STAGES, straight[rank], rest[rank], strict=True):
            assert seen_later == seen[HALF:], stage
            for name, value in end.items():
                assert later[name] == value, f"{name} differs, {stage} on {world_size} rank(s)"
    assert any(i >= 0 for _, ids in straight[0][0][0] for micro in ids for head in micro for n in head for i in n)


# Other ranks, other stages

RANKS = (1, 2, 3, 4)


def grid_values(folder: Path, world_size: int) -> dict:
    """Dropout would draw other numbers on other ranks; each number of ranks saves with another stage, four in two memory
    groups."""
    stage = STAGES[world_size - 1].removesuffix("-bf16")
    return settings(folder, f"grid-{world_size}", train={"total_steps": WHOLE, "deepspeed": stage},
                    memory={"group_size": 2 if world_size == 4 else 0})


def train_and_save(values: dict) -> str:
    session = set_up(build(RunConfig, values), dist.discover())
    advance(session, HALF)
    saving.save(session)
    content = session.model.banks[1].content_hash()
    session.close()
    return content


def load_grid(runs: list[dict]) -> list:
    """Goes on from every run in the grid, with stage and memory groups of this number of ranks; nothing is written."""
    mine, seen = grid_values(Path(), dist.discover().world_size), []
    for values in runs:
        values = {**mine, "train": {**values["train"], "deepspeed": mine["train"]["deepspeed"]}, "data": values["data"]}
        session = resumed(values)
        content = session.model.banks[1].content_hash()
        results = [loop.train_step(session) for _ in range(2)]
        hits = session.group.all_gather_object(results[0].reads[1][0].hits[:2])
        seen.append((content, [result.loss for result in results],
                     tuple(torch.cat(parts, dim=1) for parts in zip(*hits, strict=True))))
        session.close()
    return seen


def test_any_number_of_ranks_and_any_stage_goes_on_from_any_other(folder: Path) -> None:
    runs = [grid_values(folder, world_size) for world_size in RANKS]
    saved = [run_on_ranks(train_and_save, world_size, values)[0] for world_size, values in zip(RANKS, runs, strict=True)]
    loaded = [run_on_ranks(load_grid, world_size, runs)[0] for world_size in RANKS]
    for number, content in enumerate(saved):
        same, losses, hits = zip(*(seen[number] for seen in loaded), strict=True)
        assert set(same) == {content}
        for first, second in losses:
            assert first == pytest.approx(losses[0][0], abs=1e-6)
            assert second == pytest.approx(losses[0][1], abs=1e-5)  # one update later: the optimizer went along
        for found in hits:
            assert_same_hits(found, hits[0])


# One finished run that the tests below read, copy and damage


def job(values: dict, resume: str | None = None) -> int:
    return loop.run(build(RunConfig, values), resume=resume)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run of six steps on two ranks, with checkpoints at 3 and 6 and rows for each step."""
    values = values_of(folder, "finished", save_every=HALF)
    assert run_on_ranks(job, 2, values) == [0, 0]
    return folder / "runs" / "finished"


def copy_of(run: Path, name: str, **train: Any) -> dict:
    """A copy of the run under another name, and its settings."""
    shutil.copytree(run, run.with_name(name))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"].update(run_dir=str(run.with_name(name)), **train)
    return config


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def resume_all(jobs: list[tuple[dict, str]]) -> list:
    """Exit code, or what was said, of each job in turn."""
    outcomes = []
    for values, resume in jobs:
        try:
            outcomes.append(job(values, resume))
        except ConfigError as error:
            outcomes.append(str(error))
    return outcomes


def test_resume_falls_back_drops_what_lies_beyond_and_refuses_what_does_not_fit(finished: Path) -> None:
    run = finished.parent
    longer = copy_of(finished, "longer", total_steps=8)
    fallen = copy_of(finished, "fallen")
    damage(run / "fallen" / "checkpoints" / "step-00000006" / "banks" / "layer-01" / "shard-00004.safetensors")
    earlier = copy_of(finished, "earlier", log_every=1)
    ruined = copy_of(finished, "ruined")
    for step in (3, 6):
        damage(run / "ruined" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    wider = copy_of(finished, "wider")
    wider["model"]["hidden_size"] = 64
    empty = {**copy_of(finished, "unused"), "preset": "fresh"}
    empty["train"]["run_dir"] = str(run / "fresh")
    jobs = [(longer, "auto"), (fallen, "auto"), (earlier, str(run / "earlier" / "checkpoints" / "step-00000003")),
            (copy_of(finished, "done"), "auto"), (ruined, "auto"), (wider, "auto"),
            (ruined, str(run / "ruined" / "checkpoints" / "step-00000003")), (empty, "auto"),
            (empty, str(run / "nowhere")), (longer, "none")]
    before = (run / "done" / "metrics.jsonl").read_bytes()
    first, second = run_on_ranks(resume_all, 2, jobs)
    assert first == second
    *codes, ruin, wide, chosen, fresh, nowhere, again = first
    assert codes == [0, 0, 0, 0] and fresh == 0
    assert "no checkpoint in" in ruin and "step-00000006/model.safetensors: the content" in ruin and "step-00000003" in ruin
    assert "model.hidden_size must be that of the checkpoint" in wide and "expected 32, got 64" in wide
    assert "step-00000003/model.safetensors: the content" in chosen
    assert "there is no run folder or checkpoint" in nowhere and "already holds a run" in again
    assert (run / "done" / "metrics.jsonl").read_bytes() == before

    reference = {row["step"]: row["train/loss"] for row in rows_of(finished) if "train/loss" in row}
    for name, last in (("longer", 8), ("fallen", 6), ("earlier", 6), ("fresh", 6)):
        losses = [(row["step"], row["train/loss"]) for row in rows_of(run / name) if "train/loss" in row]
        assert [step for step, _ in losses] == list(range(1, last + 1)), name
        assert {step: loss for step, loss in losses if step <= 6} == reference, name
        assert durable.newest_verified(run / name / "checkpoints") == (
            run / name / "checkpoints" / f"step-{last:08d}", [])
        assert_tensorboard_has_no_overlap(run / name, last)
    assert (run / "fallen" / "checkpoints" / "set-aside-step-00000006-0").is_dir()


def assert_tensorboard_has_no_overlap(run: Path, last: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, last + 1))
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag


def test_inference_reads_only_what_verifies(finished: Path) -> None:
    copy_of(finished, "inference")
    run = finished.with_name("inference")

    def load(path: Path) -> int:
        return opening.open_model(path, group=dist.Group(), device=torch.device("cpu")).step

    assert load(run) == 6
    newest = run / "checkpoints" / "step-00000006"
    for part in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = part.read_bytes()
        damage(part)
        with pytest.raises(ConfigError) as caught:
            load(newest)
        assert part.name in str(caught.value)
        assert load(run) == 3
        part.write_bytes(content)
    assert load(newest) == 6


def test_a_run_folder_has_one_writer(finished: Path) -> None:
    config = build(RunConfig, copy_of(finished, "locked", total_steps=8))
    lock = durable.Lock(finished.with_name("locked"))
    with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()} on host"):
        open_run(config, dist.Group(), "auto")
    lock.close()
    other_seed = copy_of(finished, "other-seed", total_steps=8, seed=9)
    other_seed["train"]["run_dir"] = str(finished.with_name("locked"))
    with pytest.raises(ConfigError, match="train.seed"):
        open_run(build(RunConfig, other_seed), dist.Group(), "auto")
    durable.Lock(finished.with_name("locked")).close()  # a refused start holds nothing


def test_auto_needs_a_run_folder() -> None:
    with pytest.raises(ConfigError, match="needs train.run_dir"):
        open_run(RunConfig(), dist.Group(), "auto")


@pytest.mark.parametrize(("section", "change"), [
    ("model", {"memory_head_dim": 16}), ("model", {"num_layers": 3}), ("model", {"short_term_memory_size": 8}),
    ("memory", {"virtual_shards": 6}), ("model", {"long_term_memory_slots": 600}), ("memory", {"dtype": "bf16"}),
    ("train", {"seed": 1}), ("train", {"streams": 24}),
    ("train", {"betas": (0.5, 0.9)}), ("train", {"precision": "bf16"}), ("train", {"weight_decay": 0.5})])
def test_what_must_not_change_is_named(finished: Path, section: str, change: dict) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values[section].update(change)
    name, = change
    with pytest.raises(ConfigError, match=f"^{section}.{name} must be that of the checkpoint"):
        checkpoint.check_resumable(build(RunConfig, values), finished / "checkpoints" / "step-00000006", 2)


def test_what_may_change_is_accepted(finished: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["train"].update(total_steps=99, log_every=7, learning_rate=1.0, save_every=1, gradient_accumulation_steps=1,
                           deepspeed="zero3")
    values["eval"].update(every=5, windows=1)
    values["memory"].update(tier="exact", exchange="all_to_all")
    assert checkpoint.check_resumable(build(RunConfig, values), finished / "checkpoints" / "step-00000006", 2) == 6


# Streams


def states_of(rank: int, world_size: int, num_micro: int, streams: int = 12) -> dict[int, StreamState]:
    size = streams // (world_size * num_micro)

    def state(first: int) -> StreamState:
        number_B = torch.arange(first, first + size).float()
        slots = number_B[:, None, None].expand(size, 2, 3)
        return StreamState((slots, slots + 1), (slots - 1,), number_B % 3 == 0, number_B)

    return {micro: state((rank * num_micro + micro) * size) for micro in range(num_micro)}


@pytest.mark.parametrize("saved", [(1, 1), (2, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("loaded", [(1, 1), (1, 4), (2, 3), (3, 2), (12, 1)])
def test_streams_load_on_any_number_of_ranks(tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]) -> None:
    for rank in range(saved[0]):
        first = rank * 12 // saved[0]
        for name, write in stream_files.stream_parts(states_of(rank, *saved), first=first).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write(tmp_path / name)
    for rank in range(loaded[0]):
        came = stream_files.load_streams(tmp_path / stream_files.FOLDER, StreamState, rank=rank,
                                         world_size=loaded[0], num_micro=loaded[1])
        for micro, expected in states_of(rank, *loaded).items():
            for part, wanted in zip(came[micro], expected, strict=True):
                pairs = zip(part, wanted, strict=True) if isinstance(part, tuple) else [(part, wanted)]
                assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="12 saved streams do not divide over 5 ranks"):
        stream_files.load_streams(tmp_path / stream_files.FOLDER, StreamState, rank=0, world_size=5, num_micro=1)


# Saves that fail


def fail_some_saves(jobs: list[dict]) -> list[dict]:
    return [fail_saves_of(values) for values in jobs]


def fail_saves_of(values: dict) -> dict:
    """Files of rank 1, then of rank 0, may not grow beyond a size; then the disk is full; then all is well."""
    session = set_up(build(RunConfig, values), dist.discover())
    advance(session, 1)
    good, places = saving.save(session), []
    for rank, limit in ((1, 3000), (0, 3000), (0, 100), (1, 0)):
        advance(session, 1)
        if session.group.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        places.append(saving.save(session))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    real, durable.shutil.disk_usage = shutil.disk_usage, lambda path: shutil._ntuple_diskusage(10**6, 10**6, 17)
    advance(session, 1)
    places.append(saving.save(session))
    durable.shutil.disk_usage = real
    hash_of_bank = session.model.banks[1].content_hash()
    found = durable.newest_verified(session.run_folder / "checkpoints")
    last = saving.save(session)
    session.close()
    return {"places": places, "intact": found == (good, []), "failed": session.failed_saves, "last": last,
            "hash": hash_of_bank}


def test_a_failed_save_leaves_the_old_one_and_training_goes_on_alike(folder: Path) -> None:
    stages = ("cpu", "zero2", "zero3")
    ranks = run_on_ranks(fail_some_saves, 2, [values_of(folder, f"failing-{stage}", stage) for stage in stages])
    for stage, *reports in zip(stages, *ranks, strict=True):
        check_failures(folder / "runs" / f"failing-{stage}", reports)


def check_failures(run: Path, reports: list[dict]) -> None:
    for report in reports:
        assert report["places"] == [None] * 5 and report["intact"] and report["failed"] == 5
        assert report["last"] == run / "checkpoints" / "step-00000006"
    assert durable.newest_verified(run / "checkpoints") == (reports[0]["last"], [])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000006"]
    assert [row["train/failed_saves"] for row in rows_of(run) if "train/failed_saves" in row] == [1, 2, 3, 4, 5]
    model, *_, step = opening.open_model(run, group=dist.Group(), device=torch.device("cpu"))
    assert (step, model.banks[1].content_hash()) == (6, reports[0]["hash"])


def fake_commit(parent: Path, step: int) -> Path:
    final = durable.step_folder(parent, step)
    with durable.commit(final, durable.CommitFacts(step, 1, 1, "0" * 64, {})) as place:
        (place / "data").write_text("x" * 100)
    return final


def test_the_last_verified_checkpoint_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        fake_commit(tmp_path, step)
    for step in (2, 3):
        damage(tmp_path / f"step-{step:08d}" / "data")
    commit.drop_old(tmp_path, keep=2)
    assert len(durable.steps(tmp_path)) == 3
    fake_commit(tmp_path, 4)
    commit.drop_old(tmp_path, keep=2)
    assert [path.name for path in durable.steps(tmp_path)] == ["step-00000003", "step-00000004"]


def test_rows_beyond_a_step_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\n7\n{"step": 3}\n{"st')
    drop_rows_beyond(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": 1}\n'


# The command line


def test_the_command_line_hands_resume_on(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    calls = []
    monkeypatch.setattr(loop, "run", lambda config, **more: calls.append((config, more)) or 0)
    assert cli.main(["train", "--resume", "auto", "train.run_dir=x"]) == 0
    assert cli.main(["train", "--resume", "none"]) == 0
    assert cli.main(["train", "--resume", str(finished), "train.total_steps=9"]) == 0
    assert cli.main(["train", f"--resume={finished / 'checkpoints' / 'step-00000003'}"]) == 0
    assert [more for _, more in calls[:2]] == [{"resume": "auto"}, {}]
    assert (calls[2][0].model.hidden_size, calls[2][0].train.total_steps) == (32, 9)
    assert calls[3][0].train.total_steps == WHOLE and calls[3][1]["resume"].endswith("step-00000003")
    assert cli.main(["train", "--resume", str(finished / "nowhere")]) == 2


# Kills


DRAWING = ["train.memory_sample_ratio=0.25", "train.replay_slots=2000", "model.dropout=0.1"]


def test_ten_kills_and_resumes_in_a_row_equal_one_run(tmp_path: Path) -> None:
    """To the last bit: every file of the last checkpoint (weights, optimizer, generators, streams, banks with their hits,
    and the spans for replay, which say what was read in which order), and every number that was recorded."""
    text, chance = write_text(tmp_path / "text"), random.Random(1)
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    reached = [killed_after_saving(tmp_path / "killed", text, *DRAWING, chance=chance) for _ in range(10)]
    assert sorted(set(reached)) == reached, "each job got further than the one before"
    last = reached[-1] + 1
    killed, straight = (trained_to(tmp_path / name, text, last, *DRAWING) for name in ("killed", "straight"))
    assert what_was_computed(killed) == what_was_computed(straight)
    assert [row["step"] for row in what_was_computed(killed) if "train/loss" in row] == list(range(1, last + 1))
    folders = [run / "checkpoints" / f"step-{last:08d}" for run in (killed, straight)]
    seals, others = (durable.verify(folder).files for folder in folders)
    # Two files tell the seconds of training and the run's folder; safetensors shuffles the two entries of a replay's header.
    assert {name for name in seals.keys() | others.keys() if seals.get(name) != others.get(name)} <= {
        "trainer.json", "config.yaml", "replay.safetensors"}
    spans, same = (load_file(folder / "replay.safetensors") for folder in folders)
    assert all(torch.equal(spans[name], same[name]) for name in spans.keys() | same.keys()) and len(spans["number"]) > last
    assert {"rng/rank-00000.safetensors", "model.safetensors"} <= seals.keys()
    assert sum(name.startswith("banks/layer-01/") for name in seals) == 12
    assert_tensorboard_has_no_overlap(killed, last)
    assert sorted(path.name[:5] for path in (killed / "checkpoints").iterdir()) == ["step-", "step-"]


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmcode.train.start.time.strftime", lambda _: "now")
    starts = [open_run(RunConfig(), dist.Group()) for _ in range(3)]
    assert [one.run_folder for one in starts] == [Path("runs") / name for name in
                                                      ("custom-now", "custom-now-2", "custom-now-3")]
    for one in starts:
        one.close()


def test_a_run_folder_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start = open_run(build(RunConfig, {"train": {"run_dir": "~/mine"}}), dist.Group())
    assert start.run_folder == tmp_path / "mine" and start.run_folder.is_dir()
    start.close()
