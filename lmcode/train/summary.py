"""The summary that ends a training job: collected on all ranks, rendered by a pure function, read by a person."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from lmcode.eval.held_out import NOTHING_FAR, EvalResult
from lmcode.memory import measure
from lmcode.model.generation.sampling import Decoding
from lmcode.protocol import Output
from lmcode.train.session import Session

SHOWN = ("forward", "backward", "search", "exchange", "optimizer", "commit")  # phases of a step, as a person reads them
SAMPLE_TOKENS = 96
SAMPLE_WINDOWS = 3  # windows of a held-out document that are read before the model continues it


@dataclass(frozen=True)
class RunFacts:
    """What the summary says; plain values only."""

    steps: int
    skipped_steps: int
    training_seconds: float
    tokens_per_s: float
    results: dict[str, EvalResult]
    void: dict[str, str]  # why a mode was not measurable
    filled_by_rank: dict[int, list[int]]
    slots: int
    memory_groups: int  # that hold the bank, each whole
    recall_by_layer: dict[int, float | None]  # of the last step's search; None: not measured
    hits_by_rank: list[list[int]]  # [reader][holder], last step
    phase_ms: dict[str, float]
    bytes_per_step: float
    prompt_tail: str
    sample: str
    checkpoint: Path
    run_folder: Path


def render(facts: RunFacts) -> str:
    """The summary as text."""
    minutes, seconds = divmod(round(facts.training_seconds), 60)
    lines = [f"trained {facts.steps} steps in {minutes} min {seconds:02d} s ({facts.tokens_per_s:,.0f} tokens/s), "
             f"{facts.skipped_steps} skipped", "", *_losses(facts.results, facts.void), "", *_memory(facts), "",
             *_costs(facts), "",
             "a held-out document, continued by the model:",
             *_quote(facts.prompt_tail, "  | "), *_quote(facts.sample, "  > "), "",
             f"run folder   {facts.run_folder}", f"checkpoint   {facts.checkpoint}",
             f"TensorBoard  tensorboard --logdir {facts.run_folder / 'tensorboard'}"]
    return "\n".join(lines)


def _losses(results: dict[str, EvalResult], void: dict[str, str]) -> list[str]:
    says = {"on": "memory on", "off": "memory off (no retrieval)", "shuffled": "memory shuffled (another document's)",
            "random": "memory random (entries drawn by lot)"}
    tokens = results["on"].tokens
    lines = [f"held-out loss, nats per token over {tokens:,} tokens      all    >= 16 windows into a document"]
    for mode, result in results.items():
        far = "not measurable" if result.far_loss is None else f"{result.far_loss:.4f}"
        lines.append(f"  {says[mode]:<44}{result.loss:>12.4f}    {far}")
    lines += [f"  {says[mode]:<44}not measurable: {reason}" for mode, reason in void.items()]
    return [*lines, f"  far is not measurable: {NOTHING_FAR}"] if results["on"].far_loss is None else lines


def _memory(facts: RunFacts) -> list[str]:
    if not facts.filled_by_rank:
        return ["this model has no bank"]
    over = "all ranks" if facts.memory_groups == 1 else f"the ranks of each of {facts.memory_groups} memory groups"
    lines = [f"slots filled per rank, of {facts.slots:,} over {over}"]
    for layer, filled in facts.filled_by_rank.items():
        lines.append(f"  layer {layer}: " + "  ".join(f"rank {rank} {count:,}" for rank, count in enumerate(filled)))
    recalls = "  ".join(f"layer {layer} {'not measured' if recall is None else f'{recall:.4f}'}"
                        for layer, recall in facts.recall_by_layer.items())
    lines.append(f"share of the exact hits that the last step's search found: {recalls}")
    lines.append("where the hits of the last step came from")
    for reader, counts in enumerate(facts.hits_by_rank):
        total = max(1, sum(counts))
        shares = "  ".join(f"{100 * count / total:.1f} % from rank {holder}" for holder, count in enumerate(counts))
        lines.append(f"  rank {reader} read {sum(counts):,}: {shares}")
    return lines


def _costs(facts: RunFacts) -> list[str]:
    ms, step = facts.phase_ms, max(facts.phase_ms["step"], 1e-9)
    parts = "  ".join(f"{name} {ms[name]:.0f}" for name in SHOWN)
    return [f"one step took {ms['step']:.0f} ms: {parts}",
            f"  search {100 * ms['search'] / step:.1f} % and exchange {100 * ms['exchange'] / step:.1f} % of a step; "
            f"{facts.bytes_per_step:,.0f} bytes received per rank and step for the memory"]


def _quote(text: str, mark: str) -> list[str]:
    return [mark + line for line in text.splitlines()]


def collect(session: Session, results: dict[str, EvalResult], void: dict[str, str], training_seconds: float,
            checkpoint: Path) -> RunFacts:
    """Gathers the facts over all ranks. A collective; the result is meant for rank 0."""
    group, banks = session.group, session.model.banks
    stats = {layer: bank.stats() for layer, bank in banks.items()}
    counts = torch.zeros(group.size, dtype=torch.int64)
    for layer, bank in banks.items():
        for read in session.last.reads[layer] if session.last else []:
            counts += measure.shares_by_rank(bank, read.hits).cpu()
    prompt_tail, sample = continue_document(session)
    phase_ms, bytes_per_step = session.costs.per_step()
    tokens = session.config.train.streams * session.config.train.sequence_length * session.step
    return RunFacts(
        steps=session.step, skipped_steps=session.engine.skipped_steps, training_seconds=training_seconds,
        tokens_per_s=tokens / max(training_seconds, 1e-9), results=results, void=void,
        filled_by_rank={layer: s["live_by_rank"] for layer, s in stats.items()},
        slots=session.config.model.long_term_memory_slots,
        memory_groups=group.size // session.config.memory.ranks_per_group(group.size),
        recall_by_layer={layer: measure.recall(bank) for layer, bank in banks.items()},
        hits_by_rank=group.all_gather_object(counts.tolist()), phase_ms=phase_ms,
        bytes_per_step=bytes_per_step, prompt_tail=prompt_tail, sample=sample, checkpoint=checkpoint,
        run_folder=session.folder)


def continue_document(session: Session) -> tuple[str, str]:
    """Reads the start of a held-out document with the memory on, and continues it: (end of what was read, text).

    Every rank does the same work, so that the searches of all ranks match; the banks are forks and are thrown away.
    """
    documents, tokenizer = session.corpus.held_out, session.corpus.tokenizer
    length = SAMPLE_WINDOWS * session.config.train.sequence_length
    long_enough = (i for i in range(len(documents)) if len(documents.document(i)) > length)
    chosen = next(long_enough, max(range(len(documents)), key=lambda i: len(documents.document(i))))
    prompt = torch.as_tensor(documents.document(chosen)[:length].astype("int64"), device=session.engine.device)[None]
    forks = session.model.memories.fork(slots=session.config.eval.slots)
    steps = itertools.count()

    def commit(output: Output) -> None:
        step = next(steps)
        for layer, fork in forks.items():
            candidates = output.memory[layer].candidates
            mine = candidates.valid_N & (session.group.rank == 0)  # all ranks hold the same document: write it once
            fork.commit([candidates._replace(valid_N=mine)], [output.memory[layer].hits], step=step)

    def agree(token_B: torch.Tensor) -> torch.Tensor:
        return session.group.all_gather(token_B, phase="tokens")[:1]

    decoding = Decoding(max_new_tokens=SAMPLE_TOKENS, no_repeat_ngram_size=4, seed=session.config.train.seed)
    with session.model.reading_from(forks):
        written = session.model.write_on(prompt, decoding, commit=commit, agree=agree,
                                         window=session.config.train.sequence_length)
    ids = written.tokens_BT[0].tolist()
    tail = tokenizer.decode(ids[:prompt.shape[1]]).splitlines()[-6:]
    return "\n".join(tail), tokenizer.decode(ids[prompt.shape[1]:])
