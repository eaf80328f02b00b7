"""The long-term read: one softmax over a sequence's own past, the bank's entries and a null slot, behind a gate.

The module asks a `Retriever` exactly once per forward pass, whatever the data, since collectives hide behind it. Stored
entries are constants; the local part is what trains the key and value projections. All scores, softmaxes, log-sum-exps
and mixed values are fp32, under autocast, too. Letters here: X tokens before the
window; partial softmaxes; queries of one stream, and then its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model.rotary import Rotation
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE, Candidates, Hits, Retriever

if TYPE_CHECKING:
    from lmcode.model.cache import LayerCache


BEFORE_OWN, FOUND = 2, 1  # rows of cached values before own ones, the null slot's zeros first; that of the bank's answer


class Window(NamedTuple):
    """What a layer must know about the streams whose tokens it sees; nothing here carries a gradient.

    namespace_B: int64, the document each stream is in; negative: none, so nothing is found or offered for writing.
    pending_valid_B: bool, streams whose last token waits for its successor.
    reset_B: bool or None, streams that start a document here (`pending_valid_B` is already False there).
    valid_BT: bool or None, False at (trailing) padding.
    rotation: rotary tables, or None where positions are learned.
    slots_BMD: this layer's carried short-term slots; None starts afresh.
    pending_key_BHD: this layer's key of each stream's last token; None where there is none.
    cache: what this layer is to keep for later tokens of the window; None outside generation.
    document_B: int64, the text that each stream reads, negative where unknown; None: unknown everywhere.
    piece_BT: int64, the document within the window that each token belongs to, ascending from 0; None: there is one, and
        else `namespace_B` and `document_B` are [B, P], of each such document.
    seen_BTT: bool, which tokens (last dim) each token may attend to; None: itself and all before it.
    token_BTD: the tokens' embeddings, of mean square 1; None where no layer makes keys or values from them.
    with_past: puts keys and values [H, B, N, D] of the window's tokens that were read before in front of these ones, where a
        window is read in parts; `seen_BTT` then has a column for each of them.
    past_BXD: this layer's cache of the tokens before the window; None where there is none. See `past.py`.
    past_length_B: int64, how many of its last tokens are of the document that each stream is in.
    seen_past_BTX: bool, which of them (last dim) each token may attend to, [B, T or 1, X].
    """

    namespace_B: Tensor
    pending_valid_B: Tensor
    reset_B: Tensor | None = None
    valid_BT: Tensor | None = None
    rotation: Rotation | None = None
    slots_BMD: Tensor | None = None
    pending_key_BHD: Tensor | None = None
    cache: LayerCache | None = None
    document_B: Tensor | None = None
    piece_BT: Tensor | None = None
    seen_BTT: Tensor | None = None
    token_BTD: Tensor | None = None
    with_past: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    past_BXD: Tensor | None = None
    past_length_B: Tensor | None = None
    seen_past_BTX: Tensor | None = None

    def of_tokens(self, of_B: Tensor, length: int) -> Tensor:
        """A property of streams, or of their documents, for each token: [B, length]."""
        return of_B[:, None].expand(-1, length) if self.piece_BT is None else of_B.gather(1, self.piece_BT)


@dataclass
class ReadTape:
    """One layer's side products of one forward pass, all detached.

    A layer returns its tensor only and records the rest here. Activation checkpointing runs the layer a second time
    during the backward pass with the same tape: it then finds `hits` and does not search again, and records nothing.
    """

    hits: Hits | None = None
    candidates: Candidates | None = None
    gate_BT: Tensor | None = None
    share_HN: Tensor | None = None
    null_share_HN: Tensor | None = None
    credit_HN: Tensor | None = None
    pending_key_BHD: Tensor | None = None
    slots_BMD: Tensor | None = None
    past_BXD: Tensor | None = None

    def record(self, **products: Any) -> None:
        """Stores what was not recorded before; the first execution wins."""
        for name, product in products.items():
            if getattr(self, name) is None:
                setattr(self, name, product)


def merge_partials(values_HND: Sequence[Tensor], lses_HN: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins softmaxes over disjoint sets of keys into the softmax over their union.

    With partial results o_p and l_p = log sum exp, the whole is sum_p exp(l_p - l) o_p, l = log sum_p exp l_p (the
    merge of flash decoding; Milakov and Gimelshein 2018 for the running form).

    Args:
        values_HND: fp32 partial results. A set without keys has value 0 and log-sum-exp `NO_SCORE`.
        lses_HN: fp32 log-sum-exps; more than there are values: the last ones belong to sets whose value is 0.

    Returns:
        The joint value [..., D], and the share of the joint softmax of each set, [X, ...].
    """
    share_XHN = torch.stack(tuple(lses_HN)).softmax(dim=0)
    parts = [share_HN.unsqueeze(-1) * value_HND
             for share_HN, value_HND in zip(share_XHN, values_HND, strict=False)]
    return torch.stack(parts).sum(dim=0), share_XHN


def embeddings(window: Window) -> Tensor:
    """The embeddings of a window's tokens; ValueError where the window has none."""
    if window.token_BTD is None:
        raise ValueError("a layer that makes keys or values from embeddings needs them in its window: got token_BTD = None")
    return window.token_BTD


def last_tokens(token_BTD: Tensor, count: int, piece_BT: Tensor | None) -> list[Tensor]:
    """For each token itself, the one before it and so on, `count` in all; 0 where the window or its document has begun."""
    before = [token_BTD]
    for back in range(1, count):
        shifted_BTD = F.pad(token_BTD, (0, 0, back, 0))[:, :token_BTD.shape[1]]
        if piece_BT is not None:
            same_BT = piece_BT == F.pad(piece_BT, (back, 0), value=-1)[:, :piece_BT.shape[1]]
            shifted_BTD = shifted_BTD.where(same_BT[..., None], 0.0)
        before.append(shifted_BTD)
    return before


def attend_own_past(query_HBTD: Tensor, key_HBTD: Tensor, value_HBTD: Tensor, *, successor_values: bool,
                    seen_BTT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of token i over tokens j < i of its sequence: logit q_i . k_j, value v_{j+1} (or v_j).

    There may be more keys than queries, which then belong to the last tokens.

    Args:
        seen_BTT: which tokens j are of the sequence of i; None: all.

    Returns:
        Value [H, B, T, D] and log-sum-exp [H, B, T]; 0 and `NO_SCORE` for the first token, which has no past.
    """
    T, N = query_HBTD.shape[2], key_HBTD.shape[2]
    earlier_TT = torch.ones(T, N, dtype=torch.bool, device=query_HBTD.device).tril(N - T - 1)
    has_past_T = torch.arange(N - T, N, device=query_HBTD.device) > 0
    if seen_BTT is not None:
        earlier_TT = earlier_TT & seen_BTT
        has_past_T = earlier_TT.any(dim=-1)
    if successor_values:
        value_HBTD = value_HBTD.roll(-1, dims=2)  # what wraps around sits at j = T-1, which no token may see
    score_HBTT = (query_HBTD @ key_HBTD.transpose(2, 3)).masked_fill(~earlier_TT, NO_SCORE)
    lse_HBT = score_HBTT.logsumexp(dim=-1)
    mixed_HBTD = (score_HBTT - lse_HBT.unsqueeze(-1)).exp() @ value_HBTD
    return mixed_HBTD.where(has_past_T[..., None], 0.0), lse_HBT.where(has_past_T, NO_SCORE)


def fill_cache(cache: LayerCache, query_HBTD: Tensor, key_HBTD: Tensor, value_HBTD: Tensor, *,
               successor_values: bool) -> None:
    """Leaves a window's first tokens in `cache` for those to come.

    A value lies where its key is (with successors, that of token j + 1 with key j), `BEFORE_OWN` rows further on.
    """
    if successor_values:
        value_HBTD = value_HBTD.roll(-1, dims=2)  # each stream's last one is overwritten by its next token's value
    cache.fill("own_query", query_HBTD.unsqueeze(2))
    cache.fill("own_key", key_HBTD.unsqueeze(2))
    cache.fill("own_value", F.pad(value_HBTD, (0, 0, BEFORE_OWN, 0)).unsqueeze(2), length=BEFORE_OWN + cache.window)


def retrieval_queries(query_HBTD: Tensor, namespace_BT: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The queries that go to the bank: every token's own, or one per chunk of `stride` tokens.

    A chunk asks with the last token of the chunk before it, as anything pooled over itself would show its first tokens
    its last ones. The first chunk has a row too, with namespace -1, so that the number of rows depends on shapes only.

    Returns:
        query_HND and namespace_N with N = B * ceil(T / stride), b-major.
    """
    H, _, T, D = query_HBTD.shape
    if stride > 1:
        query_HBTD = F.pad(query_HBTD[:, :, stride - 1:T - 1:stride], (0, 0, 1, 0))
    return query_HBTD.reshape(H, -1, D), per_query(namespace_BT, stride).reshape(-1)


def per_query(of_BT: Tensor, stride: int) -> Tensor:
    """What is known of the token that each query was made from, [B, ceil(T / stride)]; -1 for that of the first chunk."""
    if stride == 1:
        return of_BT
    return F.pad(of_BT[:, stride - 1:of_BT.shape[1] - 1:stride], (1, 0), value=-1)


def sum_per_query(share_HBT: Tensor, stride: int) -> Tensor:
    """Sum of `share_HBT` over the tokens that share a query: [H, N] in the order of `retrieval_queries`."""
    if stride > 1:
        share_HBT = F.pad(share_HBT, (0, -share_HBT.shape[2] % stride)).unflatten(2, (-1, stride)).sum(dim=-1)
    return share_HBT.flatten(1)


def share_per_query(share_HBT: Tensor, stride: int) -> Tensor:
    """Mean of `share_HBT` over the tokens that share a query: [H, N] in the order of `retrieval_queries`."""
    return sum_per_query(share_HBT, stride) / sum_per_query(torch.ones_like(share_HBT), stride)


def attention_paid(share_HBT: Tensor, valid_BT: Tensor | None, stride: int) -> Tensor:
    """What the tokens of each query, without padding, gave its hits in all: `Hits.credit_HN` from their `share_HBT`."""
    return sum_per_query(share_HBT if valid_BT is None else share_HBT.where(valid_BT, 0.0), stride)


def make_candidates(key_HBTD: Tensor, value_HBTD: Tensor, window: Window, *, successor_values: bool) -> Candidates:
    """One candidate entry per token: its value, under the key of the token before it (its own without successors).

    Candidate 0 of a stream takes the pending key and is valid only where there is one. Surprise is left at 0: losses
    are not known here.
    """
    H, B, T, D = key_HBTD.shape
    valid_BT = torch.ones(B, T, dtype=torch.bool, device=key_HBTD.device)
    namespace_BT = window.of_tokens(window.namespace_B, T)
    valid_BT &= namespace_BT >= 0
    if window.valid_BT is not None:
        valid_BT &= window.valid_BT
    if successor_values:
        pending_BHD = window.pending_key_BHD
        first_HB1D = (key_HBTD.new_zeros(H, B, 1, D) if pending_BHD is None
                      else pending_BHD.to(key_HBTD.dtype).transpose(0, 1).unsqueeze(2))
        key_HBTD = torch.cat([first_HB1D, key_HBTD[:, :, :-1]], dim=2)
        valid_BT[:, 0] &= window.pending_valid_B
        if window.piece_BT is not None:
            valid_BT[:, 1:] &= window.piece_BT[:, 1:] == window.piece_BT[:, :-1]
    document_B = torch.full_like(window.namespace_B, -1) if window.document_B is None else window.document_B
    return Candidates(key_HBTD.detach().flatten(1, 2), value_HBTD.detach().flatten(1, 2),
                      namespace_BT.flatten(),
                      torch.zeros(B * T, dtype=torch.float32, device=key_HBTD.device), valid_BT.flatten(),
                      window.of_tokens(document_B, T).flatten())


def last_keys(key_HBTD: Tensor, window: Window) -> Tensor:
    """Key of each stream's last valid token, detached [B, H, D]; a stream of padding keeps the key it came with."""
    if window.valid_BT is None:
        return key_HBTD[:, :, -1].transpose(0, 1).detach().clone()
    count_B = window.valid_BT.sum(dim=1)
    streams_B = torch.arange(len(count_B), device=count_B.device)
    last_BHD = key_HBTD[:, streams_B, (count_B - 1).clamp(min=0)].transpose(0, 1).detach()
    before_BHD = torch.zeros_like(last_BHD) if window.pending_key_BHD is None else window.pending_key_BHD
    return torch.where((count_B > 0)[:, None, None], last_BHD, before_BHD.to(last_BHD.dtype))


class LongTermRead(nn.Module):
    """Memory heads with projections of their own, and all learned numbers of the read. It owns no memory."""

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        width, H, D = config.hidden_size, config.memory_heads, config.memory_head_dim
        self.num_heads, self.head_dim = H, D
        self.successor_values = config.successor_values
        self.stride = config.retrieval_stride
        self.key_tokens, from_token = config.memory_key_tokens, config.memory_values == "token"
        self.query_key_value = nn.Linear((1 + self.key_tokens) * width, (2 if from_token else 3) * H * D, bias=False)
        self.value = nn.Linear(width, H * D, bias=False) if from_token else None
        self.output = nn.Linear(H * D, width, bias=False)
        self.gate = nn.Linear(width, 1)
        self.log_temperature_H = nn.Parameter(torch.empty(H))
        self.retrieved_bias_H = nn.Parameter(torch.empty(H))
        self.null_logit_H = nn.Parameter(torch.empty(H))

    def forward(self, x_BTD: Tensor, *, window: Window, retriever: Retriever, tape: ReadTape) -> Tensor:
        """What each token recalls, gated: [B, T, D] in the dtype of x. Everything else goes on the tape."""
        B, T, _ = x_BTD.shape
        query_HBTD, key_HBTD, value_HBTD = self._project(x_BTD, window)
        if window.cache is not None:
            fill_cache(window.cache, query_HBTD, key_HBTD, value_HBTD, successor_values=self.successor_values)
            if self.key_tokens > 1:
                window.cache.fill("token", embeddings(window).unsqueeze(1))
        own = (key_HBTD, value_HBTD) if window.with_past is None else window.with_past(key_HBTD, value_HBTD)
        merged_HBTD, share_XHBT = self._read(query_HBTD, *own, window, retriever, tape)
        gate_BT1, share_HBT = torch.sigmoid(self.gate(x_BTD)), share_XHBT[1].detach()
        tape.record(pending_key_BHD=last_keys(key_HBTD, window),
                    candidates=make_candidates(key_HBTD, value_HBTD, window, successor_values=self.successor_values),
                    gate_BT=gate_BT1.detach().squeeze(-1).float(),
                    share_HN=share_per_query(share_HBT, self.stride),
                    credit_HN=attention_paid(share_HBT, window.valid_BT, self.stride),
                    null_share_HN=share_per_query(share_XHBT[2].detach(), self.stride))
        merged_BTX = merged_HBTD.permute(1, 2, 0, 3).reshape(B, T, -1)
        recalled_BTD: Tensor = gate_BT1 * self.output(merged_BTX.to(x_BTD.dtype))
        return recalled_BTD

    def _project(self, x_BTD: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of length temperature, unit keys and values, each fp32 [H, B, T, D]: a score is then q . k."""
        B, T, _ = x_BTD.shape
        if self.key_tokens:
            x_BTD = torch.cat([x_BTD, *last_tokens(embeddings(window), self.key_tokens, window.piece_BT)], dim=-1)
        qkv_BTX = self.query_key_value(x_BTD)
        if self.value is not None:
            qkv_BTX = torch.cat([qkv_BTX, self.value(embeddings(window))], dim=-1)
        qkv_BT3HD = qkv_BTX.float().view(B, T, 3, self.num_heads, self.head_dim)
        query_HBTD, key_HBTD, value_HBTD = qkv_BT3HD.permute(2, 3, 0, 1, 4).contiguous()
        temperature_H = self.log_temperature_H.float().exp()
        query_HBTD = F.normalize(query_HBTD, dim=-1) * temperature_H[:, None, None, None]
        return query_HBTD, F.normalize(key_HBTD, dim=-1), value_HBTD

    @without_autocast()
    def _read(self, query_HBTD: Tensor, key_HBTD: Tensor, value_HBTD: Tensor, window: Window, retriever: Retriever,
              tape: ReadTape) -> tuple[Tensor, Tensor]:
        """One softmax over own past, hits and null slot: the value [H, B, T, D] and each one's share [3, H, B, T]."""
        own_HBTD, own_lse_HBT = attend_own_past(query_HBTD, key_HBTD, value_HBTD, successor_values=self.successor_values,
                                                seen_BTT=window.seen_BTT)
        found_HBTD, found_lse_HBT = self._retrieve(query_HBTD, window, retriever, tape)
        null_lse_HBT = self.null_logit_H.float()[:, None, None].expand_as(own_lse_HBT)
        return merge_partials([own_HBTD, found_HBTD], [own_lse_HBT, found_lse_HBT, null_lse_HBT])

    def _queries(self, query_HBTD: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The queries that go to the bank, and their namespaces, -1 for padding."""
        _, B, T, _ = query_HBTD.shape
        namespace_BT = window.of_tokens(window.namespace_B, T)
        if window.valid_BT is not None:
            namespace_BT = namespace_BT.where(window.valid_BT, -1)
        return retrieval_queries(query_HBTD, namespace_BT, self.stride)

    def _retrieve(self, query_HBTD: Tensor, window: Window, retriever: Retriever,
                  tape: ReadTape) -> tuple[Tensor, Tensor]:
        """Attention over the bank's hits, per token: value [H, B, T, D] and log-sum-exp [H, B, T], bias included."""
        H, B, T, D = query_HBTD.shape
        query_HND, namespace_N = self._queries(query_HBTD, window)
        hits = tape.hits
        if hits is None:
            document_N = (None if window.document_B is None else
                          per_query(window.of_tokens(window.document_B, T), self.stride).flatten())
            hits = retriever.search(query_HND.detach(), namespace_N, document_N)
            tape.record(hits=hits)
        value_HND, lse_HN = retriever.attend(query_HND, hits)
        value_HBXD = value_HND.float().view(H, B, -1, D)
        lse_HBX = lse_HN.float().view(H, B, -1) + self.retrieved_bias_H.float()[:, None, None]
        if self.stride > 1:
            value_HBXD = value_HBXD.repeat_interleave(self.stride, dim=2)[:, :, :T]
            lse_HBX = lse_HBX.repeat_interleave(self.stride, dim=2)[:, :, :T]
            if window.piece_BT is not None:  # a document must not see what another one asked for
                asked_BT = per_query(window.piece_BT, self.stride).repeat_interleave(self.stride, dim=1)[:, :T]
                own_BT = window.piece_BT == asked_BT
                value_HBXD, lse_HBX = value_HBXD.where(own_BT[..., None], 0.0), lse_HBX.where(own_BT, NO_SCORE)
        return value_HBXD, lse_HBX
