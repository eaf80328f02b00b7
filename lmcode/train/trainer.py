"""`MemoryAwareTrainer`: a model and a dataset in memory, trained by the engine and loop of the command line.

The trainer makes a `Session` and hands it to `loop.fit`; nothing of the loop is repeated here. Every method is a
collective: in a job of several ranks each runs the same script, makes the same trainer and calls the same methods. The
ranks then hold one model: rank 0's weights, and banks that are sliced over all of them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmcode import dist
from lmcode.backbone import Backbone
from lmcode.config import ConfigError, DataConfig, RunConfig, TrainConfig, build
from lmcode.data.corpus import Corpus
from lmcode.data.dataset import MemoryDataset, as_dataset
from lmcode.data.replay import Replay, make_replay, make_sampler
from lmcode.data.streams import PassStart, StreamSampler
from lmcode.data.tokenizer import ByteTokenizer, same_tokenizer
from lmcode.dist import Group, check_same, on_rank_0
from lmcode.eval.held_out import EvalResult, evaluate
from lmcode.jobs import network
from lmcode.model.mode import keeping_mode
from lmcode.presets import load_run_config
from lmcode.saved import checkpoint
from lmcode.saved.places import place_of
from lmcode.train import loop, observe, path_checkpoint, resuming, start
from lmcode.train.engine import Engine
from lmcode.train.session import Session
from lmcode.train.writers import NullMetrics

log = logging.getLogger("lmcode")

HISTORY = {"train/loss": "loss", "train/learning_rate": "learning_rate", "train/grad_norm": "grad_norm",
           "perf/tokens_per_s": "tokens_per_s", "train/replay_share": "replay_share", "train/replay_loss": "replay_loss"}


class History(NullMetrics):
    """Keeps what a session records, as lists to plot, and hands it on."""

    def __init__(self, inner: NullMetrics) -> None:
        self.inner = inner
        self.lists: dict[str, list[float]] = {name: [] for name in ("step", *HISTORY.values(), "eval_step", "eval_loss",
                                                                    "eval_loss_memory_off")}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.inner.scalars(step, values)
        if "train/loss" in values:
            self._add(step=step, **{name: values.get(tag, math.nan) for tag, name in HISTORY.items()})
        if "eval/loss" in values:
            self._add(eval_step=step, eval_loss=values["eval/loss"],
                      eval_loss_memory_off=values.get("eval/loss_memory_off", math.nan))

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.lists[name].append(value)

    def histogram(self, step: int, tag: str, values: torch.Tensor) -> None:
        self.inner.histogram(step, tag, values)

    def close(self) -> None:
        self.inner.close()


class MemoryAwareTrainer:
    """Trains `model` in place: its own weights and banks.

    Args:
        model: on one rank as it is. On several its weights become those of rank 0 and its banks are spread over all ranks;
            what is in them must be the same on every rank.
        config: a `TrainConfig`, or a dict of its keys; what is left out has its default, but `sequence_length` is that of
            the longest sample, and `streams` and `memory_sample_ratio` come with the dataset. With `run_dir` there is a run
            folder, too, with metrics and a checkpoint every `save_every` steps; the last one is for `save_checkpoint`.

    Raises:
        ConfigError: an unknown key, with the nearest known one; a value that cannot work; banks that cannot be spread.
    """

    def __init__(self, model: Backbone, config: TrainConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(model, Backbone):
            raise ConfigError(f"model must be an LMCODE: got {type(model).__name__}")
        self.config: TrainConfig = config if isinstance(config, TrainConfig) else build(TrainConfig, config or {})
        if self.config.save_every and self.config.run_dir is None:
            raise ConfigError("save_every needs run_dir, the folder that the checkpoints go to")
        self.model = model
        self._me = dist.join()
        self.group = model.group if model.group.size == self._me.world_size else Group.world()
        model.share(self.group, dist.device())
        self._engine: Engine | None = None
        self._start: start.Start | None = None
        self._resume: str | None = None  # what `open_run` resumes from
        self._session: Session | None = None

    @property
    def step(self) -> int:
        """Optimizer steps so far, over all calls of `train`."""
        return 0 if self._session is None else self._session.step

    @property
    def replay(self) -> Replay | None:
        """The stored spans, whose `forget` is final; None if nothing is replayed."""
        return None if self._session is None else self._session.replay

    def train(self, dataset: Any, num_epochs: int = 10, batch_size: int = 32,
              eval_dataset: Any = None) -> dict[str, list[float]]:
        """Trains until the samples have been read `num_epochs` times or `total_steps` are reached, whichever comes first.

        Each sample is a document: `batch_size` of them are read side by side, window by window, and a free row takes the
        next one; rows without any are padding. Learning rate and steps continue over several calls. So does a pass through
        the samples that `total_steps` or a checkpoint interrupted, if `train` is called again with the same samples, windows
        and batch size. Any other data is read from its beginning, as new documents.

        Args:
            dataset: a `MemoryDataset`, or what one can be made of (then with `config.memory_sample_ratio`).
            batch_size: over all ranks, which must divide it.
            eval_dataset: evaluated about once an epoch and at the end.

        Returns:
            Lists to plot: step, loss, learning_rate, grad_norm, tokens_per_s, replay_share and replay_loss (NaN without
            replay) of every `log_every` steps and the last; eval_step, eval_loss, eval_loss_memory_off.

        Raises:
            ConfigError: a batch size that ranks do not divide or that the config contradicts, ids outside the model's
                vocabulary, ranks with different samples.
        """
        check_same(self.group, "train", num_epochs, batch_size, eval_dataset is None)
        if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 1:
            raise ConfigError(f"num_epochs must be an integer of at least 1: got {num_epochs!r}")
        data = self._dataset(dataset)
        held_out = None if eval_dataset is None else self._dataset(eval_dataset)
        config = self._run_config(data, batch_size)
        session, history = self._next_session(config, data, num_epochs, held_out)
        with keeping_mode(self.model):
            if session.step >= session.last_step:
                log.warning("nothing to train: %d of %d steps are behind", session.step, session.last_step)
            else:
                loop.fit(session)
                self._evaluate_last(session)
        over = session.step >= session.data_pass.first_step + (session.sampler.num_steps or 0)
        session.data_pass = dataclasses.replace(session.data_pass, over=over)
        return history.lists

    def evaluate(self, dataset: Any, batch_size: int = 32) -> dict[str, float]:
        """Held-out loss over all of `dataset`, in banks of its own: nothing is changed.

        Returns:
            loss (nats per token), perplexity and tokens; with banks also loss_memory_off and perplexity_memory_off, the same
            without retrieval.
        """
        check_same(self.group, "evaluate", batch_size)
        data = self._dataset(dataset)
        sampler = self._held_out(data, batch_size, self._window(data))
        modes = ("on", "off") if self.model.banks else ("on",)
        results: dict[str, EvalResult] = {
            mode: evaluate(self.model, sampler, banks=self.model.banks, group=self.group, mode=mode,
                           windows=sampler.num_steps or 0) for mode in modes}
        told = {"loss": results["on"].loss, "perplexity": _perplexity(results["on"]), "tokens": results["on"].tokens}
        if "off" in results:
            told.update(loss_memory_off=results["off"].loss, perplexity_memory_off=_perplexity(results["off"]))
        return told

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes the whole state as the folder `path`: weights, banks, optimizer, streams and replay, of one step.

        A path such as 'best_model.pt' names a folder all the same, which `lmcode generate` reads, too. A checkpoint that was
        there stays until the new one is whole and verified by its hashes.

        Raises:
            ConfigError: before any training; or if something is there that is no checkpoint.
            SaveFailed: if the file system refuses; the old checkpoint is as it was.
        """
        if self._session is None:
            raise ConfigError("there is nothing to save yet: call train or load_checkpoint first")
        path_checkpoint.save(self._session, Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """Restores model and trainer as they were when `path` was saved; `train` with the same dataset then resumes exactly.

        Raises:
            ConfigError: if there is no checkpoint, it does not verify, or is of another shape of model or training.
        """
        folder = on_rank_0(self.group, lambda: checkpoint.find(Path(path)))
        own = self.config.run_dir is not None and place_of(folder).run == Path(self.config.run_dir).expanduser().resolve()
        if own:
            self._resume = str(folder)
        saved = load_run_config(folder / "config.yaml").train
        train = self.config.model_copy(update={
            name: getattr(saved, name) for name in ("streams", "sequence_length", "memory_sample_ratio", "replay_sampler",
                                                    "replay_slots")})
        config = RunConfig(preset="trainer", model=self.model.config, memory=self.model.memory_config, train=train,
                           data=DataConfig(packing=False))
        checkpoint.check_resumable(config, folder, self.group.size)
        trainer, corpus = path_checkpoint.corpus_of(folder)
        session = self._make_session(config, corpus, make_replay(config), PassStart(**trainer.get("pass", {})), None)
        resuming.load_into(session, folder, trainer)
        if own:
            session.saved = folder
            on_rank_0(self.group, lambda: resuming.set_the_future_aside(session))
        if corpus.tokenizer.vocab_size <= self.model.config.vocab_size:
            self.model.tokenizer = corpus.tokenizer
        self._session, self.model.replay = session, session.replay

    def resume(self) -> int:
        """Resumes in `run_dir` after a crash: from its newest checkpoint that verifies, or from the beginning if there is
        none. Call it before `train`. Returns the step it resumes from; 0 also for a folder that does not exist yet.

        Raises:
            ConfigError: without `run_dir`; after training has begun; if there are checkpoints and none verifies.
        """
        if self.config.run_dir is None:
            raise ConfigError("resume needs run_dir, the folder to resume in")
        if self._session is not None:
            raise ConfigError(f"resume must come before train and load_checkpoint: {self.step} steps are behind")
        run = Path(self.config.run_dir).expanduser()
        self._resume = "auto"
        if on_rank_0(self.group, lambda: run.is_dir() and checkpoint.newest(run)):
            self.load_checkpoint(run)
        return self.step

    def _dataset(self, data: Any) -> MemoryDataset:
        tokenizer = getattr(self.model, "tokenizer", None)
        made = as_dataset(data, memory_sample_ratio=self.config.memory_sample_ratio, tokenizer=tokenizer)
        if made.tokenizer is not None and not same_tokenizer(made.tokenizer, tokenizer):
            has = "none" if tokenizer is None else f"another one, of {tokenizer.vocab_size} ids"
            raise ConfigError("the dataset's texts must be in the model's tokens, since its tokenizer is saved with it: set "
                              f"model.tokenizer to the dataset's, of {made.tokenizer.vocab_size} ids; the model has {has}")
        if made.largest_id >= self.model.config.vocab_size:
            raise ConfigError(f"ids must be below the model's vocab_size, {self.model.config.vocab_size}: "
                              f"the dataset has {made.largest_id}")
        if len(set(self.group.all_gather_object(made.digest()))) > 1:
            raise ConfigError("every rank must pass the same samples in the same order: these differ")
        return made

    def _run_config(self, data: MemoryDataset, batch_size: int) -> RunConfig:
        """The config of one call; a number that the trainer's config and the call both give must be the same."""
        called = {"streams": batch_size, "memory_sample_ratio": data.memory_sample_ratio, "replay_sampler": data.sampler,
                  "replay_slots": data.slots}
        for name, value in called.items():
            if name in self.config.model_fields_set and getattr(self.config, name) != value:
                raise ConfigError(f"the config gives {name} = {getattr(self.config, name)} and the call {value}: leave one "
                                  "out, or make them equal")
        config: RunConfig = build(RunConfig, {
            "preset": "trainer", "model": self.model.config, "memory": self.model.memory_config,
            "train": {**self.config.model_dump(), **called, "sequence_length": self._window(data)},
            "data": {"packing": False}, "eval": {"every": 0, "streams": batch_size}})
        config.check_trains()
        config.check_world_size(self.group.size)
        return config

    def _window(self, data: MemoryDataset) -> int:
        """Tokens of a window: as configured, or so many that the longest sample is one, if the model can read that many."""
        if "sequence_length" in self.config.model_fields_set:
            return self.config.sequence_length
        stride, most = self.model.config.retrieval_stride, self.model.config.context_length
        return max(2, stride * min(-(-(data.longest - 1) // stride), most // stride))

    def _held_out(self, data: MemoryDataset, batch_size: int, length: int) -> StreamSampler:
        """One pass through `data` in order, no more rows than needed, the same number on every rank."""
        ranks = self.group.size
        return StreamSampler(data.as_documents(), streams=ranks * -(-min(batch_size, len(data)) // ranks),
                             sequence_length=length, seed=0, epochs=1, shuffle=False)

    def _next_session(self, config: RunConfig, data: MemoryDataset, num_epochs: int,
                      held_out: MemoryDataset | None) -> tuple[Session, History]:
        """The session of this call, and its history: it continues after the last step, with new data or with the rest of the
        same data."""
        former, train = self._session, config.train
        tokenizer = data.tokenizer or getattr(self.model, "tokenizer", None) or ByteTokenizer()
        documents = data.as_documents()
        corpus = Corpus(documents, documents, tokenizer, Path(), {"digest": data.digest()})
        replay, free, goes_on = make_replay(config), self.model.memories.free_visit(), False
        data_pass = PassStart(first_namespace=free)
        if former is not None:
            replay = _kept(former.replay, replay)
            data_pass = PassStart(first_step=former.step, first_namespace=free,
                                  first_pause=1 if replay is None or not len(replay) else 0)
            goes_on = not former.data_pass.over and former.corpus.meta["digest"] == corpus.meta["digest"] and all(
                getattr(former.config.train, name) == getattr(train, name)
                for name in ("streams", "sequence_length", "memory_sample_ratio"))
            data_pass = former.data_pass if goes_on else data_pass
        session = self._make_session(config, corpus, replay, data_pass, num_epochs)
        if former is not None:
            session = dataclasses.replace(session, step=former.step, states=former.states if goes_on else {},
                                          training_seconds=former.training_seconds, failed_saves=former.failed_saves,
                                          skipped_in_a_row=former.skipped_in_a_row, saved=former.saved)
        if held_out is not None:
            session.held_out = self._held_out(held_out, train.streams, train.sequence_length)
            every = max(1, (session.sampler.num_steps or 0) // num_epochs)
            evaluation = config.eval.model_copy(update={"every": every, "windows": session.held_out.num_steps})
            session.config = config.model_copy(update={"eval": evaluation})
        session.metrics = history = History(self._record(session))
        start.announce(session)
        self._session, self.model.replay = session, session.replay
        return session, history

    def _make_session(self, config: RunConfig, corpus: Corpus, replay: Replay | None, data_pass: PassStart,
                      num_epochs: int | None) -> Session:
        if self._engine is None:  # one engine for the trainer's life: it keeps the optimizer state
            network.announce(self.group)
            torch.manual_seed(config.train.seed)
            self.model.activation_checkpointing = config.train.activation_checkpointing
            self._engine = Engine(self.model, config, world_size=self.group.size)
            if config.model.dropout:
                resuming.seed_rank(config, step=0, rank=self.group.rank)
        if self._start is None and config.train.run_dir is not None:
            self._start = start.open_run(config, self.group, self._resume)
        folder = None if self._start is None else self._start.run_folder
        sampler = make_sampler(config, corpus.train, replay, data_pass=data_pass, epochs=num_epochs)
        return Session(config=config, me=self._me, group=self.group, run_folder=folder, corpus=corpus, model=self.model,
                       engine=self._engine, sampler=sampler, held_out=None, metrics=NullMetrics(), replay=replay,
                       data_pass=data_pass)

    def _record(self, session: Session) -> NullMetrics:
        """Where the numbers go beside the history: the run folder, if there is one."""
        if session.run_folder is None or self._me.rank != 0:
            return NullMetrics()
        return start.record_in(session.run_folder, session)

    def _evaluate_last(self, session: Session) -> None:
        if session.held_out is not None:
            modes = ("on", "off") if self.model.banks else ("on",)
            observe.log_evaluation(session, {
                mode: loop.held_out_loss(session, mode, session.config.eval.windows) for mode in modes})


def _kept(former: Replay | None, fresh: Replay | None) -> Replay | None:
    """The spans of the last call, if this one can replay them."""
    if former is None or fresh is None or former.sequence_length != fresh.sequence_length or former.slots != fresh.slots:
        if former is not None and fresh is not None:
            log.warning("the spans stored so far have another length or number of slots: replay starts empty")
        return fresh
    former.sampler = fresh.sampler
    return former


def _perplexity(result: EvalResult) -> float:
    return math.exp(min(result.loss, 700.0))
