"""Can this host run the project? Every check is a function that returns rows and changes nothing.

A check that raises becomes a failed row, so one broken part never hides the others. Under a launcher, every rank checks
its own host and the collectives join all ranks.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from lmcode import processor
from lmcode.doctor.folder import GIB, Space, file_system_rows
from lmcode.doctor.row import Row, State, guarded
from lmcode.jobs import network

REQUIRED = {  # lowest versions, as in setup.cfg
    "torch": "2.10", "deepspeed": "0.19.8", "huggingface_hub": "1.0", "numpy": "1.26", "psutil": "5.9", "pydantic": "2.5",
    "PyYAML": "6.0", "safetensors": "0.5", "tensorboard": "2.21", "tokenizers": "0.20",
}
OPTIONAL = {"mpi4py": "launch/mpi.sh", "matplotlib": "plots", "transformers": "the transformers Auto classes"}
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu")
LOWEST_LIMITS = {"open files": 1024, "processes": 1024}


def run_checks(run_dir: Path, space: Space | None = None) -> list[Row]:
    """All rows, in the order of the table.

    Args:
        run_dir: where runs will be kept; it need not exist yet and is not created.
        space: what a run's checkpoints take, if that is known.
    """
    installed = installed_versions([*REQUIRED, *OPTIONAL, *FAISS_BUILDS])
    checks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("python", lambda: [python_row()]),
        ("packages", lambda: package_rows(installed)),
        ("faiss", lambda: [faiss_build_row(installed)]),
        ("device", device_rows),
        ("bf16", bf16_rows),
        ("cuda of torch and faiss", lambda: [cuda_row(torch_cuda(), installed, faiss_cuda(installed))]),
        ("faiss search", lambda: [faiss_search_row()]),
        ("collectives", lambda: [collectives_row()]),
        ("network", lambda: [network_row(), host_name_row()]),
        ("run folder", lambda: file_system_rows(run_dir, space)),
        ("shared memory", lambda: [shared_memory_row(Path("/dev/shm"))]),
        ("limits", lambda: [limits_row(limits())]),
    ]
    return [row for name, check in checks for row in guarded(name, check)]


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
        return Row("faiss", "warn", "not installed; memory.tier=exact is used, slower on large banks; ivf and "
                   "hnsw are refused")
    return Row("faiss", "ok", f"{builds[0]} {installed[builds[0]]}")


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built for, such as '12.6'; None for a build without."""
    import torch

    return torch.version.cuda


def faiss_cuda(installed: Mapping[str, str]) -> str | None:
    """The major version of CUDA that faiss-gpu was built for, from what it requires; None if it does not say."""
    if "faiss-gpu" not in installed:
        return None
    found = re.search(r"nvidia-[a-z-]+-cu(\d+)", " ".join(metadata.requires("faiss-gpu") or ()))
    return found[1] if found else None


def cuda_row(of_torch: str | None, installed: Mapping[str, str], of_faiss: str | None) -> Row:
    """One major version of CUDA for both is what their makers test; the search below says whether two work together."""
    name, has_faiss_gpu = "cuda of torch and faiss", "faiss-gpu" in installed
    torch_says = f"torch for CUDA {of_torch}" if of_torch else "torch without CUDA"
    if not has_faiss_gpu:
        detail = f"{torch_says}, {'faiss-cpu' if 'faiss-cpu' in installed else 'no faiss'}"
        return Row(name, "warn" if of_torch else "ok", detail + ("; on a GPU memory.tier=exact is used" if of_torch else ""))
    faiss_says = f"faiss-gpu for CUDA {of_faiss}" if of_faiss else "faiss-gpu for an unknown CUDA"
    if of_torch is None:
        return Row(name, "fail", f"{torch_says}, {faiss_says}; install faiss-cpu, or a torch with CUDA")
    alike = of_faiss is None or of_torch.split(".")[0] == of_faiss
    return Row(name, "ok" if alike else "warn", f"{torch_says}, {faiss_says}" + ("" if alike else "; the majors differ"))


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


def bf16_rows() -> list[Row]:
    """Whether a processor that computes multiplies bf16, which a preset for GPUs asks for; nothing to say beside a GPU."""
    import torch

    able = processor.has_bf16()
    if torch.cuda.is_available() or able is None:
        return []
    return [Row("bf16", "ok" if able else "warn", "this processor multiplies bf16" if able else processor.BF16_IS_SLOW)]


def devices() -> str:
    """Where ranks compute here, in the same words on equal hosts: 'CPU' or '8 x NVIDIA H100'."""
    import torch

    if not torch.cuda.is_available():
        return "CPU"
    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return " and ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def faiss_search_row() -> Row:
    """Searches random entries with FAISS where this rank computes, and compares with brute force."""
    import torch

    from lmcode import dist
    from lmcode.memory.search import exact, faiss_index, flat
    from lmcode.memory.search.tier import Rows

    device = dist.device()
    if not faiss_index.available(device):
        return Row("faiss search", "warn", f"FAISS cannot search on {device.type}; memory.tier=exact is used")
    generator = torch.Generator().manual_seed(0)
    query_HND = torch.randn(2, 64, 32, generator=generator).to(device)
    key_HMD = torch.randn(2, 2000, 32, generator=generator).to(device)
    rows = Rows(key_HMD, torch.zeros(2000, device=device), torch.arange(2000, device=device))
    score_HNK, id_HNK, _ = flat.search_flat(query_HND, rows, 10)
    wanted_score_HNK, wanted_id_HNK, _ = exact.search_exact(query_HND, rows, 10)
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
    found = network.interfaces()
    shown = ", ".join(f"{name} {address}" for address, name in sorted(found.items(), key=lambda item: item[1])) or "none"
    outward = [address for address in found if not network.is_loopback(address)]
    return Row("network", "ok" if outward else "warn",
               shown if outward else f"{shown}; no interface that another host could reach")


def host_name_row() -> Row:
    """Gloo looks up the host's own name to choose an address."""
    name = socket.gethostname()
    try:
        return Row("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Row("host name", "warn", f"{name} does not resolve ({error}); set GLOO_SOCKET_IFNAME")


def shared_memory_row(path: Path) -> Row:
    """NCCL and gloo move data between ranks of one host through shared memory; containers often give 64 MiB."""
    if not path.is_dir():
        return Row("shared memory", "warn", f"there is no {path}")
    size = shutil.disk_usage(path).total / GIB
    return Row("shared memory", "ok" if size >= 1 else "warn",
               f"{path} has {size:.2f} GiB" + ("" if size >= 1 else "; give a container more (--shm-size)"))


def limits() -> dict[str, int | None]:
    """The limits of a process here, by what they count; None is unlimited."""
    kinds = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK,
             "processes": resource.RLIMIT_NPROC}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if limit == resource.RLIM_INFINITY else limit for name, limit in found.items()}


def limits_row(found: Mapping[str, int | None]) -> Row:
    """Open files and processes (threads count); locked memory, which RDMA needs unlimited."""
    short = [f"{lowest} {name} are better" for name, lowest in LOWEST_LIMITS.items()
             if (limit := found.get(name)) is not None and limit < lowest]
    shown = [f"{name} {'unlimited' if limit is None else limit}" for name, limit in found.items()]
    return Row("limits", "warn" if short else "ok", ", ".join(shown) + "".join(f"; {text}" for text in short))
