"""Continual learning on toy domains: what each stage reads, what is measured after it, and what is made of the losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lmcode.cli import command
from lmcode.config import ConfigError
from lmcode.data.corpus import Documents
from lmcode.eval import suite
from lmcode.eval.continual import ContinualTrial, domains_of, in_pieces, joined, spread, stages_of
from lmcode.eval.learning import Training, rate
from lmcode.report.suite import render_suite

LENGTHS = (70, 3, 41, 200, 9)  # of documents; two of the first source, three of the second
WORDS = {"sea": "ship wave sail storm port ", "sky": "cloud wing star moon air ", "sum": "one two three plus nine "}


def documents() -> Documents:
    offsets = np.cumsum([0, *LENGTHS])
    return Documents(np.arange(offsets[-1]), offsets, [*"abcde"], {"first": 2, "second": 3})


@pytest.mark.parametrize("length", [4, 20, 1000])
def test_pieces_are_the_documents_of_each_source_cut_evenly(length: int) -> None:
    whole = documents()
    first, second = in_pieces(whole, length)
    again = joined(whole, [*first, *second])
    assert again.tokens.tolist() == whole.tokens.tolist(), "every token once, in its order"
    assert {*whole.offsets.tolist()} <= {*again.offsets.tolist()} and first[-1][1] == second[0][0] == whole.offsets[2]
    sizes = np.diff(again.offsets)
    assert sizes.max() <= length and all(size >= length / 2 or size in LENGTHS for size in sizes.tolist())


def test_what_is_measured_comes_from_all_over() -> None:
    pieces = [(at, at + 10) for at in range(0, 1000, 10)]
    assert spread(pieces, 50) == [(at, at + 10) for at in (0, 200, 400, 600, 800)]
    assert spread(pieces, 10**6) == pieces and spread(pieces, 1) == pieces[:1]


def test_a_stage_reads_its_domain_and_replays_what_was_read_of_those_before() -> None:
    pieces = [[(1000 * domain + at, 1000 * domain + at + 9) for at in range(0, 900, 9)] for domain in range(3)]
    stages, again, other = (stages_of(pieces, 0.25, windows=64, length=4, seed=seed) for seed in (1, 1, 2))
    assert stages == again != other
    of = [[sum(start // 1000 == domain for start, _ in stage) for domain in range(3)] for stage in stages]
    assert of == [[32, 0, 0], [8, 24, 0], [4, 4, 24]], "a piece takes two windows"
    assert all(len({*stage}) == 32 for stage in stages) and {*stages[1][24:]} <= {*stages[0]}
    assert {*stages[2][24:]} <= {*stages[0], *stages[1]}
    alone = stages_of(pieces, 0.0, windows=64, length=4, seed=1)
    assert all(start // 1000 == domain for domain, stage in enumerate(alone) for start, _ in stage)
    assert len(stages_of(pieces, 0.0, windows=500, length=4, seed=1)[0]) == 250, "over and over, where there is not enough"


def test_the_learning_rate_runs_its_course_in_each_stage() -> None:
    assert [rate(step, 0, 40, 4) for step in range(40)] == [rate(step, 40, 80, 4) for step in range(40, 80)]
    assert rate(0, 0, 40, 4) == 0.25 and rate(4, 0, 40, 4) == 1.0 and rate(40, 0, 40, 4) == pytest.approx(0.1)


@pytest.fixture
def trial(tmp_path: Path) -> ContinualTrial:
    for name, words in WORDS.items():
        (tmp_path / name).mkdir()
        for number in range(6):
            (tmp_path / name / f"{number}.txt").write_text(words * 12 + str(number))
    training = Training(steps=5, streams=2, warmup=1, learning_rate=1e-2, model={
        "vocab_size": 300, "hidden_size": 16, "num_heads": 2, "context_length": 16, "memory_head_dim": 8, "memory_top_k": 4,
        "long_term_memory_slots": 256})
    domains = domains_of([str(tmp_path / name) for name in WORDS])
    return ContinualTrial("toy", domains, tmp_path / "cache", training, (0.0, 0.5), piece=64, held_out=100, streams=2)


def test_losses_stand_in_a_matrix_and_what_became_worse_beside_it(
        trial: ContinualTrial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(suite.SUITES, "toys", (lambda given: {"continual": trial}, (0,)))
    assert command.main(["eval", "--suite", "toys", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [*result["trials"]] == ["continual", "continual, worse"]
    found = {(one["trial"], one["control"], one["point"]): one for one in result["measured"]}
    loss = {key[1:]: one["nats"] for key, one in found.items() if key[0] == "continual"}
    labels = [(model, f"{model}, {share} % replayed") for model in ("bank", "no bank") for share in (0, 50)]
    rows = {f"{label}; after {domain}" for _, label in labels for domain in WORDS}
    rows |= {"bank, all at once", "no bank, all at once"}
    assert {*loss} == {(row, domain) for row in rows for domain in WORDS} and len({*loss.values()}) > 30
    for model, label in labels:
        for old in ("sea", "sky"):
            now = loss[f"{label}; after sum", old]
            before = {"right after": loss[f"{label}; after {old}", old], "all at once": loss[f"{model}, all at once", old]}
            for than, then in before.items():
                of_perplexity, of_nats = (found["continual, worse", f"{label}; than {than}, {of}", old]
                                          for of in ("perplexity", "nats"))
                assert of_perplexity["score"] == pytest.approx(math.exp(now - then) - 1)
                assert of_nats["score"] == pytest.approx(now / then - 1)
                assert of_perplexity["nats"] == of_nats["nats"] == pytest.approx(now - then)
    scores = [found["continual, worse", "bank, 0 % replayed; than right after, nats", point]["score"]
              for point in ("sea", "sky", "mean")]
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2)
    first = [loss[f"bank, {share} % replayed; after sea", "sea"] for share in (0, 50)]
    assert first[0] == first[1], "there is nothing to replay yet"
    table = suite.to_markdown(result)
    assert "at most so much worse; target 11 %" in table and f"{loss['bank, all at once', 'sky']:.4f}" in table
    assert "How much worse than before" in render_suite(result)


def test_domains_are_named_and_at_least_two() -> None:
    assert domains_of(["/data/code", "old books=x", "prose=books/a=b/*.txt", "a/*.txt"]) == [
        ("code", "/data/code"), ("old-books-x", "old books=x"), ("prose", "books/a=b/*.txt"), ("-.txt", "a/*.txt")]
    for given, got in ((["a/x"], "x"), (["a/x", "b/x"], "x, x"), (["x=a", "y=b", "x=c"], "x, y, x")):
        with pytest.raises(ConfigError, match=rf"--domains must be two or more of different names .*: got {got}$"):
            domains_of(given)


def test_the_trial_is_there_where_domains_are_given() -> None:
    assert "continual" not in suite.small(suite.Given())
    assert suite.small(suite.Given(domains=[("a", "x"), ("b", "y")]))["continual"].domains == [("a", "x"), ("b", "y")]
    with pytest.raises(ConfigError, match="got 'continual'"):
        suite.run_suite("small", only=["continual"])
    with pytest.raises(ConfigError, match="--domains must be two or more"):
        suite.run_suite("small", only=["continual"], domains=["a"])
