"""Evaluation mode: whatever ends a measurement, every module of the model is in the mode that it was in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcode.data.dataset import MemoryDataset
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.eval.held_out import evaluate
from lmcode.language_model import LMCODE
from lmcode.model.mode import in_eval_mode
from lmcode.model.reading import read_texts
from lmcode.report.analysis import analyze_memory_capacity
from lmcode.train.trainer import MemoryAwareTrainer
from tests.helpers.models import TEXTS, ids_of, small_model


class Interrupted(Exception):
    """What ends a measurement before its time."""


def stop(*_: Any, **__: Any) -> None:
    raise Interrupted


def evaluated(model: LMCODE) -> None:
    documents = MemoryDataset([ids_of(text)[:40] for text in TEXTS]).as_documents()
    sampler = StreamSampler(documents, streams=1, sequence_length=16, seed=0, epochs=1, shuffle=False)
    evaluate(model, sampler, banks=model.banks, group=Group(), windows=2, between=stop)


def failing(action: Callable[[LMCODE], Any]) -> Callable[[LMCODE], Any]:
    """The action on a model whose last layer raises."""
    def act(model: LMCODE) -> None:
        handle = model.layers[-1].register_forward_hook(stop)
        try:
            action(model)
        finally:
            handle.remove()

    return act


PLACES: dict[str, Callable[[LMCODE], Any]] = {
    "evaluate": evaluated,
    "generate": lambda model: model.generate([[1, 2]], max_new_tokens=2, on_token=stop),
    "read": failing(lambda model: read_texts(model, [[1, 2, 3]])),
    "report": failing(lambda model: analyze_memory_capacity(model, [ids_of(TEXTS[0])])),
    "train": failing(lambda model: MemoryAwareTrainer(model, {"total_steps": 1}).train([ids_of(TEXTS[0])[:20]], 1, 1)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_measurement_leaves_the_mode_as_it_was(place: str, training: bool) -> None:
    model = small_model().train(training)
    model.layers[0].train(not training)  # a user may have chosen otherwise for a part
    before = [module.training for module in model.modules()]
    with pytest.raises(Interrupted):
        PLACES[place](model)
    assert [module.training for module in model.modules()] == before


def test_inside_the_block_everything_is_in_evaluation_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
