"""The sections of the page that are mostly charts: how full, how used, gates, capacity, training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lmcode.report.charts import Line, areas, histogram, line_chart, share_bars
from lmcode.report.facts import BankFacts, ReportFacts
from lmcode.report.markup import Markup, element, empty, figure, join, number, percent, table

BINS = 24
PHASES = ("forward", "backward", "search", "exchange", "optimizer", "commit")  # of a step, as they are stacked
RECEIVED = ((0.0, "never"), (0.1, "< 0.1"), (0.3, "< 0.3"), (1.0, "< 1"), (3.0, "< 3"), (10.0, "< 10"),
            (math.inf, "\u2265 10"))  # upper ends of the bins of attention received, and their names


def bins(value_E: np.ndarray) -> tuple[list[int], list[float]]:
    """Counts and edges of a histogram; whole numbers get bins of whole width."""
    if not len(value_E):
        return [], []
    low, high = float(value_E.min()), float(value_E.max())
    if value_E.dtype.kind == "i":
        width = max(1, math.ceil((high - low + 1) / BINS))
        edges = np.arange(low, high + width + 1, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1e-3, BINS + 1)
    counts, edges = np.histogram(value_E, edges)
    return counts.tolist(), edges.tolist()


def bank_charts(bank: BankFacts, ranks: int) -> list[Markup]:
    """How full the virtual shards and the ranks are."""
    fill = [live / slots for live, slots in zip(bank.shard_live_X, bank.shard_slots_X, strict=True)]
    by_rank = [[place for place, rank in enumerate(bank.shard_rank_X) if rank == one] for one in range(ranks)]
    ranks_rows = [(f"rank {one}", [("filled", sum(bank.shard_live_X[s] for s in shards)
                                    / max(1, sum(bank.shard_slots_X[s] for s in shards)))])
                  for one, shards in enumerate(by_rank[:16])]
    spread = f"from {percent(min(fill))} to {percent(max(fill))}"
    return [
        figure(histogram(bank.shard_live_X, [], x="virtual shard", labels=every(len(fill))),
               title="Entries by virtual shard",
               caption=f"Virtual shards are filled {spread}. Ids are spread by a hash, so bars of equal height are what "
                       "should be seen; each shard forgets on its own."),
        figure(share_bars(ranks_rows), title="Full, by rank",
               caption=f"The {len(fill)} virtual shards as {ranks} rank{'s hold' if ranks != 1 else ' holds'} them, in per "
                       f"cent of their slots{'; the first 16 are shown' if ranks > 16 else ''}. Any other number of "
                       "ranks would hold the same entries."),
        figure(share_bars([(str(name), [(f"{entries:,} entries", entries / max(1, bank.stats["live"]))])
                           for name, entries in bank.namespaces]), title="Largest namespaces",
               caption=f"Share of all entries of the largest among {bank.efficiency['namespaces']:,} namespaces; in "
                       "training one is one reading of a document. One that takes all the room crowds out the others.")]


def every(count: int) -> list[str]:
    """Numbers as labels, thinned out where there are too many to stand side by side."""
    step = math.ceil(count / 16)
    return [str(one) if one % step == 0 else "" for one in range(count)]


def usage_charts(bank: BankFacts) -> list[Markup]:
    """Attention received, age, importance."""
    uppers = [upper for upper, _ in RECEIVED]
    place_E = np.where(bank.received_E == 0, 0, np.searchsorted(uppers, bank.received_E, side="right"))
    received = np.bincount(np.minimum(place_E, len(uppers) - 1), minlength=len(uppers)).tolist() if len(place_E) else []
    return [
        figure(histogram(received, [], x="attention received (units)", labels=[name for _, name in RECEIVED]),
               title="Attention received",
               caption="One unit is the whole softmax of one token and head. A high first bar means dead weight: entries "
                       "that nobody ever asked for."),
        figure(histogram(*bins(bank.age_E), x="age (steps since written)"), title="Age of the entries",
               caption="A flat shape that ends at once is a ring that turns over at an even pace; a tail to the right are "
                       "entries that were important enough for a second chance."),
        figure(histogram(*bins(bank.importance_E), x="importance"), title="Importance",
               caption="It starts between 0.5 and 1.5 with the surprise of the token and rises with the attention that the "
                       "entry receives; it adds to the score of an entry when it is searched for.")]


def gates_section(facts: ReportFacts) -> Markup:
    """Gates and shares of the read's softmax, and the learned numbers behind them."""
    if facts.reading is None or not facts.reading.layers:
        return join([empty("No text was read, so no gate was seen."), learned_table(facts.banks)])
    layers = facts.reading.layers
    shares = [(f"layer {layer}", [("own past", one.own_share), ("bank", one.hit_share), ("null slot", one.null_share)])
              for layer, one in layers.items()]
    charts = [figure(share_bars(shares), title="Where the read looked", legend=("own past", "bank", "null slot"),
                     caption="Mean share of the softmax over tokens and heads: the window\u2019s own earlier tokens, the "
                             "retrieved entries, and the null slot, which means: nothing was found.")]
    for layer, one in layers.items():
        counts, edges = np.histogram(np.clip(one.gate_X, 0, 1), np.linspace(0, 1, 21))
        charts.append(figure(
            histogram(counts.tolist(), edges.tolist(), x="gate (0 closed, 1 open)", y="tokens"),
            title=f"Gate of layer {layer}",
            caption=f"Mean {one.gate_X.mean():.3f}. The gate scales what the memory adds to each token; a bar at 0 are "
                    "tokens that did not want it."))
    gates = layer_lines(facts, "gate_mean")
    if gates:
        charts.append(figure(line_chart(gates, x="step", y="gate, mean over tokens", low=0, high=1),
                             title="Gates while training", legend=[line.name for line in gates],
                             caption="Whether the layers opened their gates as they learned to use the memory."))
    right = ", ".join(f"{percent(one.first_right)} in layer {layer}" for layer, one in layers.items())
    lede = f"Best hits of a head that were followed by the very token that really came next: {right}."
    return join([element("p", lede, class_="lede"), element("div", charts, class_="grid"), learned_table(facts.banks)])


def learned_table(banks: Sequence[BankFacts]) -> Markup | None:
    """Temperature, bias on retrieved entries and null logit of every head."""
    rows = [[f"layer {bank.layer}, head {head}", *map(number, numbers)] for bank in banks
            for head, numbers in enumerate(zip(bank.temperature_H, bank.bias_H, bank.null_H, strict=True))]
    if not rows:
        return None
    return table(["head", "temperature", "bias on hits (logit)", "null slot (logit)"], rows,
                 caption="What the read has learned: a higher temperature looks more sharply, a lower bias holds hits back.")


def layer_lines(facts: ReportFacts, measure: str) -> list[Line]:
    """The curves of one memory metric, a line for each layer."""
    return [Line(f"layer {bank.layer}", *facts.curves[f"memory/L{bank.layer}/{measure}"]) for bank in facts.banks
            if f"memory/L{bank.layer}/{measure}" in facts.curves]


def capacity_section(facts: ReportFacts) -> Markup:
    """Recall against the number of stored items."""
    if facts.capacity is None:
        return empty("The capacity was not measured: the model has no bank, or there was too little text.")
    top_k, charts, rows = facts.capacity["top_k"], [], []
    for layer, curve in facts.capacity["layers"].items():
        lines = [Line("found first", curve["stored"], curve["recall_at_1"]),
                 Line(f"among the best {top_k}", curve["stored"], curve["recall_at_k"]),
                 Line("first hit says the right token", curve["stored"], curve["next_at_1"])]
        charts.append(figure(
            line_chart(lines, x="items stored (logarithmic)", y="share of the items asked for", low=0, high=1, log_x=True),
            title=f"Recall of layer {layer}", legend=[line.name for line in lines],
            caption="Each item is asked for in the context it was written in, among all items stored. The bank has "
                    f"{facts.capacity['slots']:,} slots: to the right of that, and a little before, old items are gone."))
        for values in zip(*curve.values(), strict=True):
            named = dict(zip(curve, values, strict=True))
            rows.append([f"layer {layer}", number(named["stored"]), number(named["live"]), percent(named["recall_at_1"]),
                         percent(named["recall_at_k"]), percent(named["next_at_1"])])
    numbers = table(["bank", "stored", "still there", "found first", f"among the best {top_k}", "right next token"], rows,
                    caption="The same in numbers; up to 256 items are asked for at each size, by every head.")
    lede = "How many items the memory can keep apart: the text is stored in an empty copy of the bank and asked for again."
    return join([element("p", lede, class_="lede"), element("div", charts, numbers, class_="grid")])


def training_section(facts: ReportFacts) -> Markup:
    """Losses, speed, phases of a step, and the memory over time."""
    curves = facts.curves
    if not curves:
        return empty("There is no metrics.jsonl: this model\u2019s training was not recorded, or the run was not given.")
    losses = [Line(name, *curves[key]) for key, name in (
        ("train/loss", "training"), ("eval/loss", "held out"), ("eval/loss_memory_off", "held out, memory off"),
        ("eval/loss_memory_shuffled", "held out, memory of another document"),
        ("eval/loss_memory_random", "held out, entries drawn by lot")) if key in curves]
    missing = [name for key, name in (("eval/loss_memory_off", "off"), ("eval/loss_memory_shuffled", "of another document"))
               if key not in curves and "eval/loss" in curves]
    charts: list[Markup | None] = [figure(line_chart(losses, x="step", y="loss (nats per token)"), title="Loss",
                     legend=[line.name for line in losses],
                     caption="Held-out loss with the memory should lie below that without it, and below that with the "
                             "memory of another document: then it is the content that helps."
                             + "".join(f" Not measured: memory {name}." for name in missing))]
    charts += [lone(curves, "perf/tokens_per_s", "Speed", "tokens/s", "All ranks together. It falls while the bank fills, "
                    "and dips when the machine has other work."), phases(facts),
               lone(curves, "train/learning_rate", "Learning rate", "per step", "Warm-up, then decay."),
               lone(curves, "train/grad_norm", "Gradient norm", "norm before clipping",
                    "Spikes that grow with time are a sign of instability.")]
    for measure, title, unit, caption in (
            ("fill", "How full the memory is", "share of the slots", "At 1 every new entry makes an older one go."),
            ("hit_mass", "Attention to the bank", "share of the softmax", "How much of the read went to retrieved entries."),
            ("age_p50", "Age of the hits", "steps, median", "How far back the memory is used."),
            ("recall_at_k", "What the search finds", "share of the exact hits",
             "A sample of queries is searched exactly, too: at 1 the faster search has missed nothing.")):
        lines = layer_lines(facts, measure)
        if not lines and layer_lines(facts, "fill"):
            charts.append(empty(f"{title}: not measured."))
        if lines:
            charts.append(figure(line_chart(lines, x="step", y=unit, low=0), title=title,
                                 legend=[line.name for line in lines], caption=caption))
    return element("div", charts, class_="grid")


def lone(curves: Mapping[str, tuple[list[float], list[float]]], key: str, title: str, unit: str,
         caption: str) -> Markup | None:
    """A chart of one curve; None where it was not recorded."""
    if key not in curves:
        return None
    return figure(line_chart([Line(title.lower(), *curves[key])], x="step", y=unit, low=0), title=title, caption=caption)


def phases(facts: ReportFacts) -> Markup | None:
    """Where the time of a step went, stacked."""
    found = [facts.curves.get(f"perf/{phase}_ms", ([], [])) for phase in PHASES]
    steps = found[0][0]
    if not steps or any(x != steps for x, _ in found):
        return None
    layers = [(phase, [max(0.0, value) for value in y]) for phase, (_, y) in zip(PHASES, found, strict=True)]
    drawn = areas(steps, layers, x_label="step", y_label="ms per step")
    return figure(drawn, title="Where a step spends its time", legend=PHASES,
                  caption="Mean over ranks. Search and exchange are the memory's share; both grow until the bank is full.")
