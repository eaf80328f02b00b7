"""Deaths and hangs: what the judge says, and that real jobs end with the guilty rank's name and leave no process behind."""

from __future__ import annotations

import math
import os
import signal
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcode.config import ConfigError
from lmcode.dist import Group
from lmcode.jobs import watch
from lmcode.jobs.clock import Clock
from lmcode.jobs.verdict import CAUSE_S, STARTING_S, Beat, Judge, members_of
from tests.helpers import small_job
from tests.helpers.small_job import Job

HEARTBEAT_S, PATIENCE_S = 10.0, 1000.0


def judge(ranks: int = 3) -> Judge:
    one = Judge(members_of([(f"host{rank}", 100 + rank) for rank in range(ranks)]), heartbeat_s=HEARTBEAT_S,
                patience_s=PATIENCE_S)
    one.begin(0.0)
    return one


def beat(step: int = 5, phase: str = "forward", moves: int = 50, **more: object) -> Beat:
    return Beat(step, phase, moves, **{"settled": True, **more})


def speak(one: Judge, now: float, **beats: Beat) -> None:
    for name, said in beats.items():
        one.hear(int(name[1:]), said, now)


# The judge


def test_ranks_that_move_are_left_alone() -> None:
    one = judge()
    for second in range(500):
        speak(one, float(second), **{f"r{rank}": beat(step=second, moves=9 * second) for rank in range(3)})
        assert one.verdict(second + 0.5) is None


def test_a_closed_connection_is_a_death_unless_there_was_a_goodbye() -> None:
    one = judge()
    one.leave(1, "")
    one.lost(1)
    assert one.verdict(1.0) is None
    speak(one, 1.0, r2=beat(step=7, phase="backward"))
    one.lost(2)
    rank, text, silent = one.verdict(1.1)
    assert (rank, silent) == (2, False)
    for words in ("rank 2 on host2", "pid 102", "step 7", "phase backward", "died"):
        assert words in text


def test_the_cause_wins_over_its_consequence_in_either_order() -> None:
    for cause_first in (True, False):
        one = judge()
        for what in (0, 1) if cause_first else (1, 0):
            if what == 0:
                one.lost(2)
            else:
                one.raised(0, "RuntimeError: Connection closed by peer", 1.0, consequence=True)
        assert one.verdict(1.1).rank == 2


def test_a_consequence_without_a_cause_is_told_after_a_while() -> None:
    one = judge()
    speak(one, 1.0, r0=beat(), r1=beat(), r2=beat())
    one.raised(1, "RuntimeError: Connection closed by peer", 1.0, consequence=True)
    assert one.verdict(1.0 + CAUSE_S / 2) is None
    found = one.verdict(1.0 + CAUSE_S)
    assert found.rank == 1 and "Connection closed by peer" in found.text


def test_a_consequence_is_the_fault_of_one_that_left_early() -> None:
    one = judge()
    one.leave(2, "ConfigError: something")
    one.raised(1, "RuntimeError: Connection closed by peer", 1.0, consequence=True)
    found = one.verdict(1.0 + CAUSE_S)
    assert found.rank == 2 and "ConfigError: something" in found.text


@given(st.integers(0, 3), st.booleans())
def test_a_silent_rank_is_named_after_two_heartbeats_even_when_all_stand_still(silent: int, waiting: bool) -> None:
    one = judge(4)
    one.hear(silent, beat(settled=False), 0.0)  # stopped right after the first step, before it could say so
    for second in range(int(2 * HEARTBEAT_S) + 1):
        for rank in range(4):
            if rank != silent:
                one.hear(rank, beat(waiting=waiting), float(second))
        if second <= 2 * HEARTBEAT_S - 1:
            assert one.verdict(float(second)) is None
    found = one.verdict(2 * HEARTBEAT_S + 0.5)
    assert found.rank == silent and found.silent


@given(st.sets(st.integers(2, 5), min_size=1), st.sampled_from([1.0, 10.0, 30.0]))
def test_a_host_is_out_of_reach_if_all_its_ranks_are_silent_and_else_a_rank_is_stopped(silent: set[int],
                                                                                      heartbeat_s: float) -> None:
    one = Judge(members_of([(f"host{rank // 2}", 100 + rank) for rank in range(6)]), heartbeat_s=heartbeat_s,
                patience_s=PATIENCE_S)
    one.begin(0.0)
    one.hear(0, beat(), 0.0)
    for quarter in range(1, 9):
        for rank in set(range(6)) - silent:
            one.hear(rank, beat(), quarter * heartbeat_s / 4)
    found = one.verdict(2 * heartbeat_s + 0.1)
    host = found.rank // 2
    assert found.rank == min(silent) and f"on host{host}" in found.text
    whole = {2 * host, 2 * host + 1} <= silent
    assert (f"nor any other rank on host{host}: the host is down or out of reach" in found.text) == whole
    assert found.text.endswith(": it is stopped") != whole


@given(st.integers(0, 3))
def test_of_many_that_stand_still_the_one_that_does_not_wait_is_named(culprit: int) -> None:
    one = judge(4)
    beats = {f"r{rank}": beat(waiting=rank != culprit) for rank in range(4)}
    for second in range(int(2 * HEARTBEAT_S) + 2):
        speak(one, float(second), **beats)
    found = one.verdict(2 * HEARTBEAT_S + 1.5)
    assert found.rank == culprit and not found.silent and "has not moved" in found.text


@given(st.permutations([50, 51, 52, 53]))
def test_of_many_that_wait_the_one_that_is_behind_is_named(moves: list[int]) -> None:
    one = judge(4)
    for second in range(int(2 * HEARTBEAT_S) + 2):
        speak(one, float(second), **{f"r{rank}": beat(moves=moves[rank], waiting=True) for rank in range(4)})
    assert one.verdict(2 * HEARTBEAT_S + 1.5).rank == moves.index(50)


@pytest.mark.parametrize("said", [beat(settled=False), beat(phase="saving")])
def test_before_the_first_step_and_while_saving_standing_still_is_no_hang(said: Beat) -> None:
    one = judge(2)
    for second in range(int(PATIENCE_S) - 1):
        speak(one, float(second), r0=said, r1=said)
        assert one.verdict(float(second)) is None
    speak(one, PATIENCE_S + 1, r0=said, r1=said)
    assert one.verdict(PATIENCE_S + 1) is not None


@given(st.integers(0, 3), st.integers(0, 200))
def test_the_rank_whose_digest_differs_is_named(odd: int, step: int) -> None:
    one = judge(4)
    for rank in range(4):
        assert one.verdict(1.0) is None
        one.hear(rank, beat(digests=((step, 7), (step + 1, 8 + (rank == odd)))), 1.0)
    found = one.verdict(1.0)
    assert found.rank == odd and f"after step {step + 1}" in found.text


def test_before_its_first_step_a_rank_may_be_silent_for_longer() -> None:
    one = judge(2)
    for second in range(int(STARTING_S) + 1):
        assert one.verdict(float(second)) is None
        speak(one, float(second), r0=beat(settled=False, moves=second))
    assert one.verdict(STARTING_S + 1).rank == 1


def test_digests_of_different_steps_are_not_compared() -> None:
    one = judge(2)
    speak(one, 1.0, r0=beat(digests=((1, 7),)), r1=beat(digests=((2, 8),)))
    assert one.verdict(1.0) is None


# Its parts


def test_a_digest_sees_every_bit() -> None:
    weights = [torch.randn(5, 7), torch.randn(3).bfloat16(), torch.empty(0)]
    whole = watch.digest_of(1.5, True, [3, 4], weights)
    assert whole == watch.digest_of(1.5, True, [3, 4], [weight.clone() for weight in weights])
    assert whole != watch.digest_of(1.5, False, [3, 4], weights)
    assert whole != watch.digest_of(math.nextafter(1.5, 2), True, [3, 4], weights)
    assert whole != watch.digest_of(1.5, True, [3, 5], weights)
    flipped = [weight.clone() for weight in weights]
    flipped[0].view(torch.int32)[2, 3] ^= 1
    assert whole != watch.digest_of(1.5, True, [3, 4], flipped)


def test_not_a_number_is_equal_to_itself() -> None:
    nan = struct.unpack("<d", struct.pack("<d", math.nan))[0]
    assert watch.digest_of(math.nan, False, []) == watch.digest_of(nan, False, [])


def test_an_error_of_a_collective_is_a_consequence_and_no_other_is() -> None:
    assert watch.out_of_a_collective(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"))
    try:
        torch.distributed.all_reduce(torch.zeros(1))
    except ValueError as error:
        assert watch.out_of_a_collective(error)
    try:
        torch.zeros(2) @ torch.zeros(3)
    except RuntimeError as error:
        assert not watch.out_of_a_collective(error)


@pytest.mark.parametrize("error", [ConfigError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_one_rank_is_not_watched_and_its_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), watch.watching(Clock(), Group(), heartbeat_s=1.0) as alone:
        assert type(alone) is watch.NullWatch
        raise error


# Real jobs

ENDLESS = "train.total_steps=100000", "train.heartbeat_s=4"  # a loaded machine must not be taken for a silent rank
HURT = {  # name: (rank, signal or sabotage, what is said, exit codes)
    "kill": (1, signal.SIGKILL, "died without a word", [1, -9]),
    "kill rank 0": (0, signal.SIGKILL, "died without a word", [-9, 1]),
    "stop": (1, signal.SIGSTOP, "has not been heard of", [1, -9]),
    "raise": (1, small_job.raise_, "phase data, raised RuntimeError: an error of one rank alone", [1, 1]),
    "hang": (1, small_job.hang, "phase data, has not moved", [1, 1]),
    "diverge": (1, small_job.diverge, "diverges: after step 4", [1, 1]),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_job.write_text(tmp_path_factory.mktemp("watch") / "text")


@pytest.mark.parametrize("name", HURT)
def test_a_job_that_is_hurt_ends_and_names_the_rank(tmp_path: Path, text: Path, name: str) -> None:
    rank, how, what, codes = HURT[name]
    sabotage = {} if isinstance(how, signal.Signals) else {rank: how}
    with Job(tmp_path, text, *ENDLESS, sabotage=sabotage) as job:
        job.until_step(3)
        if not sabotage:
            job.send(rank, how)
        assert job.end() == codes
        assert not any(psutil.pid_exists(process.pid) for process in job.processes)
    for other, code in enumerate(codes):
        if code == 1:
            verdicts = [line for line in job.log(other).splitlines() if "this job ends" in line]
            assert len(verdicts) == 1 and verdicts[0] in job.said(other)
            for words in (f"rank {other} step ", f"rank {rank} on {os.uname().nodename}", "at step ", ", phase ", what):
                assert words in verdicts[0]
            assert all(words in job.log(other) for words in ("Current thread", "lmcode/train/loop.py")), "the stacks"


def test_a_job_that_ends_well_is_not_disturbed_and_logs_by_rank(tmp_path: Path, text: Path) -> None:
    with Job(tmp_path, text, "train.total_steps=3") as job:
        assert job.end() == [0, 0]
    assert "this job ends" not in job.said(0) + job.said(1)
    assert job.log(0).count(" rank 0 step 2] INFO step 2/3") == 1
    assert " rank 1 step 3] INFO held-out loss" in job.log(1) and "held-out" not in job.said(1)


def test_a_pause_of_the_whole_job_is_nobodys_fault(tmp_path: Path, text: Path) -> None:
    with Job(tmp_path, text, *ENDLESS) as job:
        job.until_step(3)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in (0, 1):
                job.send(rank, number)
            time.sleep(10 if number == signal.SIGSTOP else 3)  # the limit is 8 s
        assert all(process.is_alive() for process in job.processes)
