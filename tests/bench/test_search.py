"""`lmcode bench search`: what it finds is right, whatever it says of speed; what it cannot measure is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmcode.bench.keys import random_vectors
from lmcode.bench.search import Graphs, about_graphs, no_lists, recall
from lmcode.bench.turns import Spent, medians, take_turns, to_table
from lmcode.cli.command import BAD_USAGE, DONE, main

pytest.importorskip("faiss")


def test_all_ways_find_the_same_and_the_file_says_what_the_table_does(tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "search.json"
    assert main(["bench", "search", "--rows", "5000", "--queries", "33", "--rounds", "1", "--top-k", "9", "--tiers", "exact",
                 "ivf", "--probes", "9999", "--out", str(out)]) == DONE
    said = json.loads(out.read_text())
    ways = {row["way"]: row for row in said["rows"]}
    assert set(ways) == {"faiss.knn", "torch", "faiss.IndexIVFFlat", "lmcode exact", "lmcode ivf"}
    assert all(row["recall"] == 1.0 for row in ways.values()) and ways["faiss.knn"]["speed"] == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ways) and lines[0].split()[:3] == ["keys", "rows", "way"]
    assert said["settings"]["ranks"] == 2 and said["about"]["torch"] == torch.__version__


def test_hnsw_goes_through_graphs_or_says_why_not(tmp_path: Path) -> None:
    out = tmp_path / "search.json"

    def measured(*words: str) -> dict[str, dict]:
        assert main(["bench", "search", "--queries", "33", "--rounds", "1", "--top-k", "9", "--tiers", "exact", "hnsw",
                     "--out", str(out), *words]) == DONE
        return {row["way"]: row for row in json.loads(out.read_text())["rows"]}

    narrow = measured("--rows", "5000", "--width", "9")
    assert narrow["lmcode hnsw"]["note"] == "all entries in graphs" and narrow["lmcode exact"]["recall"] == 1.0
    assert 0.1 < narrow["lmcode hnsw"]["recall"] < 1.0, "nine entries in view miss some, so it was no exact search"
    assert 0.1 < narrow["faiss.IndexHNSWFlat"]["recall"] < 1.0 and narrow["lmcode exact"]["made s"] is None
    assert narrow["lmcode hnsw"]["made s"] > 0 and narrow["faiss.IndexHNSWFlat"]["made s"] > 0
    assert measured("--rows", "5000", "--width", "300")["lmcode hnsw"]["recall"] > narrow["lmcode hnsw"]["recall"] + 0.1
    few = measured("--rows", "2000")["lmcode hnsw"]
    assert few["note"] == "no graphs, so exact: virtual shards of fewer than 1,024 entries have none"
    assert few["recall"] == 1.0


def test_a_part_in_graphs_is_said_and_so_are_lists_that_are_missing() -> None:
    assert about_graphs([Graphs(0.1, 0, 1000), Graphs(0.1, 1030, 1030)]) == (
        "1,030 of 2,030 entries in graphs, the rest exact: virtual shards of fewer than 1,024 entries have none")
    assert "the log says why" in about_graphs([Graphs(0.1, 0, 5000)])
    assert no_lists(None) == "no lists, so exact: they need 4,096 entries" and no_lists(torch.zeros(2, 3)) == ""


@pytest.mark.parametrize(("words", "message"), [
    (["--tiers", "exakt"], "got 'exakt'. Did you mean 'exact'?"),
    (["--out", "nowhere/file.json"], "--out must lie in a folder that exists"),
    (["--model", "nowhere"], "nowhere"),
])
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", "--rows", "1000", "--queries", "4", *words]) == BAD_USAGE
    assert message in capsys.readouterr().err


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    assert main(["bench", "search", "--rows", "1000", "--out", str(tmp_path / "notes.json")]) == BAD_USAGE
    assert "is no result of lmcode bench" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_recall_counts_equals_and_misses() -> None:
    key, query = random_vectors(40, 3, 8, seed=0)
    key[7] = key[3]
    order = (query @ key.T).argsort(dim=1, descending=True)
    wanted = order[:, :5]
    assert recall(wanted, wanted, query, key) == 1.0
    assert recall(order[:, 1:6], wanted, query, key) == pytest.approx(0.8)
    assert recall(torch.where(wanted == 3, 7, wanted), wanted, query, key) == 1.0
    assert recall(torch.full_like(wanted, -1), wanted, query, key) == 0.0


def test_every_way_has_its_turn_in_every_round_and_the_first_does_not_count() -> None:
    calls: list[str] = []

    def way(name: str, seconds: list[float]) -> object:
        return lambda: calls.append(name) or Spent(seconds.pop(0), 0.0)

    spent = take_turns({"a": way("a", [99.0, 3.0, 1.0, 2.0]), "b": way("b", [99.0, 1.0, 1.0, 5.0])}, 3)
    assert calls == ["a", "b"] * 4 and (spent["a"].wall, spent["b"].wall) == (2.0, 1.0)
    assert medians([{"x": 3.0, "y": 1.0}, {"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 5.0}]) == {"x": 2.0, "y": 1.0}
    assert to_table([{"way": "a", "ms": 2.0, "rows": 1000}, {"way": "bb", "ms": 12345.6, "rows": None}]).splitlines() == [
        "way      ms   rows", "a     2.000  1,000", "bb   12,346"]
