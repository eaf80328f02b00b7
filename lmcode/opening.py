"""Opening what lies at a path, whatever it is: the model, its settings and its memories.

The one thing to know: this and `hf` are the only files that name a class of model. `saved.places` says what a path means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmcode.backbone import Backbone
from lmcode.backbone_config import read_sizes, resolved
from lmcode.config import RECIPES, ConfigError, RunConfig, build, near_match, with_overrides
from lmcode.dist import Group, on_rank_0
from lmcode.files import durable
from lmcode.language_model import LMCODE
from lmcode.memories.files import load_memory, prepare_search
from lmcode.presets import load_run_config
from lmcode.saved import checkpoint, pretrained
from lmcode.saved.places import Kind, Place, place_of

# Settings of a model that its weights do not depend on, in value or in meaning.
FREE = ("context_length", "dropout", "memory_top_k", "memory_temperature", "memory_bias", "memory_update_rate",
        "retrieval_stride")
BACKBONES: dict[str, type[Backbone]] = {"lmcode": LMCODE}  # by `model.backbone`; with a recipe it names a folder


class Opened(NamedTuple):
    """A model with its memories, and where it comes from.

    folder: the verified checkpoint, or the folder of the saved model.
    config: the settings that the checkpoint was saved with; of a saved model its own, and defaults for the rest.
    step: optimizer steps behind a checkpoint; 0 for a saved model, which does not say.
    """

    model: Backbone
    place: Place
    folder: Path
    config: RunConfig
    step: int


def kind_of(config: RunConfig) -> type[Backbone]:
    """The kind of model that the settings name. ConfigError for one that there is not."""
    name = config.model.backbone
    if config.model.recipe is not None:
        from lmcode.recipes.attached import Attached

        return Attached
    if name not in BACKBONES:
        raise ConfigError(f"model.backbone must be one of {', '.join(BACKBONES)}: got '{name}'."
                          f"{near_match(name, BACKBONES)}")
    return BACKBONES[name]


def make_model(config: RunConfig, *, group: Group, device: torch.device) -> Backbone:
    """The model that the settings describe, with empty memories, its weights drawn from torch's generator. A collective."""
    return kind_of(config)(config.model, memory=config.memory, group=group, device=device)


def shape_of(path: str | Path, *, memory: bool) -> dict[str, dict[str, Any]]:
    """The settings that a run which starts from the model at a path must share with it: those of the model, where its
    tokenizer lies, and with its `memory` how that is stored.

    Raises:
        ConfigError: if nothing is there, or nothing that can be read.
    """
    place = place_of(path)
    if place.kind in (Kind.SAVED_MODEL, Kind.HUGGING_FACE):
        (model, storage, _), tokenizer = pretrained.settings(place.folder), place.folder
    else:
        folder = checkpoint.find(Path(path))
        config = load_run_config(folder / "config.yaml")
        model, storage, tokenizer = config.model, config.memory, folder / "tokenizer"
    shared = {name: getattr(storage, name) for name in ("virtual_shards", "dtype", "experience_slots")} if memory else {}
    return {"model": model.model_dump(), "memory": shared, "data": {"tokenizer": str(tokenizer)},
            "train": {"init_from": str(place.path), "init_memory": memory}}


def init_from(model: Backbone, path: str | Path, *, memory: bool) -> None:
    """Gives `model` the weights of the model at a path, and with `memory` what that remembers. A collective.

    Raises:
        ConfigError: on every rank, if they have another shape.
    """
    device = next(model.parameters()).device
    other = open_model(path, group=model.group, device=device, memory=memory)
    slots = {} if memory else {"long_term_memory_slots": model.config.long_term_memory_slots}
    wanted, came = model.config.model_dump(), {**other.model.config.model_dump(), **slots}
    differs = sorted(name for name in wanted if wanted[name] != came[name] and name not in FREE)
    if differs:
        raise ConfigError(f"model.{differs[0]} must be that of '{path}', which train.init_from names: expected "
                          f"{came[differs[0]]!r}, got {wanted[differs[0]]!r}")
    try:
        model.load_state_dict(other.model.state_dict())
    except RuntimeError as error:  # learned positions of another context_length
        raise ConfigError(f"the weights of '{path}' do not fit the model: {' '.join(str(error).split())}") from None
    if memory and other.model.banks:
        load_memory(other.folder, model.memories)


def plain_values(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a transformers model in a folder that is opened with a recipe, which the overrides must name.

    Raises:
        ConfigError: if they do not.
    """
    if not any(setting.startswith("model.recipe=") for setting in overrides):
        raise ConfigError(f"'{folder}' holds a model of transformers: say how it is to remember, by --recipe or "
                          f"model.recipe=, one of {', '.join(RECIPES)}")
    length = read_sizes(str(folder))["positions"]
    return {"preset": "saved", "model": {"backbone": str(folder)}, "train": {"sequence_length": min(256, length // 4)}}


def open_model(path: str | Path, overrides: Sequence[str] = (), *, group: Group | None = None,
               device: torch.device | str = "cpu", memory: bool = True) -> Opened:
    """The model at a path: a run's newest checkpoint that verifies, a checkpoint, or a saved model. A collective of `group`.

    Args:
        overrides: dotted settings that differ from the saved ones.
        memory: fill its memories, too.

    Raises:
        ConfigError: on every rank: nothing is there, or nothing that verifies or can be read; an override changes a shape
            that the weights do not have.
    """
    group = group or Group()
    place = on_rank_0(group, lambda: place_of(path))
    if place.kind is Kind.HUGGING_FACE:
        config: RunConfig = build(RunConfig, resolved(with_overrides(plain_values(place.folder, overrides), overrides)))
        return Opened(make_model(config, group=group, device=torch.device(device)).eval(), place, place.folder, config, 0)
    if place.kind is Kind.SAVED_MODEL:
        shape, storage, _ = pretrained.settings(place.folder)
        values = {"preset": "saved", "model": shape.model_dump(), "memory": storage.model_dump(),
                  "train": {"sequence_length": shape.context_length}}
        config = build(RunConfig, with_overrides(values, overrides))
        if config.model != shape:
            raise ConfigError(f"the model in '{path}' has its settings: leave out what begins with model.")
        model: Backbone = pretrained.read(place.folder, kind_of(config), include_memory=memory, group=group, device=device,
                                          storage=config.memory)
        prepare_search(place.folder, model.memories)
        return Opened(model, place, place.folder, config, 0)
    folder = on_rank_0(group, lambda: checkpoint.find(Path(path)))  # found once: a run may be saving newer ones
    config = load_run_config(folder / "config.yaml", overrides)
    model = checkpoint.read_model(folder, kind_of(config), config, group=group, device=device, memory=memory)
    prepare_search(folder, model.memories)
    return Opened(model, place, folder, config, durable.read_manifest(folder).facts.step)
