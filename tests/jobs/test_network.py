"""What a run says of its network: everything that is set and nothing else; ranks that differ are named, and only they."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcode.jobs import network
from lmcode.jobs.network import OF_A_HOST, RankNetwork

NAMES = st.sampled_from(["GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT",
                         "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"])
OTHERS = st.sampled_from(["PATH", "HOME", "XNCCL_DEBUG", "OMP_NUM_THREADS_", "MASTER", "gloo_socket_ifname"])
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
SETTINGS = st.dictionaries(NAMES, TEXTS, max_size=5)


@given(SETTINGS, st.dictionaries(OTHERS, TEXTS, max_size=4))
def test_one_line_holds_every_variable_that_is_set_and_no_other(wanted: dict[str, str], others: dict[str, str]) -> None:
    assert network.settings({**wanted, **others}) == wanted
    line = network.describe([RankNetwork("n0", network.settings({**others, **wanted}))])
    assert "\n" not in line and line.startswith("network: ")
    if not wanted:
        assert line == "network: nothing is set"
    elif not any("\n" in value for value in wanted.values()):
        said = dict(word.split("=", 1) for word in shlex.split(line.removeprefix("network: ")))
        assert said == wanted


@given(st.lists(st.tuples(st.sampled_from(["n0", "n1"]), SETTINGS), min_size=1, max_size=6))
def test_a_difference_is_said_exactly_where_there_is_one(ranks: list[tuple[str, dict[str, str]]]) -> None:
    places = [RankNetwork(host, settings) for host, settings in ranks]
    found = {text.split(" is ")[0]: text for text in network.differences(places, [str(rank) for rank in range(len(places))])}
    for name in {name for _, settings in ranks for name in settings}:
        values = [settings.get(name) for _, settings in ranks]
        on_host = {host: {settings.get(name) for other, settings in ranks if other == host} for host, _ in ranks}
        host_matter = name in OF_A_HOST and None not in values and all(len(them) == 1 for them in on_host.values())
        assert (name in found) == (len(set(values)) > 1 and not host_matter)
    assert set(found) <= {name for _, settings in ranks for name in settings}


def test_the_ranks_of_a_difference_are_called_by_ranges() -> None:
    one = {"OMP_NUM_THREADS": "1"}
    places = [RankNetwork("n0", one)] * 3 + [RankNetwork("n1", {}), RankNetwork("n1", one)]
    assert network.differences(places, list("01234"), noun="ranks") == [
        "OMP_NUM_THREADS is 1 on ranks 0-2, 4 and unset on ranks 3"]


@given(st.sets(st.integers(0, 40)))
def test_ranges_hold_the_same_numbers(numbers: set[int]) -> None:
    back = set()
    for part in filter(None, network.ranges(str(number) for number in sorted(numbers)).split(", ")):
        first, _, last = part.partition("-")
        back |= set(range(int(first), int(last or first) + 1))
    assert back == numbers


def test_many_hosts_are_counted_and_not_all_named() -> None:
    line = network.describe([RankNetwork(f"n{at}", {}, (f"eth0 10.0.0.{at}",)) for at in range(100)])
    assert "n0 eth0 10.0.0.0, n1" in line and line.endswith("and 92 more") and len(line) < 400


def test_gloo_uses_the_interface_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: {"10.1.2.3": "left0", "127.0.0.1": "lo"})
    assert network.gloo_choice({"GLOO_SOCKET_IFNAME": "left0,lo"}) == "10.1.2.3"
    assert network.named("10.1.2.3") == "left0 10.1.2.3" and network.named("10.9.9.9") == "10.9.9.9"
    with pytest.raises(OSError, match="'right0'"):
        network.gloo_choice({"GLOO_SOCKET_IFNAME": "right0"})
