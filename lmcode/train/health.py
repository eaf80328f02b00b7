"""What happens when updates are refused step after step: the run stops and leaves what a person needs to find out why.

A refused step (a gradient that is not finite) leaves no trace in weights or banks and is counted; `train.max_skipped_steps`
of them in a row end the run with exit code 1.

    RUN/dump-step-00000123/rank-00000.safetensors    of each micro-batch m of the last refused step: {m}.input_ids_BT,
                                                     {m}.targets_BT, {m}.namespace_B; of each memory layer L:
                                                     {m}.L{L}.gate_BT, .share_HN, .score_HNK
"""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lmcode.train.session import Session, StepResult

log = logging.getLogger("lmcode")


class Diverged(RuntimeError):
    """Too many updates in a row were refused; raised on every rank alike."""


def check(session: Session, result: StepResult) -> None:
    """Counts refused steps in a row. A dump that cannot be written is logged, and stops nothing.

    Raises:
        Diverged: at `train.max_skipped_steps` of them.
    """
    session.skipped_in_a_row = 0 if result.applied else session.skipped_in_a_row + 1
    if result.applied:
        return
    limit = session.config.train.max_skipped_steps
    log.warning("step %d was skipped: its gradient is not finite (loss %g, %d in a row of at most %d, %d in all)",
                session.step, result.loss, session.skipped_in_a_row, limit, session.engine.skipped_steps)
    if session.skipped_in_a_row < limit:
        return
    place = dump(session, result) if session.run_folder is not None else None
    raise Diverged(f"the updates of {limit} steps in a row were refused, the last one step {session.step}: gradients are "
                   f"not finite; try a smaller train.learning_rate or model.memory_update_rate"
                   + (f". The last batch and its gates are in '{place}'" if place else ""))


def dump(session: Session, result: StepResult) -> Path | None:
    """Writes what this rank read in the last step; the folder, or None if the file system refuses."""
    group, micros = session.group, session.config.train.gradient_accumulation_steps
    folder = session.folder / f"dump-step-{session.step:08d}"
    tensors: dict[str, Tensor] = {}
    for micro in range(micros):
        batch = session.sampler.batch(session.step - 1, rank=group.rank, world_size=group.size, micro=micro,
                                      num_micro=micros)
        tensors.update({f"{micro}.{name}": getattr(batch, name) for name in ("input_ids_BT", "targets_BT", "namespace_B")})
        for layer, reads in result.reads.items():
            read = reads[micro]
            tensors.update({f"{micro}.L{layer}.gate_BT": read.gate_BT, f"{micro}.L{layer}.share_HN": read.share_HN,
                            f"{micro}.L{layer}.score_HNK": read.hits.score_HNK})
    try:
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                  folder / f"rank-{group.rank:05d}.safetensors")
    except OSError as error:
        log.error("the dump of step %d was not written: %s", session.step, error)
        return None
    return folder
