"""The page: well formed, self-contained, safe with any text, equal for equal facts, and true to the banks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmcode import dist, generate_memory_report, plot_training_history, visualize_memory_flow
from lmcode.cli import command as cli
from lmcode.config import ConfigError, RunConfig, build
from lmcode.dist import Group
from lmcode.language_model import LMCODE
from lmcode.report.charts import Line, histogram, line_chart, short, ticks
from lmcode.report.facts import gather
from lmcode.report.history import curves_of, read_metrics, tagged
from lmcode.report.markup import Markup, element, number, size_of
from lmcode.report.page import render
from lmcode.report.reading import read_documents
from lmcode.report.run import report_path
from lmcode.train import loop
from lmcode.train.start import set_up
from tests.helpers.models import TEXTS, ids_of, remember, small_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings, write_corpus

VOID = {"meta", "br"}
SECTIONS = ("content", "usage", "gates", "duplicates", "examples", "capacity", "training", "settings")
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & </pre></style><!-- '


class Reader(HTMLParser):
    """Reads a page back: its tags in order, its text, its ids; an end tag that closes something else is a failure."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())


def check(page: str) -> Reader:
    """What holds for every page; returns it read."""
    reader = Reader(page)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "img", "image", "use"}
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(str(attributes[name]).startswith("#") for name in ("href", "src", "xlink:href") if name in attributes)
    assert not re.search(r"https?://|url\(|@import|//[a-z]+\.", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert [one for one in ids if one in SECTIONS] == list(SECTIONS) and len(set(ids)) == len(ids)
    links = [attributes["href"] for name, attributes in reader.tags if name == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    assert not re.search(r"\b(nan|inf|None)\b", reader.text), "a number that is missing is a dash"
    return reader


@pytest.fixture(scope="module")
def model() -> LMCODE:
    model = small_model()
    remember(model, TEXTS)
    return model


def test_the_page_says_what_the_banks_say(model: LMCODE) -> None:
    before = {layer: bank.content_hash() for layer, bank in model.banks.items()}
    reader = check(generate_memory_report(model, TEXTS, title="A model"))
    assert {layer: bank.content_hash() for layer, bank in model.banks.items()} == before
    for layer, bank in model.banks.items():
        stats = bank.stats()
        full = f"layer {layer}{stats['live']:,}{stats['slots']:,}{100 * stats['fill']:.1f} %{stats['evicted']:,}"
        assert full in reader.text
        names, counts = np.unique(bank.shard.columns["namespace"][bank.shard.live_M], return_counts=True)
        assert all(f"{name}, {count:,} entries: " in reader.text for name, count in zip(names, counts, strict=True))
    live = sum(bank.stats()["live"] for bank in model.banks.values())
    assert f"The memory holds {live:,} entries in 480 slots" in reader.text and "A model" in reader.text


def test_equal_facts_give_an_equal_page(model: LMCODE, tmp_path: Path) -> None:
    one = generate_memory_report(model, TEXTS, tmp_path / "new" / "report.html")
    assert generate_memory_report(model, [ids_of(text) for text in TEXTS]) == one
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == one


def test_text_of_a_corpus_cannot_become_a_tag() -> None:
    model = small_model()
    model.store_experience(EVIL, namespace=EVIL[:20])
    page = generate_memory_report(model, [EVIL * 3, *TEXTS], title=EVIL, history=[{"step": 1, "train/loss": 2.0}])
    reader = check(page)
    assert "<script" not in page.lower() and "<img" not in page.lower() and "<!--" not in page
    assert EVIL.strip() in reader.text, "it is shown as what it is"


def test_markup_escapes_whatever_is_not_markup() -> None:
    assert element("p", "<b>", Markup("<i></i>"), 3, ["&", None], title='"<') == \
        '<p title="&quot;&lt;">&lt;b&gt;<i></i>3&amp;</p>'


def test_examples_point_at_places_that_were_read(model: LMCODE) -> None:
    text = "alpha beta gamma delta; " * 12
    reading = read_documents(model, [ids_of(text), ids_of("z" * 40)], names=["greek", "z"], tokenizer=model.tokenizer,
                             length=32)
    assert reading.names == ("greek", "z") and reading.tokens == len(text) - 1 + 39
    assert reading.examples and set(reading.layers) == {0, 2}
    for one in reading.examples:
        source, place = re.fullmatch(r"(greek|z), token ([\d,]+)", one.source).groups()
        place, whole = int(place.replace(",", "")), text if source == "greek" else "z" * 40
        assert whole[:place + 1].endswith(one.before) and one.came == whole[place + 1]
        assert 0 < one.share <= 1 and one.hits and sum(hit.weight for hit in one.hits) <= 1 + 1e-6
        assert [hit.score for hit in one.hits] == sorted((hit.score for hit in one.hits), reverse=True)
        for hit in one.hits:  # a document reads its own entries, and only those of earlier windows
            back = int(hit.source.removesuffix(" tokens earlier").replace(",", ""))
            assert back > 0 and (place - back) // 32 <= place // 32 and whole[:place - back + 1].endswith(hit.before)
            assert whole[place - back + 1:].startswith(hit.after) and hit.right == (hit.after[0] == one.came)
    for layer in reading.layers.values():
        assert layer.own_share + layer.hit_share + layer.null_share == pytest.approx(1)
        assert len(layer.gate_X) == reading.tokens and 0 <= layer.first_right <= 1


def test_losses_of_a_reading_are_those_of_the_model(model: LMCODE) -> None:
    ids = ids_of(TEXTS[0])[:20]
    reading = read_documents(model, [ids])
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids]), torch.tensor([ids]), namespace_B=torch.tensor([10**6])).loss
    assert reading.loss_off == pytest.approx(float(expected), rel=1e-5) == reading.loss_on, "one window recalls nothing"


def test_entries_written_in_training_are_shown_without_text() -> None:
    model = small_model(memory={"scope": "global"})
    remember(model, TEXTS)
    reading = read_documents(model, [ids_of("q" * 70)], tokenizer=model.tokenizer, length=32)
    sources = {hit.source: hit for one in reading.examples for hit in one.hits}
    trained = [hit for source, hit in sources.items() if "written while training" in source]
    assert trained and all(hit.before is None and hit.after is None and not hit.right for hit in trained)
    check(generate_memory_report(model, ["q" * 70]))


@pytest.mark.parametrize("shape", [{}, {"retrieval_stride": 2}, {"successor_values": False}])
@pytest.mark.parametrize("policy", [{}, {"write": "every_nth", "write_every": 3}, {"write": "surprise", "write_share": 0.4}])
def test_a_context_that_comes_again_points_at_its_first_place(policy: dict[str, Any], shape: dict[str, Any]) -> None:
    """Windows 2 and 3 repeat windows 0 and 1, so their queries equal the keys of two windows ago, in layer 0 and without
    short-term memory: a hit with a cosine of 1 must be exactly 64 tokens back, whichever tokens were written."""
    model = small_model(memory=policy, memory_layers=(0,), short_term_memory_size=0, **shape)
    text = "".join(chr(33 + number) for number in range(64)) * 2
    reading = read_documents(model, [ids_of(text + "!")], tokenizer=model.tokenizer, length=32)
    surest = model.config.memory_temperature - 0.25  # the score of a cosine of 1 for an entry of little importance
    same = [hit for one in reading.examples for hit in one.hits if hit.score > surest]
    assert same and all(hit.source == "64 tokens earlier" and hit.right for hit in same)


def test_a_model_without_a_bank_has_a_report() -> None:
    reader = check(generate_memory_report(small_model(long_term_memory_slots=0), TEXTS))
    assert "This model has no bank" in reader.text and "capacity was not measured" in reader.text


def test_an_empty_bank_has_a_report() -> None:
    reader = check(generate_memory_report(small_model(), ["ab"]))
    assert "Nothing has been stored yet." in reader.text and "No entry has been read yet." in reader.text


def test_a_report_needs_text_that_fits(model: LMCODE) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        generate_memory_report(model, [])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.256"):
        generate_memory_report(model, [[1, 999]])
    with pytest.raises(ValueError, match="a history is a dict of lists"):
        generate_memory_report(model, TEXTS, history="metrics.jsonl")


def report_on_a_rank() -> str:
    model = small_model(Group.world())
    remember(model, TEXTS, count_hits=False)
    return render(replace(gather(model, [ids_of(text) for text in TEXTS], title="ranks", ranks=2)))


def test_two_ranks_write_the_page_that_one_does() -> None:
    alone, = run_on_ranks(report_on_a_rank, 1)
    both = run_on_ranks(report_on_a_rank, 2)
    assert both[0] == both[1] == alone


def train_on_a_rank(jobs: list[dict]) -> None:
    for values in jobs:
        session = set_up(build(RunConfig, values), dist.discover())
        loop.fit(session)
        loop.finish(session, 1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two very small runs of two ranks, with a bank and without."""
    folder = tmp_path_factory.mktemp("report")
    write_corpus(folder)
    changes = {"bank": {}, "none": {"model": {"long_term_memory_slots": 0}}}
    run_on_ranks(train_on_a_rank, 2, [settings(folder, name, **sections) for name, sections in changes.items()])
    return {name: folder / "runs" / name for name in changes}


def test_lmcode_report_writes_the_page_of_a_run(runs: dict[str, Path], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["bank"]
    assert cli.main(["report", str(run)]) == 0
    page = run / "report" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    reader = check(page.read_text(encoding="utf-8"))
    assert "After step 5, memory over 2 ranks" in reader.text and "There is no metrics.jsonl" not in reader.text
    assert "train.learning_rate0.003" in reader.text and "tokens earlier" in reader.text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"held out: {number(last['eval/loss'])} at 5" in reader.text, "a chart's marks carry the recorded numbers"
    out = tmp_path / "other.html"
    assert cli.main(["report", str(run / "checkpoints" / "step-00000005"), "--out", str(out)]) == 0
    assert out.read_bytes() == page.read_bytes()


def test_a_run_without_a_bank_or_without_its_text_has_a_report(runs: dict[str, Path], tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    reader = check(report_path(runs["none"], []).read_text(encoding="utf-8"))
    assert "This model has no bank" in reader.text and "Where a step spends its time" in reader.text
    moved = [f"data.path={tmp_path / 'moved'}", f"data.cache={tmp_path}"]
    reader = check(report_path(runs["bank"], moved, out=tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "The held-out documents could not be read" in reader.text and "layer 1" in reader.text


def test_other_text_than_that_of_the_run_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in range(4):
        (tmp_path / "text" / f"{name}.txt").write_text(f"other words {name} " * 20)
    other = [f"data.path={tmp_path / 'text'}", f"data.cache={tmp_path}"]
    reader = check(report_path(runs["bank"], other, out=tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "The corpus is not the one that this run was trained on" in reader.text


def test_what_cannot_be_reported(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2 and "no run folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the report cannot be written to"):
        report_path(runs["none"], [], out=tmp_path / "file" / "index.html")


def test_histories_become_curves() -> None:
    lists = {"step": [10, 20, 30, 40], "loss": [4, 3, None, 1.5], "eval_step": [20, 40], "eval_loss": [3.5, 2.5],
             "epoch_loss": [3.0, 2.0], "grad_norm": [float("nan")] * 4}
    curves = curves_of(lists)
    assert curves == {"loss": ([10, 20, 40], [4, 3, 1.5]), "eval_loss": ([20, 40], [3.5, 2.5]),
                      "epoch_loss": ([20, 40], [3.0, 2.0])}
    assert set(tagged(curves)) == {"train/loss", "eval/loss", "epoch_loss"}
    rows = [{"step": 1, "train/loss": 3.0, "x": None}, {"step": 1, "eval/loss": 2.0}, {"step": 2, "train/loss": 2.5}]
    assert curves_of(rows) == {"train/loss": ([1, 2], [3.0, 2.5]), "eval/loss": ([1], [2.0])}
    assert curves_of({"loss": [3, 2]}) == {"loss": ([1, 2], [3, 2])}


@pytest.mark.parametrize("history, message", [
    ([], "nothing to draw"), ({"step": [1]}, "nothing to draw"), ("text", "dict of lists or a list of rows"),
    ([{"loss": 1}], "row 0 has"), ({"loss": 3}, "'loss' is int"), ({"loss": ["a"]}, "'loss' has 'a'"),
    ({"step": [1], "loss": [1, 2]}, "more values than there are steps: 2 > 1"), (5, "got int"),
])
def test_histories_that_are_refused(history: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_training_history(history)


def test_metrics_are_read_past_a_line_cut_short(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "m.jsonl").write_text('{"step": 1, "a": 2}\n[]\n{"step": 2, "a"')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "a": 2}]


def test_figures_are_made_and_written(model: LMCODE, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "train/loss": 1.0, "memory/L0/fill": 0.5, "memory/L2/fill": 0.6, "perf/tokens_per_s": 9}
            for step in range(3)]
    figure = plot_training_history(rows, path=tmp_path / "history.png")
    titles = {axes.get_title(loc="left"): len(axes.lines) for axes in figure.axes}
    assert titles == {"Loss": 1, "Speed": 1, "How full the memory is": 2}
    figure = visualize_memory_flow(model, "def f($x):\n\treturn $x", path=tmp_path / "flow.svg")
    assert len(figure.axes) == 5 and figure.axes[0].images[0].get_array().shape == (2, 21)
    assert (tmp_path / "history.png").stat().st_size > 1000 and (tmp_path / "flow.svg").stat().st_size > 1000


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 65536) == [0, 20000, 40000, 60000] and ticks(0.28, 1.0) == [0.4, 0.6, 0.8, 1.0] and ticks(3, 3) == [3]
    assert [short(value) for value in (65536, 1.2e6, 0.5, 0.0015, 0.002, 0, -3)] == \
        ["65.5k", "1.2M", "0.5", "1.5e-3", "2e-3", "0", "-3"]
    assert [number(value) for value in (65536, 0.4131, 25.0914, 1234.5, None, float("nan"))] == \
        ["65,536", "0.413", "25.1", "1,234", "–", "–"]
    assert [size_of(count) for count in (0, 999, 1000, 71106560)] == ["0 bytes", "999 bytes", "1 kB", "71.1 MB"]


@pytest.mark.parametrize("chart", [
    line_chart([Line("a", [1], [float("nan")])], x="x", y="y"), histogram([], [], x="x"),
    histogram([0, 0], [0, 1, 2], x="x")])
def test_a_chart_of_nothing_says_so(chart: Markup) -> None:
    assert chart.startswith('<p class="empty">')


@pytest.mark.parametrize("chart", [
    line_chart([Line("a", [5], [2.0])], x="x", y="y"), line_chart([Line("a", [1, 2], [0, 0])], x="x", y="y", log_x=True),
    histogram([3], [1.0, 2.0], x="x"), histogram([1, 2], [], x="x", labels=["a", "b"])])
def test_a_chart_of_little_stays_inside_its_frame(chart: Markup) -> None:
    Reader(chart)
    places = [float(place) for place in re.findall(r'\b(?:cx|x|x1|x2)="([-\d.]+)"', chart)]
    heights = [float(place) for place in re.findall(r'\b(?:cy|y|y1|y2)="([-\d.]+)"', chart)]
    assert all(0 <= place <= 380 for place in places) and all(0 <= place <= 220 for place in heights)




def test_metrics_of_earlier_versions_come_under_todays_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "perf/bytes_sent": 8.0, "train/loss": 1.0}\n{"step": 4, "perf/by')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "perf/bytes_received": 8.0, "train/loss": 1.0}]
