"""The page of a suite's numbers: a table for each trial, and a chart where it has several points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcode.config import ConfigError
from lmcode.eval.suite import measured_in, pointed, shown, to_markdown, worded
from lmcode.eval.trial import summarised
from lmcode.files import durable
from lmcode.files.replace import is_free
from lmcode.report.charts import Line, line_chart
from lmcode.report.markup import Markup, element, figure, join, table
from lmcode.report.style import CSS
from lmcode.version import MADE_BY

FILES = ("results.json", "results.md", "index.html")
UNITS = {"share": "Share of answers that are right, in per cent", "nats": "Held-out loss, nats per token",
         "worse": "How much worse than before, in per cent"}


def render_suite(result: Mapping[str, Any]) -> str:
    """The page, from what `run_suite` returns."""
    sections = [element("section", element("h2", f"{name}: {trial['title']}"), trial_section(result, name))
                for name, trial in result["trials"].items()]
    seeds = ", ".join(map(str, result["seeds"]))
    says = f"Seeds {seeds}; LMCODE {result['version']}, torch {result['torch']}, {result['threads']} threads."
    head = element("head", element("meta", charset="utf-8"), element("title", f"{result['suite']} – what memory is worth"),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("style", Markup(CSS)))
    header = element("header", element("p", "Evaluation suite", class_="kicker"), element("h1", result["suite"]),
                     element("p", says, class_="lede"))
    page = element("html", head, element("body", header, element("main", sections), element("footer", MADE_BY)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def trial_section(result: Mapping[str, Any], name: str) -> Markup:
    """One trial's table and chart."""
    mine = {key[1:]: one for key, one in summarised(measured_in(result)).items() if key[0] == name}
    trial, points = result["trials"][name], list(dict.fromkeys(point for _, point in mine))
    controls = list(dict.fromkeys(control for control, _ in mine))
    rows = [[worded(control).strip("*"), *(shown(mine[control, point], trial["unit"]) if (control, point) in mine else ""
                                           for point in points)] for control in controls]
    parts = [table([trial["varied"], *map(pointed, points)], rows,
                   caption=f"{UNITS[trial['unit']]}: the mean over seeds (largest minus smallest).")]
    numbers = [point for point in points if not isinstance(point, str) and point > 0]
    if len(numbers) > 1:
        lines = [Line(worded(control).strip("*"), numbers, [mine[control, point].score for point in numbers])
                 for control in controls if all((control, point) in mine for point in numbers)]
        parts.append(figure(line_chart(lines, x=trial["varied"], y="share that is right", low=0.0, high=1.0, log_x=True),
                            title=trial["varied"], legend=[line.name for line in lines],
                            caption="The model with its bank, and its controls."))
    return join(parts)


def write_suite(result: Mapping[str, Any], folder: Path) -> None:
    """results.json, results.md and index.html in `folder`, each whole or not at all.

    Raises:
        ConfigError: as `check_folder`.
    """
    check_folder(folder)
    texts = json.dumps(result, indent=1), f"{to_markdown(result)}\n{MADE_BY}\n", render_suite(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, texts, strict=True):
            durable.replace_text(folder / name, text)
    except OSError as error:
        raise ConfigError(f"the suite's results cannot be written to '{folder}': {error.strerror or error}") from None


def check_folder(folder: Path) -> None:
    """Refuses a folder in which the results of a suite would replace what this program has not written.

    Raises:
        ConfigError: naming the file.
    """
    try:
        theirs = [name for name in FILES if not is_free(folder / name, MADE_BY)]
    except OSError as error:
        raise ConfigError(f"the suite's results cannot be written to '{folder}': {error.strerror or error}") from None
    if theirs:
        raise ConfigError(f"'{folder / theirs[0]}' exists and is no result of this program: give another folder")
