"""The hosts of a job in a file: one `HOST slots=N` per line, `#` starts a comment. Read as launch/multinode.sh reads it."""

from __future__ import annotations

import re
from pathlib import Path

from lmcode.config import ConfigError

LINE = re.compile(r"[ \t]*([A-Za-z0-9][A-Za-z0-9._-]*)[ \t]+slots=([1-9][0-9]{0,3})[ \t]*", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots, which are ranks, by host, in the order of the file.

    Raises:
        ConfigError: if there is no such file, or it names no host; or for a line of another form or a host that is there
            twice, with the number of the line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no hostfile '{path}'")
    hosts: dict[str, int] = {}
    for number, whole in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        line = whole.partition("#")[0]
        if not line.strip(" \t"):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"{path}, line {number}: expected 'HOST slots=N': got '{line}'")
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {found[1]} is there twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"the hostfile '{path}' names no host")
    return hosts
