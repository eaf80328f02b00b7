"""Checkpoints of a run: finding them, verifying them before use, and which settings may differ on resuming.

`train.saving` writes them; `train.resuming` says what they contain and reads it; `files.durable` makes each a commit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, RunConfig, build, flatten, with_overrides
from lmcode.data.tokenizer import load_tokenizer
from lmcode.dist import Group
from lmcode.files import durable
from lmcode.memories.files import load_memory
from lmcode.presets import load_run_config
from lmcode.saved.places import Kind, place_of

log = logging.getLogger("lmcode")
Made = TypeVar("Made", bound=Backbone)

# Settings that a resumed run must share with its checkpoint. The rest of `memory`, the schedule's numbers, saving,
# logging and evaluation may change; the corpus is compared by its digest.
FIXED = ("model.", "memory.virtual_shards", "memory.dtype", "train.streams", "train.sequence_length", "train.seed",
         "train.precision", "train.weight_decay", "train.betas")
IDENTITY = "backbone.json"  # what a model's memory belongs to: `Backbone.identity`
STORED_SIZES = ("memory.virtual_shards", "memory.experience_slots", "model.long_term_memory_slots")


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run folder that `path` means, and the checkpoint in it if it means one. ConfigError for anything else."""
    place = place_of(path)
    if place.run is None:
        raise ConfigError("a checkpoint to resume from must lie in the 'checkpoints' folder of its run: got the "
                          f"{place.kind.value} '{place.path}'")
    return (path, None) if place.kind is Kind.RUN else (place.run, place.folder)


def check_resumable(config: RunConfig, folder: Path, world_size: int) -> int:
    """Refuses a checkpoint that this job cannot resume from; returns its step. Logs another number of ranks."""
    saved, now = (flatten(one.model_dump(mode="json")) for one in (load_run_config(folder / "config.yaml"), config))
    for name in now:
        # Another share would move streams to other places in their documents; from none to some they keep their places.
        fixed = saved[name] > 0 if name == "train.memory_sample_ratio" else name.startswith(FIXED)
        if fixed and saved[name] != now[name]:
            raise ConfigError(f"{name} must be that of the checkpoint '{folder}': expected {saved[name]!r}, "
                              f"got {now[name]!r}")
    facts = durable.read_manifest(folder).facts
    if facts.world_size != world_size:
        log.info("'%s' was saved by %d rank(s): resuming with %d", folder, facts.world_size, world_size)
    return facts.step


def stored_sizes(config: RunConfig) -> dict[str, int]:
    """The settings that say how the memory is stored, which `lmcode memory reshard` changes."""
    flat = flatten(config.model_dump(mode="json"))
    return {name: flat[name] for name in STORED_SIZES}


def since_resharded(config: RunConfig, folder: Path) -> dict[str, int]:
    """The settings that `lmcode memory reshard` changed in a verified checkpoint, as they are there, where `config` still
    has the former ones: a job that is started again with the same command uses the new numbers. `check_resumable` refuses
    any others."""
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    saved, now = stored_sizes(load_run_config(folder / "config.yaml")), stored_sizes(config)
    return {name: saved[name] for name, numbers in trainer.get("resharded", {}).items()
            if now[name] != saved[name] and now[name] in numbers}


def with_numbers(config: RunConfig, numbers: Mapping[str, int]) -> RunConfig:
    """`config` with other numbers under these dotted names; ConfigError if they do not go with the rest."""
    changes = [f"{name}={number}" for name, number in numbers.items()]
    return build(RunConfig, with_overrides(config.model_dump(), changes)) if changes else config


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that verifies; None if there is none at all. Warns of those it skips.

    Raises:
        ConfigError: if there are checkpoints and none verifies, with the reason of each.
    """
    path, skipped = durable.newest_verified(run / "checkpoints")
    if path is None and skipped:
        raise ConfigError(f"no checkpoint in '{run}' verifies: " + "; ".join(reason for _, reason in skipped))
    for _, reason in skipped:
        log.warning("skipped a damaged checkpoint: %s", reason)
    return path


def find(path: Path) -> Path:
    """The checkpoint that `path` means, verified: itself, or the newest of a run folder that verifies.

    Raises:
        ConfigError: if there is none, with the nearest existing name beside it.
        DamagedCheckpoint: if `path` is a checkpoint and does not verify.
    """
    place = place_of(path)
    if place.kind in (Kind.CHECKPOINT, Kind.LONE_CHECKPOINT):
        durable.verify(place.folder)
        return place.folder
    if place.kind is not Kind.RUN:
        raise ConfigError(f"'{path}' is a {place.kind.value}, and no run or checkpoint")
    if (found := newest(path)) is None:
        raise ConfigError(f"'{path}' holds no checkpoint")
    return found


def read_model(folder: Path, make: Callable[..., Made], config: RunConfig, *, group: Group, device: torch.device | str,
               memory: bool = True) -> Made:
    """The model of a verified checkpoint, its banks filled if `memory`. A collective of `group`.

    Args:
        make: from the settings of model and memory to a model with empty memories.
        config: the checkpoint's own, perhaps with overrides.

    Raises:
        ConfigError: if the settings have a shape that the weights do not have, or the backbone is another one.
    """
    model = make(config.model, memory=config.memory, group=group, device=device)
    if (identity := folder / IDENTITY).is_file():
        model.check_identity(json.loads(identity.read_text(encoding="utf-8")))
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the weights in '{folder}' do not fit the model: {' '.join(str(error).split())}") from None
    if memory:
        load_memory(folder, model.memories)
    model.tokenizer = load_tokenizer(folder / "tokenizer")
    return model.to(device)
