"""Making the report: of a model and some text, or of a run folder (`lmcode report`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmcode import dist
from lmcode.config import ConfigError, RunConfig
from lmcode.dist import Group, on_rank_0
from lmcode.eval.documents import OTHER_CORPUS, held_out_documents
from lmcode.lmcode import LMCODE
from lmcode.report.facts import gather
from lmcode.report.history import curves_of, read_metrics, tagged
from lmcode.report.page import render
from lmcode.report.sequences import token_sequences
from lmcode.tokenizer import Tokenizer
from lmcode.train import durable
from lmcode.train.checkpoint import find, lies_in_run, load_model
from lmcode.train.metrics import flatten

log = logging.getLogger("lmcode")
MOST_DOCUMENTS = 64  # held-out documents that are looked at


def generate_memory_report(model: LMCODE, dataset: Iterable[Any], path: str | Path | None = None, *,
                           tokenizer: Tokenizer | None = None, title: str = "LMCODE",
                           history: Any = None) -> str:
    """The report of a model as one self-contained HTML page. A collective; the model and its banks are left as they are.

    Args:
        dataset: what to read for examples, gates and the capacity curve: texts, id sequences, tensors or a dataset of these
            (see `token_sequences`).
        path: also write the page to this file (rank 0 does; missing folders are made).
        tokenizer: for texts, and to show ids as text; the model's own when None.
        title: the heading of the page.
        history: for the training curves: a trainer's history, or the rows of a metrics.jsonl.

    Returns:
        The HTML text, on every rank.

    Raises:
        ValueError: for an empty dataset or one that does not fit the model, or a history of another kind.
    """
    sequences = token_sequences(model, dataset, tokenizer=tokenizer)
    curves = {} if history is None else tagged(curves_of(history))
    page = render(gather(model, sequences, title=title, tokenizer=tokenizer, curves=curves))
    if path is not None:
        on_rank_0(model.group, lambda: write_page(Path(path), page))
    return page


def report_run(run: Path, overrides: list[str], *, out: Path | None = None) -> Path:
    """Makes the report of a run's newest checkpoint that verifies, whatever number of ranks trained it. A collective.

    Args:
        run: a run folder, or one checkpoint in it.
        overrides: dotted settings, such as where the data is now.
        out: the file to write; when None, report/index.html in the run folder, or CHECKPOINT.report.html beside a checkpoint
            that lies in no run, since nothing may be added to it.

    Returns:
        The file that was written.

    Raises:
        ConfigError: if there is no checkpoint, or the file cannot be written.
    """
    group = Group.world()
    checkpoint = Path(on_rank_0(group, lambda: str(find(run).resolve())))  # found once: a run may be saving newer ones
    model, config, tokenizer, step = load_model(checkpoint, overrides, group=group, device=dist.device())
    ranks = config.memory.ranks_per_group(durable.read_manifest(checkpoint).facts.world_size)
    in_run = lies_in_run(checkpoint)
    folder = checkpoint.parents[1] if in_run else checkpoint
    sequences, names, notes = held_out_text(config, checkpoint)
    rows = read_metrics(folder / "metrics.jsonl")
    log.info("measuring the memory of step %d on %d held-out documents", step, len(sequences))
    facts = gather(model, sequences, names=names, title=folder.name, tokenizer=tokenizer, step=step, ranks=ranks,
                   length=config.train.sequence_length, curves=curves_of(rows) if rows else {},
                   settings=flatten(config.model_dump(mode="json")), notes=notes)
    page = render(facts)
    place = out or (folder / "report" / "index.html" if in_run else folder.with_name(f"{folder.name}.report.html"))
    on_rank_0(group, lambda: write_page(place, page))
    return place


def held_out_text(config: RunConfig, checkpoint: Path) -> tuple[list[list[int]], list[str], list[str]]:
    """Token ids and names of held-out documents, spread over all of them; notes on what a reader must know about them."""
    try:
        held_out = held_out_documents(checkpoint, config)
    except ConfigError as error:
        log.warning("the held-out documents could not be read: %s", error)
        return [], [], [f"The held-out documents could not be read, so there are no examples and no capacity curve: {error}"]
    documents, notes = held_out.documents, [] if held_out.same_corpus else [OTHER_CORPUS]
    stride = -(-len(documents) // MOST_DOCUMENTS)
    chosen = range(0, len(documents), stride)
    return [documents.document(one).tolist() for one in chosen], [documents.names[one] for one in chosen], notes


def write_page(path: Path, page: str) -> None:
    """Writes the page whole or not at all.

    Raises:
        ConfigError: if the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_text(path, page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to '{path}': {error.strerror or error}") from None
