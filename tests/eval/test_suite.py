"""The suite on toy trials: what is trained and asked, how numbers become tables, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcode.cli import command
from lmcode.config import ConfigError
from lmcode.data.tokenizer import load_tokenizer
from lmcode.eval import suite
from lmcode.eval.learning import Training, learn
from lmcode.eval.suite import missed, run_suite, to_markdown
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.shared import SharedFacts
from lmcode.eval.tasks.task import documents_of
from lmcode.eval.texts import TextTrial, sentences_of
from lmcode.eval.trial import Measured, Trial, cases_of, rivals, summarised
from lmcode.report.suite import render_suite

NEAR = KeyValueRecall(count=20, pairs=3, between=0, questions=3)
TINY = Training(steps=4, streams=2, model={"vocab_size": 60, "hidden_size": 16, "num_heads": 2, "context_length": 8,
                                         "memory_head_dim": 8, "memory_top_k": 4, "long_term_memory_slots": 64})


def trial(**changes: object) -> Trial:
    settings = {"title": "toy", "varied": "pairs", "training": TINY, "lessons": ((NEAR, 0.5), (NEAR, 0.5)),
                "asked": {2: KeyValueRecall(count=3, pairs=2, between=4, questions=2)}, "target": 0.9, "streams": 2}
    return Trial(**{**settings, **changes})


def test_a_lesson_is_learned_alike_each_time_and_what_it_teaches_shows() -> None:
    lessons = [(documents_of(NEAR.cases(0, vocab_size=60)), 1.0)]
    training = TINY.changed(steps=60, learning_rate=1e-2, warmup=2, model={"context_length": 16})
    one, other = (learn(training, lessons, seed=3) for _ in range(2))
    assert one.loss == other.loss and one.steps == 60 and not one.model.training
    assert one.loss < learn(training.changed(steps=5), lessons, seed=3).loss < 4.2
    assert all(bank.next_id > 0 for bank in one.model.banks.values())
    assert learn(training.changed(seconds=0.0), lessons, seed=3).steps == 0


def test_every_control_stands_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    trials = {"toy": trial(), "one for all": trial(asked={8: SharedFacts(facts=8, per_text=2, questions=4)},
                                                   asked_memory={"scope": "global"}, parts=(2,), modes=("on", "off"),
                                                   rivals=("no bank",))}
    monkeypatch.setitem(suite.SUITES, "toys", (lambda _: trials, (0, 1)))
    assert command.main(["eval", "--suite", "toys", "--seed", "5", "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())
    controls = {name: {one["control"] for one in result["measured"] if one["trial"] == name} for name in trials}
    assert controls == {"toy": {"on", "off", "shuffled", "random", "no bank", "no bank, same time", "cache of equal bytes"},
                        "one for all": {"on", "off", "2 private banks", "no bank"}}
    assert {one["seed"] for one in result["measured"]} == {5} and all(0 <= one["score"] <= 1 for one in result["measured"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "cache of equal bytes" in page and page == render_suite(result)
    assert "| the same, memory off |" in (tmp_path / "out" / "results.md").read_text()
    again = run_suite("toys", only=["one for all"], seeds=[5])
    assert again["measured"] == [one for one in result["measured"] if one["trial"] == "one for all"], "seeded"


def test_rivals_have_equal_bytes_and_the_same_time() -> None:
    taught = learn(TINY, [(documents_of(NEAR.cases(0, vocab_size=60)), 1.0)], seed=0)
    seconds = {"no bank": taught.seconds / 3}
    made = dict(rivals(trial(), taught, seconds))
    assert made["no bank"].configs()[0].long_term_memory_slots == 0 and made["no bank"].steps == TINY.steps
    assert made["no bank, same time"].steps == 3 * TINY.steps
    slot = 2 * (2 * 8 + 1) * 4 + 61  # two heads of keys with their addend and values, in fp32; and the columns
    window = 2 * 8 * 16 * 4  # layers x tokens x width x fp32
    assert made["cache of equal bytes"].configs()[0].cache_windows == -(-64 * slot // 2 // window)
    with pytest.raises(ValueError, match="a rival is"):
        list(rivals(trial(rivals=("a bank",)), taught, seconds))


def test_lessons_and_questions_never_share_a_seed() -> None:
    with pytest.raises(ValueError, match="lessons are drawn with seeds below 20000"):
        cases_of(NEAR, 20_000, 60)


RESULT = {"suite": "toys", "version": "1", "torch": "2", "threads": 1, "seeds": [0, 1],
          "trials": {"a": {"title": "toy <b>", "varied": "pairs", "target": 0.99, "unit": "share"}},
          "measured": [Measured("a", control, point, seed, score, 1.0)._asdict() for control, point, seed, score in (
              ("on", 4, 0, 1.0), ("on", 4, 1, 0.9), ("on", 8, 0, 1.0), ("on", 8, 1, 1.0), ("off", 4, 0, 0.0),
              ("off", 4, 1, 0.02))]}


def test_tables_hold_means_spreads_and_what_was_missed() -> None:
    key = ("a", "on", 4)
    summary = summarised([Measured(**one) for one in RESULT["measured"]])[key]
    assert summary == (pytest.approx(0.95), pytest.approx(0.1), 1.0, 0.0, 2)
    lines = to_markdown(RESULT).splitlines()
    assert "| **with its bank** | 95.0 (10.0) | 100.0 (0.0) |" in lines
    assert "| the same, memory off | 1.0 (2.0) |  |" in lines
    assert missed(RESULT) == ["a, pairs 4: 95.0 % of 99 %"]
    assert "toy &lt;b&gt;" in render_suite(RESULT)


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--suite must be one of smoke, small: got 'smok'. Did you mean 'smoke'\?"):
        run_suite("smok")
    with pytest.raises(ConfigError, match=r"has the trials recall, shared: got 'recal'. Did you mean 'recall'\?"):
        run_suite("smoke", only=["recal"])
    assert command.main(["eval"]) == 2 and "give a RUN to evaluate, or --suite NAME" in capsys.readouterr().err
    assert command.main(["eval", "runs/x", "--suite", "smoke"]) == 2
    assert "a suite trains its own models" in capsys.readouterr().err


def test_policies_of_eviction_stand_beside_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of few slots forgets what was read before it was written over; one of many does not."""
    asked = {0: KeyValueRecall(count=2, pairs=3, between=0, questions=3, rehearsed=3), 60: KeyValueRecall(
        count=2, pairs=3, between=60, questions=3)}
    kept = trial(asked=asked, modes=(), rivals=(), slots=32, policies={"fifo": {"eviction": "fifo"}},
                 expected={"half": lambda point: 0.5})
    monkeypatch.setitem(suite.SUITES, "toys", (lambda _: {"kept": kept}, (0,)))
    result = run_suite("toys")
    assert [(one["control"], one["point"]) for one in result["measured"]] == [
        ("fifo", 0), ("fifo", 60), ("half", 0), ("half", 60)]
    assert [one["score"] for one in result["measured"]][2:] == [0.5, 0.5]


def test_text_is_measured_beside_its_controls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"word number{number} comes {number * number} again; " * 9)
    training = TINY.changed(model={"vocab_size": 300, "context_length": 16})
    text = TextTrial("toy", str(tmp_path), tmp_path / "cache", training, sizes=(16,), windows=4, streams=2,
                     modes=("on", "off"), rivals=("no bank",),
                     variants={"one head": training.changed(model={"memory_heads": 1})})
    monkeypatch.setitem(suite.SUITES, "toys", (lambda _: {"words": text}, (0,)))
    result = run_suite("toys")
    controls = list(dict.fromkeys(one["control"] for one in result["measured"]))
    assert controls == ["on", "off", "bank of 16 slots", "one head", "no bank"]
    losses = {one["control"]: one["nats"] for one in result["measured"] if one["point"] == "all"}
    assert all(0 < loss < 6 for loss in losses.values()) and len(set(losses.values())) == 5
    table = to_markdown(result)
    assert "| held-out tokens | all |" in table and f"{losses['on']:.4f}" in table


def test_sentences_end_where_those_of_the_text_do(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("It is far. Is it so? Go on, then! " * (20 + number))
    sentences = sentences_of(str(tmp_path), tmp_path / "cache", 290)
    (folder,) = (tmp_path / "cache").iterdir()
    said = [load_tokenizer(folder / "tokenizer").decode(list(one)).strip() for one in sentences]
    assert {"It is far.", "Is it so?", "Go on, then!"} <= {*said} and all(token < 290 for one in sentences for token in one)
    assert sum(one in ("It is far.", "Is it so?", "Go on, then!") for one in said) > 0.9 * len(said)


def test_worlds_are_asked_of_what_was_taught_aloud_or_at_once() -> None:
    trials, asked = suite.worlds(lambda size: [(size - 1,)]), {}
    for name, trial in trials.items():
        assert all(lesson.aloud == trial.asked[0].aloud for lesson, _ in trial.lessons), "as the lessons word it"
        (case, *_) = trial.asked[1024].cases(0, vocab_size=trial.training.configs()[0].vocab_size)
        asked[name] = len(case.reference)
        assert {token for token in case.context if token < 512} == {511}, "sentences are told where there are some"
    assert asked == {"one hop": 1, "two hops": 2, "two hops at once": 1, "moved again": 1}
    assert {*trials} < {*suite.small(suite.Given())}
