"""Which rank caused a job to fail: pure functions of what the ranks reported and when.

There is no clock, socket or thread in here; `watch` has those. A rank that died or raised is blamed at once; a rank that
sends nothing, or whose main thread makes no progress, after two heartbeats; and if several make no progress, the one that
does not merely wait for the others in a collective. An exception that a collective raises is a consequence of another
failure, so the verdict waits for the cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

UNHURRIED = ("preparing", "saving")  # phases that may take as long as the first step without a sign of progress
STARTING_S = 300.0  # how long a rank may be silent before its first step: loading libraries holds up all its threads
CAUSE_S = 3.0  # how long a consequence waits for its cause to be heard of
QUIET_S = 5.0  # a rank that missed this many seconds of beats is more suspect than one that talks
KEPT_STEPS = 256  # digests of so many steps are compared


class Beat(NamedTuple):
    """What a rank says of itself every second.

    step: steps behind it.
    moves: grows whenever its main thread enters or leaves a phase or a collective.
    waiting: whether its main thread is inside a collective.
    settled: whether this process has finished a step; before that, compilation and data preparation take long.
    digests: (step, number) for the steps since the last beat; equal on ranks that agree.
    """

    step: int
    phase: str
    moves: int = 0
    waiting: bool = False
    settled: bool = False
    digests: tuple[tuple[int, int], ...] = ()


@dataclass
class Member:
    """One rank: who it is and what was last heard of it, in seconds of the caller's clock."""

    rank: int
    host: str
    pid: int
    beat: Beat = Beat(0, "preparing")
    heard: float = 0.0
    moved: float = 0.0
    left: str | None = None  # why it ended, if it said goodbye; "" if it just finished

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def place(self) -> str:
        return f"last heard of at step {self.beat.step}, phase {self.beat.phase}"


class Verdict(NamedTuple):
    """The rank to blame, and the line that every rank logs; `silent` if it cannot hear that it is to end."""

    rank: int
    text: str
    silent: bool = False


@dataclass
class Judge:
    """Hears what ranks say and names the one to blame, once there is one.

    Args:
        members: the ranks that are judged, by rank.
        heartbeat_s: a rank may be silent or stand still for two of these.
        patience_s: how long it may stand still before its first step, and in phases without progress to see.
        settled: whether any rank has finished a step, which takes all of them.
    """

    members: dict[int, Member]
    heartbeat_s: float
    patience_s: float
    settled: bool = False
    _digests: dict[int, dict[int, int]] = field(default_factory=dict)  # step -> rank -> digest
    _cause: Verdict | None = None
    _consequence: tuple[float, Verdict] | None = None

    def begin(self, now: float) -> None:
        """Everybody was heard of and moved just now: at the start, or after this process itself was stopped for a while."""
        for member in self.members.values():
            member.heard = member.moved = now

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        """A beat of a rank."""
        member = self.members[rank]
        if (beat.step, beat.phase, beat.moves) != (member.beat.step, member.beat.phase, member.beat.moves):
            member.moved = now
        member.heard, member.beat = now, beat
        self.settled = self.settled or beat.settled
        for step, digest in beat.digests:
            self._compare(rank, step, digest)

    def _compare(self, rank: int, step: int, digest: int) -> None:
        known = self._digests.setdefault(step, {})
        known[rank] = digest
        if len(set(known.values())) > 1 and len(known) == len(self.members):
            odd = _odd_ones(known)
            doubt = " (as many: it may be they that are wrong)" if 2 * len(odd) >= len(known) else ""
            self._blame(odd[0], f"diverges: after step {step} the loss, the weights or the counters of the banks of "
                                f"rank(s) {', '.join(map(str, odd))} are not those of the others{doubt}")
        while len(self._digests) > KEPT_STEPS:
            del self._digests[min(self._digests)]

    def lost(self, rank: int) -> None:
        """The connection to a rank ended."""
        if self.members[rank].left is None:
            self._blame(rank, "died without a word")

    def raised(self, rank: int, error: str, now: float, *, consequence: bool) -> None:
        """A rank met an exception; a `consequence` came out of a collective and may be another's fault."""
        if not consequence:
            self._blame(rank, f"raised {error}")
        elif self._consequence is None:
            self._consequence = now, self._sentence(rank, f"met an error in a collective: {error}")

    def leave(self, rank: int, reason: str) -> None:
        """A rank said goodbye."""
        self.members[rank].left = reason

    def gone(self, now: float) -> Verdict | None:
        """The rank that died, raised, diverges, or has been silent for two heartbeats (before its first step: longer)."""
        for member in self._present():
            allowed = 2 * self.heartbeat_s if self.settled else max(STARTING_S, 2 * self.heartbeat_s)
            if now - member.heard > allowed:
                self._blame(member.rank, f"has not been heard of for {now - member.heard:.0f} s{self._why(member, now)}",
                            silent=True)
        return self._cause

    def _why(self, silent: Member, now: float) -> str:
        """What the other ranks on its host, if any, say about a silent one."""
        others = [member for member in self._present() if member.host == silent.host and member is not silent]
        if not others:
            return ": it is stopped, or its host is out of reach"
        if all(now - member.heard > (now - silent.heard) / 2 for member in others):
            return f", nor any other rank on {silent.host}: the host is down or out of reach"
        return ": it is stopped"

    def verdict(self, now: float) -> Verdict | None:
        """`gone`, or the rank that stands still, or the one behind which another lost its connection."""
        return self.gone(now) or self._stalled(now) or self._behind_the_consequence(now)

    def _stalled(self, now: float) -> Verdict | None:
        still = [member for member in self._present() if now - member.moved > self._limit(member)]
        if not still:
            return None
        quiet = [member for member in self._present() if now - member.heard > QUIET_S]
        busy = [member for member in self._present() if not member.beat.waiting]
        suspects = quiet or (busy if len(busy) < len(self.members) else []) or self._present()
        culprit = min(suspects, key=lambda member: (member.beat.step, member.beat.moves, member.rank))
        return self._sentence(culprit.rank, f"has not moved for {now - culprit.moved:.0f} s (raise train.heartbeat_s if it "
                                            "just takes so long)", silent=culprit in quiet)

    def _limit(self, member: Member) -> float:
        hurried = self.settled and member.beat.phase not in UNHURRIED
        return 2 * self.heartbeat_s if hurried else max(self.patience_s, 2 * self.heartbeat_s)

    def _behind_the_consequence(self, now: float) -> Verdict | None:
        if self._consequence is None or now - self._consequence[0] < CAUSE_S:
            return None
        for member in self.members.values():
            if member.left is not None:
                return self._sentence(member.rank, f"ended before the others: {member.left or 'it had finished'}")
        quiet = max(self._present(), key=lambda member: now - member.heard)
        if now - quiet.heard > QUIET_S:
            return self._sentence(quiet.rank, f"has not been heard of for {now - quiet.heard:.0f} s, and another rank lost "
                                              "its connection", silent=True)
        return self._consequence[1]

    def _present(self) -> list[Member]:
        return [member for member in self.members.values() if member.left is None]

    def _blame(self, rank: int, what: str, *, silent: bool = False) -> None:
        self._cause = self._cause or self._sentence(rank, what, silent=silent)

    def _sentence(self, rank: int, what: str, *, silent: bool = False) -> Verdict:
        member = self.members[rank]
        return Verdict(rank, f"{member}, {member.place}, {what}", silent)


def _odd_ones(digests: dict[int, int]) -> list[int]:
    """The ranks that are not of the largest party; of two equally large ones the party of the lowest rank is right."""
    def party(digest: int) -> list[int]:
        return sorted(rank for rank, other in digests.items() if other == digest)

    largest = max((party(digest) for digest in set(digests.values())), key=lambda ranks: (len(ranks), -ranks[0]))
    return sorted(set(digests) - set(largest))


def members_of(facts: Iterable[tuple[str, int]]) -> dict[int, Member]:
    """Members by rank, from the (host, pid) of each."""
    return {rank: Member(rank, host, pid) for rank, (host, pid) in enumerate(facts)}
