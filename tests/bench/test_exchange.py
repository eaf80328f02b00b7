"""`lmcode bench exchange`: the bytes of four ranks, as they were counted, are those of the formula; ways take turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcode.bench import exchange
from lmcode.cli.command import BAD_USAGE, DONE, main

R, N, H, D, K, B = 4, 24, 2, 64, 32, 4


def formula(gathering: bool, sums: bool) -> dict[str, int]:
    """Bytes that a rank receives, from lmcode/memory/README.md: n queries of a rank, b bytes a number."""
    n, others = N * H, R - 1
    return {"queries": others * (n * D * B + 16 * N),  # with namespace and document of each token
            "hits": others * 12 * R * n * K if gathering else others * (12 * n * K + 16 * n),
            "values": others * n * D * B if sums else others * n * K * 2 * D * B,
            "gradients": others * (n * (D + 2) * B + n * D * B) if sums else 0}


def test_bytes_are_those_of_the_formula_and_every_way_has_its_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    turns, read = list[tuple[str, str]](), exchange._read

    def counted(workers: exchange.Workers, way: tuple[str, str]) -> dict[str, float]:
        turns.append(way)
        return read(workers, way)

    monkeypatch.setattr(exchange, "_read", counted)
    out = tmp_path / "exchange.json"
    sizes = {"ranks": R, "queries": N, "heads": H, "width": D, "top-k": K, "rows": 1000, "rounds": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    assert main(["bench", "exchange", *words, "--out", str(out)]) == DONE
    said = json.loads(out.read_text())
    ways = [(gathers, fetch) for gathers in ("all_gather", "all_to_all") for fetch in ("rows", "sums")]
    assert turns == ways * 3, "the first round does not count"
    rows = {(row["exchange"], row["fetch"], row["phase"]): row for row in said["rows"]}
    assert len(rows) == len(said["rows"]) == 5 * len(ways)
    for gathers, fetch in ways:
        wanted = formula(gathers == "all_gather", fetch == "sums")
        assert {phase: rows[gathers, fetch, phase]["bytes"] for phase in wanted} == wanted
        whole = rows[gathers, fetch, "all"]
        assert whole["bytes"] == sum(wanted.values()) and whole["read ms"] > 0 < whole["ms"]
    assert rows["all_gather", "rows", "all"]["share"] == rows["all_gather", "rows", "all"]["speed"] == 1.0
    assert rows["all_to_all", "sums", "all"]["share"] <= 0.25, "what the issue asks of sums"
    assert rows["all_to_all", "sums", "gradients"]["share"] is None, "rows have no gradients to send"
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(said["rows"])


@pytest.mark.parametrize(("words", "message"), [
    (["--ranks", "1"], "expected 2 or more, 64 or less: got 1"),
    (["--top-k", "1000"], "expected 1 or more, 999 or less: got 1000"),
    (["--out", "nowhere/file.json"], "--out must lie in a folder that exists"),
])
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "exchange", *words]) == BAD_USAGE
    assert message in capsys.readouterr().err
