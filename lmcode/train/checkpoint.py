"""Checkpoints of a run: saved as one commit, verified before use, resumed exactly.

A checkpoint holds, all of the same step: the weights (safetensors), DeepSpeed's own state under zero/, every bank (one
file per virtual shard) and the streams' short-term state (one file per rank, by stream), so that any number of ranks
loads those; the random number generators of each rank, the tokenizer and the resolved config. `durable` makes it a
commit; the pickles under zero/ are opened only after the manifest's hashes were found to hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmcode import __version__
from lmcode.config import ConfigError, RunConfig, near_match
from lmcode.dist import Group
from lmcode.lmcode import LMCODE
from lmcode.memory.store import load_bank, save_bank, shard_file
from lmcode.model.lm import StreamState
from lmcode.presets import load_run_config
from lmcode.tokenizer import Tokenizer, load_tokenizer
from lmcode.train import durable
from lmcode.train.durable import DamagedCheckpoint, Facts
from lmcode.train.metrics import flatten
from lmcode.train.session import Session

log = logging.getLogger("lmcode")

# Settings that a resumed run must share with its checkpoint. The rest of `memory`, the schedule's numbers, saving,
# logging and evaluation may change; the corpus is compared by its digest.
FIXED = ("model.", "memory.virtual_shards", "memory.dtype", "train.streams", "train.sequence_length", "train.seed",
         "train.precision", "train.deepspeed", "train.weight_decay", "train.betas")


class SaveFailed(RuntimeError):
    """A checkpoint that could not be written; raised on every rank alike."""


def on_rank_0(group: Group, action: Callable[[], Any]) -> Any:
    """The small picklable result of `action`, which rank 0 alone performs. A collective.

    Raises:
        ConfigError: on every rank, with the message of the ValueError or OSError that rank 0 met.
    """
    message = value = None
    if group.rank == 0:
        try:
            value = action()
        except (ValueError, OSError) as error:
            message = str(error)
    message, value = group.all_gather_object((message, value))[0]
    if message is not None:
        raise ConfigError(message)
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Finding


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run folder that `path` means, and the checkpoint if it means one."""
    if not _is_checkpoint(path):
        return path, None
    path = path.resolve()
    if path.parent.name != "checkpoints":
        raise ConfigError(f"a checkpoint to resume from must lie in the 'checkpoints' folder of its run: got '{path}'")
    return path.parents[1], path


def _is_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        names = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no run folder or checkpoint '{path}'.{near_match(path.name, names)}")
    return (path / durable.MANIFEST).exists() or durable.STEP_NAME.fullmatch(path.name) is not None


def check_resumable(config: RunConfig, folder: Path, world_size: int) -> int:
    """Refuses a checkpoint that this job cannot go on from exactly; returns its step."""
    saved, now = (flatten(one.model_dump(mode="json")) for one in (load_run_config(folder / "config.yaml"), config))
    for name in now:
        if name.startswith(FIXED) and saved[name] != now[name]:
            raise ConfigError(f"{name} must be that of the checkpoint '{folder}': expected {saved[name]!r}, "
                              f"got {now[name]!r}")
    facts = durable.read_manifest(folder).facts
    if facts.world_size != world_size:
        raise ConfigError(f"'{folder}' was saved by {facts.world_size} rank(s) and its optimizer state loads on as many "
                          f"only: got {world_size} (weights, banks and streams load on any: lmcode eval, generate)")
    return facts.step


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


def find(run: Path) -> Path:
    """The newest checkpoint of a run folder that verifies, or `run` itself if it is a checkpoint and verifies.

    Raises:
        ConfigError: if there is none, with the nearest existing name beside it.
        DamagedCheckpoint: if `run` is a checkpoint and does not verify.
    """
    if _is_checkpoint(run):
        durable.verify(run)
        return run
    if (found := newest(run)) is None:
        raise ConfigError(f"'{run}' holds no checkpoint")
    return found


# Saving


def place_of(session: Session) -> Path:
    """The folder of the checkpoint of the current step."""
    return durable.step_folder(session.run_folder / "checkpoints", session.step)


def save(session: Session) -> Path | None:
    """Commits the checkpoint of the current step; returns its folder, or None on every rank if that failed. A collective.

    A failure is logged and counted (`train/failed_saves`); the older checkpoints are as they were, and training goes on.
    """
    final = place_of(session)
    try:
        _commit(session, final)
    except SaveFailed as error:
        session.failed_saves += 1
        if session.group.rank == 0:
            shutil.rmtree(durable.temporary_of(final), ignore_errors=True)
        log.error("the checkpoint of step %d was not saved (failed saves so far: %d): %s", session.step,
                  session.failed_saves, error)
        session.metrics.scalars(session.step, {"train/failed_saves": float(session.failed_saves)})
        return None
    session.saved = final
    log.info("saved %s", final)
    return final


def _commit(session: Session, final: Path) -> None:
    group, temporary = session.group, durable.temporary_of(final)
    with _failing_alike(group):
        if group.rank == 0:
            _prepare(session, final)
    weights = session.engine.full_state_dict()
    with _failing_alike(group):
        written = _write_parts(session, temporary, weights)
    with _failing_alike(group):
        written += [path.relative_to(temporary).as_posix() for path in session.engine.save(temporary)]
    with _failing_alike(group):
        seals = durable.seal(temporary, written)
    everyones = group.all_gather_object(seals)
    with _failing_alike(group):
        if group.rank == 0:
            all_seals = {name: one for part in everyones for name, one in part.items()}
            durable.publish(temporary, final, _facts(session), all_seals)
            _drop_old(final.parent, keep=session.config.train.save_total_limit)


@contextmanager
def _failing_alike(group: Group) -> Iterator[None]:
    """Turns what any rank's file system refuses inside the block into a `SaveFailed` on all. A collective."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # torch and safetensors wrap OSErrors
        problem = f"rank {group.rank}: {' '.join(str(error).split())}"
    problems = [one for one in group.all_gather_object(problem) if one]
    if problems:
        raise SaveFailed("; ".join(problems))


def _prepare(session: Session, final: Path) -> None:
    final.parent.mkdir(exist_ok=True)
    durable.check_space(final.parent, _expected_bytes(session, final.parent))
    temporary = durable.begin(final)
    for name in ("zero", "rng", "streams", *(f"banks/layer-{layer:02d}" for layer in session.model.banks)):
        (temporary / name).mkdir(parents=True)


def _expected_bytes(session: Session, folder: Path) -> int:
    """About what a checkpoint takes: as much as the last one, else by the sizes of what goes into it."""
    for path in reversed(durable.steps(folder)):
        try:
            return durable.read_manifest(path).total_bytes
        except DamagedCheckpoint:
            continue
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in session.engine.module.parameters())
    slot_bytes = sum(bank.slots * bank.heads * bank.head_dim * 2 * (2 if bank.config.dtype == "bf16" else 4)
                     for bank in session.model.banks.values())
    return 20 * weights + slot_bytes  # fp32 weights twice, master weights and two moments


def _facts(session: Session) -> Facts:
    settings = (session.run_folder / "config.yaml").read_bytes()
    versions = {"lmcode": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return Facts(step=session.step, world_size=session.group.size, versions=versions,
                 virtual_shards=session.config.memory.virtual_shards,
                 config=hashlib.blake2b(settings, digest_size=32).hexdigest())


def _write_parts(session: Session, folder: Path, weights: dict[str, Tensor]) -> list[str]:
    """Writes this rank's part of everything but DeepSpeed's state; returns the files that other ranks cannot name."""
    rank = session.group.rank
    written = [f"rng/rank-{rank:05d}.safetensors"]
    save_file(_random_state(session.engine.device), folder / written[0])
    if session.states:
        first = rank * (session.config.train.streams // session.group.size)
        written.append(f"streams/from-{first:08d}.safetensors")
        save_streams(folder / written[-1], session.states)
    for layer, bank in session.model.banks.items():
        place = folder / f"banks/layer-{layer:02d}"
        save_bank(place, bank)
        written += [shard_file(place, shard).relative_to(folder).as_posix() for shard in bank.owned]
    if rank == 0:
        save_file(weights, folder / "model.safetensors")
        session.corpus.tokenizer.save(folder / "tokenizer")
        shutil.copy(session.run_folder / "config.yaml", folder / "config.yaml")
        write_json(folder / "trainer.json", {
            "step": session.step, "skipped_steps": session.engine.skipped_steps, "failed_saves": session.failed_saves,
            "training_seconds": session.training_seconds, "corpus": session.corpus.meta["digest"]})
    return written


def _drop_old(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, unless none of those verifies."""
    found = durable.steps(folder)
    old, kept = found[:-keep], found[-keep:]
    try:
        if old and durable.newest_verified(folder)[0] not in kept:
            log.warning("kept %d old checkpoint(s): none of the newer ones verifies", len(old))
            return
        for path in old:
            durable.discard(path)
    except OSError as error:
        log.warning("an old checkpoint was not removed: %s", error)


# State that belongs to a rank


def save_streams(path: Path, states: dict[int, StreamState]) -> None:
    """Writes the state of one rank's streams: micro-batches are consecutive parts of its block, so they are joined."""
    micros = [_named_tensors(states[micro]) for micro in sorted(states)]
    save_file({name: torch.cat([one[name] for one in micros]).cpu().contiguous() for name in micros[0]}, path)


def load_streams(folder: Path, *, rank: int, world_size: int, num_micro: int,
                 device: torch.device | str = "cpu") -> dict[int, StreamState]:
    """The states of this rank's streams by micro-batch, whatever number of ranks and micro-batches saved them.

    Raises:
        ValueError: if the saved streams do not divide over ranks and micro-batches.
    """
    parts = [load_file(path) for path in sorted(folder.glob("from-*.safetensors"))]  # by first stream: the global order
    if not parts:
        return {}
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = len(whole["pending_valid_B"])
    size, rest = divmod(count, world_size * num_micro)
    if rest:
        raise ValueError(f"{count} saved streams do not divide over {world_size} ranks x {num_micro} micro-batches")
    starts = [(rank * num_micro + micro) * size for micro in range(num_micro)]
    return {micro: _state_of({name: rows[first:first + size].clone().to(device) for name, rows in whole.items()})
            for micro, first in enumerate(starts)}


def _named_tensors(state: StreamState) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, value in state._asdict().items():
        named.update({name: value} if isinstance(value, Tensor) else {f"{name}.{i}": one for i, one in enumerate(value)})
    return named


def _state_of(named: dict[str, Tensor]) -> StreamState:
    def of(field: str) -> Any:
        count = sum(name.startswith(f"{field}.") for name in named)
        return named[field] if field in named else tuple(named[f"{field}.{i}"] for i in range(count))

    return StreamState(**{field: of(field) for field in StreamState._fields})


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


# Loading


def restore(session: Session, folder: Path) -> None:
    """Puts a new session where the run was when `folder`, a verified checkpoint, was saved. A collective.

    Raises:
        ConfigError: if the corpus is not the one that the run read so far.
    """
    config, rank = session.config, session.group.rank
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if trainer["corpus"] != session.corpus.meta["digest"]:
        raise ConfigError(f"the corpus is not the one that '{folder}' was trained on: its tokens have another digest")
    session.engine.load(folder)
    for layer, bank in session.model.banks.items():
        load_bank(folder / "banks" / f"layer-{layer:02d}", bank)
    session.states = load_streams(folder / "streams", rank=rank, world_size=session.group.size,
                                  num_micro=config.train.gradient_accumulation_steps, device=session.engine.device)
    session.step, session.training_seconds = trainer["step"], trainer["training_seconds"]
    session.engine.skipped_steps, session.failed_saves = trainer["skipped_steps"], trainer["failed_saves"]
    random = load_file(folder / "rng" / f"rank-{rank:05d}.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and session.engine.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], session.engine.device)
    session.saved = folder
    on_rank_0(session.group, lambda: _forget_the_future(session))


def _forget_the_future(session: Session) -> None:
    """Sets checkpoints beyond the current step aside: this run is about to write its own, and 'auto' must not mix them."""
    for path in durable.steps(session.run_folder / "checkpoints"):
        if int(path.name.removeprefix("step-")) > session.step:
            log.warning("%s is beyond the step to resume from: kept as %s", path, durable.set_aside(path).name)
    (session.run_folder / "summary.txt").unlink(missing_ok=True)


def load_model(run: Path, overrides: list[str], *, group: Group, device: torch.device,
               memory: bool = True) -> tuple[LMCODE, RunConfig, Tokenizer, int]:
    """Builds the model of a run's newest checkpoint that verifies, its banks filled; returns it with config, tokenizer
    and step. A collective.

    Raises:
        ConfigError: if there is no checkpoint or none verifies, or an override changes a shape that the weights do not
            have.
    """
    folder = on_rank_0(group, lambda: find(run))
    config = load_run_config(folder / "config.yaml", overrides)
    model = LMCODE(config.model, memory=config.memory, group=group, device=device)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the weights in '{folder}' do not fit the model: {' '.join(str(error).split())}") from None
    if memory:
        for layer, bank in model.banks.items():
            load_bank(folder / "banks" / f"layer-{layer:02d}", bank)
    return model.to(device), config, load_tokenizer(folder / "tokenizer"), durable.read_manifest(folder).facts.step
