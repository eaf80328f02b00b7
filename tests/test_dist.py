"""Processes and collectives: identities on one rank, exact sums and gathers on several, every byte counted."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
import torch

from lmcode import dist
from lmcode.dist import Group
from lmcode.jobs import network
from tests.helpers.ranks import run_on_ranks


def test_on_one_rank_collectives_are_identities_and_free() -> None:
    group, x = Group(), torch.randn(4, 3)
    for collective in (group.all_gather, group.all_to_all, group.reduce_scatter, group.all_reduce):
        assert collective(x, phase="p") is x
    assert group.all_gather_object("a") == ["a"]
    group.barrier()
    assert group.take() == ({}, {})


def collectives() -> dict:
    group = Group.world()
    R, r = group.size, group.rank
    rows = torch.arange(6.0).view(2, 3) + 100 * r
    parts = torch.arange(2.0 * R * 3).view(2 * R, 3) + 1000 * r
    result = {
        "gather": group.all_gather(rows, phase="gather").tolist(),
        "all_to_all": group.all_to_all(parts, phase="exchange").tolist(),
        "scatter": group.reduce_scatter(parts, phase="scatter").tolist(),
        "reduce": group.all_reduce(rows, phase="reduce").tolist(),
        "unchanged": rows.tolist(),
        "objects": group.all_gather_object(r),
        "empty": tuple(group.all_gather(torch.zeros(0, 5), phase="empty").shape),
    }
    seconds, received = group.take()
    result["bytes"], result["timed"] = received, sorted(seconds)
    result["after_take"] = group.take()
    result["rows"] = group.all_gather_rows(rows[:r], [min(one, 2) for one in range(R)], phase="rows").tolist()
    result["ints"] = group.all_gather_int(10 * r, phase="ints", device=rows.device)
    group.take()
    result["network"] = network_said(group)
    result["splits"] = {size: split_up(group, size) for size in range(1, R + 1) if R % size == 0}
    return result


def network_said(group: Group) -> list[tuple[str, str]]:
    """What this rank logs about the network: as it is, and with a variable that is another on each rank."""
    said: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelname, record.getMessage()))

    network.log.addHandler(Keep())
    network.log.setLevel(logging.INFO)
    for value in ("WARN", str(group.rank)):
        os.environ["NCCL_DEBUG"] = value
        network.announce(group)
    return said


def check_network(said: list[tuple[str, str]], rank: int, ranks: int) -> None:
    if rank > 0:
        assert said == [], "rank 0 speaks for all"
        return
    (level, line), _, (warning, text) = said
    assert (level, warning) == ("INFO", "WARNING")
    assert {"NCCL_DEBUG=WARN", "OMP_NUM_THREADS=1", "MASTER_ADDR=127.0.0.1"} <= set(line.replace(";", "").split())
    here = socket.gethostname()
    assert f"ranks listen: {here} " in line and line.endswith(socket.gethostbyname(here)), "the address that gloo has chosen"
    assert text == "ranks differ in what is set: NCCL_DEBUG is " + " and ".join(f"{r} on ranks {r}" for r in range(ranks))


def split_up(group: Group, size: int) -> dict:
    """Who is in the two parts of this rank, and what their collectives cost."""
    (inside, between), calls = group.split(size), group.calls
    assert group.split(size) == (inside, between), "made once"
    members = [part.all_gather_int(group.rank, phase=name, device=torch.device("cpu"))
               for name, part in (("inside", inside), ("between", between))]
    places = (inside.rank, inside.size), (between.rank, between.size)
    return {"members": members, "places": places, "bytes": group.take()[1], "calls": group.calls - calls,
            "of their own": (inside is not group and inside.take()[1], between is not group and between.take()[1])}


@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_move_what_they_say_and_count_it(world_size: int) -> None:
    R = world_size
    rows = [torch.arange(6.0).view(2, 3) + 100 * r for r in range(R)]
    parts = [torch.arange(2.0 * R * 3).view(2 * R, 3) + 1000 * r for r in range(R)]
    for rank, result in enumerate(run_on_ranks(collectives, world_size)):
        mine = slice(2 * rank, 2 * rank + 2)
        assert result["gather"] == torch.cat(rows).tolist()
        assert result["all_to_all"] == torch.cat([part[mine] for part in parts]).tolist()
        assert result["scatter"] == sum(part[mine] for part in parts).tolist()
        assert result["reduce"] == sum(rows).tolist()
        assert result["unchanged"] == rows[rank].tolist()
        assert result["objects"] == list(range(R))
        assert result["empty"] == (0, 5)
        check_network(result["network"], rank, R)
        assert result["bytes"] == {"gather": (R - 1) * 24, "exchange": (R - 1) * 24, "scatter": (R - 1) * 24,
                                   "reduce": 2 * 24 * (R - 1) // R, "empty": 0}
        assert result["timed"] == sorted(result["bytes"])
        assert result["after_take"] == ({}, {})
        assert result["rows"] == torch.cat([one[:r] for r, one in enumerate(rows)]).tolist()
        assert result["ints"] == [10 * r for r in range(R)]
        for size, split in result["splits"].items():
            first, number = rank // size * size, R // size
            assert split["members"] == [list(range(first, first + size)), list(range(rank % size, R, size))]
            assert split["places"] == ((rank % size, size), (rank // size, number))
            sizes = {"inside": size, "between": number}
            assert split["bytes"] == {name: 8 * (ranks - 1) for name, ranks in sizes.items() if ranks > 1}
            assert split["calls"] == sum(ranks > 1 for ranks in sizes.values())
            assert not any(split["of their own"]), "what parts cost is counted by the whole"


def test_parts_must_share_out_the_ranks() -> None:
    alone = Group()
    assert alone.split(1) == (alone, alone)
    for size in (0, 2, 4):
        with pytest.raises(ValueError, match=f"must divide the number of ranks: 3 % {size} != 0"):
            Group(size=3).split(size)


@pytest.mark.parametrize(("env", "expected"), [
    ({}, dist.Rank(0, 1, 0, 1, "single")),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, dist.Rank(3, 4, 1, 2, "deepspeed")),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, dist.Rank(3, 4, 1, 2, "torchrun")),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, dist.Rank(1, 2, 1, 2, "mpirun")),
    ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
     dist.Rank(5, 8, 1, 4, "slurm")),
    ({"SLURM_PROCID": "0"}, dist.Rank(0, 1, 0, 1, "single")),  # an sbatch script itself, not a step of srun
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, dist.Rank(0, 1, 0, 1, "single")),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PTY_PORT": "4711"},
     dist.Rank(0, 1, 0, 1, "single")),  # typed into a shell of srun --pty
])
def test_every_launcher_is_recognised(env: dict, expected: dist.Rank) -> None:
    assert dist.discover(env) == expected


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK='x'"):
        dist.discover({"RANK": "x", "WORLD_SIZE": "2"})


def test_a_log_file_on_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-00000.log").symlink_to("/dev/full")
    dist.log_into(tmp_path, dist.Rank(0, 1, 0, 1, "single"))
    handler = dist.log.handlers[-1]
    try:
        for _ in range(3):
            dist.log.warning("a line")
    finally:
        dist.log.removeHandler(handler)
        handler.stream = None
    assert capsys.readouterr().err.count("Traceback") == 0
    assert caplog.text.count("takes no more lines: [Errno 28]") == 1
