"""The doctor on several hosts: rows follow from what the hosts say, whoever fails is named, and nobody is waited for long.

ssh, srun, scontrol and salloc are scripts on PATH. Behind most of them stands an agent that only plays one, so that it can
lie; one test has the real agents, two on this machine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcode.cli import command as cli
from lmcode.doctor import agent, compare, facts
from lmcode.doctor.compare import Offset, Report
from lmcode.doctor.row import Row, exit_code, to_dict

# An agent whose behaviour is in its host's name. No import but of what starts at once.
PLAYER = f"""
import json, sys, time
host = sys.argv[1]
report = {{"rows": [{{"name": "free space", "state": "ok", "detail": "9 GiB"}},
                    {{"name": "host name", "state": "ok", "detail": host}}],
           "facts": {{"python": "3.11.2", "torch": "2.12.1" if host == "other" else "2.13.0", "lmcode": "abc"}},
           "settings": {{"NCCL_DEBUG": "INFO"}} if host == "chatty" else {{}}, "address": "eth0 10.0.0.1",
           "folder": "/data" if host == "apart" else "/data/runs", "devices": "8 x H100" if host == "gpu" else "CPU"}}
def answer(do, request):
    if do == "report":
        return 17 if host == "liar" else report
    if do == "clock":
        return time.time() + {{"late": 100, "slow": 5}}.get(host, 0)
    if do == "listen":
        busy = host == "busy" and request["wanted"]
        return {{"port": 4242, "problem": f"port {{request['wanted']}} cannot be opened" if busy else ""}}
    if do == "reach":
        return ["timed out" if host == "walled" else "" for _ in request["targets"]]
    if do == "missing":
        return sorted(request["texts"])[:1] if host == "blind" else []
    if do == "lock":
        return host in ("n0", "thief")
    if do == "gather":
        return {{"seconds": [9.0, 0.01, 0.02], "addresses": ["eth0 10.0.0.1"], "right": host != "wrong"}}
    return True
print("Welcome to", host, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if host == "brief" and do == "put" or host == "gone" and do == "clock":
        sys.exit("it went away")
    if host == "mute":
        time.sleep(1000)
    if host == "garbled":
        print("{agent.MARK}{{not json", flush=True)
    elif host == "unable" and do == "put":
        print("{agent.MARK}" + json.dumps({{"problem": "OSError: read-only file system"}}), flush=True)
    else:
        print("{agent.MARK}" + json.dumps({{"value": answer(do, request)}}), flush=True)
"""
SSH = """
host="${@: -2:1}"
case "$host" in
    dead) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255 ;;
    garbage) echo "This account is not available"; exit 0 ;;
    endless) exec yes ;;
    localhost | 127.0.0.1) exec bash -c "${@: -1}" ;;
esac
"""


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins, first on PATH; no launcher around."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "player.py").write_text(PLAYER)
    play = f'exec "{sys.executable}" -S -E {tools}/player.py'
    stand_in(tools, "ssh", f'echo "$@" >>{tmp_path}/said\n{SSH}\n{play} "$host"')
    stand_in(tools, "srun", f'echo "$@" >>{tmp_path}/said\nfor word in "$@"; do\n'
                            f'    case "$word" in --nodelist=*) {play} "${{word#*=}}" ;; esac\ndone')
    stand_in(tools, "scontrol", 'tr "," "\\n" <<<"${@: -1}"')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in (*agent.LAUNCHERS, "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "GLOO_SOCKET_IFNAME", "LMCODE_MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def examine(bed: Path, capsys: pytest.CaptureFixture[str], *hosts: str, timeout: str = "900") -> tuple[int, list[dict]]:
    """The exit code and the rows of `lmcode doctor --hostfile` over these hosts."""
    (bed / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    code = cli.main(["doctor", "--hostfile", str(bed / "hosts"), "--json", "--timeout", timeout])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ok"] else 1)
    return code, report["checks"]


def failed(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows if row["state"] == "fail"}


def test_hosts_that_agree_are_compared_in_every_way(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = examine(bed, capsys, "n0", "n1", "n2")
    assert code == 0
    found = {row["name"]: row["detail"] for row in rows}
    assert list(found) == ["free space", "host name", "same versions", "same devices", "network settings", "clocks",
                           "shared folder", "locks between hosts", "open ports", "interface", "all_gather", "hosts"]
    assert found["same versions"] == "python 3.11.2, torch 2.13.0, lmcode abc"
    assert found["all_gather"].startswith("1.68 GB/s"), "two others' 16 MiB in the median of the rounds, 20 ms"
    assert [row["hosts"] for row in rows if row["name"] == "host name"] == [["n0"], ["n1"], ["n2"]]


@pytest.mark.parametrize(("host", "name", "state", "text"), [
    ("other", "same versions", "fail", "torch: 2.13.0 on n0, n1; 2.12.1 on other"),
    ("gpu", "same devices", "fail", "8 x H100 on gpu"),
    ("chatty", "network settings", "warn", "NCCL_DEBUG is unset on n0, n1 and INFO on chatty"),
    ("late", "clocks", "fail", "late is 100."), ("slow", "clocks", "warn", "slow is 5.0"),
    ("apart", "shared folder", "fail", "/data on apart"), ("blind", "shared folder", "fail", "does not see what n0 wrote"),
    ("thief", "locks between hosts", "warn", "thief got a lock"),
    ("walled", "open ports", "fail", "cannot reach n0:4242: timed out"),
    ("wrong", "all_gather", "fail", "other bytes arrived"),
    ("unable", "shared folder", "fail", "read-only file system"), ("brief", "host", "fail", "it went away"),
    ("gone", "host", "fail", "it went away"), ("liar", "host", "fail", "a report is an object: got '17'"),
    ("garbled", "host", "fail", "none of the doctor's words"), ("dead", "host", "fail", "No route to host"),
    ("garbage", "host", "fail", "answers 'This account is not available' instead of a report")])
def test_a_host_that_differs_or_fails_is_named_and_the_others_go_on(
        bed: Path, capsys: pytest.CaptureFixture[str], host: str, name: str, state: str, text: str) -> None:
    code, rows = examine(bed, capsys, "n0", "n1", host)
    row = next(row for row in rows if row["name"] == name and row["state"] == state)
    assert text in row["detail"] and host in row["detail"] + " ".join(row.get("hosts", ()))
    assert code == int(state == "fail")
    lost = {"brief", "gone", "liar", "garbled", "dead", "garbage"}
    assert rows[-1]["detail"] == f"{2 if host in lost else 3} of 3 answered to the end"
    if host in lost:
        assert set(failed(rows)) == {"host", "hosts"}, "what the others can do without it was done"
        assert any(row["name"] == "all_gather" and row["state"] == "ok" for row in rows)


@pytest.mark.parametrize("host", ["mute", "endless"])
def test_nobody_is_waited_for_longer_than_the_timeout(bed: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:
    code, rows = examine(bed, capsys, "n0", host, timeout="1")
    said = [row["detail"] for row in rows if row["state"] == "fail" and row.get("hosts") == [host]]
    assert code == 1 and len(said) == 1 and "has not answered for 1 s (to 'report')" in said[0]


def test_all_hosts_may_be_dead(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = examine(bed, capsys, "dead")
    assert code == 1 and [row["name"] for row in rows] == ["host", "hosts"]


def test_the_port_of_the_rendezvous_is_the_one_that_is_tried(bed: Path, capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "port 29500 cannot be opened" in failed(examine(bed, capsys, "busy", "n1")[1])["open ports"]["detail"]
    assert examine(bed, capsys, "n0", "busy")[0] == 0, "only the first host is asked for that port"


def test_over_ssh_goes_what_a_job_would_get(bed: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "it's; on")
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    examine(bed, capsys, "n0")
    said = (bed / "said").read_text()
    assert "BatchMode=yes" in said and "'NCCL_DEBUG=it'\"'\"'s; on'" in said and "s3cret" not in said


def test_srun_reaches_every_host_of_the_job_around(bed: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0,n1")
    assert cli.main(["doctor", "--srun"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-2].endswith("2 of 2 answered to the end") and table[-1] == "13 ok, 0 warn, 0 fail"
    said = (bed / "said").read_text().splitlines()
    assert len(said) == 2 and all("--overlap --nodes=1 --ntasks=1" in line for line in said)


def test_outside_of_a_job_one_is_made_that_runs_the_same_command(bed: Path) -> None:
    stand_in(bed / "bin", "salloc", f'printf "%s\\n" "$@" >{bed}/words; exit 1')
    (bed / "my.yaml").write_text("preset: tiny\n")
    given = ["doctor", "--srun", "--nodes", "2", "--json", "--run-dir", "/data/my runs", "--timeout", "7", "--config",
             str(bed / "my.yaml")]
    assert cli.main(given) == 1, "its exit code is ours"
    words = (bed / "words").read_text().splitlines()
    assert {"--nodes=2", "--ntasks-per-node=1"} < set(words)
    inner = words[words.index(sys.executable):]
    assert inner[1:3] == ["-m", "lmcode"]
    assert {**vars(cli.parse(inner[3:])), "nodes": 2, "parser": None} == {**vars(cli.parse(given)), "parser": None}


@pytest.mark.parametrize(("words", "message"), [
    (["--nodes", "2"], "--nodes goes with --srun"), (["--srun"], "--srun needs --nodes N"),
    (["--srun", "--hostfile", "x"], "not allowed with"), (["--hostfile", "none"], "there is no hostfile 'none'"),
    (["--srun", "--nodes", "0"], "1 or more"), (["--preset", "tinny"], "Did you mean 'tiny'")])
def test_what_cannot_work_is_bad_usage(bed: Path, capsys: pytest.CaptureFixture[str], words: list[str],
                                       message: str) -> None:
    assert cli.main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_without_ssh_or_slurm_the_missing_program_is_named(bed: Path, capsys: pytest.CaptureFixture[str],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (bed / "hosts").write_text("n0 slots=1\n")
    monkeypatch.setenv("PATH", "")
    for words, program in ((["--hostfile", str(bed / "hosts")], "ssh"), (["--srun", "--nodes", "1"], "salloc")):
        assert cli.main(["doctor", *words]) == 2
        assert f"there is no {program} on this machine" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "many")
    assert cli.main(["doctor", "--hostfile", str(bed / "hosts")]) == 2


def test_the_doctor_of_several_hosts_is_started_once(bed: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", "--hostfile", "hosts"]) == 2
    assert "without a launcher" in capsys.readouterr().err


def test_real_agents_find_each_other(bed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (bed / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    runs = bed / "data" / "runs"
    runs.parent.mkdir()
    cli.main(["doctor", "--hostfile", str(bed / "hosts"), "--json", "--run-dir", str(runs), "--preset", "tiny"])
    rows = json.loads(capsys.readouterr().out)["checks"]
    found = {row["name"]: row for row in rows}
    for name in ("collectives", "same versions", "same devices", "clocks", "shared folder", "locks between hosts",
                 "open ports", "interface", "all_gather", "hosts"):
        assert found[name]["state"] in ("ok", "warn"), found[name]
    assert facts.source_hash() in found["same versions"]["detail"]
    assert found["network settings"]["detail"] == "OMP_NUM_THREADS=1"
    assert "GB/s received by each host (2 hosts, 16 MiB of each" in found["all_gather"]["detail"]
    assert str(runs.parent) in found["shared folder"]["detail"] and "a checkpoint has" in found["free space"]["detail"]
    assert list(runs.parent.iterdir()) == [], "nothing is left behind"


# The agent's answers, without a process


def test_the_agent_answers_whatever_it_is_asked(tmp_path: Path) -> None:
    one = agent.Agent()
    for request in ({}, {"do": "close"}, {"do": "__init__"}, {"do": "put"}, {"do": "reach"}, {"do": 3}):
        assert set(agent.answer(one, request)) == {"problem"}
    assert set(agent.answer(one, {"do": "clock"})) == {"value"}


def test_files_locks_and_ports_of_two_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SEE_S", 0.0)
    first, second = agent.Agent(), agent.Agent()
    first.put(str(tmp_path), "a", "text")
    texts = {"a": "text", "b": "text"}
    assert second.missing(str(tmp_path), texts) == ["b"] and second.missing(str(tmp_path), {"a": "other"}) == ["a"]
    assert first.lock(str(tmp_path), "a") and not second.lock(str(tmp_path), "a")
    port = first.listen(0)["port"]
    taken = second.listen(port)
    assert taken["problem"] and taken["port"] != port
    assert second.reach([("127.0.0.1", port), ("127.0.0.1", taken["port"])]) == ["", ""]
    first.close()
    assert second.reach([("127.0.0.1", port)]) != [""]
    assert list(tmp_path.iterdir()) == []
    second.close()


def test_every_source_counts_for_the_hash(tmp_path: Path) -> None:
    package = tmp_path / "lmcode"
    (package / "part").mkdir(parents=True)
    (tmp_path / "ds_configs").mkdir()
    seen = {facts.source_hash(package)}
    for name, text in (("lmcode/a.py", "1"), ("lmcode/a.py", "2"), ("lmcode/part/b.py", ""), ("ds_configs/z.json", "{}")):
        (tmp_path / name).write_text(text)
        seen.add(facts.source_hash(package))
    (package / "a.py").rename(package / "c.py")
    seen.add(facts.source_hash(package))
    (package / "a.pyc").write_text("not a source")
    assert len(seen) == 6 and facts.source_hash(package) in seen


# From answers to rows

HOSTS = st.lists(st.sampled_from([f"n{at}" for at in range(6)]), min_size=1, max_size=6, unique=True)
ROWS = st.lists(st.builds(Row, st.sampled_from("abc"), st.sampled_from(["ok", "warn", "fail"]), st.sampled_from("xyz"),
                          st.just(())),
                max_size=4, unique_by=lambda row: row.name)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["rows", "facts", "settings", "folder", "devices", "address", "name"]), inner,
                        max_size=6), max_leaves=12)


def reports(data: st.DataObject, hosts: list[str], **drawn: Any) -> dict[str, Report]:
    blank = Report([], {}, {}, "/runs", "CPU", "lo 127.0.0.1")
    return {host: blank._replace(**{name: data.draw(values) for name, values in drawn.items()}) for host in hosts}


@given(st.data(), HOSTS)
def test_merged_rows_say_what_every_host_said(data: st.DataObject, hosts: list[str]) -> None:
    said = reports(data, hosts, rows=ROWS)
    rows = compare.merged(said)
    again = {(host, row._replace(hosts=())) for row in rows for host in (row.hosts or hosts)}
    assert again == {(host, row) for host, report in said.items() for row in report.rows}
    assert len({row._replace(hosts=()) for row in rows}) == len(rows)
    assert exit_code(rows) == max((exit_code(report.rows) for report in said.values()), default=0)


@given(st.data(), HOSTS)
def test_versions_fail_exactly_where_two_hosts_differ(data: st.DataObject, hosts: list[str]) -> None:
    versions = st.dictionaries(st.sampled_from(["torch", "python"]), st.sampled_from(["1", "2"]))
    said = reports(data, hosts, facts=versions)
    rows = compare.version_rows(said)
    differing = {name for name in ("torch", "python") if len({report.facts.get(name) for report in said.values()}) > 1}
    assert {row.detail.split(":")[0] for row in rows if row.state == "fail"} == differing
    for row in rows:
        assert row.state == "ok" or all(host in row.detail for host in hosts)


@given(st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), st.floats(-200, 200), min_size=2), st.floats(0, 3))
def test_clocks_are_judged_by_the_two_furthest_apart_less_what_is_uncertain(ahead: dict[str, float], error: float) -> None:
    row = compare.clock_row({host: Offset(seconds, error) for host, seconds in ahead.items()})
    certain = max(ahead.values()) - min(ahead.values()) - 2 * error
    assert row.state == ("fail" if certain > 30 else "warn" if certain > 1 else "ok")
    if row.state != "ok":
        assert f"{max(ahead, key=ahead.__getitem__)} is " in row.detail


@given(st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), st.sampled_from(["", "refused"]), min_size=3, max_size=3))
def test_every_unreachable_port_is_a_failed_row_of_the_host_that_tried(problem: dict[str, str]) -> None:
    ports = {host: {"port": 5000, "problem": ""} for host in problem}
    tried = {host: {other: problem[host] for other in problem if other != host} for host in problem}
    rows = compare.port_rows(ports, tried)
    assert {host for row in rows for host in row.hosts} == {host for host, text in problem.items() if text}
    assert exit_code(rows) == int(any(problem.values()))


def test_a_gather_without_all_hosts_fails_and_points_at_loopback() -> None:
    choices = {"n0": "lo 127.0.0.1", "n1": "eth0 10.0.0.1"}
    done = {"n1": {"seconds": [1.0], "addresses": [], "right": True}}
    interface, gather = compare.gather_rows(done, 2**24, ["n0", "n1"], choices)
    assert (interface.state, gather.state) == ("fail", "fail")
    assert "n0 would listen on a loopback address: set GLOO_SOCKET_IFNAME" in interface.detail
    slow = compare.gather_rows({**done, "n0": done["n1"]}, 2**24, ["n0", "n1"], choices)
    assert [row.state for row in slow] == ["ok", "warn"]


@given(JSON)
def test_whatever_is_no_report_is_a_valueerror(value: Any) -> None:
    try:
        compare.parse_report(value)
    except ValueError:
        return
    assert set(value) >= {"rows", "facts", "settings", "folder", "devices", "address"}


@given(ROWS)
def test_a_report_survives_the_way(rows: list[Row]) -> None:
    sent = {"rows": [to_dict(row) for row in rows], "facts": {"a": "b"}, "settings": {}, "folder": "/x", "devices": "CPU",
            "address": ""}
    assert compare.parse_report(json.loads(json.dumps(sent))) == Report(rows, {"a": "b"}, {}, "/x", "CPU", "")
