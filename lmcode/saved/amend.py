"""Changing the memory of a saved run.

The one thing to know: a saved memory is never changed in place. `amend` writes a revision of the newest checkpoint (the
same step, everything but the memory linked to the old files) as a commit of its own, and only then removes the old one,
so that a kill leaves one or the other. `--resume auto` and `load_model` take the revision, since it counts as newer. A
checkpoint outside of a run keeps its path (`files.replace`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, RunConfig, build, to_yaml
from lmcode.data import replay
from lmcode.files import durable
from lmcode.files.durable import Parts, write_json
from lmcode.files.replace import beside, clear, link, take_place
from lmcode.memories.experiences import Namespace
from lmcode.memories.files import BANKS, EXPERIENCES, forget_graphs, make_folders, save_memory
from lmcode.presets import load_run_config
from lmcode.saved.checkpoint import stored_sizes
from lmcode.saved.places import place_of

log = logging.getLogger("lmcode")


@dataclasses.dataclass
class Draft:
    """A revision in the making, for a change to work on.

    folder: the checkpoint or saved model that is revised. model: with all that it remembers there. facts: for the new
    manifest; None of a saved model. parts: files other than the memory that are written anew, by their path.
    """

    folder: Path
    model: Backbone
    facts: durable.CommitFacts | None = None
    parts: Parts = dataclasses.field(default_factory=dict)


class Amended(NamedTuple):
    """What `amend` did: the result of the change, the new commit, and older checkpoints, which hold the former memory."""

    result: Any
    folder: Path
    older: list[Path]


@contextmanager
def writing(run_folder: Path) -> Iterator[None]:
    """The right to write into a run folder, for the length of a block.

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written.
    """
    try:
        lock = durable.Lock(run_folder)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    try:
        yield
    finally:
        lock.close()


def amend(folder: Path, model: Backbone, change: Callable[[Draft], Any]) -> Amended:
    """Changes the memory of `model`, loaded from the checkpoint `folder`, and commits it as the next revision.

    One process alone; the caller holds the run folder's lock (`writing`), or the config.yaml of a checkpoint that lies in
    no run (`durable.held`). If `change` raises, nothing is written.

    Raises:
        OSError: if the disk refuses; the old checkpoint is as it was.
    """
    manifest = durable.read_manifest(folder)
    draft = Draft(folder, model, manifest.facts)
    result = change(draft)
    forget_graphs(folder, model.memories)
    durable.check_space(folder.parent, manifest.total_bytes)
    if place_of(folder).run is None:
        try:
            _commit(beside(folder) / "new", draft, manifest)
        except Exception:
            clear(folder)
            raise
        take_place(folder)
        return Amended(result, folder, [])
    step, revision = durable.step_of(folder)
    final = durable.step_folder(folder.parent, step, revision + 1)
    _commit(final, draft, manifest)
    try:
        durable.discard(folder)
    except (OSError, durable.DamagedCheckpoint) as error:
        log.warning("'%s' was not removed, though '%s' takes its place: %s", folder, final.name, error)
    set_aside = sorted(folder.parent.glob("set-aside-*"))
    return Amended(result, final, [*(path for path in durable.steps(folder.parent) if path != final), *set_aside])


def _commit(final: Path, draft: Draft, manifest: durable.Manifest) -> None:
    """Writes the memory and the parts of a draft anew, and links all else."""
    with durable.commit(final, draft.facts or manifest.facts) as place:
        for name in manifest.files:
            if name not in draft.parts and name.split("/")[0] not in (BANKS, EXPERIENCES):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                link(draft.folder / name, place / name)
        for name, write in draft.parts.items():
            write(place / name)
        make_folders(place, draft.model.memories)
        save_memory(place, draft.model.memories)


# Changes


def forget(draft: Draft, *, ids: Sequence[int] | None = None, namespace: Namespace | None = None,
           older_than: float | None = None) -> dict[str, int]:
    """`LMCODE.delete_experiences` of a model and of the spans that its run replays.

    Returns:
        count (of experiences), entries (of the layers' banks) and replay_spans that were removed.

    Raises:
        ValueError: as there.
    """
    draft.model.replay = kept = load_spans(draft.folder)
    gone = draft.model.delete_experiences(ids=ids, namespace=namespace, older_than=older_than)
    if kept is not None and gone.spans:
        draft.parts[replay.FILE] = replay.replay_part(kept)
    return {"count": gone.experiences, "entries": gone.entries, "replay_spans": gone.spans}


def load_spans(folder: Path) -> replay.Replay | None:
    """What the run of a checkpoint replays; None if that is nothing."""
    if not (folder / replay.FILE).exists():
        return None
    kept = replay.make_replay(load_run_config(folder / "config.yaml"))
    if kept is None:
        raise ConfigError(f"'{folder}' holds spans for replay, and its config.yaml replays nothing")
    replay.load_replay(folder / replay.FILE, kept)
    return kept


def reshard(draft: Draft, virtual_shards: int, *, slots: int | None = None,
            experience_slots: int | None = None) -> dict[str, int]:
    """Moves a run's memory to another number of virtual shards: see `Memories.reshard`.

    The revision's config.yaml says the new numbers; its trainer.json keeps the former ones, so that a job whose settings
    still have them can resume (`checkpoint.since_resharded`).

    Returns:
        count (of entries moved), former (number of virtual shards), virtual_shards, slots and experience_slots.

    Raises:
        ConfigError: as `Memories.reshard`, or if the run's other settings do not allow the new numbers.
    """
    old = load_run_config(draft.folder / "config.yaml")
    count = draft.model.reshard_memory(virtual_shards, slots=slots, experience_slots=experience_slots)
    new: RunConfig = build(RunConfig, {**old.model_dump(), "model": draft.model.config.model_dump(),
                                       "memory": draft.model.memory_config.model_dump()})
    trainer = json.loads((draft.folder / "trainer.json").read_text(encoding="utf-8"))
    former = {name: sorted({number, *trainer.get("resharded", {}).get(name, [])})
              for name, number in stored_sizes(old).items()}
    text = to_yaml(new)
    draft.parts["config.yaml"] = partial(Path.write_text, data=text, encoding="utf-8")
    draft.parts["trainer.json"] = partial(write_json, value={**trainer, "resharded": former})
    facts = draft.facts or durable.read_manifest(draft.folder).facts
    draft.facts = dataclasses.replace(facts, virtual_shards=virtual_shards,
                                      config=hashlib.blake2b(text.encode(), digest_size=32).hexdigest())
    return {"count": count, "former": old.memory.virtual_shards, "virtual_shards": virtual_shards,
            "slots": new.model.long_term_memory_slots, "experience_slots": new.memory.experience_slots}
