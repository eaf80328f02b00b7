"""Updates that are refused one after the other end the run, on all ranks alike, and leave what they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmcode import dist
from lmcode.config import RunConfig, build
from lmcode.train import health, loop, saving
from lmcode.train.session import Session
from lmcode.train.start import open_run, set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings, write_corpus

LIMIT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    write_corpus(folder)
    return folder


def poison(session: Session, steps: set[int]) -> None:
    """Rank 0's gradient is not finite in these steps."""
    backward = session.engine.backward

    def poisoned(loss: torch.Tensor) -> None:
        backward(loss * float("nan") if session.step in steps and session.group.rank == 0 else loss)

    session.engine.backward = poisoned


def train(values: dict, bad: set[int]) -> dict:
    session = set_up(build(RunConfig, values), dist.discover())
    poison(session, bad)
    before = session.model.banks[1].content_hash()
    try:
        loop.fit(session)
        problem = None
    except health.Diverged as error:
        problem = str(error)
    session.close()
    return {"problem": problem, "step": session.step, "skipped": session.engine.skipped_steps,
            "untouched": session.model.banks[1].content_hash() == before}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["cpu", "zero2"])
def test_too_many_refused_steps_in_a_row_end_the_run_with_a_dump(folder: Path, stage: str, precision: str) -> None:
    values = settings(folder, f"bad-{stage}-{precision}",
                      train={"total_steps": 9, "max_skipped_steps": LIMIT, "deepspeed": stage, "precision": precision})
    for report in run_on_ranks(train, 2, values, set(range(9))):
        assert f"the updates of {LIMIT} steps in a row were refused" in report["problem"]
        assert (report["step"], report["skipped"], report["untouched"]) == (LIMIT, LIMIT, True)
    for rank in range(2):
        dumped = load_file(folder / "runs" / f"bad-{stage}-{precision}" / f"dump-step-{LIMIT:08d}"
                           / f"rank-{rank:05d}.safetensors")
        assert dumped["0.input_ids_BT"].shape == (6, 16)
        assert dumped["0.L1.gate_BT"].shape == (6, 16)


def test_refused_steps_with_good_ones_between_them_do_not(folder: Path) -> None:
    values = settings(folder, "now-and-then", train={"total_steps": 8, "max_skipped_steps": LIMIT})
    report, _ = run_on_ranks(train, 2, values, {0, 1, 3, 4, 6})
    assert (report["problem"], report["step"], report["skipped"]) == (None, 8, 5)


def train_in_two_parts(values: dict) -> dict:
    """Saved after two refused steps, then resumed where every step is refused."""
    counted = []
    for resume, last in ((None, 2), ("auto", 9)):
        config = build(RunConfig, {**values, "train": {**values["train"], "total_steps": last}})
        session = set_up(config, dist.discover(), start=open_run(config, dist.Group.world(), resume))
        counted.append((session.step, session.skipped_in_a_row))
        poison(session, set(range(9)))
        try:
            loop.fit(session)
            saving.save(session)
        except health.Diverged:
            counted.append((session.step, session.skipped_in_a_row))
        session.close()
    return {"counted": counted}


def test_a_resumed_run_goes_on_counting_refused_steps(folder: Path) -> None:
    values = settings(folder, "resumed", train={"max_skipped_steps": LIMIT, "deepspeed": "cpu"})
    report, = run_on_ranks(train_in_two_parts, 1, values)
    assert report["counted"] == [(0, 0), (2, 2), (3, 3)], "the third refused step in a row is the last one"


def consolidations(values: dict) -> list[int]:
    """The steps after which a bank was consolidated, when steps 2 and 4 are refused."""
    session = set_up(build(RunConfig, values), dist.discover())
    poison(session, {1, 3})
    bank, seen = session.model.banks[1], []
    consolidate = bank.consolidate
    bank.consolidate = lambda threshold: (seen.append(session.step), consolidate(threshold))[1]
    loop.fit(session)
    session.close()
    return seen


def test_a_refused_step_does_not_consolidate(folder: Path) -> None:
    values = settings(folder, "merging", train={"total_steps": 6, "memory_consolidation_interval": 2, "deepspeed": "cpu"})
    assert run_on_ranks(consolidations, 1, values) == [[6]]
