"""Making the report: of a model and some text, or of a run folder (`lmcode report`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmcode import dist
from lmcode.backbone import Backbone
from lmcode.config import ConfigError, flatten
from lmcode.data.tokenizer import Tokenizer
from lmcode.dist import Group, on_rank_0
from lmcode.eval.documents import OTHER_CORPUS, held_out_documents
from lmcode.files import durable
from lmcode.files.replace import is_free
from lmcode.opening import Opened, open_model
from lmcode.report.facts import gather
from lmcode.report.history import curves_of, read_metrics, tagged
from lmcode.report.page import render
from lmcode.report.sequences import token_sequences
from lmcode.saved.places import Kind
from lmcode.version import MADE_BY

log = logging.getLogger("lmcode")
MOST_DOCUMENTS = 64  # held-out documents that are looked at


def generate_memory_report(model: Backbone, dataset: Iterable[Any], path: str | Path | None = None, *,
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


def report_path(path: Path, overrides: list[str], *, out: Path | None = None) -> Path:
    """Makes the report of the model at a path, whatever number of ranks trained it. A collective.

    Args:
        path: a run folder, a checkpoint, or a saved model (then with a text to look at, data.path=).
        overrides: dotted settings, such as where the data is now.
        out: the file to write; when None, report/index.html in the run folder, or CHECKPOINT.report.html beside a checkpoint
            that lies in no run, since nothing may be added to it.

    Returns:
        The file that was written.

    Raises:
        ConfigError: if nothing can be opened there, or the file cannot be written.
    """
    group = Group.world()
    opened = open_model(path, overrides, group=group, device=dist.device())
    model, config, step, run = opened.model, opened.config, opened.step, opened.place.run
    saved_model = opened.place.kind in (Kind.SAVED_MODEL, Kind.HUGGING_FACE)
    ranks = config.memory.ranks_per_group(1 if saved_model else durable.read_manifest(opened.folder).facts.world_size)
    folder = opened.place.path if run is None else run
    sequences, names, notes = held_out_text(opened)
    rows = read_metrics(folder / "metrics.jsonl")
    log.info("measuring the memory of step %d on %d held-out documents", step, len(sequences))
    facts = gather(model, sequences, names=names, title=folder.name, tokenizer=model.tokenizer, step=step, ranks=ranks,
                   length=config.train.sequence_length, curves=curves_of(rows) if rows else {},
                   settings=flatten(config.model_dump(mode="json")), notes=notes)
    page = render(facts)
    place = out or (run / "report" / "index.html" if run is not None else folder.with_name(f"{folder.name}.report.html"))
    on_rank_0(group, lambda: write_page(place, page))
    return place


def held_out_text(opened: Opened) -> tuple[list[list[int]], list[str], list[str]]:
    """Token ids and names of held-out documents, spread over all of them; notes on what a reader must know about them."""
    try:
        held_out = held_out_documents(opened)
    except ConfigError as error:
        log.warning("the held-out documents could not be read: %s", error)
        return [], [], [f"The held-out documents could not be read, so there are no examples and no capacity curve: {error}"]
    documents, notes = held_out.documents, [] if held_out.same_corpus else [OTHER_CORPUS]
    stride = -(-len(documents) // MOST_DOCUMENTS)
    chosen = range(0, len(documents), stride)
    return [documents.document(one).tolist() for one in chosen], [documents.names[one] for one in chosen], notes


def write_page(path: Path, page: str) -> None:
    """Writes the page whole or not at all; in the place of an older one, if any.

    Raises:
        ConfigError: if something else is there, or the file system refuses.
    """
    path = path.resolve()
    try:
        if not is_free(path, MADE_BY):
            raise ConfigError(f"'{path}' exists and is no report of this program: give another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_text(path, page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to '{path}': {error.strerror or error}") from None
