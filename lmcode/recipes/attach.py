"""`lmcode.attach`: a long-term memory for a transformers model, by one call."""

from __future__ import annotations

from typing import Any

import torch

from lmcode.backbone_config import described, recipe_of, sizes_of
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build, near_match
from lmcode.dist import Group
from lmcode.recipes import foreign
from lmcode.recipes.attached import Attached


def attach(model: Any, recipe: str = "camelot", *, memory: dict[str, Any] | MemoryConfig | None = None,
           group: Group | None = None, device: torch.device | str | None = None, **options: Any) -> Any:
    """Gives a causal language model of transformers' a long-term memory, and returns it: it stays what it is, for generate,
    pipelines and the lm-evaluation-harness.

    `model.lmcode` is the memory's side of it, an `Attached`: `store_experience`, `query_memory`, `banks`,
    `save_pretrained`. What is read is namespace 0, where experiences go, unless `with model.lmcode.namespace(...)` says
    otherwise. The weights of the model are frozen unless `train_backbone=True`.

    Args:
        model: of one of the architectures in `backbone_config.FAMILIES`; it is changed, and can be attached to once.
        recipe: a name in `config.RECIPES`.
        memory: settings of the banks (`MemoryConfig`).
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; that of the model when None.
        **options: settings of the model (`long_term_memory_slots`, `memory_layers`, `memory_top_k`, ...) and of the recipe
            (`cache`, `sinks`, ...).

    Raises:
        ConfigError (a ValueError): for another kind of model, one that has a memory already, an unknown recipe, options that
            do not fit, layers that do not exist.
    """
    if not foreign.is_model(model):
        raise ConfigError(f"attach takes a causal language model of transformers: got {type(model).__name__}")
    if getattr(model, "lmcode", None) is not None:
        raise ConfigError("a model can be attached to once: this one has a memory already")
    config = config_for(model, recipe, options)
    storage = memory if isinstance(memory, MemoryConfig) else build(MemoryConfig, memory or {})
    place = next(model.parameters()).device if device is None else torch.device(device)
    return Attached(config, memory=storage, group=group, device=place, model=model).backbone


def config_for(model: Any, recipe: str, options: dict[str, Any]) -> LMCODEConfig:
    """The settings of a model with a recipe. ConfigError for those that do not fit."""
    own = recipe_of(recipe).Options.model_fields
    known = [*own, *LMCODEConfig.model_fields]
    for name in options:
        if name not in known or name in ("backbone", "recipe", "recipe_options"):
            raise ConfigError(f"attach has no option '{name}' with the recipe '{recipe}'.{near_match(name, known)}")
    sizes = sizes_of(model.config.to_dict())
    values = {name: value for name, value in options.items() if name not in own}
    values.update(backbone=model.name_or_path or model.config.model_type, recipe=recipe,
                  recipe_options={name: value for name, value in options.items() if name in own})
    return build(LMCODEConfig, described(values, sizes))
