"""What a path means: a run, a checkpoint in a run, a lone checkpoint, a saved model, or another model. Decided here alone.

The one thing to know: a kill can have left the files that belong at a path next to it; `Place.folder` says where they are
now. Nothing is verified here, and torch is not needed.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from lmcode.config import ConfigError, near_match
from lmcode.files import durable
from lmcode.files.replace import left_by_a_kill
from lmcode.saved.files import CONFIG, MODEL_TYPE, whole


class Kind(Enum):
    """RUN: a run folder. CHECKPOINT: one in the `checkpoints` folder of a run. LONE_CHECKPOINT: at a path of its own, as
    `MemoryAwareTrainer.save_checkpoint` leaves it. SAVED_MODEL: what `save_pretrained` wrote. HUGGING_FACE: a folder with
    the config.json of another kind of model."""

    RUN = "run"
    CHECKPOINT = "checkpoint"
    LONE_CHECKPOINT = "checkpoint by itself"
    SAVED_MODEL = "saved model"
    HUGGING_FACE = "model of another kind"


class Place(NamedTuple):
    """What lies at a path.

    path: absolute, links followed. folder: where its files are.
    """

    kind: Kind
    path: Path
    folder: Path

    @property
    def run(self) -> Path | None:
        """The run folder that it is or lies in."""
        if self.kind is Kind.CHECKPOINT:
            return self.path.parents[1]
        return self.path if self.kind is Kind.RUN else None


def place_of(path: str | Path) -> Place:
    """What lies at a path.

    Raises:
        ConfigError: if there is no folder, with the nearest name beside it.
    """
    real = Path(path).resolve()
    folder = left_by_a_kill(real) or real
    if not folder.is_dir():
        names = [one.name for one in real.parent.iterdir()] if real.parent.is_dir() else []
        raise ConfigError(f"there is no run folder or checkpoint '{path}', nor a saved model."
                          f"{near_match(real.name, names)}")
    saved = (whole(folder) / CONFIG).is_file()
    if saved and _is_ours(whole(folder) / CONFIG):  # whatever else lies there
        return Place(Kind.SAVED_MODEL, real, whole(folder))
    if (folder / durable.MANIFEST).exists() or durable.STEP_NAME.fullmatch(real.name) is not None:
        return Place(Kind.CHECKPOINT if real.parent.name == "checkpoints" else Kind.LONE_CHECKPOINT, real, folder)
    if saved:
        return Place(Kind.HUGGING_FACE, real, whole(folder))
    return Place(Kind.RUN, real, folder)


def _is_ours(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # `pretrained.settings` says what is wrong with it
    return not isinstance(content, dict) or content.get("model_type") == MODEL_TYPE


def is_run_or_checkpoint(path: str | Path) -> bool:
    """Whether a run or a checkpoint lies at a path; False, too, where nothing does, or an empty folder."""
    try:
        place = place_of(path)
    except ConfigError:
        return False
    return place.kind not in (Kind.SAVED_MODEL, Kind.HUGGING_FACE) and (
        place.kind is not Kind.RUN or (place.folder / "config.yaml").is_file() or (place.folder / "checkpoints").is_dir())
