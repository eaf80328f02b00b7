"""Processes that hold the parts of one bank, each with one thread, and do as they are told, all at the same time.

The parent measures, and runs the peers while the workers wait.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from lmcode.bench.turns import Spent
from lmcode.dist import free_port


class Workers:
    """R processes in one group; `with` ends them.

    Args:
        make: called in each with `arguments`, at module level; returns the object whose methods are called.
    """

    def __init__(self, ranks: int, make: Callable[..., Any], *arguments: Any) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, theirs, make, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What the method returns on each rank."""
        for pipe in self._pipes:
            pipe.send((method, arguments))
        return self._answers()

    def timed(self, method: str, *arguments: Any) -> Spent:
        """The longest wall time of a rank, and the processor time of all."""
        spent = self.call(method, *arguments)
        return Spent(max(one.wall for one in spent), sum(one.cpu for one in spent))

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                fine, answer = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(self._pipes)} is gone") from None
            if not fine:
                raise RuntimeError(f"rank {rank} of {len(self._pipes)} failed:\n{answer}")
            answers.append(answer)
        return answers

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.terminate()
            process.join()
            pipe.close()


def _serve(rank: int, ranks: int, port: int, pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    try:
        import torch

        from lmcode import dist

        torch.set_num_threads(1)
        dist.start()
        made = make(*arguments)
        pipe.send((True, None))
        while True:
            method, given = pipe.recv()
            pipe.send((True, getattr(made, method)(*given)))
    except EOFError:
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
