"""Processes: who we are among the ranks, and the collectives of the memory group.

The one importer of torch.distributed outside DeepSpeed. On one rank every collective is the identity and costs nothing,
so the same program runs on one process and on many. A `Group` counts the bytes it receives and the seconds it waits, which
is where the run's `perf/bytes_received` and `perf/exchange_ms` come from.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmcode.config import ConfigError

log = logging.getLogger("lmcode")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rank:
    """One process among `world_size`; `local_rank` counts the processes on its host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


def discover(env: Mapping[str, str] = os.environ) -> Rank:
    """Reads who we are from the launcher's environment: deepspeed or torchrun, Open MPI, Slurm, or none.

    Of Slurm only the variables of an srun step count: a batch script has SLURM_PROCID and SLURM_NTASKS too, and a command
    that it starts without srun is alone. So is one that a person types into a shell of srun --pty: the other tasks of that
    step never come.

    Raises:
        ValueError: if the launcher's variables are incomplete or not integers.
    """
    names = {
        "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                   "OMPI_COMM_WORLD_LOCAL_SIZE"),
        "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    }
    if "SLURM_PTY_PORT" in env:
        del names["slurm"]
    for launcher, (rank, size, local, local_size) in names.items():
        if rank in env and size in env and (launcher != "deepspeed" or local_size in env):
            try:
                world = int(env[size])
                tasks_here = tasks_on_node(env.get(local_size, str(world)), int(env.get("SLURM_NODEID", "0")))
                return Rank(int(env[rank]), world, int(env.get(local, env[rank])), tasks_here, launcher)
            except ValueError:
                raise ValueError(f"{launcher}: {rank}={env[rank]!r} and {size}={env[size]!r} must be integers") from None
    return Rank(0, 1, 0, 1, "single")


def tasks_on_node(text: str, node: int) -> int:
    """The number of tasks on one node, from Slurm's list for all nodes: '2(x3),1' is 2, 2, 2, 1; the last one goes on.

    Raises:
        ValueError: if the list is not of this form.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"a list of tasks per node looks like 2(x3),1: got '{text}'")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[min(node, len(counts) - 1)]


def first_host(node_list: str) -> str:
    """The first host of Slurm's compressed list: 'gpu[07-12,20],cpu1' begins with gpu07."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", node_list)
    return "".join(part or "" for part in found.groups()) if found else ""


def start(timeout_s: float = 1800.0) -> Rank:
    """Joins the default process group (gloo on CPU, NCCL with GPUs); returns this process's place in it.

    A process started without a launcher becomes a group of one. Threads are shared out among the ranks of a host unless
    OMP_NUM_THREADS says otherwise.
    """
    import torch.distributed as td

    me = discover()
    if td.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(me.local_rank))  # DeepSpeed asks for it, whoever made the group
        return me
    if me.launcher == "mpirun":
        _rendezvous_over_mpi(me)
    if me.launcher == "slurm":
        os.environ.update(slurm_rendezvous(os.environ))
    if me.launcher == "single":
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(RANK=str(me.rank), WORLD_SIZE=str(me.world_size), LOCAL_RANK=str(me.local_rank),
                      LOCAL_WORLD_SIZE=str(me.local_world_size))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // me.local_world_size))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(me.local_rank)
    store = td.HashStore() if me.launcher == "single" else None  # type: ignore[attr-defined]  # alone: no port to be taken
    td.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size,
                          timeout=timedelta(seconds=timeout_s))
    return me


def _rendezvous_over_mpi(me: Rank) -> None:
    """Gives all MPI ranks the address and a free port of rank 0, unless the user set them."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    from mpi4py import MPI

    address = (socket.gethostname(), free_port()) if me.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast(address, root=0)
    alone = me.local_world_size == me.world_size
    os.environ.update(MASTER_ADDR="127.0.0.1" if alone else host, MASTER_PORT=str(port))


def slurm_rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of an srun step: the user's, or its first host and a port made from the job's id."""
    return {"MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1",
            "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 15000)}


def stop() -> None:
    """Leaves the default process group, if there is one."""
    import torch.distributed as td

    if td.is_initialized():
        td.destroy_process_group()


def join() -> Rank:
    """`start` for a script that has no end of its own to stop at: a group that is made here ends with the process."""
    import torch.distributed as td

    if not td.is_initialized():
        atexit.register(stop)
    return start()


@contextmanager
def running(step: Callable[[], int] | None = None) -> Iterator[Rank]:
    """`start`, logging (with the number of the `step`, if given) and `stop` around a block: one job of one process."""
    me = start()
    set_up_logging(me, step=step)
    try:
        yield me
    finally:
        stop()
        for handler in log.handlers[1:]:
            log.removeHandler(handler)
            handler.close()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Group:
    """Collectives over some ranks. Tensors are gathered along axis 0 in rank order.

    bytes_received, seconds: payload bytes that arrived from other ranks, and wall time inside collectives (waiting
    included), by the phase named in each call, since the start or the last `take`.
    calls: collectives finished so far.
    All three count for the groups that this one was `split` into, too; theirs stay empty.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, handle: Any = None, part_of: Group | None = None) -> None:
        self.rank, self.size = rank, size
        self._handle, self._whole = handle, part_of or self
        self._splits: dict[int, tuple[Group, Group]] = {}
        self.bytes_received: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.calls = 0

    @classmethod
    def world(cls) -> Group:
        """A group of all ranks with a communicator of its own, so that its traffic never interleaves with DeepSpeed's."""
        import torch.distributed as td

        if not td.is_initialized() or td.get_world_size() == 1:
            return cls()
        return cls(rank=td.get_rank(), size=td.get_world_size(), handle=td.new_group())

    def split(self, size: int) -> tuple[Group, Group]:
        """Two groups that this rank is in: `size` consecutive ranks, and the ranks at its place in each such group.

        Of a group of all ranks only. Collective when it is first called with a size; that makes the communicators, which
        later calls return. Where a group would be all ranks it is this one, with the communicator that is there.

        Raises:
            ValueError: if `size` does not divide the number of ranks.
        """
        if size < 1 or self.size % size:
            raise ValueError(f"the size of a part must divide the number of ranks: {self.size} % {size} != 0")
        if size not in self._splits:
            inside = [range(first, first + size) for first in range(0, self.size, size)]
            between = [range(place, self.size, size) for place in range(size)]
            self._splits[size] = self._one_of(inside), self._one_of(between)
        return self._splits[size]

    def _one_of(self, parts: Sequence[range]) -> Group:
        """The part with this rank; every rank makes all of them in the same order, as torch.distributed demands."""
        if len(parts) == 1:
            return self
        mine = next(part for part in parts if self.rank in part)
        handle = None
        if len(mine) > 1:
            import torch.distributed as td

            handles = [td.new_group(list(part)) for part in parts]
            handle = handles[parts.index(mine)]
        return Group(rank=mine.index(self.rank), size=len(mine), handle=handle, part_of=self)

    @contextmanager
    def _counted(self, phase: str, received: int) -> Iterator[None]:
        start, whole = time.perf_counter(), self._whole
        yield
        whole.seconds[phase] = whole.seconds.get(phase, 0.0) + time.perf_counter() - start
        whole.bytes_received[phase] = whole.bytes_received.get(phase, 0) + received
        whole.calls += 1

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and bytes by phase since the last call; starts counting anew."""
        taken = self.seconds, self.bytes_received
        self.seconds, self.bytes_received = {}, {}
        return taken

    def all_gather(self, tensor: Tensor, *, phase: str) -> Tensor:
        """Concatenates every rank's equally shaped tensor along axis 0."""
        if self.size == 1:
            return tensor
        import torch.distributed as td

        tensor = tensor.contiguous()
        gathered = tensor.new_empty((self.size, *tensor.shape))
        with self._counted(phase, (self.size - 1) * tensor.nbytes):
            td.all_gather(list(gathered.unbind()), tensor, group=self._handle)
        return gathered.flatten(0, 1)

    def all_gather_int(self, number: int, *, phase: str, device: torch.device) -> list[int]:
        """Every rank's number, in rank order."""
        return self.all_gather(torch.tensor([number], device=device), phase=phase).tolist()

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int], *, phase: str) -> Tensor:
        """Concatenates along axis 0 the rows of all ranks, `counts` of them each."""
        padded = rows.new_zeros(max(1, *counts), *rows.shape[1:])
        padded[:len(rows)] = rows
        parts = self.all_gather(padded, phase=phase).split(len(padded))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def all_to_all(self, tensor: Tensor, *, phase: str) -> Tensor:
        """Sends the r-th equal part of axis 0 to rank r; returns the parts received, in rank order."""
        if self.size == 1:
            return tensor
        import torch.distributed as td

        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        with self._counted(phase, tensor.nbytes * (self.size - 1) // self.size):
            td.all_to_all_single(received, tensor, group=self._handle)
        return received

    def all_to_all_rows(self, rows: Tensor, sent_X: Sequence[int], arriving_X: Sequence[int], *, phase: str) -> Tensor:
        """Sends the next `sent_X[r]` rows to rank r; returns the rows received, `arriving_X[r]` from rank r, in rank order.

        Every rank must know how many rows come from each other one.
        """
        if self.size == 1:
            return rows
        import torch.distributed as td

        rows = rows.contiguous()
        received = rows.new_empty(sum(arriving_X), *rows.shape[1:])
        others = sum(arriving_X) - arriving_X[self.rank]
        with self._counted(phase, others * math.prod(rows.shape[1:]) * rows.element_size()):
            td.all_to_all_single(received, rows, list(arriving_X), list(sent_X), group=self._handle)
        return received

    def reduce_scatter(self, tensor: Tensor, *, phase: str) -> Tensor:
        """Sums over ranks; rank r keeps the r-th equal part of axis 0. Added in rank order, hence deterministic.

        An all_to_all and a local sum: the same bytes as gloo's own reduce_scatter and several times faster (README).
        """
        if self.size == 1:
            return tensor
        parts = self.all_to_all(tensor, phase=phase)
        return parts.view(self.size, -1, *tensor.shape[1:]).sum(0)

    def all_reduce(self, tensor: Tensor, *, phase: str) -> Tensor:
        """Returns the sum over ranks; the argument is left as it is."""
        if self.size == 1:
            return tensor
        import torch.distributed as td

        total = tensor.clone()
        with self._counted(phase, 2 * tensor.nbytes * (self.size - 1) // self.size):
            td.all_reduce(total, group=self._handle)
        return total

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, in rank order."""
        if self.size == 1:
            return [value]
        import torch.distributed as td

        values: list[Any] = [None] * self.size
        td.all_gather_object(values, value, group=self._handle)
        self._whole.calls += 1
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            import torch.distributed as td

            td.barrier(group=self._handle)


def set_up_logging(me: Rank, *, step: Callable[[], int] | None = None, level: int = logging.INFO) -> None:
    """Console logging with rank, host and, if given, step in every line; only rank 0 speaks below warnings."""
    log.handlers = [_handler(logging.StreamHandler(), me, step, level if me.rank == 0 else max(level, logging.WARNING))]
    log.propagate = False
    log.setLevel(level)


def log_into(folder: Path, me: Rank, *, step: Callable[[], int] | None = None, level: int = logging.INFO) -> Path:
    """Every rank's lines also go into a file of its own in `folder`, rank-00000.log and so on; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{me.rank:05d}.log"
    log.addHandler(_handler(_LogFile(path, encoding="utf-8", errors="backslashreplace"), me, step, level))
    return path


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences, with one warning on the console and no traceback for every line."""

    silenced = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        if not self.silenced:
            self.silenced = True
            log.warning("'%s' takes no more lines: %s", self.baseFilename, sys.exc_info()[1])


def _handler(handler: logging.Handler, me: Rank, step: Callable[[], int] | None, level: int) -> logging.Handler:
    def add_place(record: logging.LogRecord) -> bool:
        record.place = f"{socket.gethostname()} rank {me.rank}" + ("" if step is None else f" step {step()}")
        return True

    handler.addFilter(add_place)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(place)s] %(levelname)s %(message)s", "%H:%M:%S"))
    handler.setLevel(level)
    return handler


def raise_together(group: Group, problem: str | None) -> None:
    """Raises ConfigError on every rank if any has a problem. A collective."""
    problems = [f"rank {rank}: {one}" if group.size > 1 else one
                for rank, one in enumerate(group.all_gather_object(problem)) if one]
    if problems:
        raise ConfigError(problems[0])


def check_same(group: Group, name: str, *arguments: Any) -> None:
    """Refuses, on every rank, arguments of the collective `name` that differ between ranks. A collective.

    It must come before anything that one rank alone could refuse: the others would wait for it.

    Args:
        arguments: values that are spelled alike (`repr`) wherever they are equal.
    """
    if group.size > 1:
        digest = hashlib.blake2b(repr(arguments).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if len(set(group.all_gather_object(digest))) > 1:
            raise ConfigError(f"{name} is a collective: all ranks must pass the same arguments")


def on_rank_0(group: Group, action: Callable[[], Result]) -> Result:
    """The small picklable result of `action`, which rank 0 alone performs. A collective.

    Raises:
        ConfigError: on every rank, with the message of the ValueError or OSError that rank 0 met.
    """
    message: str | None = None
    value: Any = None
    if group.rank == 0:
        try:
            value = action()
        except (ValueError, OSError) as error:
            message = str(error)
    message, value = group.all_gather_object((message, value))[0]
    if message is not None:
        raise ConfigError(message)
    result: Result = value
    return result
