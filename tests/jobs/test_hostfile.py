"""Hostfiles: what is read, what is refused, and that launch/multinode.sh judges the same files in the same words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcode.config import ConfigError
from lmcode.jobs.hostfile import read_hostfile
from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

HOSTS = st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True), st.integers(1, 9999), min_size=1,
                        max_size=5)
WRONG = ["", "# nobody\n", "n0 slots=2\nn1\n", "n0 slots=0\n", "n0 slots=2 n1\n", "n0;reboot slots=1\n",
         "n0 slots=2\nn0 slots=2\n", "-oProxyCommand=x slots=1\n", "n0 slots=12345\n"]


@given(HOSTS, st.lists(st.sampled_from(["", "# a comment", "   ", "\t"]), max_size=3), st.sampled_from(["", " # ranks"]))
def test_hosts_come_back_in_their_order(tmp_path_factory: pytest.TempPathFactory, hosts: dict[str, int], noise: list[str],
                                        comment: str) -> None:
    path = tmp_path_factory.getbasetemp() / "hostfile"
    lines = [f" {host}\tslots={slots}{comment}" for host, slots in hosts.items()]
    path.write_text("\n".join([*noise, *lines, *noise]))
    assert list(read_hostfile(path).items()) == list(hosts.items())


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_hostfile_is_refused_here_as_in_the_launcher(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_hostfile(path)
    env = {**os.environ, "LMCODE_SKIP_INSTALL": "1", "LMCODE_VENV": sys.prefix, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "launch/multinode.sh", str(path)], cwd=CHECKOUT, env=env, capture_output=True, text=True,
                          timeout=PATIENCE_S)
    assert (done.returncode, done.stderr.strip()) == (2, f"lmcode: error: {refused.value}")


def test_no_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no hostfile"):
        read_hostfile(tmp_path / "none")
