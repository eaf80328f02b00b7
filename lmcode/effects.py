"""Settings that have no effect together with the other settings: one table of rules, and the warning for each.

A setting counts as chosen by the user if its value is neither that of the preset nor the default, so the numbers that a
preset has for another policy are no reason to warn. A setting without effect is a warning and no error: the user may be
running a sweep over the setting that makes it effective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lmcode.config import RunConfig
from lmcode.presets import ALL, by_name


class Rule(NamedTuple):
    """When some settings have an effect, and how a person gets there."""

    settings: tuple[str, ...]
    holds: Callable[[RunConfig, int | None], bool]  # given the number of ranks, if that is known
    needs: str


def _in(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


def _replays(config: RunConfig, _ranks: int | None) -> bool:
    return config.train.memory_sample_ratio > 0


def _has_bank(config: RunConfig, _ranks: int | None) -> bool:
    return config.model.long_term_memory_slots > 0 and bool(config.model.memory_layer_indices)


def _has_read(config: RunConfig, _ranks: int | None) -> bool:
    return bool(config.model.memory_layer_indices)


def _has_slots(config: RunConfig, _ranks: int | None) -> bool:
    return config.model.short_term_memory_size > 0


def _exchanges(config: RunConfig, ranks: int | None) -> bool:
    return ranks is None or config.memory.ranks_per_group(ranks) > 1


RULES = (
    Rule(("memory.write_every",), lambda config, _: config.memory.write == "every_nth", "memory.write=every_nth"),
    Rule(("memory.write_share",), lambda config, _: config.memory.write == "surprise", "memory.write=surprise"),
    Rule(("memory.consolidation_threshold",), lambda config, _: config.train.memory_consolidation_interval > 0,
         "train.memory_consolidation_interval of 1 or more"),
    Rule(_in("train", "replay_sampler replay_slots"), _replays, "train.memory_sample_ratio above 0"),
    Rule(("memory.value_folder",), lambda config, _: config.memory.value_store == "mmap", "memory.value_store=mmap"),
    Rule(("memory.second_chance_importance",), lambda config, _: config.memory.eviction == "clock",
         "memory.eviction=clock"),
    Rule(("memory.exchange",), _exchanges, "more than one rank that shares a bank"),
    Rule(("memory.recall_target",), lambda config, _: config.memory.tier in ("ivf", "hnsw", "auto"),
         "memory.tier of ivf, hnsw or auto"),
    Rule(("memory.recall_target",), lambda config, _: config.memory.scope == "global", "memory.scope=global"),
    Rule(("memory.tier",), lambda config, _: config.memory.tier not in ("ivf", "hnsw") or config.memory.scope == "global",
         "memory.scope=global: reads of one document are exact"),
    Rule(("memory.merge_keep",), lambda config, _: config.memory.merge_above is not None, "memory.merge_above"),
    Rule(("memory.group_size",), lambda _, ranks: ranks is None or ranks > 1, "more than one rank"),
    Rule(_in("train", "min_learning_rate schedule"), lambda config, _: config.train.total_steps > config.train.warmup_steps,
         "train.total_steps beyond train.warmup_steps"),
    Rule(("train.min_learning_rate",), lambda config, _: config.train.schedule != "constant",
         "a train.schedule that decays"),
    Rule(("train.decay_share",), lambda config, _: config.train.schedule == "wsd", "train.schedule=wsd"),
    Rule(("eval.windows",), lambda config, _: config.eval.every > 0, "eval.every of 1 or more"),
    Rule(_in("model", "memory_heads memory_head_dim memory_temperature memory_key_tokens memory_values "
                  "retrieval_stride successor_values"), _has_read,
         "a layer in model.memory_layers"),
    Rule(_in("model", "memory_top_k memory_bias")
         + _in("memory", "virtual_shards group_size dtype tier fetch exchange scope write write_every write_share "
                         "value_store value_folder eviction "
                         "second_chance_importance importance_weight importance_growth consolidation_threshold merge_above "
                         "merge_keep max_norm "
                         "experience_slots recall_queries recall_target")
         + _in("train", "memory_consolidation_interval") + _in("eval", "slots"), _has_bank,
         "a bank: model.long_term_memory_slots above 0 and a layer in model.memory_layers"),
    Rule(_in("model", "short_term_dim short_term_segment memory_update_rate"), _has_slots,
         "model.short_term_memory_size above 0"),
)


def without_effect(config: RunConfig, ranks: int | None = None, *, rules: Iterable[Rule] = RULES) -> list[str]:
    """A line for each setting that was chosen and changes nothing in this combination.

    Args:
        ranks: that will share the run; None if that is not known.
    """
    usual = [RunConfig(), *([by_name(config.preset)] if config.preset in ALL else [])]
    said: dict[str, str] = {}
    for rule in rules:
        for name in () if rule.holds(config, ranks) else rule.settings:
            if _value(config, name) not in [_value(one, name) for one in usual]:
                said.setdefault(name, f"{name} = {_value(config, name)} has no effect here: it needs {rule.needs}")
    return list(said.values())


def _value(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)
