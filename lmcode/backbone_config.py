"""Settings of a run whose model is one of transformers with a recipe (`model.backbone=PATH`), from that model's config.json.

The one thing to know: nothing here needs torch or transformers. A recipe's class, which does, is asked for the settings that
follow from it when such a run is described; `recipes` has the models themselves.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.config import RECIPES, ConfigError, LMCODEConfig, Section, build, near_match


class Family(NamedTuple):
    """Names of the parts of an architecture of transformers, from the inner model (`base_model`) down.

    layers, attention: the list of decoder layers; the attention module in each.
    rotates: whether positions enter by rotating queries and keys; otherwise they are in the hidden states already.
    """

    layers: str
    attention: str
    rotates: bool = True


FAMILIES = {"llama": Family("layers", "self_attn"), "mistral": Family("layers", "self_attn"),
            "qwen2": Family("layers", "self_attn"), "qwen3": Family("layers", "self_attn"),
            "gpt2": Family("h", "attn", rotates=False), "gpt_neox": Family("layers", "attention")}
NAMES = {  # what config.json calls a size, and what GPT-2's does
    "vocab_size": ("vocab_size",), "hidden_size": ("hidden_size", "n_embd"), "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"), "positions": ("max_position_embeddings", "n_positions"),
    "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)}
MODEL_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads")


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`. ConfigError, with the list, for one that is not supported."""
    if model_type not in FAMILIES:
        raise ConfigError(f"a backbone must have one of the architectures {', '.join(FAMILIES)}: got '{model_type}'."
                          f"{near_match(str(model_type), FAMILIES)}")
    return FAMILIES[model_type]


def sizes_of(content: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of `NAMES` of a transformers config. ConfigError for another architecture, or a size that is missing."""
    family_of(content.get("model_type"))
    given = {size: next((content[name] for name in names if content.get(name) is not None), None)
             for size, names in NAMES.items()}
    for size in (*MODEL_SIZES, "positions"):
        if not isinstance(given[size], int):
            raise ConfigError(f"the config of a backbone must have '{NAMES[size][0]}': got {given[size]!r}")
    found = {size: number for size, number in given.items() if isinstance(number, int)}
    return {"kv_heads": found["num_heads"], "head_dim": found["hidden_size"] // found["num_heads"], **found}


def read_sizes(path: str) -> dict[str, int]:
    """`sizes_of` of the model in a folder. ConfigError if there is none."""
    folder = Path(path).expanduser()
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        names = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError("model.backbone must be 'lmcode' or the folder of a transformers model, with its config.json: got "
                          f"'{path}'.{near_match(folder.name, [name for name in names if name != folder.name])}") from None
    return sizes_of(content if isinstance(content, dict) else {})


def recipe_of(name: Any) -> Any:
    """The class of a recipe. ConfigError, with the list, for one that there is not."""
    if name not in RECIPES:
        raise ConfigError(f"model.recipe must be one of {', '.join(RECIPES)}: got '{name}'.{near_match(str(name), RECIPES)}")
    return pkgutil.resolve_name(RECIPES[name])


def options_of(name: Any, options: Mapping[str, Any]) -> Section:
    """A recipe's own settings, checked. ConfigError for one that it does not have, or that does not fit."""
    try:
        made: Section = build(recipe_of(name).Options, options)
        return made
    except ConfigError as error:
        raise ConfigError(f"model.recipe_options of '{name}': {error}") from None


def described(values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The section `model` of a run config for a backbone of these sizes: what was given, and what follows from the recipe.

    Raises:
        ConfigError: an unknown recipe, options that do not fit it or the backbone.
    """
    options = options_of(values.get("recipe"), values.get("recipe_options") or {})
    kind = recipe_of(values["recipe"])
    if values.get("cache_windows"):
        raise ConfigError("model.cache_windows is of our own model: here it is model.recipe_options.cache=, in tokens: "
                          f"got {values['cache_windows']}")
    for name in ("memory_key_tokens", "memory_values"):
        if values.get(name, usual := LMCODEConfig.model_fields[name].default) != usual:
            raise ConfigError(f"model.{name} is of our own model, whose embeddings are its own: with a recipe it must be "
                              f"{usual!r}, got {values[name]!r}")
    room = sizes["positions"] - getattr(options, "sinks", 0) - getattr(options, "cache", 0)
    if room < 2:
        raise ConfigError(f"sinks and cache must leave room for a window: the backbone has {sizes['positions']} positions, "
                          f"{room} are left")
    given = {name: value for name, value in values.items() if name not in MODEL_SIZES and value is not None}
    if given.get("context_length", room) > room:
        raise ConfigError(f"model.context_length must not exceed what sinks and cache leave of the backbone's positions, "
                          f"{room}: got {given['context_length']}")
    model = {"short_term_memory_size": 0, "context_length": room, **kind.settings(sizes, options), **given,
             **{name: sizes[name] for name in MODEL_SIZES}}
    model["recipe_options"] = options.model_dump(mode="json")
    kind.check(model, sizes)
    return model


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run config, in which a backbone's sizes and a recipe's settings are filled in from its folder.

    The corpus is then tokenized by the backbone's tokenizer, and documents do not share a window.
    """
    model = values.get("model") or {}
    name = model.get("backbone", "lmcode") if isinstance(model, dict) else "lmcode"
    if name == "lmcode" or not (model.get("recipe") or (Path(name).expanduser() / "config.json").is_file()):
        return values
    data = {**(values.get("data") or {})}
    if data.get("packing") is True:
        raise ConfigError("documents cannot share a window that a backbone reads: leave data.packing out")
    data["packing"] = False
    if data.get("tokenizer") in (None, "bpe"):
        data["tokenizer"] = model["backbone"]
    model = {**model, "backbone": str(Path(model["backbone"]).expanduser().resolve())}
    return {**values, "model": described(model, read_sizes(model["backbone"])), "data": data}
