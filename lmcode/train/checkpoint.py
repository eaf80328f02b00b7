"""Checkpoints of a run: one folder a step, complete or absent.

A checkpoint holds the weights (safetensors), DeepSpeed's own state, every bank (one file per virtual shard, so that any
number of ranks loads it), the streams' short-term state, the tokenizer and the resolved config, all of the same step.
It is written under a temporary name and renamed when every rank is done.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmcode.config import ConfigError, RunConfig, load_run_config, near_match
from lmcode.dist import Group
from lmcode.lmcode import LMCODE
from lmcode.memory.store import load_bank, save_bank
from lmcode.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from lmcode.train.loop import Session

log = logging.getLogger("lmcode")


def make_run_folder(path: Path) -> Path:
    """Creates the run folder.

    Raises:
        ConfigError: if it already holds a run (nothing is ever overwritten).
    """
    if (path / "config.yaml").exists():
        raise ConfigError(f"'{path}' already holds a run; give another train.run_dir")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save(session: Session) -> Path:
    """Writes the checkpoint of the current step; returns its folder. A collective."""
    from safetensors.torch import save_file

    group, final = session.group, session.run_folder / "checkpoints" / f"step-{session.step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if group.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    group.barrier()
    weights = session.engine.full_state_dict()
    if group.rank == 0:
        save_file(weights, temporary / "model.safetensors")
        session.corpus.tokenizer.save(temporary / "tokenizer")
        shutil.copy(session.run_folder / "config.yaml", temporary / "config.yaml")
        write_json(temporary / "trainer.json", {"step": session.step, "world_size": group.size})
    for layer, bank in session.model.banks.items():
        folder = temporary / "banks" / f"layer-{layer:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_bank(folder, bank)
    session.engine.save(temporary)
    group.barrier()
    if group.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        drop_old(final.parent, keep=session.config.train.save_total_limit)
    group.barrier()
    log.info("saved %s", final)
    return final


def drop_old(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "trainer.json").is_file())


def find(run: Path) -> Path:
    """The newest checkpoint of a run folder, or `run` itself if it is a checkpoint.

    Raises:
        ConfigError: if there is none, with the nearest existing name beside it.
    """
    if (run / "trainer.json").is_file():
        return run
    if not run.is_dir():
        names = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
        raise ConfigError(f"there is no run folder '{run}'.{near_match(run.name, names)}")
    found = checkpoints(run / "checkpoints")
    if not found:
        raise ConfigError(f"'{run}' holds no checkpoint")
    return found[-1]


def load_model(run: Path, overrides: list[str], *, group: Group, device: torch.device,
               memory: bool = True) -> tuple[LMCODE, RunConfig, Tokenizer, int]:
    """Builds the model of a run's newest checkpoint, its banks filled; returns it with config, tokenizer and step.

    Raises:
        ConfigError: if there is no checkpoint, or an override changes a shape that the weights do not have.
    """
    from safetensors.torch import load_file

    folder = find(run)
    config = load_run_config(folder / "config.yaml", overrides)
    model = LMCODE(config.model, memory=config.memory, group=group, device=device)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the weights in '{folder}' do not fit the model: {' '.join(str(error).split())}") from None
    if memory:
        for layer, bank in model.banks.items():
            load_bank(folder / "banks" / f"layer-{layer:02d}", bank)
    step = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))["step"]
    return model.to(device), config, load_tokenizer(folder / "tokenizer"), step
