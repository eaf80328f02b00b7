"""Recipe `mplus`: a pool of tokens that forgets at random, a bank of what it has forgotten, and a retriever that is trained.

After MemoryLLM (Wang et al., "MemoryLLM: Towards Self-Updatable Large Language Models", ICML 2024, arXiv 2402.04624) and M+
(Wang et al., "M+: Extending MemoryLLM with Scalable Long-Term Memory", ICML 2025, arXiv 2502.00592). The one thing to know:
what leaves the carried row is compressed to its last tokens, these enter the stream's pool, and what they push out is
offered to the bank. README.md says what the papers do, what this does, and why.

An entry's key is what the retriever makes of the token's key, then zeros; its value is the token's key before its rotation,
scaled as the attention scales its logits, then the token's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model.long_term import merge_partials
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE, Candidates, Hits, NullRetriever
from lmcode.recipes import recipe
from lmcode.recipes.anatomy import Anatomy
from lmcode.recipes.carried import pick
from lmcode.recipes.joint import attend_own, queries_of, share_per_query
from lmcode.recipes.pool import draws, filled, first, last_of, renewed
from lmcode.recipes.recipe import Left, Pass, check_settings


class Options(recipe.Options):
    """Settings of this recipe beside `sinks` and `cache`."""

    pool: int = Field(480, ge=1, description="N, tokens that a stream's pool holds in each memory layer")
    compressed: int = Field(16, ge=1, description="K, tokens of a window that enter the pool; with a full one as many leave")
    distance: int = Field(256, ge=0, description="most positions that a token of the pool or the bank lies before the row")
    seed: int = Field(0, ge=0, description="of the draw that says which tokens leave the pool")

    @model_validator(mode="after")
    def _fits(self) -> Options:
        if self.compressed > self.pool:
            raise ValueError(f"compressed must not exceed pool: got {self.compressed} and {self.pool}")
        return self


class Projection(nn.Module):
    """A matrix for each key-value head, without a bias. It begins as the mean of its inputs' parts of width `width`."""

    def __init__(self, heads: int, parts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(parts, 1).div(parts).repeat(heads, 1, 1))

    def forward(self, x_BHTX: Tensor) -> Tensor:
        projected: Tensor = torch.einsum("bhtx,hxd->bhtd", x_BHTX.float(), self.weight.float())
        return projected


class MPlus(recipe.Recipe):
    """A pool for each stream and memory layer, and the two projections of a retriever for each layer. See the module.

    A stream's state: of each memory layer key [B, H, N, D], value [B, H, N, D] and surprise [B, N] of its pool; then, of all
    layers, how many of its places are filled and how often it was renewed, int64 [B].
    """

    Options = Options
    joins_attention = True

    def __init__(self, anatomy: Anatomy, config: LMCODEConfig, options: Any) -> None:
        super().__init__(anatomy, config, options)
        heads, width = config.memory_heads, config.memory_head_dim // 2
        group, layers = config.num_heads // heads, [str(layer) for layer in config.memory_layer_indices]
        self.queries = nn.ModuleDict({layer: Projection(heads, group, width) for layer in layers})
        self.keys = nn.ModuleDict({layer: Projection(heads, 1, width) for layer in layers})

    @staticmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """Memories in all layers and no bias, as the papers have it: fewer layers or a bias lose facts (see README.md)."""
        return {"memory_layers": "all", "memory_heads": sizes["kv_heads"], "memory_head_dim": 2 * sizes["head_dim"],
                "memory_bias": 0.0, "successor_values": False}

    @staticmethod
    def check(model: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        check_settings("mplus", model, {"memory_heads": sizes["kv_heads"], "memory_head_dim": 2 * sizes["head_dim"],
                                        "retrieval_stride": 1, "successor_values": False})

    # Reading

    @without_autocast()
    def recall(self, layer: int, query_BXTD: Tensor, current: Pass, *, scaling: float) -> tuple[Tensor, Tensor] | None:
        """Attention over what was retrieved for each token, and over the pool: one softmax with its log-sum-exp."""
        if current.state is None and isinstance(current.retrievers[layer], NullRetriever):
            return None
        if self.training and torch.is_grad_enabled():
            current.notes.setdefault(("query", layer), query_BXTD.detach())
        placed_BXTD = self.anatomy.rotate(query_BXTD, current.tables).float()
        parts = [self._attend_bank(layer, query_BXTD, placed_BXTD, current)]
        if current.state is not None and not current.at_once:
            key_BHND, value_BHND, seen_B11N = self._pool(layer, current)
            parts.append(attend_own(placed_BXTD, key_BHND, value_BHND, seen_B11N, scaling=scaling))
        value_BXTD, share_PBXT = merge_partials([part[0] for part in parts], [part[1] for part in parts])
        current.notes.setdefault(("share", layer), share_PBXT[0].detach())
        lse_BXT = torch.stack([part[1] for part in parts]).logsumexp(dim=0)
        return value_BXTD, torch.where(lse_BXT > NO_SCORE / 2, lse_BXT + self.config.memory_bias, lse_BXT)

    def _attend_bank(self, layer: int, query_BXTD: Tensor, placed_BXTD: Tensor, current: Pass) -> tuple[Tensor, Tensor]:
        """Softmax over each token's hits, which lie before the pool in the order of their ids: value and log-sum-exp."""
        retriever, (B, _, T, D) = current.retrievers[layer], query_BXTD.shape
        hits = self._hits(layer, query_BXTD, current)
        if isinstance(retriever, NullRetriever):
            return torch.zeros_like(placed_BXTD), placed_BXTD.new_full(placed_BXTD.shape[:3], NO_SCORE)
        id_HNK, order_HNK = hits.id_HNK.sort(dim=-1, stable=True)  # no hit is -1 and comes first: farthest away
        entry_HNKX = retriever.fetch(hits)[1]
        entry_HNKX = entry_HNKX.gather(2, order_HNK[..., None].expand_as(entry_HNKX))
        key_BHTKD, value_BHTKD = entry_HNKX.unflatten(1, (B, T)).transpose(0, 1).float().split(D, dim=-1)
        K = key_BHTKD.shape[3]
        place_K = torch.arange(-self.options.pool - K, -self.options.pool, device=id_HNK.device)
        key_BHTKD = self._at(place_K, key_BHTKD.flatten(1, 2)).unflatten(1, (-1, T))
        query_BHXTD = placed_BXTD.unflatten(1, (self.config.memory_heads, -1))
        score_BHXTK = torch.einsum("bhgtd,bhtkd->bhgtk", query_BHXTD, key_BHTKD)
        valid_BHTK = (id_HNK >= 0).unflatten(1, (B, T)).transpose(0, 1)
        score_BHXTK = score_BHXTK.masked_fill(~valid_BHTK.unsqueeze(2), NO_SCORE)
        value_BHXTD = torch.einsum("bhgtk,bhtkd->bhgtd", score_BHXTK.softmax(-1), value_BHTKD)
        lse_BHXT = score_BHXTK.logsumexp(-1).where(valid_BHTK[..., -1].unsqueeze(2), NO_SCORE)
        return value_BHXTD.flatten(1, 2), lse_BHXT.flatten(1, 2)

    @torch.no_grad()
    def _hits(self, layer: int, query_BXTD: Tensor, current: Pass) -> Hits:
        """What the retriever finds for each token and key-value head, N = B * T; it is asked once in a pass."""
        tape, D = current.tape(layer), query_BXTD.shape[-1]
        if tape.hits is None:
            query_HND = queries_of(self._asked(layer, query_BXTD), self.config.memory_heads)
            tape.record(hits=current.retrievers[layer].search(F.pad(query_HND, (0, D)), *current.asking(1)))
        assert tape.hits is not None
        return tape.hits

    def _asked(self, layer: int, query_BXTD: Tensor) -> Tensor:
        """The retriever's queries, one for each token and key-value head: [B, H, T, D]."""
        far_BXTD = self.anatomy.at_distance(query_BXTD, self.options.distance)
        grouped_BHTXD = far_BXTD.unflatten(1, (self.config.memory_heads, -1)).transpose(2, 3)
        asked_BHTD: Tensor = self.queries[str(layer)](grouped_BHTXD.flatten(3))
        return asked_BHTD

    def _at(self, place_N: Tensor, key_BXND: Tensor) -> Tensor:
        """Keys turned to their places before the row, which are negative; none is farther away than `distance`."""
        place_1N = place_N.clamp(min=-self.options.distance)[None]
        return self.anatomy.rotate(key_BXND, self.anatomy.tables(place_1N, key_BXND))

    def _pool(self, layer: int, current: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """The pool that a pass finds: keys at their places, values, and which are filled, bool [B, 1, 1, N]."""
        key_BHND, value_BHND, _ = self._carried(layer, current)
        place_N = torch.arange(-self.options.pool, 0, device=key_BHND.device)
        return self._at(place_N, key_BHND.float()), value_BHND, filled(self._counts(current)[0], len(place_N))[:, None, None]

    def _carried(self, layer: int, current: Pass) -> tuple[Tensor, ...]:
        state: Any = current.state
        number = self.config.memory_layer_indices.index(layer)
        parts: tuple[Tensor, ...] = state.recipe[3 * number:3 * number + 3]
        return parts

    def _counts(self, current: Pass) -> tuple[Tensor, ...]:
        """How much of each stream's pool is filled and how often it was renewed; a document begins with an empty one."""
        state: Any = current.state
        reset_B = current.reset_B
        return tuple(part_B if reset_B is None else part_B.masked_fill(reset_B, 0) for part_B in state.recipe[-2:])

    def joined(self, layer: int, share_BXT: Tensor, current: Pass) -> None:
        """Of the softmax, what went to the bank is recorded; the pool's part counts as the stream's own past."""
        heads = self.config.memory_heads
        share_BHXT = (share_BXT * current.notes["share", layer]).float().unflatten(1, (heads, -1))
        share_HN, credit_HN = (share_per_query(part, heads) for part in (share_BHXT.mean(2), share_BHXT.sum(2)))
        current.tape(layer).record(share_HN=share_HN, credit_HN=credit_HN.where(current.valid_BT.flatten(), 0.0),
                                   null_share_HN=torch.zeros_like(share_HN),
                                   gate_BT=torch.ones_like(current.valid_BT, dtype=torch.float32))

    # Writing

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """What the pool drops for the last tokens of what has left the row; those themselves where nobody carries a pool."""
        pool_key_BHND, pool_value_BHND, pool_surprise_BN = self._carried(layer, current)
        place_BT, valid_BT = self._renew(layer, current, left)
        scaling: Any = self.anatomy.attention(layer).scaling
        key_BHTD = pick(pool_key_BHND, left.key_BHTD, place_BT).float() * scaling
        value_BHTD = pick(pool_value_BHND, left.value_BHTD, place_BT).float()
        surprise_BT = torch.cat([pool_surprise_BN, left.surprise_BT], dim=1).gather(1, place_BT)
        sought_BHTX = F.pad(self.keys[str(layer)](key_BHTD), (0, key_BHTD.shape[-1]))
        return current.candidates(sought_BHTX, torch.cat([key_BHTD, value_BHTD], dim=-1), surprise_BT, valid_BT)

    def _renew(self, layer: int, current: Pass, left: Left) -> tuple[Tensor, Tensor]:
        """Notes the layer's pool as it is from now on. Returns the tokens that go to the bank: places in pool and `left`
        side by side, int64 [B, T], and which of them there are."""
        N, entering_BT = self.options.pool, last_of(left.valid_BT, self.options.compressed)
        if current.at_once:
            place_BT, valid_BT = first(entering_BT, entering_BT.shape[1])
            return N + place_BT, valid_BT
        key_BHND, value_BHND, surprise_BN = self._carried(layer, current)
        count_B, renewal_B = self._counts(current)
        draw_BN = draws(current.namespace_B, renewal_B, places=N, layer=layer, seed=self.options.seed)
        kept_BN, after_B, place_BT, valid_BT = renewed(count_B, entering_BT, draw_BN)
        surprise_BX = torch.cat([surprise_BN, left.surprise_BT], dim=1)
        current.notes["pool", layer] = (pick(key_BHND, left.key_BHTD, kept_BN), pick(value_BHND, left.value_BHTD, kept_BN),
                                        surprise_BX.gather(1, kept_BN))
        current.notes["counts"] = (after_B, renewal_B + entering_BT.any(dim=1))
        return place_BT, valid_BT

    def blank_state(self, num_streams: int, device: torch.device | None) -> tuple[Tensor, ...]:
        B, N, config = num_streams, self.options.pool, self.config
        row_BHND = torch.zeros(B, config.memory_heads, N, config.memory_head_dim // 2, device=device)
        count_B = torch.zeros(B, dtype=torch.int64, device=device)
        parts = (row_BHND, row_BHND, torch.zeros(B, N, device=device)) * len(config.memory_layer_indices)
        return (*parts, count_B, count_B)

    def next_state(self, current: Pass) -> tuple[Tensor, ...]:
        state: Any = current.state
        if current.at_once:
            return tuple(state.recipe)
        pools = [current.notes["pool", layer] for layer in self.config.memory_layer_indices]
        return (*(part for pool in pools for part in pool), *current.notes["counts"])

    # Training

    @without_autocast()
    def auxiliary(self, current: Pass) -> Tensor:
        """The retriever's loss at each token, fp32 [B, T], nats: a mean over memory layers."""
        losses = [self._retriever_loss(layer, current) for layer in self.config.memory_layer_indices]
        return torch.stack(losses).mean(dim=0)

    def _retriever_loss(self, layer: int, current: Pass) -> Tensor:
        """Binary cross-entropy of sigmoid(q . k) for each token and each key in its pool, a mean over heads and keys.

        Those count as relevant to which the layer's own attention gives more than an equal share of what it gives the pool.
        """
        query_BXTD, (key_BHND, _, seen_B11N) = current.notes["query", layer], self._pool(layer, current)
        scaling: Any = self.anatomy.attention(layer).scaling
        placed_BHXTD = self.anatomy.rotate(query_BXTD, current.tables).float().unflatten(1, (self.config.memory_heads, -1))
        score_BHXTN = placed_BHXTD @ key_BHND.unsqueeze(2).transpose(-1, -2) * scaling
        share_BHTN = score_BHXTN.masked_fill(~seen_B11N.unsqueeze(2), NO_SCORE).softmax(-1).mean(dim=2)
        count_B111 = seen_B11N.sum(dim=-1, keepdim=True).clamp(min=1)
        sought_BHND = self.keys[str(layer)](self._carried(layer, current)[0].float() * scaling)
        logit_BHTN = self._asked(layer, query_BXTD) @ sought_BHND.transpose(-1, -2)
        relevant_BHTN = (share_BHTN * count_B111 > 1.0).to(logit_BHTN)
        loss_BHTN = F.binary_cross_entropy_with_logits(logit_BHTN, relevant_BHTN, reduction="none")
        return (loss_BHTN.where(seen_B11N, 0.0) / count_B111).sum(dim=-1).mean(dim=1)
