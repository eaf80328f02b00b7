"""From the answers of several hosts to rows: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from lmcode.doctor.row import Row, State, from_dict, listed
from lmcode.jobs import network

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0
SLOW_GB_S = 0.1  # about 1 Gbit/s


class Report(NamedTuple):
    """What one host says of itself; see `Agent.report`."""

    rows: list[Row]
    facts: dict[str, str]
    settings: dict[str, str]
    folder: str
    devices: str
    address: str


class Offset(NamedTuple):
    """A host's clock beside ours: seconds ahead, and how wrong that may be."""

    ahead_s: float
    error_s: float


def parse_report(value: Any) -> Report:
    """A report from JSON values.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a report is an object: got {str(value)[:80]!r}")
    for key in ("facts", "settings"):
        if not _is_table_of_texts(value.get(key)):
            raise ValueError(f"a report's {key} are texts by name: got {str(value.get(key))[:80]!r}")
    texts = [value.get(key) for key in ("folder", "devices", "address")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a report's folder, devices and address are texts")
    if not isinstance(value.get("rows"), list):
        raise ValueError("a report's rows are a list")
    return Report([from_dict(row) for row in value["rows"]], value["facts"], value["settings"],
                  value["folder"], value["devices"], value["address"])


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def merged(reports: Mapping[str, Report]) -> list[Row]:
    """The rows of all hosts, in the order in which they come up; hosts that say the same share a row."""
    hosts_of: dict[str, dict[Row, list[str]]] = {}
    for host, report in reports.items():
        for row in report.rows:
            hosts_of.setdefault(row.name, {}).setdefault(row, []).append(host)
    return [row if len(hosts) == len(reports) > 1 else row._replace(hosts=tuple(hosts))
            for rows in hosts_of.values() for row, hosts in rows.items()]


def by_value(values: Mapping[str, str]) -> str:
    """'2.13.0 on n0, n1; 2.12.1 on n2', the most frequent first."""
    hosts_of: dict[str, list[str]] = {}
    for host, value in values.items():
        hosts_of.setdefault(value, []).append(host)
    return "; ".join(f"{value} on {listed(hosts)}" for value, hosts in
                     sorted(hosts_of.items(), key=lambda item: -len(item[1])))


def version_rows(reports: Mapping[str, Report]) -> list[Row]:
    """One row if all facts are equal on all hosts, else one for each that is not."""
    names = list(dict.fromkeys(name for report in reports.values() for name in report.facts))
    said = {name: {host: report.facts.get(name, "nothing") for host, report in reports.items()} for name in names}
    rows = [Row("same versions", "fail", f"{name}: {by_value(values)}") for name, values in said.items()
            if len(set(values.values())) > 1]
    same = ", ".join(f"{name} {next(iter(values.values()))}" for name, values in said.items())
    return rows or [Row("same versions", "ok", same)]


def device_row(reports: Mapping[str, Report]) -> Row:
    """Ranks on a GPU and ranks on a CPU cannot talk; other differences make the slowest host the pace of all."""
    devices = {host: report.devices for host, report in reports.items()}
    if len(set(devices.values())) == 1:
        return Row("same devices", "ok", next(iter(devices.values())))
    return Row("same devices", "fail" if "CPU" in devices.values() else "warn", by_value(devices))


def settings_row(reports: Mapping[str, Report]) -> Row:
    """What is set on the hosts; differences that are no host's own business are warned of."""
    places = [network.RankNetwork(host, report.settings) for host, report in reports.items()]
    found = network.differences(places, list(reports))
    if found:
        return Row("network settings", "warn", "; ".join(found))
    alike = " ".join(f"{name}={value}" for name, value in places[0].settings.items() if name not in network.OF_A_HOST)
    own = "; ".join(" ".join([place.host, *(f"{name}={place.settings[name]}" for name in network.OF_A_HOST
                                            if name in place.settings)]) for place in places
                    if any(name in place.settings for name in network.OF_A_HOST))
    return Row("network settings", "ok", "; ".join(text for text in (alike, own) if text) or "nothing is set")


def clock_row(offsets: Mapping[str, Offset]) -> Row:
    """The two clocks that are furthest apart. What the measurement may have wrong counts in their favour."""
    last = max(offsets, key=lambda host: offsets[host].ahead_s)
    first = min(offsets, key=lambda host: offsets[host].ahead_s)
    skew, error = offsets[last].ahead_s - offsets[first].ahead_s, offsets[last].error_s + offsets[first].error_s
    state: State = "fail" if skew - error > SKEW_FAIL_S else "warn" if skew - error > SKEW_WARN_S else "ok"
    said = "equal" if skew == 0 else f"{last} is {skew:.3f} s (+- {error:.3f}) ahead of {first}"
    return Row("clocks", state, said + ("" if state == "ok" else "; files and logs will seem out of order: use NTP"))


def port_rows(ports: Mapping[str, Mapping[str, Any]], problems: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Whether every host's port can be reached from all others.

    Args:
        ports: by host, what `Agent.listen` said; the first host's is the port of the rendezvous.
        problems: by host, and by the host that it tried to reach, what was wrong; '' for nothing.
    """
    first = next(iter(ports))
    rows = [Row("open ports", "fail", str(found["problem"]), (host,)) for host, found in ports.items() if found["problem"]]
    for host, tried in problems.items():
        bad = {other: text for other, text in tried.items() if text}
        if bad:
            rows.append(Row("open ports", "fail", "; ".join(f"cannot reach {other}:{ports[other]['port']}: {text}"
                                                            for other, text in list(bad.items())[:3])
                            + (f"; and {len(bad) - 3} more" if len(bad) > 3 else ""), (host,)))
    return rows or [Row("open ports", "ok", f"port {ports[first]['port']} of {first}, and a free one of every other host, "
                                            "can be reached from all others")]


def folder_rows(folders: Mapping[str, str]) -> list[Row]:
    """A failed row if the hosts do not have the same part of the run folder's path."""
    if len(set(folders.values())) == 1:
        return []
    return [Row("shared folder", "fail", f"the run folder's path goes on differently: {by_value(folders)}")]


def sharing_rows(folder: str, writers: Sequence[str], missing: Mapping[str, Sequence[str]]) -> list[Row]:
    """Whether each host sees what the others wrote.

    Args:
        missing: by host, those of the `writers` whose files it did not find, or not as they were written.
    """
    rows = [Row("shared folder", "fail", f"does not see what {listed(others)} wrote in {folder}: not a file system that "
                                         "the hosts share", (host,)) for host, others in missing.items() if others]
    return rows or [Row("shared folder", "ok", f"{folder}: each of {len(writers)} hosts sees what the others write")]


def shared_lock_row(holder: str, others: Mapping[str, bool]) -> Row:
    """Whether the lock that one host holds keeps the others out; by host, if it got the lock as well."""
    got = [host for host, taken in others.items() if taken]
    if got:
        return Row("locks between hosts", "warn", f"{listed(got)} got a lock that {holder} holds: two jobs could write "
                                                  "into one run folder unnoticed")
    return Row("locks between hosts", "ok", f"a lock that {holder} holds is refused elsewhere")


def gather_rows(found: Mapping[str, Mapping[str, Any]], size: int, hosts: Sequence[str],
                choices: Mapping[str, str]) -> list[Row]:
    """The interfaces in use, and the speed of the all_gather of `size` bytes over them.

    Args:
        found: by host, what `Agent.gather` said; not all hosts if it failed.
        choices: by host, the address that gloo would choose, for the hosts that could not join.
    """
    if len(found) < len(hosts):
        loop = [host for host in hosts if network.is_loopback(choices[host].split(" ")[-1])]
        hint = f"; {listed(loop)} would listen on a loopback address: set GLOO_SOCKET_IFNAME" if loop else ""
        return [Row("interface", "fail" if loop else "warn", by_host(choices, hosts) + hint),
                Row("all_gather", "fail", f"{len(hosts) - len(found)} of {len(hosts)} hosts did not finish")]
    used = {host: " and ".join(one["addresses"]) or choices[host] for host, one in found.items()}
    wrong = tuple(host for host, one in found.items() if not one["right"])
    if wrong:
        return [Row("interface", "ok", by_host(used, hosts)),
                Row("all_gather", "fail", "other bytes arrived than were sent", wrong)]
    seconds = max(median(one["seconds"]) for one in found.values())
    rate = (len(hosts) - 1) * size / seconds / 1e9
    return [Row("interface", "ok", by_host(used, hosts)),
            Row("all_gather", "ok" if rate >= SLOW_GB_S else "warn",
                f"{rate:.2f} GB/s received by each host ({len(hosts)} hosts, {size / 2**20:.0f} MiB of each, "
                f"{1000 * seconds:.1f} ms)")]


def by_host(values: Mapping[str, str], hosts: Sequence[str]) -> str:
    """'n0 left0 10.0.0.1, n1 right0 10.0.0.2'."""
    return listed([f"{host} {values[host]}" for host in hosts])
