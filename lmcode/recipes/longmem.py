"""Recipe `longmem`: a residual side network beside a frozen backbone, of half its layers, one of which reads the memory.

After LongMem (Wang et al., "Augmenting Language Models with Long-Term Memory", NeurIPS 2023, arXiv 2306.07174). The backbone
makes the keys and values that are stored, so they never grow stale; the side network, the only part that is trained, learns
to read them. The one thing to know: side layers are copies of the backbone's own modules, called with the arguments that the
backbone's layer was called with, so their attention takes the same way as that of any layer; README.md says where this
differs from the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lmcode.config import LMCODEConfig
from lmcode.precision import without_autocast
from lmcode.protocol import Candidates, NullRetriever
from lmcode.recipes import foreign, recipe
from lmcode.recipes.anatomy import Anatomy
from lmcode.recipes.chunks import Waiting, attend_chunks, chunk_query, in_chunks
from lmcode.recipes.joint import answers_of, queries_of
from lmcode.recipes.recipe import Left, Pass, check_one_layer, check_settings

RETRIEVED = 64  # tokens that a query finds, in the paper
REMEMBERED = 65536  # tokens that its memory holds
ENTERED, STAYED = "longmem entered", "longmem stayed"  # notes of a pass: what the first layer was given, and who waits


class Options(recipe.Options):
    """Settings of this recipe beside `sinks` and `cache`."""

    chunk: int = Field(4, ge=1, description="tokens that are stored and found together")
    distance: int = Field(256, ge=0, description="positions that every stored token lies before the query that reads it")


class Called(NamedTuple):
    """One call of a layer: its arguments behind the hidden states, and what it handed on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_BTD: Tensor


def sources_of(num_layers: int) -> list[int]:
    """The layer that each side layer is made from: the second of every two, and the last one where it has no pair."""
    return [min(first + 1, num_layers - 1) for first in range(0, num_layers, 2)]


def side_layer(anatomy: Anatomy, source: int, *, number: int) -> nn.Module:
    """A trainable copy of a layer, whose attention has another number."""
    layer, config = anatomy.layers[source], anatomy.base.config
    made = copy.deepcopy(layer, {id(config): config})  # one config: it says whose attention is called
    attention: Any = getattr(made, anatomy.family.attention)
    attention.layer_idx = number
    return made


class LongMem(recipe.Recipe):
    """Side layers, their norm, a gate between attention and memory for each head, and one between both networks."""

    Options = Options
    watches = changes_model = True

    def __init__(self, anatomy: Anatomy, config: LMCODEConfig, options: Any) -> None:
        super().__init__(anatomy, config, options)
        self.sources = sources_of(anatomy.sizes["num_layers"])
        self.own_layers, self.memory_layer = len(self.sources), config.memory_layer_indices[0]
        self.layers = nn.ModuleList(side_layer(anatomy, source, number=anatomy.sizes["num_layers"] + place)
                                    for place, source in enumerate(self.sources))
        self.norm = copy.deepcopy(anatomy.norm)
        self.memory_gate_H = nn.Parameter(torch.full((anatomy.sizes["num_heads"],), config.memory_bias))
        self.opening_D = nn.Parameter(torch.zeros(config.hidden_size))
        self.requires_grad_(True)

    @staticmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """The paper's: the memory at three quarters of the depth (its 18th layer of 24), 64 tokens found, 65,536 kept, and
        gates that begin half open."""
        return {"memory_layers": (max(0, 3 * sizes["num_layers"] // 4 - 1),), "memory_heads": sizes["kv_heads"],
                "memory_head_dim": options.chunk * sizes["head_dim"], "memory_top_k": max(1, RETRIEVED // options.chunk),
                "long_term_memory_slots": max(1, REMEMBERED // options.chunk), "memory_bias": 0.0,
                "successor_values": False}

    @staticmethod
    def check(model: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        width = model["recipe_options"]["chunk"] * sizes["head_dim"]
        check_settings("longmem", model, {"memory_heads": sizes["kv_heads"], "memory_head_dim": width, "retrieval_stride": 1,
                                          "successor_values": False})
        check_one_layer("longmem", model, "whose keys and values are stored")

    # The side network

    def watched(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: Tensor, current: Pass) -> None:
        if layer == 0:
            current.notes[ENTERED] = args[0]
        if layer in self.sources:
            current.notes[layer] = Called(args[1:], kwargs, hidden_BTD)

    def after_model(self, hidden_BTD: Tensor, current: Pass) -> Tensor:
        """Equation 2 of the paper, H_side[l] = f(H_side[l-1]) + H[2l] - H[2l-2]; then the way over from the backbone."""
        before_BTD: Tensor = current.notes.pop(ENTERED)
        side_BTD = before_BTD
        for place, (source, layer) in enumerate(zip(self.sources, self.layers, strict=True)):
            called = current.notes.pop(source)
            cache = foreign.cache_in([*called.args, *called.kwargs.values()])
            if cache is not None:
                foreign.room(cache, place)
            side_BTD = layer(side_BTD, *called.args, **called.kwargs) + (called.hidden_BTD - before_BTD)
            before_BTD = called.hidden_BTD
        side_BTD = self.norm(side_BTD)
        mixed_BTD: Tensor = hidden_BTD + self.opening_D.to(hidden_BTD.dtype) * (side_BTD - hidden_BTD)
        return mixed_BTD

    def after_attention(self, layer: int, query_BXTD: Tensor, mixed_BXTD: Tensor, current: Pass) -> Tensor:
        """In the layer that reads: sigmoid(gate) of the memory's answer, the rest of the attention's own; where nothing was
        found, all of it."""
        if layer - self.anatomy.sizes["num_layers"] != self.memory_layer // 2:
            return mixed_BXTD
        found_BXTD, found_BXT = self._found(query_BXTD, current)
        share_BXT = torch.sigmoid(self.memory_gate_H.float())[:, None] * found_BXT
        self._record(share_BXT.detach(), current)
        mixed_fp32 = mixed_BXTD.float()
        return (mixed_fp32 + share_BXT.unsqueeze(-1) * (found_BXTD - mixed_fp32)).to(mixed_BXTD.dtype)

    @without_autocast()
    def _found(self, query_BXTD: Tensor, current: Pass) -> tuple[Tensor, Tensor]:
        """Attention over the tokens that each query finds, fp32 [B, X, T, D], and where it finds any, 0 or 1 [B, X, T]; X
        query heads."""
        tape, retriever = current.tape(self.memory_layer), current.retrievers[self.memory_layer]
        heads, chunk = self.config.memory_heads, self.options.chunk
        query_HND = queries_of(self.anatomy.at_distance(query_BXTD, self.options.distance), heads).float()
        if tape.hits is None:
            namespace_N, document_N = current.asking(query_BXTD.shape[1] // heads)
            tape.record(hits=retriever.search(chunk_query(query_HND.detach(), chunk), namespace_N, document_N))
        hits: Any = tape.hits
        if isinstance(retriever, NullRetriever):
            value_HND = torch.zeros_like(query_HND)
        else:
            key_HNKX, value_HNKX = retriever.fetch(hits)
            value_HND = attend_chunks(query_HND, key_HNKX, value_HNKX, hits.valid_HNK, chunk=chunk)
        found_HN1 = hits.valid_HNK[..., :1].float()
        return answers_of(value_HND, query_BXTD), answers_of(found_HN1, query_BXTD).squeeze(-1)

    def _record(self, share_BXT: Tensor, current: Pass) -> None:
        gate = torch.sigmoid(self.memory_gate_H.detach().float()).mean()
        current.record_share(self.memory_layer, share_BXT, gate.expand_as(current.valid_BT), self.config.memory_heads)

    # What is stored

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """Chunks of what has left the row, keys scaled as the attention scales its logits. The tokens behind the last whole
        chunk wait for those that leave in the next window."""
        state: Any = current.state
        scaling: Any = self.anatomy.attention(layer).scaling
        waiting = Waiting(*state.recipe)
        if current.reset_B is not None:
            waiting = waiting._replace(count_B=waiting.count_B.masked_fill(current.reset_B, 0))
        made, current.notes[STAYED] = in_chunks(waiting, replace(left, key_BHTD=left.key_BHTD * scaling),
                                                chunk=self.options.chunk, fill_up=current.at_once)
        return current.candidates(made.key_BHNX, made.value_BHNX, made.surprise_BN, made.valid_BN)

    def blank_state(self, num_streams: int, device: torch.device | None) -> tuple[Tensor, ...]:
        B, H, M, D = num_streams, self.anatomy.sizes["kv_heads"], self.options.chunk - 1, self.anatomy.sizes["head_dim"]
        row_BHMD = torch.zeros(B, H, M, D, device=device)
        return Waiting(row_BHMD, row_BHMD, torch.zeros(B, M, device=device),
                       torch.zeros(B, dtype=torch.int64, device=device))

    def next_state(self, current: Pass) -> tuple[Tensor, ...]:
        return tuple(current.notes.pop(STAYED))
