"""Dropout in a job: other places in every rank, micro-batch and step, none in evaluation, and without it no change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcode import dist
from lmcode.config import RunConfig, build
from lmcode.eval.held_out import evaluate
from lmcode.train import loop
from lmcode.train.start import set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings, write_corpus


def dropped(values: dict) -> dict:
    """What two steps of two micro-batches drop of the embedded tokens, and an evaluation; the random state after set-up."""
    session = set_up(build(RunConfig, values), dist.discover())
    module, state, masks = session.engine.module, torch.get_rng_state(), []
    module.dropout.register_forward_hook(lambda _module, _inputs, output: masks.append((output == 0).tolist()))
    for _ in range(2):
        loop.train_step(session)
        session.step += 1
    in_training = list(masks)
    masks.clear()
    losses = [evaluate(module, session.held_out, banks=session.model.banks, group=session.group, windows=2).loss
              for _ in range(2)]
    session.close()
    return {"training": in_training, "evaluation": masks, "losses": losses, "state": state.tolist()}


def both(jobs: list[dict]) -> list[dict]:
    return [dropped(values) for values in jobs]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    """Of each of two ranks: a job with dropout and one without."""
    folder: Path = tmp_path_factory.mktemp("dropout")
    write_corpus(folder)
    jobs = [settings(folder, name, model={"dropout": dropout}, train={"gradient_accumulation_steps": 2})
            for name, dropout in (("with", 0.3), ("without", 0.0))]
    return run_on_ranks(both, 2, jobs)


def test_no_two_micro_batches_drop_the_same_places_on_any_rank(found: list[list[dict]]) -> None:
    masks = [mask for rank in found for mask in rank[0]["training"]]
    assert len(masks) == 8 == len({str(mask) for mask in masks})
    share = torch.tensor(masks).double().mean((1, 2, 3))
    assert ((share > 0.25) & (share < 0.35)).all()


def test_evaluation_drops_nothing(found: list[list[dict]]) -> None:
    for rank in found:
        assert rank[0]["evaluation"] and not torch.tensor(rank[0]["evaluation"]).any()
        assert rank[0]["losses"][0] == rank[0]["losses"][1]


def test_without_dropout_every_rank_stands_where_the_weights_were_drawn(found: list[list[dict]]) -> None:
    assert found[0][1]["state"] == found[1][1]["state"] and found[0][0]["state"] != found[1][0]["state"]
    assert not torch.tensor([rank[1]["training"] for rank in found]).any()
