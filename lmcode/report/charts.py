"""Charts as inline SVG, for the page: no script, no request, colours from the page's style sheet.

Drawings are 380 units wide and scale with their column, so their letters have about the size of the text around them on a
telephone and on a wide screen. Points carry a <title>, which browsers show on hovering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmcode.report.markup import Markup, element, empty, join, number, percent

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


def short(value: float) -> str:
    """A number as an axis has room for: 65k, 1.2M, 0.05, 2e-3."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(at * step, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """The axes of a chart, from data to units of the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_x: bool = False

    def x(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log_x else v for v in (self.x_low, self.x_high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM), 2)

    def drawn(self, x_label: str, y_label: str, *, numbered: bool = True) -> list[Markup]:
        """Grid, tick labels and axis labels; the x axis has numbers if it is `numbered`."""
        parts = []
        for tick in ticks(self.y_low, self.y_high):
            parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=self.y(tick), y2=self.y(tick), class_="grid"))
            parts.append(element("text", short(tick), x=LEFT - 6, y=self.y(tick) + 3.5, text_anchor="end"))
        for tick in self._x_ticks() if numbered else ():
            parts.append(element("text", short(tick), x=self.x(tick), y=HEIGHT - BOTTOM + 14, text_anchor="middle"))
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
        parts.append(element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle",
                             class_="label"))
        parts.append(element("text", y_label, transform=f"translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)",
                             text_anchor="middle", class_="label"))
        return parts

    def _x_ticks(self) -> list[float]:
        if not self.log_x:
            return ticks(self.x_low, self.x_high)
        powers = range(math.floor(math.log10(self.x_low)), math.ceil(math.log10(self.x_high)) + 1)
        return [10.0**power for power in powers if self.x_low <= 10.0**power <= self.x_high]


def drawing(parts: object, label: str, height: float = HEIGHT) -> Markup:
    """An svg element that is as wide as its column; `label` says to a screen reader what it shows."""
    return element("svg", parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def line_chart(lines: Sequence[Line], *, x: str, y: str, low: float | None = None, high: float | None = None,
               log_x: bool = False) -> Markup:
    """Lines over common axes; the y axis runs from `low` to `high`, or as far as the data do."""
    points = [point for line in lines for point in line.points]
    if not points:
        return empty("No numbers were recorded for this chart.")
    xs, ys = zip(*points, strict=True)
    bottom, top = min(ys) if low is None else low, max(ys) if high is None else high
    margin = 0.06 * (top - bottom) or abs(top) * 0.1 or 1.0
    frame = Frame(min(xs), max(xs), bottom - margin * (low is None), top + margin * (high is None), log_x)
    parts = frame.drawn(x, y)
    for number_of_line, line in enumerate(lines):
        parts += _drawn_line(frame, line, number_of_line % 6)
    return drawing(parts, f"{y} over {x}: {', '.join(line.name for line in lines)}")


def _drawn_line(frame: Frame, line: Line, colour: int) -> list[Markup]:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    parts = [element("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=f"line stroke{colour}")]
    radius = 2.6 if len(places) <= 24 else 5  # the marks of a long line are there for hovering only
    kind = f"fill{colour}" if len(places) <= 24 else "unseen"
    parts += [element("circle", element("title", f"{line.name}: {number(y)} at {number(x)}"), cx=px, cy=py, r=radius,
                      class_=kind) for (px, py), (x, y) in zip(places, line.points, strict=True)]
    return parts


def histogram(counts: Sequence[int], edges: Sequence[float], *, x: str, y: str = "entries",
              labels: Sequence[str] = ()) -> Markup:
    """Bars over equal bins; with `labels` these stand below the bars, instead of an axis of numbers."""
    if not len(counts) or not sum(counts):
        return empty("There is nothing to count here yet.")
    frame = Frame(0 if labels else edges[0], len(counts) if labels else edges[-1], 0, max(counts) * 1.06)
    parts = frame.drawn(x, y, numbered=not labels)
    if labels:
        parts += [element("text", word, x=frame.x(place + 0.5), y=HEIGHT - BOTTOM + 14, text_anchor="middle")
                  for place, word in enumerate(labels)]
    for place, count in enumerate(counts):
        left, right = (frame.x(one) for one in ((place, place + 1) if labels else edges[place:place + 2]))
        what = labels[place] if labels else f"{number(edges[place])} to {number(edges[place + 1])}"
        parts.append(element("rect", element("title", f"{what}: {count:,}"), x=left + 0.6, y=frame.y(count),
                             width=max(0.4, round(right - left - 1.2, 2)), height=round(HEIGHT - BOTTOM - frame.y(count), 2),
                             class_="fill0"))
    return drawing(parts, f"{y} by {x}")


def share_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> Markup:
    """A horizontal bar for each row, cut into named shares that add up to 1 at most."""
    if not rows:
        return empty("There is nothing to divide here yet.")
    parts, width = [], WIDTH - 88 - RIGHT
    for place, (label, shares) in enumerate(rows):
        y, left = 8 + 26 * place, 88.0
        parts.append(element("text", label, x=82, y=y + 13, text_anchor="end"))
        parts.append(element("rect", x=left, y=y, width=width, height=18, class_="empty-bar"))
        for colour, (name, share) in enumerate(shares):
            parts.append(element("rect", element("title", f"{label}, {name}: {percent(share)}"), x=round(left, 2), y=y,
                                 width=round(share * width, 2), height=18, class_=f"fill{colour % 6}"))
            if share > 0.13:
                parts.append(element("text", percent(share), x=round(left + share * width / 2, 2), y=y + 13,
                                     text_anchor="middle", class_="on-bar"))
            elif len(shares) == 1:
                parts.append(element("text", percent(share), x=round(left + share * width + 5, 2), y=y + 13))
            left += share * width
    return drawing(parts, "shares", height=16 + 26 * len(rows))


def areas(x: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], *, x_label: str, y_label: str) -> Markup:
    """Areas stacked on each other; every layer has a number for each x."""
    if len(x) < 2 or not layers:
        return empty("No numbers were recorded for this chart.")
    base = [0.0] * len(x)
    tops = []
    for name, values in layers:
        top = [below + value for below, value in zip(base, values, strict=True)]
        tops.append((name, base, top))
        base = top
    frame = Frame(min(x), max(x), 0, max(base) * 1.05 or 1.0)
    parts = frame.drawn(x_label, y_label)
    for colour, (name, low, high) in enumerate(tops):
        around = [*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))]
        mean = sum(top - bottom for top, bottom in zip(high, low, strict=True)) / len(x)
        parts.append(element("polygon", element("title", f"{name}: {number(mean)} on average"),
                             points=" ".join(f"{frame.x(one)},{frame.y(other)}" for one, other in around),
                             class_=f"fill{colour % 6}"))
    return drawing(join(parts), f"{y_label} over {x_label}: {', '.join(name for name, _ in layers)}")
