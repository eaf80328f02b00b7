"""Cosines of stored and fresh keys against a slow count; and that keys which are fresh are not stale."""

from __future__ import annotations

import pytest
import torch

from lmcode.eval.learning import Training
from lmcode.eval.staleness import compare, learn_and_compare
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.task import documents_of


def test_a_comparison_is_a_slow_count() -> None:
    stored, fresh = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    cosines, found = [], []
    for head in range(2):
        for place in range(6):
            scores = [float(torch.cosine_similarity(fresh[head, place], other, dim=0)) for other in stored[head]]
            cosines.append(scores[place])
            found.append(scores[place] == max(scores))
    result = compare(stored, fresh, 7)
    assert result.age == 7 and result.cosine == pytest.approx(sum(cosines) / 12, abs=1e-5)
    assert result.found == pytest.approx(sum(found) / 12)
    assert compare(fresh, fresh, 0)[1:] == (pytest.approx(1.0), 1.0)


def test_keys_grow_stale_as_the_weights_move() -> None:
    lesson = KeyValueRecall(count=20, pairs=3, between=0, questions=3)
    training = Training(steps=12, streams=2, warmup=1, learning_rate=2e-2, model={
        "vocab_size": 60, "hidden_size": 16, "num_heads": 2, "context_length": 16, "memory_head_dim": 8, "memory_top_k": 4,
        "long_term_memory_slots": 64})
    texts = [case.tokens() for case in lesson.cases(9, vocab_size=60)[:4]]
    learned, by_layer = learn_and_compare(training, [(documents_of(lesson.cases(0, vocab_size=60)), 1.0)], texts, seed=0,
                                          moments=3)
    ages = [one.age for one in by_layer[1]]
    assert learned.steps == 12 and list(by_layer) == [1] and ages == [12, 8, 4, 0]
    cosines = [one.cosine for one in by_layer[1]]
    assert cosines[-1] == pytest.approx(1.0, abs=1e-5) and cosines[0] < cosines[2] < 1.0
    assert learned.model.banks[1].next_id > 0
