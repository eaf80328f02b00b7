"""The tier hnsw: graphs propose, exact scoring decides; nothing stale, the same on any number of ranks; files judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.files.tensors import write_tensors
from lmcode.memory import LongTermMemory, lifecycle, planning
from lmcode.memory.search import choice, faiss_index, graphs, hnsw, plan
from lmcode.memory.search.faiss_index import Links
from lmcode.memory.search.graphs import Content, origin_of, read_graph, remove_graphs, write_graph
from tests.helpers.ranks import run_on_ranks

pytest.importorskip("faiss")
H, D, K, S = 2, 16, 8, 4


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hnsw, "LEAST_ENTRIES", 50)


def clustered(seed: int, count: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    centre = torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    key = centre[torch.randint(40, (H, count), generator=chance)] + 0.4 * torch.randn(H, count, D, generator=chance)
    return F.normalize(key, dim=-1)


def make_bank(*, slots: int = 2000, group: Group | None = None, **settings: object) -> LongTermMemory:
    hnsw.LEAST_ENTRIES = 50  # in processes of their own; put back by the fixture elsewhere
    config = MemoryConfig(**{"tier": "hnsw", "scope": "global", "virtual_shards": S, "recall_queries": 0, **settings})
    return LongTermMemory(heads=H, head_dim=D, slots=slots, top_k=K, config=config, group=group or Group.world())


def filled(count: int = 1200, **settings: object) -> LongTermMemory:
    bank = make_bank(**settings)
    importance = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.5
    bank.write(clustered(0, count), clustered(0, count), torch.arange(count) % 3, importance, 0, torch.arange(count) % 5)
    return bank


def names(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def share_found(bank: LongTermMemory, query: Tensor) -> float:
    hits = bank.search(query, names(query.shape[1]))
    exact = bank.search(query, names(query.shape[1]), tier="exact")
    return float((hits.id_HNK.unsqueeze(-1) == exact.id_HNK.unsqueeze(-2)).any(-1).float().mean())


# --- what is found -------------------------------------------------------------------------------------------------


def test_most_is_found_and_its_scores_are_those_of_exact_search() -> None:
    bank, query = filled(), 7 * clustered(9, 200)
    before = bank.search(query, names(200))
    planning.build_graphs(bank)
    assert bank.shard.searcher.graphs.nodes == 1200
    assert share_found(bank, query) >= 0.95
    bank.use(replace(bank.plan, width=K))
    assert share_found(bank, query) < 1.0, "a narrow search misses some, so it was no exact one"
    hits = bank.search(query, names(200))
    exact = {(h, n, one): score for h in range(H) for n in range(200) for one, score in
             zip(before.id_HNK[h, n].tolist(), before.score_HNK[h, n].tolist(), strict=True)}
    same = [exact[h, n, one] == hits.score_HNK[h, n, place].item() for h in range(H) for n in range(200)
            for place, one in enumerate(hits.id_HNK[h, n].tolist()) if (h, n, one) in exact]
    assert len(same) > 1000 and all(same)
    assert bool((hits.score_HNK.diff(dim=-1) <= 0).all())
    for one, other in zip(bank.look_up(query[:, :6], names(6)), bank.attend(query, hits), strict=True):
        torch.testing.assert_close(one, other[:, :6])


def test_reads_of_one_document_and_of_namespaces_are_exact() -> None:
    bank, query = filled(), 7 * clustered(9, 40)
    planning.build_graphs(bank)
    bank.use(replace(bank.plan, width=K))
    for scope in ("document", [0, 2]):
        hits = bank.search(query, names(40), scope=scope)
        assert torch.equal(hits.id_HNK, bank.search(query, names(40), scope=scope, tier="exact").id_HNK)


def test_a_query_that_may_not_see_its_neighbours_is_answered_with_others() -> None:
    bank = make_bank()
    key = F.normalize(torch.ones(H, 1200, D) + 0.01 * clustered(0, 1200), dim=-1)
    document = (torch.arange(1200) < 700).long()
    key[:, 700:] = clustered(3, 500)
    bank.write(key, key, torch.ones(1200).long(), None, 0, document)
    planning.build_graphs(bank)
    query = F.normalize(torch.ones(H, 3, D), dim=-1)
    about = torch.tensor([1, 0, 1])  # query 0 and 2 are of the document that 700 entries near them are of
    hits = bank.search(query, names(3), about)
    wanted = bank.search(query, names(3), about, tier="exact")
    assert torch.equal(hits.id_HNK[:, [0, 2]], wanted.id_HNK[:, [0, 2]]) and bool((hits.id_HNK[:, [0, 2]] >= 700).all())
    assert bool((hits.id_HNK[:, 1] < 700).all())
    nodes, later = bank.shard.searcher.graphs.nodes, F.normalize(torch.ones(H, 60, D) + 0.01 * clustered(8, 60), dim=-1)
    bank.write(later, later, torch.ones(60).long(), None, 0, (torch.arange(60) < 50).long())
    hits = bank.search(query, names(3), about)
    wanted = bank.search(query, names(3), about, tier="exact")
    assert bank.shard.searcher.graphs.nodes == nodes and torch.equal(hits.id_HNK[:, [0, 2]], wanted.id_HNK[:, [0, 2]])


def test_who_is_deleted_or_overwritten_is_never_found_and_who_came_last_is() -> None:
    bank = filled(slots=1200 + 8 * S)
    planning.build_graphs(bank)
    query = bank.shard.key_HMD[:, :1].clone() * 7
    best = int(bank.search(query, names(1)).id_HNK[0, 0, 0])
    nodes = bank.shard.searcher.graphs.nodes
    assert bank.delete(ids=[best]) == 1
    assert 0 < bank.shard.searcher.graphs.nodes < nodes, "no graph keeps its key, and those of other virtual shards stay"
    assert best not in bank.search(query, names(1)).id_HNK
    planning.build_graphs(bank)
    former, nodes = set(bank.shard.columns["id"].tolist()) - {-1}, bank.shard.searcher.graphs.nodes
    new = F.normalize(clustered(77, 60) + 0.1 * torch.ones(D), dim=-1)
    ids = bank.write(new, new, names(60))
    assert bank.shard.searcher.graphs.nodes == nodes == len(former), "changes are few, and graphs stay"
    hits = bank.search(7 * new, names(60))
    assert torch.equal(hits.id_HNK[0, :, 0], ids), "the newest are found by the next search"
    live = set(bank.shard.columns["id"].tolist())
    assert set(hits.id_HNK.flatten().tolist()) <= live
    assert all(len(set(row)) == K for row in hits.id_HNK.flatten(0, 1).tolist()), "nobody twice"
    gone = sorted(former - live)
    at_gone = bank.search(7 * clustered(0, 1200)[:, gone], names(len(gone)))
    assert not np.isin(at_gone.id_HNK.numpy(), gone).any() and len(gone) > 1


def test_a_graph_with_many_changes_is_given_up_and_made_anew() -> None:
    bank = filled()
    planning.build_graphs(bank)
    bank.write(clustered(4, 700), clustered(4, 700), names(700))
    assert bank.shard.searcher.graphs.nodes == 0
    query = 7 * clustered(9, 50)
    assert torch.equal(bank.search(query, names(50), tier="hnsw").id_HNK, bank.search(query, names(50), tier="exact").id_HNK)
    planning.build_graphs(bank)
    assert bank.shard.searcher.graphs.nodes == 1900 and share_found(bank, query) >= 0.95


def test_attention_changes_scores_and_no_graph() -> None:
    bank, query = filled(importance_growth=5.0), 7 * clustered(9, 30)
    planning.build_graphs(bank)
    hits = bank.search(query, names(30))
    bank.commit([], [hits], step=1)
    again = bank.search(query, names(30))
    assert bank.shard.searcher.graphs.nodes == 1200 and not torch.equal(again.score_HNK, hits.score_HNK)
    exact = bank.search(query, names(30), tier="exact")
    found = again.id_HNK[..., 0] == exact.id_HNK[..., 0]
    assert torch.equal(again.score_HNK[..., 0][found], exact.score_HNK[..., 0][found])


# --- ranks ---------------------------------------------------------------------------------------------------------


def life(group: Group | None = None, **settings: object) -> tuple[list[Tensor], int]:
    """What a bank finds in a life with writes, deletions and graphs that come and go, in order, on all ranks together; and
    how many hits are not those of an exact search."""
    group = group or Group.world()
    seen: list[Tensor] = []
    missed = 0

    def ask(seed: int) -> None:
        nonlocal missed
        query, mine = 7 * clustered(seed, 80), slice(group.rank * 80 // group.size, (group.rank + 1) * 80 // group.size)
        document = torch.where(torch.arange(80) % 4 == 0, torch.arange(80) % 5, -1)  # from most queries nothing is hidden
        arguments = query[:, mine], torch.arange(80)[mine] % 3, document[mine]
        missed += int((bank.search(*arguments, tier="exact").id_HNK != bank.search(*arguments).id_HNK).sum())
        hits = bank.search(*arguments)
        parts = group.all_gather_object((hits.score_HNK, hits.id_HNK))
        seen.extend(torch.cat([part[kind] for part in parts], 1) for kind in range(2))
        bank.commit([], [hits], step=seed)

    bank = filled(group=group, slots=1300, **settings)
    ask(1)
    planning.build_graphs(bank)
    bank.use(replace(bank.plan, width=K))  # misses, and must miss the same everywhere
    for seed in range(2, 5):
        ask(seed)
        bank.write(clustered(seed, 40), clustered(seed, 40), torch.arange(40) % 3, None, seed, torch.arange(40) % 5)
    bank.delete(ids=[int(seen[-1][0, 0, 0]), int(seen[-1][1, 3, 1])])
    bank.consolidate(0.02)
    ask(6)
    planning.build_graphs(bank)
    ask(7)
    fork = lifecycle.fork(bank, empty=False)
    assert fork.shard.searcher.graphs.frozen and fork.shard.searcher.graphs.nodes == bank.shard.searcher.graphs.nodes
    bank = fork
    ask(7)
    return seen, missed


def on_ranks() -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The bank is sliced over four ranks, and over two in each of two memory groups."""
    return life()[0], life(group_size=2)[0], one_is_slow()


def test_the_same_hits_on_any_number_of_ranks_and_graphs_from_the_same_search_on() -> None:
    alone, missed = life(Group())
    assert missed, "or this shows nothing"
    for *lives, in_use in run_on_ranks(on_ranks, 4):
        for seen in lives:
            assert all(torch.equal(part, wanted) for part, wanted in zip(seen, alone, strict=True))
        assert in_use == [0, 0, 1]


def one_is_slow() -> list[int]:
    """Whether graphs are in use after each of three searches; only rank 0 has its own before the third one."""
    bank, query, build = filled(), 7 * clustered(9, 12), faiss_index.build_graph
    may_go = graphs.threading.Event()

    def slow(key: np.ndarray, **rest: Callable[[], bool]) -> object:
        may_go.wait()
        return build(key, **rest)

    faiss_index.build_graph = slow if bank.group.rank else build
    seen = []
    for turn in range(3):
        if turn == 2:
            may_go.set()
            bank.shard.searcher.graphs.wait()
        elif bank.group.rank == 0:
            bank.shard.searcher.graphs.wait()
        bank.group.barrier()
        hits = bank.search(query, names(12))
        seen.append(int(bank.shard.searcher.graphs.nodes > 0))
        assert turn == 2 or torch.equal(hits.id_HNK, bank.search(query, names(12), tier="exact").id_HNK)
    return seen


# --- when graphs are made ------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[graphs.threading.Event]:
    """Graphs are not made before this is set."""
    may_go, build = graphs.threading.Event(), faiss_index.build_graph

    def waiting(key: np.ndarray, **rest: Callable[[], bool]) -> object:
        may_go.wait()
        return build(key, **rest)

    monkeypatch.setattr(faiss_index, "build_graph", waiting)
    yield may_go
    may_go.set()


def test_until_graphs_are_ready_answers_are_exact_and_what_changes_meanwhile_is_seen(
        held: graphs.threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcode")
    bank, query = filled(recall_queries=12), 7 * clustered(9, 30)
    planning.prepare(bank)
    assert bank.shard.searcher.graphs.building
    exact = bank.search(query, names(30), tier="exact").id_HNK
    assert torch.equal(bank.search(query, names(30)).id_HNK, exact) and bank.shard.searcher.graphs.building
    new = clustered(50, 20)
    ids = bank.write(new, new, names(20))
    held.set()
    bank.shard.searcher.graphs.wait()
    assert torch.equal(bank.search(7 * new, names(20)).id_HNK[0, :, 0], ids)
    assert bank.shard.searcher.graphs.nodes == 1200, "those that were there when it was begun"
    assert "graphs of 1200 entries of this rank are in use; recall@8" in caplog.text


def test_a_deletion_ends_what_is_in_the_making(held: graphs.threading.Event) -> None:
    bank = filled()
    planning.prepare(bank)
    making = bank.shard.searcher.graphs._building
    graphs.threading.Timer(0.05, held.set).start()
    bank.delete(ids=[3])
    assert not bank.shard.searcher.graphs.building and making.done and not making._contents


def test_small_banks_and_copies_make_none() -> None:
    bank, query = make_bank(), 7 * clustered(9, 5)
    bank.write(clustered(0, 90), clustered(0, 90), names(90))
    planning.prepare(bank)
    bank.search(query, names(5))
    assert not bank.shard.searcher.graphs.building and bank.shard.searcher.graphs.nodes == 0
    other = lifecycle.fork(filled(), empty=False)
    other.write(clustered(8, 800), clustered(8, 800), names(800))
    other.search(query, names(5))
    assert not other.shard.searcher.graphs.building and other.shard.searcher.graphs.nodes == 0


def test_what_cannot_be_made_is_said_and_search_stays_exact(monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(faiss_index, "build_graph", lambda *_, **__: [][0])
    bank, query = filled(), 7 * clustered(9, 5)
    planning.build_graphs(bank)
    assert "graphs could not be made, and search stays exact: IndexError" in caplog.text
    caplog.clear()
    for _ in range(2):
        assert torch.equal(bank.search(query, names(5)).id_HNK, bank.search(query, names(5), tier="exact").id_HNK)
    assert not caplog.text and not bank.shard.searcher.graphs.building, "nobody tries again until asked"


def test_recall_is_measured_when_graphs_come_into_use_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcode")
    bank = filled(recall_queries=50, recall_target=1.0)
    planning.build_graphs(bank)
    bank.use(replace(bank.plan, width=K))
    bank.search(7 * clustered(9, 200), names(200))
    assert bank.plan.width > K and "entries in view from now on: recall 0." in caplog.text
    assert "graphs of 1200 entries of this rank are in use; recall@8 1.0000" in caplog.text
    bank.use(replace(bank.plan, width=plan.MOST_WIDTH))
    change = plan.revise(bank.plan, plan.Measurements(1200, 0.9), bank.config)
    assert change is not None and change.alarming and not change.plan.probing
    bank.use(change.plan)
    assert choice.tier_now({"global": "hnsw"}, "global", bank.config, bank.plan) == "exact"
    assert plan.revise(bank.plan, plan.Measurements(1200, 0.9), bank.config) is None


# --- graphs as files -----------------------------------------------------------------------------------------------


def content(count: int = 300, seed: int = 0) -> Content:
    return Content(np.arange(count), np.arange(count) * 3, clustered(seed, count).numpy())


def built(made_of: Content) -> graphs.Graph:
    return graphs.Graph(made_of.slot_E, tuple(faiss_index.build_graph(key, unwanted=lambda: False)
                                              for key in made_of.key_HED))


def test_a_graph_comes_back_from_its_file_and_no_key_is_in_it(tmp_path: Path) -> None:
    made_of, file = content(), tmp_path / "layer-00" / "graph-00000.safetensors"
    made = built(made_of)
    write_graph(file, origin_of(made_of), made)
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    came = read_graph(file, origin_of(made_of), made_of)
    for one, other in zip(came.heads, made.heads, strict=True):
        query = clustered(4, 20)[0]
        assert np.array_equal(faiss_index.ask_graph(one, query, 9), faiss_index.ask_graph(other, query, 9))
    words = file.read_bytes()
    assert not any(key.tobytes()[:16] in words for key in made_of.key_HED[0])
    mine = {"mine", "my-graph-1.safetensors", "graph-00000.safetensors.bak"}
    for name in (*mine, f".{file.name}.{'0' * 32}.tmp"):
        (tmp_path / "layer-00" / name).write_text("x")
    remove_graphs(file.parent)
    assert {one.name for one in file.parent.iterdir()} == mine


def test_damaged_and_foreign_files_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    made_of, file = content(), tmp_path / "graph-00000.safetensors"
    write_graph(file, origin_of(made_of), built(made_of))
    whole = file.read_bytes()
    assert read_graph(file, origin_of(made_of), made_of) is not None and not caplog.text
    for damage, reason in ((whole[:-100], "made anew"), (whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], "it is damaged"),
                           (b"", "made anew"), (b"x" * 99, "made anew")):
        file.write_bytes(damage)
        assert read_graph(file, origin_of(made_of), made_of) is None and reason in caplog.text
        caplog.clear()
    file.write_bytes(whole)
    other = content(seed=1)
    assert read_graph(file, origin_of(other), other) is None and "made of another content" in caplog.text
    for name in ("version", "LINKS", "KEPT"):
        with monkeypatch.context() as patched:
            patched.setattr(faiss_index, name, (lambda: "0.0") if name == "version" else 7)
            assert read_graph(file, origin_of(made_of), made_of) is None
    assert "another faiss" in caplog.text and "another links" in caplog.text and "another kept" in caplog.text
    write_tensors(file, {"x": torch.zeros(1)}, {"lmcode": json.dumps({"format": 1})})
    assert read_graph(file, origin_of(made_of), made_of) is None and "it is no graph of format 1" in caplog.text


def test_links_that_would_lead_out_of_a_graph_are_refused() -> None:
    made_of = content()
    links = faiss_index.links_of(built(made_of).heads[0])
    level, neighbour, entry = links
    high = int(level.argmax())

    def changed(array: np.ndarray, at: int, to: int) -> np.ndarray:
        return np.concatenate([array[:at], [to], array[at + 1:]]).astype(np.int32)

    start = np.concatenate([[0], np.where(level > 1, 32 + 16 * (level - 1), 32).cumsum()])
    bad = {"levels": [links._replace(level_E=part) for part in (level[:-1], changed(level, 0, 0), changed(level, 0, 99))],
           "neighbours must be int32": [links._replace(neighbour_X=neighbour[:-1]),
                                        links._replace(neighbour_X=neighbour.astype(np.int64))],
           "must be nodes": [links._replace(neighbour_X=changed(neighbour, 5, 300)),
                             links._replace(neighbour_X=changed(neighbour, 5, -2)), links._replace(entry=300),
                             links._replace(entry=int(level.argmin()))],
           "neighbours on level 1": [links._replace(neighbour_X=changed(neighbour, int(start[high]) + 32,
                                                                        int(level.argmin())))]}
    for reason, ones in bad.items():
        for one in ones:
            with pytest.raises(ValueError, match=reason):
                faiss_index.graph_of(one, made_of.key_HED[0])
    faiss_index.graph_of(Links(level, neighbour, entry), made_of.key_HED[0])


def test_a_bank_keeps_its_graphs_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    bank, query = filled(), 7 * clustered(9, 40)
    planning.build_graphs(bank, graphs=tmp_path)
    wanted = bank.search(query, names(40)).id_HNK
    assert len([*tmp_path.iterdir()]) == S
    with monkeypatch.context() as patched:
        patched.setattr(faiss_index, "build_graph", lambda *_, **__: [][0])
        again = filled()
        planning.build_graphs(again, graphs=tmp_path)
        assert again.shard.searcher.graphs.nodes == 1200 and torch.equal(again.search(query, names(40)).id_HNK, wanted)
    other = filled(1100)
    planning.build_graphs(other, graphs=tmp_path)
    assert other.shard.searcher.graphs.nodes == 1100 and "made of another content" in caplog.text
    (tmp_path / "file").write_text("in the way")
    planning.build_graphs(filled(), graphs=tmp_path / "file")
    assert "a graph was not kept for the next time" in caplog.text


def test_without_faiss_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "available", lambda device: False)
    with pytest.raises(ConfigError, match="hnsw needs FAISS"):
        make_bank()
