"""The report as one HTML page: a pure function from facts to text.

The page is self-contained: style inline, charts inline SVG, no script, no request to anywhere. What comes from a corpus or
a run passes through `markup`, which escapes it. Equal facts give an equal page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmcode.report.charts import share_bars
from lmcode.report.facts import BankFacts, ReportFacts
from lmcode.report.markup import Markup, element, empty, figure, join, number, percent, size_of, table
from lmcode.report.reading import Example, ShownHit
from lmcode.report.sections import bank_charts, capacity_section, gates_section, training_section, usage_charts
from lmcode.report.style import CSS
from lmcode.version import MADE_BY

EXCERPT = 160  # characters of an experience's text that are shown


def render(facts: ReportFacts) -> str:
    """The page."""
    sections = [
        ("content", "What is in memory", content_section(facts)),
        ("usage", "Who gets read", usage_section(facts)),
        ("gates", "Gates and where the read looks", gates_section(facts)),
        ("duplicates", "Near-duplicates", duplicates_section(facts)),
        ("examples", "Retrieval examples", examples_section(facts)),
        ("capacity", "Capacity", capacity_section(facts)),
        ("training", "Training", training_section(facts)),
        ("settings", "Settings", settings_section(facts)),
    ]
    items = [element("li", element("a", title, href=f"#{name}")) for name, title, _ in sections]
    links = element("nav", element("ul", items), aria_label="Sections")
    body = [element("section", element("h2", title), content, id=name) for name, title, content in sections]
    head = element("head", element("meta", charset="utf-8"), element("title", f"{facts.title} – memory report"),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("style", Markup(CSS)))
    footer = element("footer", f"{MADE_BY} This page asks for nothing from the network and runs no script.")
    page = element("html", head, element("body", header(facts), links, element("main", body), footer), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def header(facts: ReportFacts) -> Markup:
    """Title and the numbers that say most."""
    step = "" if facts.step is None else f"after step {facts.step:,}"
    ranks = f"{facts.ranks} rank{'s' * (facts.ranks != 1)}"
    says = ", ".join(part for part in (step, f"memory over {ranks}" if facts.banks else "no bank") if part)
    tiles = [element("div", element("dt", name), element("dd", value, element("small", unit))) for name, value, unit in
             headline(facts)]
    return element("header", element("p", "Memory report", class_="kicker"), element("h1", facts.title),
                   element("p", f"{says[:1].upper()}{says[1:]}.", class_="lede"),
                   [element("p", note, class_="note") for note in facts.notes], element("dl", tiles, class_="tiles"))


def headline(facts: ReportFacts) -> list[tuple[str, str, str]]:
    """Name, value and unit of each tile."""
    efficiency, tiles = facts.efficiency, []
    slots, live = (sum(bank.stats[name] for bank in facts.banks) for name in ("slots", "live"))
    if facts.banks:
        tiles += [("Entries", number(live), f"of {slots:,} slots, {percent(live / slots)} full"),
                  ("Memory size", size_of(efficiency["bank_bytes"]), f"keys, values, metadata of {len(facts.banks)} "
                   f"bank{'s' * (len(facts.banks) != 1)}")]
    if facts.reading is not None:
        gain = facts.reading.loss_off - facts.reading.loss_on
        tiles.append(("What the memory is worth", f"{gain:+.3f}", "nats per token: loss "
                      f"{facts.reading.loss_off:.3f} without, {facts.reading.loss_on:.3f} with it"))
    tiles.append(("Parameters", number(efficiency["parameters"]), f"{percent(efficiency['memory_parameter_share'])} of them "
                  "serve the memories"))
    speed = facts.curves.get("perf/tokens_per_s", ([], []))[1]
    if speed:
        tiles.append(("Speed in training", number(sorted(speed)[len(speed) // 2]), "tokens/s, median of the logged steps"))
    return tiles


def per_bank(banks: Sequence[BankFacts], title: str, parts: object) -> Markup:
    """A block for one layer, with its number above it where there are several."""
    return join([element("h3", title) if len(banks) > 1 else None, parts])


def content_section(facts: ReportFacts) -> Markup:
    """How full the banks are, by layer, virtual shard and namespace."""
    if not facts.banks:
        return empty("This model has no bank: long_term_memory_slots is 0 or no layer has a long-term memory.")
    rows = [[f"layer {bank.layer}", number(bank.stats["live"]), number(bank.stats["slots"]), percent(bank.stats["fill"]),
             number(bank.stats["evicted"]), number(bank.stats["merged"]), number(bank.stats["rejected"]),
             number(bank.efficiency["namespaces"]), size_of(bank.efficiency["bank_bytes"])] for bank in facts.banks]
    overview = table(["bank", "entries", "slots", "full", "evicted", "merged", "rejected", "namespaces", "size"], rows,
                     caption="The banks, over all ranks. Evicted, merged and rejected count entries.")
    blocks = [per_bank(facts.banks, f"Layer {bank.layer}", element("div", bank_charts(bank, facts.ranks), class_="grid"))
              for bank in facts.banks]
    return join([element("p", content_lede(facts), class_="lede"), overview, blocks, experiences_table(facts)])


def experiences_table(facts: ReportFacts) -> Markup | None:
    """The newest experiences, with their words."""
    stored = facts.experiences
    if stored is None:
        return None
    rows = [[str(one), namespace, visible(text[:EXCERPT]) + "\u2026" * (len(text) > EXCERPT), number(importance)]
            for one, namespace, importance, text in stored.newest]
    return table(["experience", "namespace", "text", "importance"], rows, words=3,
                 caption=f"The newest of {stored.stored:,} stored experiences; there is room for {stored.slots:,}.")


def content_lede(facts: ReportFacts) -> str:
    """One sentence about how full and how old."""
    live, slots, evicted = (sum(bank.stats[name] for bank in facts.banks) for name in ("live", "slots", "evicted"))
    if not live:
        return "Nothing has been stored yet."
    turned = f", and it has forgotten {evicted:,} older ones: {evicted / slots:.1f} times its own size" if evicted else ""
    return f"The memory holds {live:,} entries in {slots:,} slots{turned}."


def usage_section(facts: ReportFacts) -> Markup:
    """Hit mass, age and importance."""
    if not facts.banks:
        return empty("Without a bank nothing can be read.")
    blocks = []
    for bank in facts.banks:
        used = bank.efficiency
        lede = ("No entry has been read yet." if not bank.received_E.sum() else
                f"{percent(used['never_hit_share'])} of the entries were never read. The 1\u00a0% that are read most took "
                f"{percent(used['top_1_percent_share'])} of all attention, the top 10\u00a0% took "
                f"{percent(used['top_10_percent_share'])}.")
        blocks.append(per_bank(facts.banks, f"Layer {bank.layer}", [
            element("p", lede, class_="lede"), element("div", usage_charts(bank), class_="grid"), most_read_table(bank)]))
    return join(blocks)


def most_read_table(bank: BankFacts) -> Markup | None:
    if not bank.most_read:
        return None
    rows = [[str(one["id"]), str(one["namespace"]), number(one["received"]), number(one["importance"]), number(one["age"]),
             number(one["last_hit"]), number(one["count"])] for one in bank.most_read]
    return table(["entry", "namespace", "attention", "importance", "age (steps)", "last hit (steps ago)", "merged from"],
                 rows, caption="The entries that received most attention since they were written.")


def duplicates_section(facts: ReportFacts) -> Markup:
    """What consolidation would merge."""
    found = [(f"layer {bank.layer}", threshold, share, bank.stats["live"]) for bank in facts.banks if bank.stats["live"]
             for threshold, share in bank.efficiency["near_duplicate_share"].items()]
    if not found:
        return empty("No near-duplicates were counted: there are no entries, or too many to compare them all.")
    several = len(facts.banks) > 1
    bars = share_bars([(f"{layer}, {threshold:g}" if several else f"below {threshold:g}", [("would merge", share)])
                       for layer, threshold, share, _ in found])
    rows = [[layer, number(threshold), number(round(share * live)), percent(share)]
            for layer, threshold, share, live in found]
    return join([
        element("p", "Entries whose keys point in nearly the same direction say nearly the same thing. One round of "
                "consolidation merges pairs of them, so at most half of all entries can go in one round.", class_="lede"),
        element("div", figure(bars, title="Share that one round would merge",
                              caption="By cosine distance between keys, within a namespace. A bar near 50 % means that "
                                      "almost every entry has a twin: a smaller bank, or consolidation, would lose little."),
                table(["bank", "cosine distance below", "entries that would go", "share"], rows,
                      caption="Counted on a copy; nothing was merged."), class_="grid")])


def examples_section(facts: ReportFacts) -> Markup:
    """Queries and their hits as text."""
    reading = facts.reading
    if reading is None or not reading.examples:
        return empty("There is no example to show: the model has no bank, or no text was given, or nothing was found.")
    lede = (f"{', '.join(reading.names)}: {reading.tokens:,} tokens that were read window by window with a bank of their "
            "own, as in training. Highlighted is what came next: in the text itself, and after the earlier place that the "
            "memory pointed at. The first examples of a layer are those where a single hit got most attention; those marked "
            "\u201cchosen blindly\u201d stand at fixed places, whatever came of them. A bar is a hit\u2019s share of the "
            "attention over all hits, of which the best are shown. Line ends are shown as \u21b5, long gaps are shortened.")
    return join([element("p", lede, class_="lede"),
                 element("div", [example_card(one) for one in reading.examples], class_="examples")])


def example_card(example: Example) -> Markup:
    better = example.loss_on < example.loss_off
    where = f"{example.source}; layer {example.layer}, head {example.head}{'; chosen blindly' if example.blind else ''}"
    came = element("mark", visible(example.came) or "end of document")
    loss = element("span", f"{example.loss_on:.2f} nats with the memory, {example.loss_off:.2f} without",
                   class_="right" if better else "wrong")
    return element("article", element("p", where, class_="where"),
                   element("pre", visible(example.before).lstrip(), came),
                   element("div", element("span", "loss of what came: ", loss),
                           element("span", f"{percent(example.share)} of this head\u2019s softmax went to the bank"),
                           class_="hit-facts"),
                   element("ol", [hit_item(hit) for hit in example.hits], class_="hits"), class_="card example")


def hit_item(hit: ShownHit) -> Markup:
    verdict = None
    if hit.after is not None:
        verdict = element("span", "same next token" if hit.right else "another next token",
                          class_="right" if hit.right else None)
    text = (element("p", "Its text is not known: entries keep vectors, and it was not written from this document.",
                    class_="empty") if hit.before is None else
            element("pre", visible(hit.before).lstrip(), element("mark", visible(hit.after or "") or "end of document")))
    meter = element("span", element("span", style=f"width:{100 * hit.weight:.0f}%"), class_="meter", aria_hidden="true")
    return element("li", element("div", meter, element("span", percent(hit.weight)),
                                 element("span", f"score {hit.score:.2f}"), element("span", hit.source), verdict,
                                 class_="hit-facts"), text)


def visible(text: str) -> str:
    """Text on as few lines as it can be: line ends are shown, gaps of more than two blanks are shortened."""
    return re.sub(" {3,}", "  ", text.replace("\r", "").replace("\n", "\u21b5 "))


def settings_section(facts: ReportFacts) -> Markup:
    """Everything that decided the run."""
    if not facts.settings:
        return empty("This report was made from a model without a run folder: there are no settings to show.")
    rows = [[name, str(value)] for name, value in facts.settings.items()]
    return element("details", element("summary", f"All {len(rows)} settings of the run"),
                   table(["setting", "value"], rows, caption="As resolved when the run began (config.yaml).", words=2))
