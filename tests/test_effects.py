"""Settings without effect are named; what a preset brings along, or what has an effect, is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lmcode import dist, presets
from lmcode.effects import RULES, without_effect
from lmcode.presets import load_run_config
from lmcode.train import start


@pytest.mark.parametrize("preset", presets.ALL)
@pytest.mark.parametrize("ranks", [None, 1, 4])
def test_a_preset_warns_of_nothing(preset: str, ranks: int | None) -> None:
    assert without_effect(load_run_config(preset), ranks) == []


@pytest.mark.parametrize("without", [["model.long_term_memory_slots=0"], ["model.memory_layers=[]"], ["eval.every=0"],
                                     ["model.short_term_memory_size=0"]])
@pytest.mark.parametrize("preset", presets.ALL)
def test_what_a_preset_brings_along_is_no_choice_of_the_users(preset: str, without: list[str]) -> None:
    assert without_effect(load_run_config(preset, without)) == []


@pytest.mark.parametrize(("setting", "with_effect", "without"), [
    ("memory.write_every=9", ["memory.write=every_nth"], []),
    ("memory.write_share=0.9", ["memory.write=surprise"], ["memory.write=every_nth"]),
    ("memory.consolidation_threshold=0.2", ["train.memory_consolidation_interval=10"], []),
    ("train.replay_sampler=recent", ["train.memory_sample_ratio=0.5"], []),
    ("train.replay_slots=99", ["train.memory_sample_ratio=0.5"], []),
    ("eval.windows=3", ["eval.every=10"], ["eval.every=0"]),
    ("memory.second_chance_importance=3", [], ["model.long_term_memory_slots=0"]),
    ("eval.slots=4096", [], ["model.long_term_memory_slots=0"]),
    ("memory.dtype=bf16", [], ["model.memory_layers=[]"]),
    ("memory.tier=hnsw", ["memory.scope=global"], []),
    ("model.memory_heads=4", [], ["model.memory_layers=[]"]),
    ("model.short_term_dim=7", [], ["model.short_term_memory_size=0"]),
    ("train.min_learning_rate=0.5", [], ["train.total_steps=10"]),
    ("train.min_learning_rate=0.5", ["train.schedule=linear"], ["train.schedule=constant"]),
    ("train.schedule=linear", [], ["train.total_steps=10"]),
    ("train.decay_share=0.3", ["train.schedule=wsd"], ["train.schedule=linear"]),
])
def test_a_setting_without_effect_is_named_with_what_it_needs(setting: str, with_effect: list[str],
                                                              without: list[str]) -> None:
    assert without_effect(load_run_config("tiny", [setting, *with_effect])) == []
    line, = without_effect(load_run_config("tiny", [setting, *without]))
    assert line.startswith(setting.replace("=", " = ")) and " has no effect here: it needs " in line


@pytest.mark.parametrize(("setting", "ranks", "named"), [
    ("memory.exchange=all_to_all", 1, True), ("memory.exchange=all_to_all", 2, False), ("memory.exchange=auto", None, False),
    ("memory.group_size=1", 1, True), ("memory.group_size=1", 2, False),
])
def test_an_exchange_needs_ranks(setting: str, ranks: int | None, named: bool) -> None:
    assert bool(without_effect(load_run_config("tiny", [setting]), ranks)) == named


@pytest.mark.parametrize(("able", "warned"), [(False, 2), (True, 1), (None, 1)])
def test_the_start_of_a_run_warns(able: bool | None, warned: int, monkeypatch: pytest.MonkeyPatch,
                                  caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(start, "has_bf16", lambda: able)
    monkeypatch.setattr(start.observe, "describe_start", lambda *_: "")
    config = load_run_config("tiny", ["train.precision=bf16", "memory.write_every=9"])
    sampler = SimpleNamespace(describe_padding=lambda: "")
    start.announce(SimpleNamespace(config=config, me=dist.Rank(0, 1, 0, 1, "single"), model=None, last_step=400,
                                   sampler=sampler, engine=SimpleNamespace(device=torch.device("cpu"))))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == warned and "memory.write_every" in warnings[0]
    assert ("bf16 is emulated" in warnings[-1]) == (able is False)


def test_every_setting_of_the_table_exists() -> None:
    config = load_run_config("tiny")
    for name in (name for rule in RULES for name in rule.settings):
        section, _, key = name.partition(".")
        assert key in type(getattr(config, section)).model_fields, name
