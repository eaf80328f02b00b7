"""`lmcode doctor`: can this machine run the project? Every check is a function that returns rows and changes nothing.

A row's state is `ok`, `warn` (works, with a limit that the detail names) or `fail` (a run would stop or be wrong here).
A check that raises becomes a failed row, so one broken part never hides the others. Under a launcher, every rank checks
its own host and the collectives join all ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["ok", "warn", "fail"]

REQUIRED = {  # lowest versions, as in setup.cfg
    "torch": "2.10", "deepspeed": "0.19.8", "huggingface_hub": "1.0", "numpy": "1.26", "psutil": "5.9", "pydantic": "2.5",
    "PyYAML": "6.0", "safetensors": "0.5", "tensorboard": "2.21", "tokenizers": "0.20",
}
OPTIONAL = {"mpi4py": "launch/mpi.sh", "matplotlib": "plots", "transformers": "the transformers Auto classes"}
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu")
GIB = 2**30


class Row(NamedTuple):
    """One finding: what was looked at, how it is, and what a person needs to know about it."""

    name: str
    state: State
    detail: str


def run_checks(run_dir: Path) -> list[Row]:
    """All rows, in the order of the table.

    Args:
        run_dir: where runs will be kept; it need not exist yet and is not created.
    """
    installed = installed_versions([*REQUIRED, *OPTIONAL, *FAISS_BUILDS])
    checks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("python", lambda: [python_row()]),
        ("packages", lambda: package_rows(installed)),
        ("faiss", lambda: [faiss_build_row(installed)]),
        ("device", device_rows),
        ("faiss search", lambda: [faiss_search_row()]),
        ("collectives", lambda: [collectives_row()]),
        ("network", lambda: [network_row(), host_name_row()]),
        ("run folder", lambda: file_system_rows(run_dir)),
        ("shared memory", lambda: [shared_memory_row(Path("/dev/shm"))]),
        ("limits", lambda: [limits_row()]),
    ]
    return [row for name, check in checks for row in guarded(name, check)]


def guarded(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check, or one failed row that says what it raised."""
    try:
        return check()
    except Exception as error:  # whatever it is, it is a finding
        return [Row(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")]


def exit_code(rows: Iterable[Row]) -> int:
    """1 if any row failed, else 0."""
    return int(any(row.state == "fail" for row in rows))


def to_table(rows: list[Row]) -> str:
    """The rows as aligned text, with a closing line that counts them."""
    width = max(len(row.name) for row in rows)
    lines = [f"{row.state:<4}  {row.name:<{width}}  {row.detail}" for row in rows]
    counts = {state: sum(row.state == state for row in rows) for state in ("ok", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def to_json(rows: list[Row]) -> str:
    """{"ok": bool, "checks": [{"name": ..., "state": ..., "detail": ...}]}."""
    return json.dumps({"ok": exit_code(rows) == 0, "checks": [row._asdict() for row in rows]}, indent=2)


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Version by distribution name; those that are not installed are left out. Nothing is imported."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_older(version: str, lowest: str) -> bool:
    """Compares release numbers: '2.9.1+cpu' is older than '2.10'."""
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]

    return numbers(version) < numbers(lowest)


def python_row() -> Row:
    state: State = "ok" if sys.version_info >= (3, 10) else "fail"
    return Row("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def package_rows(installed: Mapping[str, str]) -> list[Row]:
    """One row per package that is required, and per optional one."""
    rows = []
    for name, lowest in REQUIRED.items():
        version = installed.get(name)
        if version is None:
            rows.append(Row(name, "fail", f"not installed; {lowest} or newer is needed"))
        elif is_older(version, lowest):
            rows.append(Row(name, "fail", f"{version}; {lowest} or newer is needed"))
        else:
            rows.append(Row(name, "ok", version))
    for name, purpose in OPTIONAL.items():
        rows.append(Row(name, "ok", installed[name]) if name in installed
                    else Row(name, "warn", f"not installed; only {purpose} need it"))
    return rows


def faiss_build_row(installed: Mapping[str, str]) -> Row:
    """One build of FAISS is right; two overwrite each other's files."""
    builds = [name for name in FAISS_BUILDS if name in installed]
    if len(builds) == 2:
        return Row("faiss", "fail", "faiss-cpu and faiss-gpu are both installed; remove both, then install one")
    if not builds:
        return Row("faiss", "warn", "not installed; memory.tier=exact is used, slower on large banks")
    return Row("faiss", "ok", f"{builds[0]} {installed[builds[0]]}")


def device_rows() -> list[Row]:
    """Each GPU that torch can use, or the CPU and how many threads there are for the ranks to share."""
    import torch

    if torch.cuda.is_available():
        return [Row(f"gpu {i}", "ok", f"{torch.cuda.get_device_name(i)}, "
                    f"{torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB")
                for i in range(torch.cuda.device_count())]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in this process"
    if shutil.which("nvidia-smi"):
        return [Row("device", "warn", f"CPU, {cores}; torch {torch.__version__} finds no GPU, yet nvidia-smi is here")]
    return [Row("device", "ok", f"CPU, {cores}")]


def faiss_search_row() -> Row:
    """Searches random entries with FAISS where this rank computes, and compares with brute force."""
    import torch

    from lmcode import dist
    from lmcode.memory import exact, faiss_index

    device = dist.device()
    if not faiss_index.available(device):
        return Row("faiss search", "warn", f"FAISS cannot search on {device.type}; memory.tier=exact is used")
    generator = torch.Generator().manual_seed(0)
    query_HNE = torch.randn(2, 64, 33, generator=generator).to(device)
    key_HME = torch.randn(2, 2000, 33, generator=generator).to(device)
    query_HNE[..., -1], key_HME[..., -1] = 1.0, 0.0
    id_M = torch.arange(2000, device=device)
    score_HNK, id_HNK, _ = faiss_index.search_flat(query_HNE, key_HME, id_M, 10)
    wanted_score_HNK, wanted_id_HNK, _ = exact.search_exact(query_HNE, key_HME, id_M, 10)
    wrong = int((id_HNK != wanted_id_HNK).sum())
    error = float((score_HNK - wanted_score_HNK).abs().max())
    # Two entries whose scores are an ulp apart may swap places, so a few differences are no fault; wrong scores are.
    state: State = "ok" if wrong <= id_HNK.numel() // 100 and error < 1e-3 else "fail"
    return Row("faiss search", state, f"{wrong} of {id_HNK.numel()} hits differ from brute force on {device.type}, "
                                      f"largest score difference {error:.1e}")


def collectives_row() -> Row:
    """Joins the process group as a run does, and gathers one number from every rank."""
    import torch

    from lmcode import dist

    me = dist.start(timeout_s=60.0)
    try:
        gathered = dist.Group.world().all_gather(torch.tensor([me.rank], device=dist.device()), phase="doctor").tolist()
    finally:
        dist.stop()
    state: State = "ok" if gathered == list(range(me.world_size)) else "fail"
    return Row("collectives", state, f"launcher {me.launcher}, {me.world_size} ranks gathered {gathered}")


def network_row() -> Row:
    """Interfaces that are up and have an IPv4 address; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME take such a name."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {name: address.address for name, addresses in psutil.net_if_addrs().items() if name in up
             for address in addresses if address.family == socket.AF_INET}
    listed = ", ".join(f"{name} {address}" for name, address in sorted(found.items())) or "none"
    outward = [name for name, address in found.items() if not address.startswith("127.")]
    return Row("network", "ok" if outward else "warn",
               listed if outward else f"{listed}; no interface that another host could reach")


def host_name_row() -> Row:
    """Gloo looks up the host's own name to choose an address."""
    name = socket.gethostname()
    try:
        return Row("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Row("host name", "warn", f"{name} does not resolve ({error}); set GLOO_SOCKET_IFNAME")


def file_system_rows(run_dir: Path) -> list[Row]:
    """Space, durability and locks where checkpoints will be written; a scratch folder is made there and removed."""
    folder = nearest_existing(run_dir)
    free = shutil.disk_usage(folder).free / GIB
    state: State = "ok" if free >= 5 else "warn" if free >= 0.5 else "fail"
    rows = [Row("free space", state, f"{free:.1f} GiB in {folder}")]
    with tempfile.TemporaryDirectory(prefix=".lmcode-doctor-", dir=folder) as scratch:
        commit_folder(Path(scratch))
        rows.append(Row("rename and fsync", "ok", f"a folder was committed in {folder}"))
        locks = locks_exclude(Path(scratch) / "lock")
        rows.append(Row("file locks", "ok" if locks else "warn",
                        "a second lock is refused" if locks else "locks do not exclude each other on this file system"))
    return rows


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the closest parent that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def commit_folder(scratch: Path) -> None:
    """Writes as a checkpoint is written: file, fsync, rename of the folder, fsync of its parent, read back.

    Raises:
        OSError: if the file system refuses any of it.
    """
    temporary, final = scratch / "commit.tmp", scratch / "commit"
    temporary.mkdir()
    with (temporary / "data").open("wb") as file:
        file.write(b"lmcode")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(final)
    parent = os.open(scratch, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    if (final / "data").read_bytes() != b"lmcode":
        raise OSError(f"a file in {scratch} reads back other bytes than were written")


def locks_exclude(path: Path) -> bool:
    """Whether an exclusive lock keeps a second one out; False also where the file system knows no locks."""
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def shared_memory_row(path: Path) -> Row:
    """NCCL and gloo move data between ranks of one host through shared memory; containers often give 64 MiB."""
    if not path.is_dir():
        return Row("shared memory", "warn", f"there is no {path}")
    size = shutil.disk_usage(path).total / GIB
    return Row("shared memory", "ok" if size >= 1 else "warn",
               f"{path} has {size:.2f} GiB" + ("" if size >= 1 else "; give a container more (--shm-size)"))


def limits_row() -> Row:
    """Open files and locked memory; RDMA needs the latter unlimited."""
    def shown(limit: int) -> str:
        return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)

    files, memory = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    enough = files == resource.RLIM_INFINITY or files >= 1024
    detail = f"open files {shown(files)}, locked memory {shown(memory)}"
    return Row("limits", "ok" if enough else "warn", detail + ("" if enough else "; 1024 open files are better"))
