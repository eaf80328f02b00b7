"""Graphs of the entries of virtual shards, for the tier `hnsw`: how a thread makes them, and files that spare it the work.

A graph follows from the keys of one virtual shard in the order of their ids and from nothing else, so it is the same on
whichever rank it is made. A file holds who neighbours whom and no key; it is a cache that nobody has to trust: it is used
only if it is of the same content, made with the same settings by the same version of FAISS, whole, and such that a search
stays inside it. Anything else is made anew. In memory keys come from the bank, always.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcode.files.tensors import write_tensors
from lmcode.memory.search import faiss_index
from lmcode.memory.search.faiss_index import Links
from lmcode.memory.search.tier import Rows

log = logging.getLogger("lmcode")
FORMAT = 1
OWN_NAME = re.compile(r"graph-\d{5,}\.safetensors|\.graph-\d{5,}\.safetensors\.[0-9a-f]{32}\.tmp")  # of `write_graph`
WAITING_S = 0.1  # until who waits for its turn looks whether it is still wanted
_TURN = threading.Lock()  # the banks of a process make their graphs one after the other, and leave other cores alone


class Content(NamedTuple):
    """The entries of one virtual shard by ascending id, as they are at one moment: slot_E and id_E int64, key_HED fp32."""

    slot_E: np.ndarray
    id_E: np.ndarray
    key_HED: np.ndarray


class Graph(NamedTuple):
    """A graph for each head over the same nodes, and the slot of each, int64."""

    slot_E: np.ndarray
    heads: tuple[Any, ...]


def content_of(rows: Rows, place: slice) -> Content:
    """A copy of what the slots of one virtual shard hold. `rows` are all of a shard."""
    id_M = rows.id_M[place].cpu().numpy()
    live = np.flatnonzero(id_M >= 0)
    order_E = live[np.argsort(id_M[live])]
    at_E = torch.from_numpy(order_E).to(rows.key_HMD.device)
    key_HED = rows.key_HMD[:, place].index_select(1, at_E).float().cpu().contiguous().numpy()
    return Content(order_E + place.start, id_M[order_E], key_HED)


def origin_of(content: Content) -> dict[str, Any]:
    """What decides what a graph is: whoever has the same makes the same."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr(content.key_HED.shape).encode())
    for array in (content.id_E, content.key_HED):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return {"format": FORMAT, "content": digest.hexdigest(), "faiss": faiss_index.version(), "links": faiss_index.LINKS,
            "kept": faiss_index.KEPT, "added_at_once": faiss_index.ADDED_AT_ONCE}


class Building:
    """Graphs in the making, by a thread of its own.

    Attributes:
        made: those that are done, by virtual shard.
        problem: why there will be no more of them; None while there may.
    """

    def __init__(self, contents: Mapping[int, Content], folder: Path | None) -> None:
        """Begins.

        Args:
            folder: of the files; None: there are none.
        """
        self.made: dict[int, Graph] = {}
        self.problem: str | None = None
        self._contents, self._folder, self._unwanted = dict(contents), folder, threading.Event()
        # A thread that is a daemon would end a process that ends in the middle of FAISS, and one that is not, keep it.
        self._thread = threading.Thread(target=self._run, name="lmcode-graphs", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is done."""
        self._thread.join()

    def stop(self) -> None:
        """Makes no more of it, and keeps nothing of what it was made from."""
        self._unwanted.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        try:
            while self._contents and not self._unwanted.is_set():
                if not _TURN.acquire(timeout=WAITING_S):
                    continue
                try:
                    shard = min(self._contents)
                    if (graph := self._graph_of(shard, self._contents.pop(shard))) is not None:
                        self.made[shard] = graph
                finally:
                    _TURN.release()
        except Exception as error:  # of whatever kind: who asked is told, and searches without
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self._contents.clear()

    def _graph_of(self, shard: int, content: Content) -> Graph | None:
        file = None if self._folder is None else self._folder / f"graph-{shard:05d}.safetensors"
        origin = {} if file is None else origin_of(content)
        if file is not None and (kept := read_graph(file, origin, content)) is not None:
            return kept
        heads = [faiss_index.build_graph(key_ED, unwanted=self._unwanted.is_set) for key_ED in content.key_HED]
        if any(head is None for head in heads):
            return None
        graph = Graph(content.slot_E, tuple(heads))
        if file is not None:
            write_graph(file, origin, graph)
        return graph


def _seal(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_graph(file: Path, origin: Mapping[str, Any], graph: Graph) -> None:
    """Keeps a graph for the next time, whole or not at all; a folder that takes none is said and no error."""
    tensors: dict[str, torch.Tensor] = {}
    for head, links in enumerate(map(faiss_index.links_of, graph.heads)):
        tensors |= {f"level-{head}": torch.from_numpy(links.level_E), f"entry-{head}": torch.tensor(links.entry),
                    f"neighbour-{head}": torch.from_numpy(links.neighbour_X)}
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, {"lmcode": json.dumps({**origin, "seal": _seal(tensors)})})
        os.replace(temporary, file)
    except OSError as error:
        log.warning("a graph was not kept for the next time: %s", error)


def read_graph(file: Path, origin: Mapping[str, Any], content: Content) -> Graph | None:
    """The graph in a file, over the keys of `content`; None if there is none or it is refused, which is said."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("lmcode", "null"))
            if not isinstance(header, dict) or {*header} != {*origin, "seal"}:
                raise ValueError(f"it is no graph of format {FORMAT}")
            if other := [name for name, value in origin.items() if header[name] != value]:
                raise ValueError(f"it was made of another {', '.join(other)}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        H = len(content.key_HED)
        if {*tensors} != {f"{name}-{head}" for name in ("level", "entry", "neighbour") for head in range(H)}:
            raise ValueError("its tensors are others")
        if _seal(tensors) != header["seal"]:
            raise ValueError("it is damaged")
        return Graph(content.slot_E, tuple(
            faiss_index.graph_of(Links(tensors[f"level-{head}"].numpy(), tensors[f"neighbour-{head}"].numpy(),
                                       int(tensors[f"entry-{head}"])), key_ED)
            for head, key_ED in enumerate(content.key_HED)))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        log.warning("the graph in '%s' is made anew: %s", file, error)
        return None


def remove_graphs(folder: Path) -> None:
    """Removes the files that `write_graph` has left in a folder, and the folder if nothing else is in it."""
    for file in folder.glob("*graph-*.safetensors*"):
        if OWN_NAME.fullmatch(file.name):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
