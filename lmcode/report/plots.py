"""Figures: the one importer of matplotlib, which is loaded when a figure is drawn.

Figures are made without pyplot, so nothing is kept alive or shown behind a caller's back: a notebook shows what is
returned, a script calls `savefig`, and every function writes the file itself if it is given a path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcode.config import near_match
from lmcode.files.replace import is_free
from lmcode.memories.experiences import Namespace
from lmcode.report.history import Curves, curves_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure

    from lmcode.backbone import Backbone
    from lmcode.data.tokenizer import Tokenizer

COLOURS = ("#2563b8", "#d1661a", "#178a72", "#8450b8", "#b5404f", "#6b7280")
MADE_BY = "Drawn by LMCODE."
SAYS_WHO = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}  # where it is noted
MOST_LABELS = 64  # tokens that fit as words along an axis
PANELS = {  # of a monitor: measure -> title, label of the y axis
    "fill": ("How full", "% of slots"), "gate_mean": ("Gate", "mean over tokens"),
    "hit_share": ("Attention to the bank", "% of the softmax"), "age_p50": ("Age of the hits", "steps, median"),
    "score_mean": ("Score of the hits", "logit, mean"), "evicted": ("Evicted so far", "entries"),
}
PERCENT = ("fill", "hit_share")
Points = Sequence[float] | np.ndarray
KNOWN = {  # of a training history, in the order of their panels: title, label of the y axis
    "loss": ("Loss", "nats per token"), "learning_rate": ("Learning rate", ""), "tokens_per_s": ("Speed", "tokens/s"),
    "grad_norm": ("Gradient norm", "before clipping"), "fill": ("How full the memory is", "share of the slots"),
    "gate_mean": ("Gate of the memory", "mean over tokens"), "hit_mass": ("Attention to the bank", "share of the softmax"),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Writes the figure if there is a path; returns it.

    Raises:
        ValueError: for a kind of file that matplotlib does not know, and for a file that exists and does not say that it was
            drawn here.
    """
    if path is not None:
        known, kind = figure.canvas.get_supported_filetypes(), Path(path).suffix.removeprefix(".").lower()
        if kind not in known:
            raise ValueError(f"a figure is written as one of {', '.join(sorted(known))}: got '{path}'."
                             f"{near_match(kind, known)}")
        if not is_free(Path(path), MADE_BY):
            raise ValueError(f"'{path}' exists and was not drawn by this program: give another file")
        figure.savefig(path, metadata={SAYS_WHO[kind]: MADE_BY} if kind in SAYS_WHO else None)
    return figure


def style(axes: Axes, *, title: str, y: str, x: str = "step") -> None:
    """The look that all panels share."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(y, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # typed as any Locator, and a MaxNLocator
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lines(axes: Axes, lines: Iterable[tuple[str, Points, Points]], *, legend: bool = True) -> None:
    """Lines (name, x, y); few points are marked, so that a single one can be seen."""
    for number, (name, x, y) in enumerate(lines):
        axes.plot(x, y, label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.6,
                  marker="o" if len(x) <= 20 else None, markersize=3.5)
    if legend and len(axes.lines) > 1:
        axes.legend(fontsize=8, frameon=False)


def draw_monitor(steps: Sequence[int], history: Mapping[int, Mapping[str, Sequence[float]]], *,
                 path: str | Path | None = None) -> Figure:
    """The figure of `MemoryMonitor.plot_history`."""
    figure = new_figure(11, 6)
    figure.suptitle(f"Memory over {len(steps)} recorded step{'s' * (len(steps) != 1)}", fontsize=12, x=0.01, ha="left")
    for axes, (name, (title, y)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        scale = 100 if name in PERCENT else 1
        draw_lines(axes, [(f"layer {layer}", steps, scale * np.asarray(values[name], float))
                          for layer, values in history.items()], legend=name == "fill")
        style(axes, title=title, y=y)
        if name in ("fill", "gate_mean"):
            axes.set_ylim(-0.03 * (100 if scale == 100 else 1), 1.03 * (100 if scale == 100 else 1))
        if all(math.isnan(value) for values in history.values() for value in values[name]):
            axes.text(0.5, 0.5, "no hits yet", ha="center", transform=axes.transAxes, color="#6b7280", fontsize=9)
    return finish(figure, path)


def plot_training_history(history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]], *,
                          path: str | Path | None = None) -> Figure:
    """Draws a training history: losses, learning rate, speed, and whatever else of it is numbers, up to six panels.

    Args:
        history: what `MemoryAwareTrainer.train` returns (a dict of lists; `step` is the x axis, and a shorter list is spread
            over it), or the rows of a metrics.jsonl (a list of dicts, each with `step`). None and nan are gaps.
        path: where to write the figure (png, svg, pdf); not written when None.

    Raises:
        ValueError: nothing to draw, rows without a step, or a value that is no number.
    """
    curves = curves_of(history)
    panels = panels_of(curves)
    columns = min(3, len(panels))
    figure = new_figure(4.2 * columns, 3.1 * -(-len(panels) // columns))
    grid = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat)
    for axes, (title, unit, names) in zip(grid, panels, strict=False):
        draw_lines(axes, [(label_of(name), *curves[name]) for name in names])
        style(axes, title=title, y=unit)
    for axes in grid[len(panels):]:
        axes.remove()
    return finish(figure, path)


def panels_of(curves: Curves) -> list[tuple[str, str, list[str]]]:
    """Title, unit and the curves of each panel: all losses, then one panel for each measure (its layers together), the
    known ones first; six at most."""
    groups: dict[str, list[str]] = {}
    for name in curves:
        groups.setdefault("loss" if "loss" in name else name.rpartition("/")[2], []).append(name)
    order = [*(word for word in KNOWN if word in groups), *sorted(groups.keys() - KNOWN.keys())]
    return [(*KNOWN.get(word, (word.replace("_", " ").capitalize(), "")), sorted(groups[word])) for word in order[:6]]


def label_of(name: str) -> str:
    """'train/learning_rate' -> 'learning rate'; the layer of a memory metric stays."""
    *place, last = name.split("/")
    return " ".join([last.replace("_", " "), *(f"(layer {one[1:]})" for one in place if one[1:].isdigit()),
                     *(f"({one})" for one in place if one in ("train", "eval") and last == "loss")])


def visualize_memory_flow(model: Backbone, input_sequence: Any, *, namespace: Namespace | None = None,
                          tokenizer: Tokenizer | None = None, path: str | Path | None = None) -> Figure:
    """Draws where the tokens of one sequence look: for each memory layer the gate and the shares of the read's softmax.

    One row of the four maps is a memory layer, one column a token. Arguments, errors and meaning are those of
    `lmcode.report.flow.memory_flow`; the figure is also written to `path` if there is one.
    """
    from lmcode.report.flow import memory_flow

    flow = memory_flow(model, input_sequence, namespace=namespace, tokenizer=tokenizer)
    labelled, rows = len(flow.tokens) <= MOST_LABELS, len(flow.layers)
    figure = new_figure(max(7.0, min(16.0, 2 + 0.24 * len(flow.tokens))), 2.2 + 4 * (0.35 + 0.32 * rows))
    maps = (("Gate (0 closed, 1 open)", flow.gate_XT), ("Share read from the bank", flow.bank_XT),
            ("Share read from the sequence's own past", flow.own_XT), ("Share of the null slot (nothing)", flow.null_XT))
    for axes, (title, value_XT) in zip(figure.subplots(4, 1, sharex=True), maps, strict=True):
        image = axes.imshow(value_XT, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_yticks(range(rows), [f"layer {layer}" for layer in flow.layers], fontsize=8)
    if labelled:
        words = [word.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("$", r"\$") for word in flow.tokens]
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8, family="monospace")
    axes.set_xlabel("token" if labelled else "token (number in the sequence)", fontsize=9)
    figure.colorbar(image, ax=figure.axes, fraction=0.03, pad=0.01).ax.tick_params(labelsize=8)
    return finish(figure, path)
