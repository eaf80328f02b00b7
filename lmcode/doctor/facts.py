"""What has to be equal on every host of a job: versions, and the project's own sources."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from lmcode.version import __version__

PACKAGE = Path(__file__).parents[1]


def collect() -> dict[str, str]:
    """Each fact by its name; 'none' for a package that is not there."""
    from lmcode.doctor.host import FAISS_BUILDS, installed_versions

    found = installed_versions(["deepspeed", *FAISS_BUILDS])
    faiss = " and ".join(f"{name} {found[name]}" for name in FAISS_BUILDS if name in found)
    return {"python": platform.python_version(), "torch": torch_version(), "deepspeed": found.get("deepspeed", "none"),
            "faiss": faiss or "none", "lmcode": f"{__version__} {source_hash()}"}


def torch_version() -> str:
    """With the build, which the installed distribution's version may leave out: '2.13.0+cpu'."""
    import torch

    return str(torch.__version__)


def source_hash(package: Path = PACKAGE) -> str:
    """Twelve digits that differ if any source of the project does; sharding files count, where they lie beside it."""
    files = [*sorted(package.rglob("*.py")), *sorted((package.parent / "ds_configs").glob("*.json"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package.parent).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
