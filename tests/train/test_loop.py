"""The training loop on real gloo processes with the real DeepSpeed: what must not depend on how a job is spread."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from lmcode import dist, opening
from lmcode.eval.held_out import evaluate
from lmcode.memory.entry import MASS_UNIT
from lmcode.protocol import LayerMemory
from lmcode.train import loop
from lmcode.train.session import Session
from tests.helpers.ranks import run_on_ranks
from tests.helpers.same_hits import assert_same_hits
from tests.helpers.small_run import STEPS, settings, start, write_corpus


def masses(session: Session) -> dict[int, float]:
    """Units of attention that each entry on this rank has received."""
    columns = session.model.banks[1].shard.columns
    return {one: mass / MASS_UNIT for one, mass in zip(columns["id"].tolist(), columns["hit_mass"].tolist(), strict=True)
            if one >= 0}


def misbooked(session: Session, reads: list[LayerMemory], before: dict[int, float]) -> float:
    """By how much a step's growth of `masses` is off what its reads paid, at most: an entry's weight among the hits times
    what the joint softmax gave the hits, over all queries and heads of all ranks."""
    paid: dict[int, float] = {}
    own = [(read.hits.id_HNK, read.hits.score_HNK.softmax(-1) * read.hits.credit_HN.unsqueeze(-1)) for read in reads]
    for ids, amounts in itertools.chain(*session.group.all_gather_object(own)):
        for one, amount in zip(ids.flatten().tolist(), amounts.flatten().tolist(), strict=True):
            paid[one] = paid.get(one, 0.0) + amount
    return max(abs(mass - before.get(one, 0.0) - paid.get(one, 0.0)) for one, mass in masses(session).items())


def train(values: dict) -> dict:
    """Trains a few steps; what a job of any shape must agree on."""
    session = start(values)
    losses, hits, errors, credits = [], [], [], []
    commit = session.model.memories.commit

    def checked(reads: dict[int, list[LayerMemory]], *, step: int) -> None:  # a consolidation changes the masses again
        before = masses(session)
        commit(reads, step=step)
        errors.append(misbooked(session, reads[1], before))

    session.model.memories.commit = checked
    for _ in range(STEPS):
        result = loop.train_step(session)
        credits += [(read.hits.credit_HN, read.share_HN) for read in result.reads[1]]
        losses.append(result.loss)
        rows = (torch.cat([part.transpose(0, 1) for part in parts]) for parts in
                zip(*(read.hits[:2] for read in result.reads[1]), strict=True))
        hits.append(tuple(session.group.all_gather(part, phase="test") for part in rows))
    stats = session.model.banks[1].stats()
    held_out = evaluate(session.engine.module, session.held_out, banks=session.model.banks, group=session.group,
                        windows=3)
    session.metrics.close()
    return {"losses": losses, "hits": hits, "held_out": held_out, "misbooked": max(errors), "credits": credits,
            "stats": {key: stats[key] for key in ("live", "evicted", "chances", "spared", "merged", "rejected", "next_id")}}


def train_all(jobs: list[dict]) -> list[dict]:
    return [train(values) for values in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict:
    """One rank, ZeRO-2, everything by default."""
    return run_on_ranks(train_all, 1, [settings(folder, "reference")])[0][0]


def assert_same(came: dict, expected: dict, *, tolerance: float = 2e-5) -> None:
    """The same losses up to rounding, a few near-tied hits that traded the last place included, and the same counts."""
    assert came["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert came["held_out"].loss == pytest.approx(expected["held_out"].loss, abs=tolerance)
    assert came["stats"] == expected["stats"]
    assert came["misbooked"] < 1e-4


def test_the_job_wraps_the_ring_and_learns(reference: dict) -> None:
    assert reference["stats"]["evicted"] > 0 and reference["stats"]["live"] == 480
    assert reference["stats"]["spared"] > 0 < reference["stats"]["chances"]
    assert reference["losses"][-1] < reference["losses"][0]
    assert (reference["hits"][-1][1] >= 0).any(), "the last step must have found something, or these tests say little"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_losses_ids_and_hits_do_not_depend_on_the_number_of_ranks(folder: Path, reference: dict,
                                                                  world_size: int) -> None:
    sizes = (0, 2, 1) if world_size == 4 else (0,)  # of the memory groups
    jobs = [settings(folder, f"ranks-{world_size}-{size}", memory={"group_size": size}) for size in sizes]
    for result in [one for rank in run_on_ranks(train_all, world_size, jobs) for one in rank]:
        assert_same(result, reference)
        for came, expected in zip(result["hits"], reference["hits"], strict=True):
            assert_same_hits(came, expected)


def test_losses_do_not_depend_on_how_the_job_is_spread(folder: Path, reference: dict) -> None:
    variants = {
        "zero0": {"train": {"deepspeed": "cpu"}},
        "zero1": {"train": {"deepspeed": "zero1"}},
        "zero3": {"train": {"deepspeed": "zero3"}},
        "offload": {"train": {"deepspeed": "zero3_offload"}},
        "accumulation": {"train": {"gradient_accumulation_steps": 3}},
        "checkpointing": {"train": {"activation_checkpointing": True}},
        "checkpointing-zero3": {"train": {"activation_checkpointing": True, "deepspeed": "zero3"}},
        "all_to_all": {"memory": {"exchange": "all_to_all"}},
        "rows": {"memory": {"fetch": "rows"}},
        "exact": {"memory": {"tier": "exact"}},
        "faiss": {"memory": {"tier": "faiss-flat"}},
    }
    jobs = [settings(folder, name, **changes) for name, changes in variants.items()]
    results = run_on_ranks(train_all, 2, jobs)[0]
    for name, result in zip(variants, results, strict=True):
        try:
            assert_same(result, reference)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("world_size", [1, 2])
def test_entries_are_credited_with_what_the_joint_softmax_gave_them(folder: Path, reference: dict, world_size: int) -> None:
    changes = {"model": {"retrieval_stride": 4}, "train": {"activation_checkpointing": True}}
    strided = run_on_ranks(train_all, world_size, [settings(folder, f"strided-{world_size}", **changes)])[0][0]
    for result, most in ((reference, 1.0), (strided, 4.0)):
        assert result["misbooked"] < 1e-4
        credit, share = (torch.cat([one.flatten() for one in part]) for part in zip(*result["credits"], strict=True))
        assert (credit <= most * share + 1e-6).all() and 0 < credit.max() <= most
    assert all(torch.equal(credit, share) for credit, share in reference["credits"])


def test_consolidation_on_the_way_does_not_depend_on_the_number_of_ranks(folder: Path, reference: dict) -> None:
    changes = {"train": {"memory_consolidation_interval": 2}, "memory": {"consolidation_threshold": 0.3}}
    alone, together = (run_on_ranks(train_all, R, [settings(folder, f"consolidated-{R}", **changes)])[0][0]
                       for R in (1, 2))
    # A pair whose distance is the threshold's but for rounding may be merged on one number of ranks only.
    merged = [one["stats"].pop("merged") for one in (alone, together)]
    live = [one["stats"].pop("live") for one in (alone, together)]
    assert merged == pytest.approx([merged[0]] * 2, abs=3) and live == pytest.approx([live[0]] * 2, abs=3)
    assert_same(together, alone, tolerance=1e-4)
    assert merged[0] > 3 and reference["stats"]["merged"] == 0


def spoil_one_step(jobs: list[dict]) -> list[dict]:
    """Lets everything that one step computes be NaN and reports what that step changed."""
    reports = []
    for values in jobs:
        session = start(values)
        for _ in range(2):
            loop.train_step(session)
        bank = session.model.banks[1]
        weights, content = session.engine.weights(), bank.content_hash()
        hook = session.engine.module.embedding.register_forward_hook(lambda module, inputs, output: output * math.nan)
        result = loop.train_step(session)
        hook.remove()
        after = session.engine.weights()
        reports.append({
            "applied": result.applied, "loss": result.loss, "skipped": session.engine.skipped_steps,
            "bank_unchanged": bank.content_hash() == content,
            "weights_unchanged": all(torch.equal(weights[name], after[name]) for name in weights),
            "goes_on": math.isfinite(loop.train_step(session).loss)})
        session.metrics.close()
    return reports


def test_a_step_that_is_not_finite_leaves_no_trace_and_training_goes_on(folder: Path) -> None:
    variants = {"cpu": "fp32", "zero1": "fp32", "zero2": "fp32", "zero3": "fp32", "zero3_offload": "fp32",
                "cpu-bf16": "bf16", "zero2-bf16": "bf16", "zero3-bf16": "bf16"}
    jobs = [settings(folder, f"spoiled-{name}", train={"deepspeed": name.split("-")[0], "precision": precision})
            for name, precision in variants.items()]
    for rank_reports in run_on_ranks(spoil_one_step, 2, jobs):
        for name, report in zip(variants, rank_reports, strict=True):
            assert math.isnan(report.pop("loss"))
            assert report == {"applied": False, "skipped": 1, "bank_unchanged": True, "weights_unchanged": True,
                              "goes_on": True}, name


def count_reads(values: dict) -> dict:
    session = start(values)
    bank, calls = session.model.banks[1], {"search": 0, "commit": 0}
    for name in calls:
        def counted(*args: object, _call: object = getattr(bank, name), _name: str = name, **kwargs: object) -> object:
            calls[_name] += 1
            return _call(*args, **kwargs)

        setattr(bank, name, counted)
    loop.train_step(session)
    session.metrics.close()
    return calls


def test_checkpointing_searches_and_commits_once_a_step(folder: Path) -> None:
    values = settings(folder, "counted", train={"activation_checkpointing": True})
    assert run_on_ranks(count_reads, 2, values) == [{"search": 1, "commit": 1}] * 2


def run_whole_job(values: dict) -> list:
    session = start(values)
    loop.fit(session)
    loop.finish(session, 1.0)
    return [session.model.banks[1].content_hash(), session.run_folder]


def load_and_hash(run: Path) -> tuple[str, int]:
    model, *_, step = opening.open_model(run, group=dist.Group.world(), device=torch.device("cpu"))
    tokenizer = model.tokenizer
    assert tokenizer.decode(tokenizer.encode("ok")) == "ok"
    return model.banks[1].content_hash(), step


def test_a_run_folder_holds_what_the_readme_says_and_loads_on_another_number_of_ranks(folder: Path) -> None:
    values = settings(folder, "whole", eval={"every": 2}, train={"save_every": 2, "save_total_limit": 2},
                      memory={"group_size": 1})
    content, run = run_on_ranks(run_whole_job, 2, values)[0]
    assert run_on_ranks(load_and_hash, 3, run) == [(content, STEPS)] * 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    for name in ("config.yaml", "ds_config.json", "metrics.jsonl", "summary.txt", "tensorboard"):
        assert (run / name).exists(), name
    summary = (run / "summary.txt").read_text()
    assert "over the ranks of each of 2 memory groups\n  layer 1: rank 0 480  rank 1 480\n" in summary
    assert "100.0 % from rank 0  0.0 % from rank 1\n" in summary and "0.0 % from rank 0  100.0 % from rank 1\n" in summary

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    words = {key for row in rows for key in row}
    expected = {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/loss_memory_off",
                "perf/tokens_per_s", "perf/step_ms", "perf/search_ms", "perf/exchange_ms", "perf/bytes_received"}
    expected |= {f"memory/L1/{name}" for name in ("fill", "gate_mean", "hit_mass", "age_p50", "recall_at_k", "evicted",
                                                  "merged", "rejected")}
    assert expected <= words
    assert all(row["memory/L1/recall_at_k"] == 1.0 for row in rows if "memory/L1/recall_at_k" in row)
    assert_tensorboard_agrees(run, rows)


def assert_tensorboard_agrees(run: Path, rows: list[dict]) -> None:
    """The event files, read back, hold the same numbers under the same words."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag in ("train/loss", "eval/loss", "memory/L1/fill"):
        written = {row["step"]: row[tag] for row in rows if row.get(tag) is not None}
        read = {event.step: event.value for event in events.Scalars(tag)}
        assert read == pytest.approx(written, rel=1e-6)
    assert {"memory/L1/scores", "memory/L1/ages", "memory/L1/gates"} <= set(events.Tags()["histograms"])
    assert any("sample" in tag for tag in events.Tags()["tensors"])


def refuse(values: dict) -> str:
    try:
        start(values)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_what_cannot_work_is_refused_on_every_rank(folder: Path) -> None:
    values = settings(folder, "refused", data={"path": str(folder / "nowhere")})
    messages = run_on_ranks(refuse, 2, values)
    assert messages[0] == messages[1] and "nowhere" in messages[0]
