"""python tools/chaos_disk.py [--points 50] [--ranks 2] [--folder FOLDER]

A disk that refuses: a real run saves, and at one of its calls the disk is full (ENOSPC), broken (EIO) or read-only
(EROFS), at points spread over all calls of all ranks. Each time the save must be reported as failed, older checkpoints
must be as they were, byte for byte, nothing may be left over, and training must go on; a last save must then work. Exit
code 1 otherwise.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import traced
from traced import Op

from lmcode.files import durable
from lmcode.train import saving

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
Outcome = dict[str, Any]


def failing_at(number: int, code: int) -> Callable[[Op], None]:
    """Raises at this call and, as a broken disk does, at those that follow; a removal is let through."""
    calls = 0

    def before(op: Op) -> None:
        nonlocal calls
        calls += op.kind not in ("unlink", "rmdir")
        if calls > number and op.kind not in ("unlink", "rmdir"):
            raise OSError(code, os.strerror(code), op.path)

    return before


def count_calls(session: Any) -> int:
    """Calls that a save makes on this rank, removals aside."""
    with traced.Recorder(session.run_folder / "checkpoints") as recorder:
        saving.save(session)
    session.group.barrier()
    return sum(op.kind not in ("unlink", "rmdir") for op in recorder.ops)


def fail_saves(values: dict, points: int) -> list[Outcome]:
    """Steps and saves, each of which fails at another point; what came of it, on rank 0."""
    session, outcomes = chaos.resumed(values), []
    checkpoints, rank, group = session.run_folder / "checkpoints", session.me.rank, session.group
    for _ in range(2):
        chaos.step(session)
        saving.save(session)
    chaos.step(session)
    calls = group.all_gather_object(count_calls(session))
    before = chaos.content_of(checkpoints)
    for number in range(points * len(CODES)):
        code, point = CODES[number % len(CODES)], number // len(CODES)
        victim = point % group.size
        at = point * calls[victim] // points
        hook = failing_at(at, code) if rank == victim else lambda op: None
        failed, step = session.failed_saves, session.step
        loss = chaos.step(session)
        with traced.Recorder(checkpoints, hook):
            saved = saving.save(session)
        group.barrier()
        if rank == 0:
            outcomes.append(judge(checkpoints, before, code, victim, at, reported=saved is None and
                                  session.failed_saves == failed + 1, goes_on=session.step == step + 1 and loss == loss))
            before = chaos.content_of(checkpoints)
        group.barrier()
    chaos.step(session)
    outcomes.append({"last": saving.save(session) is not None and durable.newest_verified(checkpoints)[1] == []})
    session.close()
    return outcomes


def judge(checkpoints: Path, before: dict[str, bytes], code: int, victim: int, at: int, **fine: bool) -> Outcome:
    """What lies there after a save that had to fail. One that took its name before the disk failed may be there, whole."""
    now = chaos.content_of(checkpoints)
    more = {name.split("/")[0] for name in now.keys() - before.keys()}
    found, skipped = durable.newest_verified(checkpoints)
    named = len(more) == 1 and found is not None and found.name in more and not skipped
    old = {name: content for name, content in now.items() if name.split("/")[0] not in more}
    return {"code": errno.errorcode[code], "rank": victim, "call": at, "intact": old == before and not skipped,
            "clean": not more or named, "named": named, **fine}


def run(arguments: argparse.Namespace) -> int:
    with chaos.place(arguments.folder) as folder:
        values = chaos.settings(folder, "refused")
        *outcomes, last = chaos.on_ranks(fail_saves, arguments.ranks, values, arguments.points, folder=folder)[0]
    rows = [("the disk says", "points", "older ones intact", "nothing left over", "reported", "training goes on",
             "failed after the name")]
    for code in CODES:
        mine = [one for one in outcomes if one["code"] == errno.errorcode[code]]
        rows.append((errno.errorcode[code], len(mine), *(sum(one[key] for one in mine) for key in
                                                        ("intact", "clean", "reported", "goes_on", "named"))))
    print(chaos.table(rows))
    failures = [str(one) for one in outcomes if not all(one[key] for key in ("intact", "clean", "reported", "goes_on"))]
    if not last["last"]:
        failures.append("the save after all these failures did not work")
    return chaos.verdict(f"{', '.join(map(errno.errorcode.get, CODES))} at {arguments.points} points each: older "
                         f"checkpoints intact {sum(one['intact'] for one in outcomes)} of {len(outcomes)}", failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--points", type=int, default=50, help="of each kind of error")
    parser.add_argument("--ranks", type=int, default=2)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
