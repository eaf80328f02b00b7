"""Opening what lies at a path, whatever it is: the model, its settings and its memories.

The one thing to know: this and `hf` are the only files that name a class of model. `saved.places` says what a path means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, RunConfig, build, near_match, with_overrides
from lmcode.dist import Group, on_rank_0
from lmcode.files import durable
from lmcode.language_model import LMCODE
from lmcode.presets import load_run_config
from lmcode.saved import checkpoint, pretrained
from lmcode.saved.places import Kind, Place, place_of

BACKBONES: dict[str, type[Backbone]] = {"lmcode": LMCODE}  # by `model.backbone`


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
    if name not in BACKBONES:
        raise ConfigError(f"model.backbone must be one of {', '.join(BACKBONES)}: got '{name}'."
                          f"{near_match(name, BACKBONES)}")
    return BACKBONES[name]


def make_model(config: RunConfig, *, group: Group, device: torch.device) -> Backbone:
    """The model that the settings describe, with empty memories, its weights drawn from torch's generator. A collective."""
    return kind_of(config)(config.model, memory=config.memory, group=group, device=device)


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
    if place.kind in (Kind.SAVED_MODEL, Kind.HUGGING_FACE):
        model = pretrained.read(place.folder, LMCODE, include_memory=memory, group=group, device=device)
        values = {"preset": "saved", "model": model.config.model_dump(), "memory": model.memory_config.model_dump(),
                  "train": {"sequence_length": model.config.context_length}}
        config: RunConfig = build(RunConfig, with_overrides(values, overrides))
        if config.model != model.config:
            raise ConfigError(f"the model in '{path}' has its settings: leave out what begins with model.")
        return Opened(model, place, place.folder, config, 0)
    folder = on_rank_0(group, lambda: checkpoint.find(Path(path)))  # found once: a run may be saving newer ones
    config = load_run_config(folder / "config.yaml", overrides)
    model = checkpoint.read_model(folder, kind_of(config), config, group=group, device=device, memory=memory)
    return Opened(model, place, folder, config, durable.read_manifest(folder).facts.step)
