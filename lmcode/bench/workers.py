"""Processes that hold the parts of one bank, each with one thread, and do as they are told, all at the same time.

The parent measures, and runs the peers while the workers wait.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from lmcode.bench.turns import Spent
from lmcode.config import ConfigError
from lmcode.dist import free_port

DONE, REFUSED, FAILED = "done", "refused", "failed"


class Workers:
    """R processes in one group; `with` ends them.

    Args:
        make: called in each with `arguments`, at module level; returns the object whose methods are called.

    Raises:
        ConfigError: what a worker refuses, here and in `call`. RuntimeError: with its traceback, what fails there.
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
        try:
            self._answers()
        except BaseException:
            self._end()
            raise

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
        """Those of all ranks; what the first one met that cannot go on, for the others can be waiting for it."""
        answers: dict[int, Any] = {}
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while len(answers) < len(ranks):
            for pipe in wait([pipe for pipe, rank in ranks.items() if rank not in answers]):
                assert isinstance(pipe, Connection)  # we gave it nothing else to wait for
                where = f"rank {ranks[pipe]} of {len(ranks)}"
                try:
                    how, answer = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"{where} is gone") from None
                if how == REFUSED:
                    raise ConfigError(answer)
                if how == FAILED:
                    raise RuntimeError(f"{where} failed:\n{answer}")
                answers[ranks[pipe]] = answer
        return [answers[rank] for rank in range(len(ranks))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
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
        pipe.send((DONE, None))
        while True:
            method, given = pipe.recv()
            pipe.send((DONE, getattr(made, method)(*given)))
    except EOFError:
        pass
    except ConfigError as error:
        pipe.send((REFUSED, str(error)))
    except Exception:
        pipe.send((FAILED, traceback.format_exc()))
