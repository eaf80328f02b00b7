"""Runs a function on several real processes that form a gloo group, for tests; a lost rank fails instead of hanging.

They are forked (`forked`), so a call costs little.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lmcode import dist
from lmcode.dist import free_port
from tests.helpers import forked
from tests.helpers.forked import CONTEXT
from tests.helpers.patience import PATIENCE_S


class RankError(RuntimeError):
    """A rank raised, died or did not finish; the message names it and shows where it was."""


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = PATIENCE_S) -> list[Any]:
    """Calls `function(*args)` on every rank of a fresh group; returns the results in rank order.

    Each process has one torch thread, one FAISS thread and the environment of a launcher, and is in the default
    process group, so that `dist.discover`, `dist.start` and `dist.Group.world` work in it.

    Args:
        function: importable by name (defined at module level), as are picklable arguments and results.
        timeout_s: for the function, and as long again for starting.

    Raises:
        RankError: as soon as one rank raises or dies, with its traceback; or after `timeout_s`, with the ranks that
            had not finished and their stacks. The other processes are killed.
    """
    port = free_port()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = CONTEXT.Pipe(duplex=False)
                process = forked.process(_child, rank, world_size, port, theirs, folder, function, args)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            _collect(processes, pipes, PATIENCE_S, Path(folder))
            return _collect(processes, pipes, timeout_s, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list[Any], pipes: list[Connection], timeout_s: float, folder: Path) -> list[Any]:
    """Waits for one message of every rank: that it has begun, then its result. The first that is neither ends it all."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = "\n".join(_stack_of(processes[rank], folder / str(rank), rank) for rank in waiting.values())
            raise RankError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not finish in time:\n{stacks}")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                fine, result = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[rank].join()
                raise RankError(f"rank {rank} of {len(pipes)} died with exit code {processes[rank].exitcode}") from None
            if not fine:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _stack_of(process: Any, file: Path, rank: int) -> str:
    """Where a process stands, if it has come far enough to say so."""
    if file.exists() and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        said, deadline = "", time.monotonic() + PATIENCE_S
        while not (said and said == file.read_text()) and time.monotonic() < deadline:  # until it has said all
            said = file.read_text()
            time.sleep(0.3)
        return f"rank {rank}:\n{said}"
    return f"rank {rank}: not started"


def _child(rank: int, world_size: int, port: int, pipe: Connection, folder: str, function: Callable[..., Any],
           args: tuple[Any, ...]) -> None:
    with open(Path(folder) / str(rank), "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        try:
            leave = _join(rank, world_size, port)
            pipe.send_bytes(pickle.dumps((True, "begun")))
            result = True, function(*args)
            leave()  # not after an error: the others would then be the first to report one
        except BaseException:
            result = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(result))  # by value: tensors sent by handle die with the process
        pipe.close()
        faulthandler.unregister(signal.SIGUSR1)


def _join(rank: int, world_size: int, port: int) -> Callable[[], None]:
    """Enters the group, which commands that the test runs do not end; returns how to leave it."""
    import torch
    import torch.distributed as td

    dist.stop = lambda: None

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        import faiss
    except ImportError:
        pass
    else:
        faiss.omp_set_num_threads(1)
    td.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=2 * PATIENCE_S))
    return td.destroy_process_group
