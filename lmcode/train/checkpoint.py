"""Checkpoints of a run: found, verified before use, resumed exactly. `saving` writes them.

A checkpoint holds, all of the same step: the weights, the optimizer's state (whole parameters, spread over one file per
rank), every bank (one file per virtual shard), the streams' short-term state (one file per rank, by stream), the spans
kept for replay, the random number generators of each rank, the tokenizer and the resolved config. Nothing in it depends
on the number of ranks or the ZeRO stage but the generators, and nothing is a pickle. `durable` makes it a commit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmcode.config import ConfigError, RunConfig, build, near_match, with_overrides
from lmcode.dist import Group, on_rank_0
from lmcode.lmcode import LMCODE
from lmcode.presets import load_run_config
from lmcode.saved.memory import load_memory
from lmcode.tokenizer import Tokenizer, load_tokenizer
from lmcode.train import durable, optimizer_files, replay
from lmcode.train.data import Pass
from lmcode.train.engine import MOMENTS
from lmcode.train.metrics import flatten
from lmcode.train.session import Session
from lmcode.train.stream_files import load_streams

log = logging.getLogger("lmcode")
RNG_FOLDER = "rng"

# Settings that a resumed run must share with its checkpoint. The rest of `memory`, the schedule's numbers, saving,
# logging and evaluation may change; the corpus is compared by its digest.
FIXED = ("model.", "memory.virtual_shards", "memory.dtype", "train.streams", "train.sequence_length", "train.seed",
         "train.precision", "train.weight_decay", "train.betas")
STORED_SIZES = ("memory.virtual_shards", "memory.experience_slots", "model.long_term_memory_slots")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Finding


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run folder that `path` means, and the checkpoint if it means one."""
    if not _is_checkpoint(path):
        return path, None
    path = path.resolve()
    if not lies_in_run(path):
        raise ConfigError(f"a checkpoint to resume from must lie in the 'checkpoints' folder of its run: got '{path}'")
    return path.parents[1], path


def lies_in_run(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of a run, and not at a path of its own."""
    return checkpoint.absolute().parent.name == "checkpoints"


def _is_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        names = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no run folder or checkpoint '{path}'.{near_match(path.name, names)}")
    return (path / durable.MANIFEST).exists() or durable.STEP_NAME.fullmatch(path.name) is not None


def check_resumable(config: RunConfig, folder: Path, world_size: int) -> int:
    """Refuses a checkpoint that this job cannot go on from; returns its step. Says when the ranks are not as many."""
    saved, now = (flatten(one.model_dump(mode="json")) for one in (load_run_config(folder / "config.yaml"), config))
    for name in now:
        # Another share would move streams to other places in their documents; from none to some they go on from theirs.
        fixed = saved[name] > 0 if name == "train.memory_sample_ratio" else name.startswith(FIXED)
        if fixed and saved[name] != now[name]:
            raise ConfigError(f"{name} must be that of the checkpoint '{folder}': expected {saved[name]!r}, "
                              f"got {now[name]!r}")
    facts = durable.read_manifest(folder).facts
    if facts.world_size != world_size:
        log.info("'%s' was saved by %d rank(s): going on with %d", folder, facts.world_size, world_size)
    return facts.step


def stored_sizes(config: RunConfig) -> dict[str, int]:
    """The settings that say how the memory is stored, which `lmcode memory reshard` changes."""
    flat = flatten(config.model_dump(mode="json"))
    return {name: flat[name] for name in STORED_SIZES}


def since_resharded(config: RunConfig, folder: Path) -> dict[str, int]:
    """The numbers that `lmcode memory reshard` gave to a verified checkpoint, where `config` has those from before it: a job
    that is started again with the same words goes on with them. Other numbers `check_resumable` refuses."""
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


def place_of(session: Session) -> Path:
    """The folder of the checkpoint of the current step."""
    if session.saved is not None and durable.step_of(session.saved)[0] == session.step:
        return session.saved  # perhaps a later revision of the step
    return durable.step_folder(session.run_folder / "checkpoints", session.step)


def rng_file(rank: int) -> str:
    """The file with a rank's random number generators, relative to the checkpoint."""
    return f"{RNG_FOLDER}/rank-{rank:05d}.safetensors"


# Loading


def restore(session: Session, folder: Path) -> None:
    """Puts a new session where the run was when `folder`, a verified checkpoint, was saved. A collective.

    Raises:
        ConfigError: if the corpus is not the one that the run read so far.
    """
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if trainer["corpus"] != session.corpus.meta["digest"]:
        raise ConfigError(f"the corpus is not the one that '{folder}' was trained on: its tokens have another digest")
    load_into(session, folder, trainer)
    session.saved = folder
    on_rank_0(session.group, lambda: _forget_the_future(session))


def load_into(session: Session, folder: Path, trainer: Mapping[str, Any]) -> None:
    """Everything of a verified checkpoint into `session`; `trainer` is its trainer.json. A collective."""
    config, rank = session.config, session.group.rank
    weights = load_file(folder / "model.safetensors")
    session.engine.load(trainer["updates"], optimizer_files.reader(folder, weights, MOMENTS))
    load_memory(folder, session.model)
    session.states = load_streams(folder / "streams", rank=rank, world_size=session.group.size,
                                  num_micro=config.train.gradient_accumulation_steps, device=session.engine.device)
    session.step, session.training_seconds = trainer["step"], trainer["training_seconds"]
    session.engine.skipped_steps, session.failed_saves = trainer["skipped_steps"], trainer["failed_saves"]
    session.skipped_in_a_row = trainer.get("skipped_in_a_row", 0)  # older checkpoints do not say
    session.owes_evaluation = trainer.get("owes_evaluation", False)
    session.resharded = trainer.get("resharded", {})
    session.data_pass = replay.resume(session.replay, folder, Pass(**trainer.get("pass", {})), step=session.step)
    session.sampler = replay.make_sampler(config, session.corpus.train, session.replay, data_pass=session.data_pass,
                                          epochs=session.sampler.epochs)
    _set_random_state(session, folder / rng_file(rank))


def _set_random_state(session: Session, file: Path) -> None:
    """Sets this rank's generators; those of a rank that did not exist start from seed, step and rank."""
    if not file.exists():
        torch.manual_seed(hash((session.config.train.seed, session.step, session.group.rank)))
        return
    random = load_file(file)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and session.engine.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], session.engine.device)


def _forget_the_future(session: Session) -> None:
    """Sets checkpoints beyond the current step aside: this run is about to write its own, and 'auto' must not mix them."""
    for path in durable.steps(session.run_folder / "checkpoints"):
        if durable.step_of(path) > max(durable.step_of(session.saved), (session.step, 0)):
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
        load_memory(folder, model)
    model.tokenizer = load_tokenizer(folder / "tokenizer")
    return model.to(device), config, model.tokenizer, durable.read_manifest(folder).facts.step
