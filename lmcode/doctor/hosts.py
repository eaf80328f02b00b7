"""The checks over several hosts: first the report of each host, then what only several hosts can find out together.

A host that stops answering becomes one failed row; the checks continue without it.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from lmcode.doctor import compare
from lmcode.doctor.compare import Offset, Report
from lmcode.doctor.folder import SCRATCH, Space
from lmcode.doctor.link import Link
from lmcode.doctor.row import Row, guarded

STEP_S = 30.0  # for one thing that takes a moment
CLOCK_ROUNDS = 5
GATHER_BYTES, GATHERED_BYTES, GATHER_ROUNDS = 16 * 2**20, 256 * 2**20, 5  # of one host, of all, how often


def examine(link: Link, *, run_dir: Path, space: Space | None = None, master_address: str | None = None,
            master_port: int = 0) -> list[Row]:
    """All rows about the hosts of `link`: each host's own, then those that compare.

    Args:
        run_dir: where runs will be kept, the same path on all hosts.
        space: what a run's checkpoints take, if that is known.
        master_address, master_port: where ranks will meet; the first host and a free port unless given.
    """
    all_hosts = len(link.hosts)
    reports = collect(link, run_dir, space)
    rows = compare.merged(reports)
    if reports:
        rows += [*compare.version_rows(reports), compare.device_row(reports), compare.settings_row(reports)]
    if len(link.hosts) > 1:
        rows += guarded("clocks", lambda: clocks(link))
        rows += guarded("shared folder", lambda: shared_folder(link, reports))
        rows += guarded("open ports", lambda: together(link, reports, master_address, master_port))
    left = len(link.hosts)
    rows += link.rows
    return [*rows, Row("hosts", "ok" if left == all_hosts else "fail", f"{left} of {all_hosts} answered to the end")]


def collect(link: Link, run_dir: Path, space: Space | None) -> dict[str, Report]:
    """The reports of the hosts that gave one; a host that gave anything else is lost."""
    reports = {}
    said = link.ask("report", timeout_s=link.ready_s, run_dir=str(run_dir.absolute()), space=list(space) if space else None)
    for host in list(link.hosts):
        try:
            if host in said:
                reports[host] = compare.parse_report(said[host].value)
            else:
                link.drop(host, "gave no report")
        except ValueError as error:
            link.drop(host, f"gave something else than a report: {error}")
    return reports


def clocks(link: Link) -> list[Row]:
    """The clocks of the hosts, each measured beside ours from the middle of the shortest round trip."""
    best: dict[str, Offset] = {}
    for _ in range(CLOCK_ROUNDS):
        for host, answer in link.ask("clock", timeout_s=STEP_S).items():
            error = (answer.heard - answer.asked) / 2
            if host not in best or error < best[host].error_s:
                best[host] = Offset(float(answer.value) - (answer.asked + answer.heard) / 2, error)
    return [compare.clock_row(best)] if len(best) > 1 else []


def shared_folder(link: Link, reports: dict[str, Report]) -> list[Row]:
    """Every host writes a file where runs are kept, and looks for those of the others; one locks its own."""
    apart = compare.folder_rows({host: reports[host].folder for host in link.hosts})
    if apart:
        return apart
    folder, token = reports[link.hosts[0]].folder, secrets.token_hex(4)
    names = {host: f"{SCRATCH}{token}-{number}" for number, host in enumerate(link.hosts)}
    texts = {names[host]: secrets.token_hex(16) for host in link.hosts}
    put = link.ask("put", timeout_s=STEP_S, place=folder, each={
        host: {"name": name, "text": texts[name]} for host, name in names.items()})
    if len(put) < 2:
        return []
    written = {names[host]: host for host in put}
    found = link.ask("missing", timeout_s=STEP_S, place=folder, texts={name: texts[name] for name in written})
    missing = {host: [written[name] for name in answer.value] for host, answer in found.items()}
    rows = compare.sharing_rows(folder, list(put), missing)
    if any(missing.values()):
        return rows
    holder = next(iter(put))
    held = link.ask("lock", timeout_s=STEP_S, place=folder, each={holder: {"name": names[holder]}})
    if held and held[holder].value:
        tried = link.ask("lock", timeout_s=STEP_S, place=folder, each={
            host: {"name": names[holder]} for host in put if host != holder})
        rows.append(compare.shared_lock_row(holder, {host: bool(answer.value) for host, answer in tried.items()}))
    return rows


def together(link: Link, reports: dict[str, Report], address: str | None, port: int) -> list[Row]:
    """Ports between the hosts, then an all_gather over them, with one rank on each."""
    first = link.hosts[0]
    listening = link.ask("listen", timeout_s=STEP_S, each={host: {"wanted": port if host == first else 0}
                                                          for host in link.hosts})
    ports = {host: answer.value for host, answer in listening.items()}
    if first not in ports or len(ports) < 2:
        return []
    called = {host: address if host == first and address else host for host in ports}
    others = {host: [other for other in ports if other != host] for host in ports}
    said = link.ask("reach", timeout_s=STEP_S + len(ports), each={
        host: {"targets": [(called[other], ports[other]["port"]) for other in them]} for host, them in others.items()})
    rows = compare.port_rows(ports, {host: dict(zip(others[host], answer.value, strict=True))
                                     for host, answer in said.items()})
    link.ask("hang_up", timeout_s=STEP_S)
    return rows + gather(link, reports, called[first], ports[first]["port"])


def gather(link: Link, reports: dict[str, Report], address: str, port: int) -> list[Row]:
    """The speed of the all_gather between the hosts, and the interfaces that it took."""
    hosts = list(link.hosts)
    if len(hosts) < 2 or len({reports[host].devices == "CPU" for host in hosts}) > 1:
        return []  # a lost host, or different devices: there is a row about it already
    size = min(GATHER_BYTES, GATHERED_BYTES // len(hosts))
    said = link.ask("gather", timeout_s=2 * STEP_S, world=len(hosts), address=address, port=port, size=size,
                    rounds=GATHER_ROUNDS, each={host: {"rank": rank} for rank, host in enumerate(hosts)}, give_up_s=STEP_S)
    return compare.gather_rows({host: answer.value for host, answer in said.items()}, size, hosts,
                               {host: reports[host].address for host in hosts})
