"""Detection of ranks that die or hang: every rank sends a heartbeat each second, and all learn at once which rank failed.

The heartbeats use TCP connections of every rank with rank 0, served by a daemon thread in each process. No collective uses
them, so they work while the main thread is stuck in one. Rank 0 judges the others (`verdict`), they judge rank 0. At a
verdict every rank logs the same line, writes its Python stacks into its log file and exits with code 1; a rank that is
stopped is killed by the ranks on its machine. With one rank there is nothing to watch and no thread.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import queue
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcode.config import ConfigError
from lmcode.dist import Group
from lmcode.jobs.clock import Clock
from lmcode.jobs.verdict import KEPT_STEPS, Beat, Judge, Verdict, members_of

log = logging.getLogger("lmcode")

TICK_S = 0.2  # how often the thread looks up
BEAT_S = 1.0
CONNECT_S = 30.0
LAST_WORDS_S = 2.0  # for a verdict to reach the others before the process that found it ends
EXIT_S = 8.0  # from a verdict on, at most, even if logging it hangs
PATIENCE_S = 1800.0  # before the first step, and in phases without progress to see
FAILED = 1


class NullWatch:
    """Watches nothing, and says where the main thread is: what a job of one rank has.

    clock: its step and phase are what is said of this rank.
    group: of all ranks; its collectives count as progress.
    stacks: where the Python stacks go at a verdict; standard error when None.
    """

    def __init__(self, clock: Clock, group: Group) -> None:
        self.clock, self.group = clock, group
        self.stacks: Path | None = None

    def report(self, step: int, digest: int) -> None:
        """This rank finished a step with `digest`, a number that must be the same on all ranks."""


class Watch(NullWatch):
    """The control channel of one rank of several. Construction is a collective; use `watching`."""

    def __init__(self, clock: Clock, group: Group, *, heartbeat_s: float, patience_s: float) -> None:
        super().__init__(clock, group)
        self._digests: deque[tuple[int, int]] = deque(maxlen=KEPT_STEPS)
        self._words: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._main = threading.main_thread().ident
        self._beat_s = min(BEAT_S, heartbeat_s / 4)
        listener, address = _listen() if group.rank == 0 else (None, None)
        self._facts = group.all_gather_object({**_identity(), "address": address})
        self._peers, problem = _connect(group, listener, self._facts[0]["address"])
        self.problems = [text for text in group.all_gather_object(problem) if text]
        members = members_of((one["host"], one["pid"]) for one in self._facts)
        known = members if group.rank == 0 else {0: members[0]}
        self._judge = Judge(known, heartbeat_s=heartbeat_s, patience_s=patience_s)
        self._unread = dict.fromkeys(self._peers, b"")
        self._thread = threading.Thread(target=self._run, name="lmcode-watch", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._judge.begin(time.monotonic())
        self._thread.start()

    def report(self, step: int, digest: int) -> None:
        self._digests.append((step, digest))
        self._judge.settled = True

    def leave(self, reason: str = "") -> None:
        """Says goodbye, so that the end of this process is not taken for a death."""
        self._words.put({"bye": reason})
        self._words.put(None)
        self._thread.join(timeout=LAST_WORDS_S)

    def fail(self, error: BaseException) -> None:
        """Tells the others of an exception in the main thread; does not return if there is a verdict.

        One that came out of a collective is held back for the verdict on who caused it.
        """
        trace = "".join(traceback.format_exception(error))
        log.error("%s", trace.rstrip())
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._words.put({"raised": text, "consequence": out_of_a_collective(error)})
        self._thread.join(timeout=2 * EXIT_S)

    # The thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:  # a job must not hang because of a mistake in here, nor end
            log.exception("from now on nobody will say which rank died or hangs: the control channel broke")

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, peer in self._peers.items():
            peer.settimeout(BEAT_S)
            selector.register(peer, selectors.EVENT_READ, rank)
        looked, told = time.monotonic(), 0.0
        while True:
            for key, _ in selector.select(TICK_S) if self._peers else ():
                self._read(key.data, selector)
            now = time.monotonic()
            if now - looked > 5 * BEAT_S:  # this process was stopped, or the machine slept: the others are not to blame
                self._judge.begin(now)
            looked = now
            if now - told >= self._beat_s:
                told = now
                self._say({"beat": self._beat()})
            while not self._words.empty():
                word = self._words.get()
                if word is None:
                    return self._hang_up()
                self._say({"beat": self._beat()})
                self._say(word)
            found = self._judge.verdict(now) if self.group.rank == 0 else self._judge.gone(now)
            if found is not None:
                self._execute(found)

    def _beat(self) -> Beat:
        digests = tuple(self._digests.popleft() for _ in range(len(self._digests)))
        return Beat(self.clock.step, self.clock.phase, self.clock.moves + self.group.calls, _in_collective(self._main),
                    self._judge.settled, digests)

    def _say(self, word: dict[str, Any]) -> None:
        """Says something of this rank to its judge, which is rank 0, and to all whom rank 0 has to tell."""
        if self.group.rank == 0:
            self._hear(0, word)
        self._tell(word)

    def _tell(self, word: dict[str, Any]) -> None:
        """Says something to all peers."""
        line = json.dumps(word).encode() + b"\n"
        for peer in self._peers.values():
            try:
                peer.sendall(line)
            except OSError:  # reading from it will tell why
                continue

    def _read(self, rank: int, selector: selectors.BaseSelector) -> None:
        try:
            data = self._peers[rank].recv(65536)
        except OSError:
            data = b""
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            self._hear(rank, json.loads(line))
        if not data:
            selector.unregister(self._peers[rank])
            self._peers.pop(rank).close()
            self._judge.lost(rank)

    def _hear(self, rank: int, word: dict[str, Any]) -> None:
        now = time.monotonic()
        if "beat" in word:
            *rest, digests = word["beat"]
            self._judge.hear(rank, Beat._make([*rest, tuple(map(tuple, digests))]), now)
        elif "raised" in word:
            self._judge.raised(rank, word["raised"], now, consequence=word["consequence"])
        elif "bye" in word:
            self._judge.leave(rank, word["bye"])
        elif "verdict" in word:
            self._execute(Verdict(*word["verdict"]))

    def _hang_up(self) -> None:
        for peer in self._peers.values():
            peer.close()

    # The end

    def _execute(self, verdict: Verdict) -> None:
        """Says whose fault it is and ends this process."""
        threading.Timer(EXIT_S, os._exit, (FAILED,)).start()  # whatever happens below
        if self.group.rank == 0:
            self._tell({"verdict": verdict})
        log.critical("this job ends: %s", verdict.text)
        _dump_stacks(self.stacks)
        if verdict.silent:
            _kill(self._facts[verdict.rank], here=self._facts[self.group.rank])
        _kill_children()
        if self.group.rank == 0:
            self._see_them_off(without=verdict.rank if verdict.silent else None)
        logging.shutdown()
        os._exit(FAILED)

    def _see_them_off(self, *, without: int | None) -> None:
        """Reads on until the others have closed: a process that ends with unread data takes back what it has sent."""
        deadline = time.monotonic() + LAST_WORDS_S
        for rank, peer in self._peers.items():
            try:
                peer.shutdown(socket.SHUT_WR)
                peer.settimeout(max(0.01, deadline - time.monotonic()))
                while rank != without and peer.recv(65536):
                    pass
            except OSError:
                continue


@contextmanager
def watching(clock: Clock, group: Group, *, heartbeat_s: float, patience_s: float = PATIENCE_S,
             alike: tuple[type[BaseException], ...] = ()) -> Iterator[NullWatch]:
    """Watches over the ranks of `group` during the block. A collective.

    An exception inside the block is reported to the other ranks and ends the job, as a killed rank does; but a ConfigError
    and Ctrl-C, which every rank meets alike, are not, nor are those in `alike`.

    Args:
        heartbeat_s: a rank may be silent, or stand still between two signs of progress, for two of these, and longer before
            its first step; 0: not watched.
        patience_s: how long it may stand still before its first step and while it prepares or saves.
    """
    if group.size == 1 or heartbeat_s == 0:
        yield NullWatch(clock, group)
        return
    watch = Watch(clock, group, heartbeat_s=heartbeat_s, patience_s=patience_s)
    if watch.problems:
        log.warning("nobody will say which rank died or hangs, there is no control channel: %s", "; ".join(watch.problems))
        yield NullWatch(clock, group)
        return
    watch.start()
    met_alike: tuple[type[BaseException], ...] = (ConfigError, KeyboardInterrupt, *alike)
    try:
        yield watch
    except met_alike as error:
        watch.leave(f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()


# Connections


def _listen() -> tuple[socket.socket, tuple[str, int, str]]:
    """Rank 0's listening socket; the (host, port, token) that leads to it. On MASTER_ADDR, where the ranks already met."""
    host = os.environ["MASTER_ADDR"]
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family, backlog=1024)
    except OSError:  # a name that means this machine to the others only
        listener = socket.create_server(("", 0), backlog=1024)
    return listener, (host, listener.getsockname()[1], secrets.token_hex(16))


def _connect(group: Group, listener: socket.socket | None,
             address: tuple[str, int, str]) -> tuple[dict[int, socket.socket], str | None]:
    """The sockets by rank, on rank 0 those of all others, elsewhere that of rank 0; and what is wrong, if anything is."""
    host, port, token = address
    try:
        if listener is None:
            peer = socket.create_connection((host, port), timeout=CONNECT_S)
            peer.sendall(f"{token} {group.rank:08d}\n".encode())
            return {0: peer}, None
        with listener:
            return _accept(listener, token, others=group.size - 1), None
    except OSError as error:
        return {}, f"rank {group.rank}: {error} ({host}:{port})"


def _accept(listener: socket.socket, token: str, *, others: int) -> dict[int, socket.socket]:
    """One connection of each other rank; strangers are turned away."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_S
    while len(peers) < others:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        peer, _ = listener.accept()
        peer.settimeout(5.0)
        said, _, rank = peer.recv(len(token) + 10, socket.MSG_WAITALL).decode(errors="replace").partition(" ")
        if not secrets.compare_digest(said.encode(), token.encode()):
            peer.close()
            continue
        peers[int(rank)] = peer
    return peers


# Processes


def _identity() -> dict[str, Any]:
    """Who this process is, so that another one can be sure to kill this one and no other."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "born": psutil.Process().create_time()}


def _machine() -> list[str]:
    """Equal for two processes only if a process number means the same process to both."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [secrets.token_hex(16)]


def _kill(whom: dict[str, Any], *, here: dict[str, Any]) -> None:
    """Kills a stopped rank if it is on this machine; elsewhere that is for the ranks there, or the launcher."""
    import psutil

    if whom["machine"] != here["machine"]:
        return
    try:
        process = psutil.Process(whom["pid"])
        if process.create_time() == whom["born"]:
            process.kill()
    except psutil.Error:
        return


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue


def _dump_stacks(path: Path | None) -> None:
    """The Python stacks of all threads, where a reader of the rank's log finds them."""
    if path is None:
        faulthandler.dump_traceback(all_threads=True)
        return
    with path.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _in_collective(thread: int | None) -> bool:
    frame = sys._current_frames().get(thread) if thread is not None else None
    return frame is not None and _of_collectives(frame.f_code.co_filename)


def out_of_a_collective(error: BaseException) -> bool:
    """Whether an exception was raised by torch's collectives, hence perhaps because another rank is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    native = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    return native or bool(frames) and _of_collectives(frames[-1].filename)


def _of_collectives(filename: str) -> bool:
    return "torch/distributed/" in filename.replace(os.sep, "/")


# Digests


def digest_of(loss: float, applied: bool, counters: Iterable[int], weights: Iterable[Tensor] = ()) -> int:
    """A number that is equal on ranks that agree bit for bit on what each of them holds whole.

    Args:
        loss: of the step, after its all_reduce.
        counters: of the banks.
        weights: all of them, where no rank holds a part only (empty tensors count nothing); a few ms.
    """
    total = torch.zeros((), dtype=torch.int64)
    for weight in weights:
        flat = weight.detach().contiguous().view(-1)
        total = total.to(flat.device) + flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
    numbers = [*counters, int(total)]
    return zlib.crc32(struct.pack(f"<d?{len(numbers)}q", loss, applied, *numbers))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
