"""Requests to save and end: noticed in every phase, decided by all ranks, and without a trace in what the run computes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lmcode.cli import command as cli
from lmcode.dist import Group
from lmcode.jobs import preempt
from lmcode.jobs.preempt import Preempted, Request, agreed, noticing
from tests.helpers import small_job
from tests.helpers.small_job import Job, before

# Requests


@pytest.mark.parametrize("number", preempt.SIGNALS)
def test_a_signal_is_a_request_during_the_block_and_nowhere_else(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with noticing() as request:
        assert not request.asked()
        os.kill(os.getpid(), number)
        assert request.asked() and request.reason == number.name
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.reason == number.name, "the first one counts"
    assert signal.getsignal(number) == handler
    with noticing() as another:
        assert not another.asked()


def test_an_inner_block_shares_the_request_of_the_outer() -> None:
    with noticing() as outer:
        with noticing() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.asked()


def test_a_file_is_a_request_and_goes_when_it_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "LOOK_EVERY_S", 0.0)
    file = tmp_path / preempt.FILE
    file.touch()
    request = Request()
    request.look_for(file)
    assert not file.exists() and not request.asked(), "one from before was meant for another process"
    file.touch()
    assert request.asked() and request.reason == str(file)
    request.honoured()
    assert not file.exists() and request.asked()


def test_work_of_one_rank_gives_way_only_when_asked() -> None:
    request = Request()
    request.raise_if_asked(1, 2)
    request.reason = "SIGTERM"
    with pytest.raises(Preempted):
        request.raise_if_asked()


def test_all_ranks_agree_when_one_was_asked() -> None:
    class Two(Group):
        def all_gather_object(self, value: Any) -> list[Any]:
            return [value, "SIGUSR2"]

    mine = Request()
    agreed(mine, Group())
    with pytest.raises(Preempted):
        agreed(mine, Two())
    assert mine.reason == "SIGUSR2"


# Real jobs


def ask(*_arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


def while_preparing(_loop: Any) -> None:
    from lmcode.data import corpus

    before(corpus._SideWriter, "add", ask)


def while_training(loop: Any) -> None:
    """And once more while the checkpoint is saved."""
    before(loop, "train_step", lambda session: ask() if session.step == 1 else None)
    before(loop.saving, "save", ask)


def while_consolidating(loop: Any) -> None:
    from lmcode.memory.bank import LongTermMemory

    before(LongTermMemory, "consolidate", ask)


def while_evaluating(loop: Any) -> None:
    before(loop, "evaluate", ask)


def while_saving(loop: Any) -> None:
    before(loop.saving, "_begin", ask)


def with_a_file(loop: Any) -> None:
    def touch(session: Any) -> None:
        (session.run_folder / preempt.FILE).touch()

    preempt.LOOK_EVERY_S = 0.0
    before(loop, "train_step", touch)


# who is asked and when, and the step that the job must have stopped after
ASKED = [(0, while_preparing, None), (1, while_training, 2), (1, while_consolidating, 4), (0, while_evaluating, 5),
         (1, while_saving, 7), (0, with_a_file, 8), (1, while_evaluating, 10)]
SETTINGS = ["train.total_steps=10", "train.memory_consolidation_interval=3", "eval.every=5", "eval.windows=2",
            "train.save_every=6", "train.heartbeat_s=30"]


def rows(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl says of the losses, in its order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {tag: [(line["step"], line[tag]) for line in lines if tag in line]
            for tag in ("train/loss", "train/grad_norm", "memory/L1/merged", "eval/loss", "eval/loss_memory_off")}


def on_the_board(run: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars(tag)]


def test_a_job_that_is_asked_to_end_in_every_phase_computes_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    text = small_job.write_text(tmp_path / "text")
    for name in ("whole", "asked"):
        (tmp_path / name).mkdir()
    with Job(tmp_path / "whole", text, *SETTINGS) as whole:
        assert whole.end() == [0, 0]
    run = tmp_path / "asked" / "run"
    for rank, phase, step in ASKED:
        with Job(tmp_path / "asked", text, "--resume", "auto", *SETTINGS, sabotage={rank: phase}) as job:
            assert job.end() == [75, 75], f"{phase.__name__}: {job.said(0)[-3000:]}"
        saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        assert (saved[-1] if saved else None) == (step and f"step-{step:08d}"), phase.__name__
        assert "asked to end by" in job.log(0) and "--resume auto" in job.log(0)
        assert not (run / preempt.FILE).exists()
    with Job(tmp_path / "asked", text, "--resume", "auto", *SETTINGS) as job:
        assert job.end() == [0, 0]
    assert rows(run) == rows(whole.run)
    assert [step for step, _ in rows(run)["train/loss"]] == list(range(1, 11))
    assert [step for step, _ in rows(run)["eval/loss"]] == [5, 10]
    assert on_the_board(run, "train/loss") == list(range(1, 11))


def test_a_check_that_prepares_the_corpus_gives_way_and_leaves_nothing(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcode.data import corpus

    words = ["config", "check", "--data", *small_job.SETTINGS, f"data.path={small_job.write_text(tmp_path / 'text')}",
             f"data.cache={tmp_path / 'cache'}"]
    with monkeypatch.context() as patch:
        patch.setattr(corpus._SideWriter, "add", ask)
        assert cli.main(words) == preempt.REQUEUE
    assert list((tmp_path / "cache").iterdir()) == []
    assert cli.main(words) == 0


def test_a_job_of_one_rank_is_asked_in_the_same_way(tmp_path: Path) -> None:
    text = small_job.write_text(tmp_path / "text")
    with Job(tmp_path, text, "train.total_steps=100000", ranks=1) as job:
        job.until_step(3)
        job.send(0, signal.SIGTERM)
        assert job.end() == [75]
    assert "asked to end by SIGTERM" in job.log(0)
