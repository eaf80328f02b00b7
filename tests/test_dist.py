"""Processes and collectives: identities on one rank, exact sums and gathers on several, every byte counted."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks

from lmcode import dist
from lmcode.dist import Group


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
    return result


@pytest.mark.parametrize("world_size", [2, 3])
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
        assert result["bytes"] == {"gather": (R - 1) * 24, "exchange": (R - 1) * 24, "scatter": (R - 1) * 24,
                                   "reduce": 2 * 24 * (R - 1) // R, "empty": 0}
        assert result["timed"] == sorted(result["bytes"])
        assert result["after_take"] == ({}, {})


@pytest.mark.parametrize(("env", "expected"), [
    ({}, dist.Rank(0, 1, 0, 1, "single")),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, dist.Rank(3, 4, 1, 2, "deepspeed")),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, dist.Rank(3, 4, 1, 2, "torchrun")),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, dist.Rank(1, 2, 1, 2, "mpirun")),
    ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
     dist.Rank(5, 8, 1, 4, "slurm")),
    ({"SLURM_PROCID": "0"}, dist.Rank(0, 1, 0, 1, "single")),  # an sbatch script itself, not a step of srun
])
def test_every_launcher_is_recognised(env: dict, expected: dist.Rank) -> None:
    assert dist.discover(env) == expected


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK='x'"):
        dist.discover({"RANK": "x", "WORLD_SIZE": "2"})
