"""What decides how ranks reach each other: the variables that are set, and the addresses that are used.

Nothing is set in here. The functions that compare ranks are pure; `announce` logs the result when a training run starts.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lmcode.dist import Group

log = logging.getLogger("lmcode")

PREFIXES = ("GLOO_", "NCCL_", "MASTER_")
NAMES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# Variables that may differ between hosts, since they name a device of the host.
OF_A_HOST = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "CUDA_VISIBLE_DEVICES")
SHOWN_HOSTS = 8
UNKNOWN = "an unknown address (NCCL_DEBUG=INFO makes NCCL say its own)"


class RankNetwork(NamedTuple):
    """One rank's side of the network: its host, what is set there, and the addresses it listens on ('left0 10.0.0.1')."""

    host: str
    settings: Mapping[str, str]
    addresses: tuple[str, ...] = ()


def settings(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that decide how ranks reach each other and what they compute with, by name."""
    return {name: env[name] for name in sorted(env) if name.startswith(PREFIXES) or name in NAMES}


def describe(places: Sequence[RankNetwork]) -> str:
    """One line about all ranks: what is set on rank 0, and the addresses in use on each host."""
    listed = " ".join(f"{name}={shlex.quote(value)}" for name, value in places[0].settings.items()).replace("\n", " ")
    used = {place.host: place.addresses for place in reversed(places)}  # a host's first rank speaks for it
    hosts = [f"{host} {' and '.join(used[host]) or UNKNOWN}" for host in dict.fromkeys(
        place.host for place in places)]
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    reached = f"; ranks listen: {', '.join(hosts[:SHOWN_HOSTS])}{more}" if len(places) > 1 else ""
    return f"network: {listed or 'nothing is set'}{reached}"


def differences(places: Sequence[RankNetwork], names: Sequence[str], *, noun: str = "") -> list[str]:
    """How the places differ in what is set, one text per variable; none if they agree.

    Variables that name a device of a host (`OF_A_HOST`) may differ between hosts, but must be set on all of them or on none.

    Args:
        names: what to call each place; neighbours that agree are called by ranges if these are numbers.
        noun: goes before the names, such as "ranks".
    """
    texts = []
    for variable in sorted({name for place in places for name in place.settings}):
        called: dict[str | None, list[str]] = {}
        for place, name in zip(places, names, strict=True):
            called.setdefault(place.settings.get(variable), []).append(name)
        per_host = {place.host: place.settings.get(variable) for place in places}
        one_each = None not in called and all(per_host[place.host] == place.settings.get(variable) for place in places)
        if len(called) > 1 and not (variable in OF_A_HOST and one_each):
            texts.append(f"{variable} is " + " and ".join(
                f"{'unset' if value is None else shlex.quote(value)} on {noun} {ranges(them)}".replace("  ", " ")
                for value, them in called.items()))
    return texts


def ranges(names: Iterable[str]) -> str:
    """'0-3, 7' for numbers that ascend; other names as they are."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name.isdigit() and runs[-1][-1].isdigit() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def announce(group: Group) -> None:
    """Rank 0 logs what is in effect, and a warning if ranks differ in it. A collective."""
    here = RankNetwork(socket.gethostname(), settings(os.environ), tuple(listening()) if group.size > 1 else ())
    places = [RankNetwork(*place) for place in group.all_gather_object(tuple(here))]
    if group.rank == 0:
        log.info("%s", describe(places))
        found = differences(places, [str(rank) for rank in range(group.size)], noun="ranks")
        if found:
            log.warning("ranks differ in what is set: %s", "; ".join(found))


def interfaces() -> dict[str, str]:
    """The name of the interface by IPv4 address, of those that are up."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {address.address: name for name, addresses in psutil.net_if_addrs().items() if name in up
            for address in addresses if address.family == socket.AF_INET}


def is_loopback(address: str) -> bool:
    """Whether no other host can mean this one by `address`."""
    return address.startswith("127.") or address == "::1"


def named(address: str) -> str:
    """'left0 10.0.0.1': an address of this host after its interface; alone if that is not known."""
    name = interfaces().get(address)
    return f"{name} {address}" if name else address


def listening() -> list[str]:
    """The addresses on which this process accepts connections, without the wildcards (0.0.0.0, ::). After the first
    collective these are the addresses of gloo (or NCCL)."""
    import psutil

    process = psutil.Process()
    try:
        found = (getattr(process, "net_connections", None) or process.connections)(kind="tcp")  # its name before psutil 6
    except psutil.Error:
        return []
    addresses = {one.laddr.ip.removeprefix("::ffff:") for one in found if one.status == psutil.CONN_LISTEN}
    return [named(address) for address in sorted(addresses - {"0.0.0.0", "::", ""})]


def gloo_choice(env: Mapping[str, str]) -> str:
    """The address that gloo will use here: that of GLOO_SOCKET_IFNAME, else the one that the host's name resolves to.

    Raises:
        OSError: if there is no such interface, or the name does not resolve.
    """
    wanted = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not wanted:
        return socket.gethostbyname(socket.gethostname())
    found = [address for address, name in interfaces().items() if name == wanted]
    if not found:
        raise OSError(f"GLOO_SOCKET_IFNAME is '{wanted}', and no interface of that name has an IPv4 address here")
    return found[0]
