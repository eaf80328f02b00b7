"""A backbone with a memory that is trained, killed and resumed is the one that was never stopped."""

from __future__ import annotations

import random
from pathlib import Path

from lmcode.files import durable
from lmcode.opening import open_model
from tests.helpers.recipe_models import plain
from tests.helpers.small_job import killed_after_saving, trained_to, what_was_computed, write_text


def test_two_kills_and_resumes_equal_one_run(tmp_path: Path) -> None:
    """On two ranks, to the last bit: every file of the last checkpoint (what was trained, optimizer, generators, what
    streams carry, the bank's shards), and every number that was recorded."""
    text, chance = write_text(tmp_path / "text"), random.Random(1)
    plain("llama").save_pretrained(tmp_path / "backbone")
    words = [f"model.backbone={tmp_path / 'backbone'}", "model.recipe=lmcode", "model.recipe_options.sinks=2",
             "model.recipe_options.cache=6", "model.short_term_memory_size=0", "model.long_term_memory_slots=156",
             "eval.final_windows=1"]
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    reached = [killed_after_saving(tmp_path / "killed", text, *words, chance=chance, ranks=2, steps=2) for _ in range(2)]
    assert 0 < reached[0] < reached[1], "the second job got further than the first"
    last = reached[1] + 1
    killed, straight = (trained_to(tmp_path / name, text, last, *words, ranks=2) for name in ("killed", "straight"))
    assert what_was_computed(killed) == what_was_computed(straight)
    assert [row["step"] for row in what_was_computed(killed) if "train/loss" in row] == list(range(1, last + 1))
    seals, others = (durable.verify(run / "checkpoints" / f"step-{last:08d}").files for run in (killed, straight))
    # These two tell the seconds of training and the run's folder.
    assert {name for name in seals.keys() | others.keys() if seals.get(name) != others.get(name)} <= {
        "trainer.json", "config.yaml"}
    assert {"backbone.json", "model.safetensors", "rng/rank-00001.safetensors"} <= seals.keys()
    assert sum(name.startswith(("banks/layer-01/", "streams/")) for name in seals) == 14
    first, second = (open_model(run).model for run in (killed, straight))
    assert first.banks[1].content_hash() == second.banks[1].content_hash() and first.banks[1].stats()["evicted"] > 0
    trained, same = ({name: weight.tolist() for name, weight in one.kept_parameters()} for one in (first, second))
    assert trained == same and all(name.startswith("recipe.") for name in trained) and trained
