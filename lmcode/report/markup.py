"""HTML as values: text is escaped unless it is `Markup` already, so that no corpus can put a tag into a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = ("meta", "br", "line", "rect", "circle", "path", "polyline", "polygon")


class Markup(str):
    """Text that is HTML already. Made by the functions of this module and by nobody who holds foreign text."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element. Children are Markup, text (escaped), numbers, or iterables of these; None is left out.

    Attributes: `class_` is class, other underscores are hyphens; None is left out.
    """
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)
    if name in VOID and not children:
        return Markup(f"<{name}{shown}/>" if name not in ("meta", "br") else f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """Children one after the other, as `element` takes them."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, (str, int, float)):
            parts.append(escape(str(child)))
        elif child is not None:
            parts.append(join(child))
    return Markup("".join(parts))


def number(value: float | None, digits: int = 3) -> str:
    """A number as people write it: 65,536, 0.413, 3.26e-05; an en dash for None and nan."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """0.4131 -> '41.3 %', with a blank that does not break."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}\u00a0%"


def size_of(count: float) -> str:
    """Bytes with a unit: 71.1 MB."""
    power = min(4, int(math.log10(max(count, 1)) // 3))
    return f"{number(count / 1000**power)} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str, words: int = 1) -> Markup:
    """A table in a box of its own that scrolls sideways. The first `words` columns are words, the others numbers."""
    def cells(kind: str, row: Sequence[Any]) -> list[Markup]:
        return [element(kind, cell, class_="words" if place < words else None) for place, cell in enumerate(row)]

    body = [element("tr", cells("td", row)) for row in rows]
    inner = element("table", element("thead", element("tr", cells("th", headers))), element("tbody", body))
    box = element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return element("div", element("p", caption, class_="caption"), box, class_="table")


def figure(drawing: Markup, *, title: str, caption: str, legend: Sequence[str] = ()) -> Markup:
    """A drawing with a title, a legend (colours in the order of the names) and a caption that says what to see in it."""
    names = [element("li", element("span", class_=f"swatch fill{place % 6}"), name) for place, name in enumerate(legend)]
    return element("figure", element("h3", title), element("ul", names, class_="legend") if names else None, drawing,
                   element("figcaption", caption))


def empty(text: str) -> Markup:
    """What stands where there is nothing to show."""
    return element("p", text, class_="empty")
