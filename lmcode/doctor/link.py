"""Connections to the agents: one subprocess for each host, ssh or srun, all asked at the same time.

A host that does not answer in time, or answers anything else, counts as lost: it gets no further requests, and the others
continue. There is one `srun` for each host, because Slurm ends a step, on all its hosts, when one of them cannot be reached.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from lmcode.doctor.agent import MARK
from lmcode.doctor.row import Row

ROOT = Path(__file__).parents[2]  # of the sources: the checkout, or the environment's folder of packages
AGENT = (sys.executable, "-m", "lmcode.doctor.agent")
HANDED_ON = re.compile(r"(GLOO|NCCL|TORCH|HF)_|(DS_ACCELERATOR|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES)$")  # as multinode.sh
ABOUT = {"clock": "clocks", "put": "shared folder", "missing": "shared folder", "lock": "locks between hosts",
         "listen": "open ports", "reach": "open ports", "gather": "all_gather"}  # the row that tells of a failed request
ORPHAN_S = 5.0  # after its request's time an agent that nobody kills ends itself
LEAVE_S = 5.0
LONGEST_LINE = 2**22


class HostReply(NamedTuple):
    """What a host said, and the Unix times here before it was asked and after it was heard."""

    value: Any
    asked: float
    heard: float


def over_ssh(host: str, env: Mapping[str, str]) -> list[str]:
    """The command for an agent on `host`, in the same environment and checkout, with the variables that a job gets."""
    handed_on = [f"{name}={value}" for name, value in sorted(env.items()) if HANDED_ON.match(name)]
    there = f"cd {shlex.quote(str(ROOT))} && exec env {shlex.join([*handed_on, *AGENT])}"
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
            "-o", "ServerAliveCountMax=3", host, there]


def over_srun(host: str) -> list[str]:
    """The command for an agent on `host` of the job that this process is in, beside whatever runs there."""
    return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", f"--chdir={ROOT}", *AGENT]


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """What a process reads from and what it writes to; ValueError for one that was started without pipes."""
    if process.stdin is None or process.stdout is None:
        raise ValueError(f"a process that is asked needs pipes for requests and answers: got {process.args!r}")
    return process.stdin, process.stdout


class Link:
    """The agents of several hosts; a context manager that leaves no process behind.

    hosts: those that are left. rows: what is to be said of those that are lost, and of requests that could not be done.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], *, ready_s: float = 120.0) -> None:
        self.ready_s = ready_s
        self.rows: list[Row] = []
        self._errors: dict[str, IO[bytes]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._requests: dict[str, IO[bytes]] = {}
        self._answers: dict[str, IO[bytes]] = {}
        self._unread: dict[str, bytes] = dict.fromkeys(commands, b"")
        self._noise: dict[str, str] = {}
        for host, command in commands.items():
            self._errors[host] = tempfile.TemporaryFile()
            self._processes[host] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                     stderr=self._errors[host])
            self._requests[host], self._answers[host] = _pipes(self._processes[host])
            os.set_blocking(self._answers[host].fileno(), False)
        self.hosts = list(commands)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for requests in self._requests.values():
            try:
                requests.close()
            except OSError:  # what was still in the buffer has no reader any more
                continue
        deadline = time.monotonic() + (LEAVE_S if kind is None else 0.5)
        for host, process in self._processes.items():
            try:
                process.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._answers[host].close()
        for file in self._errors.values():
            file.close()

    def ask(self, do: str, *, timeout_s: float, each: Mapping[str, Mapping[str, Any]] | None = None,
            **arguments: Any) -> dict[str, HostReply]:
        """Has the hosts do something, all at once; the answers of those that did it, in the order of the hosts.

        Args:
            do: the name of one of the agent's functions.
            timeout_s: who has not answered by then is lost.
            each: arguments by host, beside those that all get; only these hosts are asked.
        """
        asked: dict[str, float] = {}
        for host in [host for host in self.hosts if each is None or host in each]:
            request = {"do": do, "limit_s": timeout_s + ORPHAN_S, **arguments, **(each or {}).get(host, {})}
            asked[host] = time.time()
            with suppress(OSError):  # a host that has gone: why, is read below
                self._requests[host].write(json.dumps(request).encode() + b"\n")
                self._requests[host].flush()
        said = self._listen(asked, do, timeout_s)
        return {host: said[host] for host in self.hosts if host in said}

    def _listen(self, asked: Mapping[str, float], do: str, timeout_s: float) -> dict[str, HostReply]:
        said: dict[str, HostReply] = {}
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for host in asked:
                selector.register(self._answers[host], selectors.EVENT_READ, host)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    done = self._read(key.data)
                    if done is None:
                        continue
                    selector.unregister(key.fileobj)
                    if "problem" in done:
                        self.rows.append(Row(ABOUT.get(do, "host"), "fail", done["problem"], (key.data,)))
                    elif done:
                        said[key.data] = HostReply(done["value"], asked[key.data], time.time())
                if time.monotonic() >= deadline:
                    for key in list(selector.get_map().values()):
                        self._lose(key.data, f"has not answered for {timeout_s:.0f} s (to '{do}')", end=True)
                    break
        return said

    def _read(self, host: str) -> dict[str, Any] | None:
        """What a host says next; None if it has not finished saying it; {} if the host was lost over it."""
        try:
            data = os.read(self._answers[host].fileno(), 65536)
        except BlockingIOError:
            return None
        if not data:
            self._lose(host, self._last_words(host))
            return {}
        if len(self._unread[host]) > LONGEST_LINE:
            self._lose(host, "talks without end", end=True)
            return {}
        *lines, self._unread[host] = (self._unread[host] + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace")
            if not text.startswith(MARK):
                self._noise[host] = text.strip() or self._noise.get(host, "")
                continue
            try:
                said = json.loads(text.removeprefix(MARK))
            except ValueError:
                said = None
            if isinstance(said, dict) and (isinstance(said.get("problem"), str) or "value" in said):
                return said
            self._lose(host, f"answers '{text[:80]}', which is none of the doctor's words", end=True)
            return {}
        return None

    def _last_words(self, host: str) -> str:
        """Why a host's process has ended, from what it said last."""
        process = self._processes[host]
        try:
            code = process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            return "has closed its output"
        self._errors[host].seek(0)
        lines = self._errors[host].read().decode("utf-8", "replace").strip().splitlines()
        noise = self._noise.get(host, "")
        if lines:  # srun gives the reason first, others last
            reason = next((line for line in lines if line.startswith("srun: error: ")), lines[-1])
            return f"does not answer: {reason.strip()}"
        return f"answers '{noise[:80]}' instead of a report" if noise else f"ended with exit code {code} and without a word"

    def _lose(self, host: str, why: str, *, end: bool = False) -> None:
        self.rows.append(Row("host", "fail", why, (host,)))
        self.hosts.remove(host)
        if end:
            self._processes[host].kill()

    def drop(self, host: str, why: str) -> None:
        """Loses a host whose answers make no sense."""
        self._lose(host, why, end=True)
