"""The program that the doctor starts on each host: it reads one request per line, executes it and answers in one line.

Started by `link.py` over ssh or srun; it ends when its input ends. A request is a JSON object with "do", the name of a
function here, "limit_s", the seconds after which the process gives up and exits, and the function's arguments. An answer
begins with `MARK`, so that output of a login shell or a library is not taken for one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from lmcode.doctor import facts, folder
from lmcode.doctor.row import to_dict
from lmcode.jobs import network

MARK = "lmcode-doctor:"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK",
             "MASTER_ADDR", "MASTER_PORT")
CONNECT_S = 3.0
AT_ONCE = 32  # connections that are tried side by side
SEE_S = 5.0  # for what another host has written to appear


class Agent:
    """What is open and lying about between two requests."""

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self.files: list[Path] = []
        self.locks: list[IO[str]] = []

    def report(self, run_dir: str, space: list[int] | None) -> dict[str, Any]:
        """Everything that can be said of this host alone."""
        from lmcode.doctor.host import devices, run_checks

        settings = network.settings(os.environ)
        for name in LAUNCHERS:  # the checks are those of one process, whatever started this one
            os.environ.pop(name, None)
        rows = run_checks(Path(run_dir), folder.Space(*space) if space else None)
        try:
            address = network.named(network.gloo_choice(os.environ))
        except OSError as error:
            address = str(error)
        return {"host": socket.gethostname(), "facts": facts.collect(), "rows": [to_dict(row) for row in rows],
                "folder": str(folder.nearest_existing(Path(run_dir))), "devices": devices(), "settings": settings,
                "address": address}

    def clock(self) -> float:
        """Seconds since 1970, as this host counts."""
        return time.time()

    def listen(self, wanted: int) -> dict[str, Any]:
        """Opens a port, `wanted` (0: any) or, if it is taken, another one; says which, and what was wrong."""
        problem = ""
        try:
            listener = socket.create_server(("", wanted))
        except OSError as error:
            problem, listener = f"port {wanted} cannot be opened: {error.strerror}", socket.create_server(("", 0))
        self.listeners.append(listener)
        return {"port": listener.getsockname()[1], "problem": problem}

    def reach(self, targets: list[tuple[str, int]]) -> list[str]:
        """What is wrong with each (host, port); '' where a connection was made."""
        def attempt(target: tuple[str, int]) -> str:
            try:
                socket.create_connection((target[0], target[1]), timeout=CONNECT_S).close()
            except OSError as error:
                return str(error) or type(error).__name__
            return ""

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(attempt, targets))

    def put(self, place: str, name: str, text: str) -> bool:
        """Writes a file as the parts of a checkpoint are written: aside, fsync, rename. It is gone when the agent ends."""
        path = Path(place) / name
        self.files += [path, path.with_suffix(".new")]
        with self.files[-1].open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.files[-1].rename(path)
        return True

    def missing(self, place: str, texts: Mapping[str, str]) -> list[str]:
        """The files, by name, that do not have these texts here, even after a while."""
        deadline = time.monotonic() + SEE_S
        left = dict(texts)
        while left:
            left = {name: text for name, text in left.items() if _read(Path(place) / name) != text}
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return sorted(left)

    def lock(self, place: str, name: str) -> bool:
        """Takes the lock of a file that `put` made somewhere, and keeps it; False if another has it."""
        file = (Path(place) / name).open("r+", encoding="utf-8")
        self.locks.append(file)
        return folder.try_lock(file.fileno())

    def hang_up(self) -> bool:
        """Closes the ports that `listen` opened."""
        while self.listeners:
            self.listeners.pop().close()
        return True

    def gather(self, rank: int, world: int, address: str, port: int, size: int, rounds: int,
               give_up_s: float) -> dict[str, Any]:
        """Joins a process group with one rank per host, gathers `size` bytes of each a few times; how long that took, the
        addresses in use, and whether what came was right."""
        import torch

        from lmcode import dist

        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR=address,
                          MASTER_PORT=str(port))
        dist.start(timeout_s=give_up_s)
        group = dist.Group.world()
        mine = torch.full((size,), rank + 1, dtype=torch.uint8, device=dist.device())
        right, seconds = True, []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            gathered = group.all_gather(mine, phase="doctor").view(world, size)
            if gathered.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            right = right and bool((gathered[:, 0] == torch.arange(1, world + 1, device=mine.device)).all())
        addresses = network.listening()
        dist.stop()
        return {"seconds": seconds[1:], "addresses": addresses, "right": right}

    def close(self) -> None:
        """Leaves nothing behind."""
        self.hang_up()
        for file in self.locks:
            file.close()
        for path in self.files:
            path.unlink(missing_ok=True)


REQUESTS = ("report", "clock", "listen", "reach", "put", "missing", "lock", "hang_up", "gather")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def answer(agent: Agent, request: Mapping[str, Any]) -> dict[str, Any]:
    """{"value": ...}, or {"problem": text} if the request could not be done."""
    arguments = dict(request)
    try:
        do = arguments.pop("do")
        if do not in REQUESTS:
            raise ValueError(f"a request is one of {', '.join(REQUESTS)}: got {do!r}")
        return {"value": getattr(agent, do)(**arguments)}
    except Exception as error:  # whatever it is, it is a finding
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> int:
    """Serves standard input until it ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # only answers go out
        agent = Agent()
        try:
            for line in iter(sys.stdin.readline, ""):
                request = json.loads(line)
                limit = threading.Timer(request.pop("limit_s"), os._exit, (1,))
                limit.daemon = True
                limit.start()
                said = answer(agent, request)
                limit.cancel()
                out.write(f"{MARK}{json.dumps(said)}\n")
                out.flush()
        finally:
            agent.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
