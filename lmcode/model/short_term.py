"""Short-term memory: a few recurrent slots per stream, read by every token and written once per segment.

Segment s reads the slots as they were after segment s-1 and then writes them. All segments of one forward pass share a
graph, because a write that is detached before it is read would never be trained. Whatever depends on tokens alone is
computed for the whole window at once; the loop over segments holds only what is recurrent (three small matmuls).
Letters here: S slots of a stream, E their width, G segments, L tokens of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE

if TYPE_CHECKING:
    from lmcode.model.cache import LayerCache

EPSILON = 1e-6


class ShortTermMemory(nn.Module):
    """Slots that tokens attend to, and that attend to the tokens of each segment to renew themselves.

    The write (a gated, slot-attention-like update):
        candidate = softmax(query(slot) . key(token) / sqrt(E)) value(token)
        z         = sigmoid(update gate of [slot, candidate])
        slot     <- (1 - z * eta) * slot + z * eta * candidate
    Slots are kept in fp32 whatever the module's dtype: steps of size eta would be lost to bf16 rounding. So is all that a
    write computes but its linear maps.
    """

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        C, S, E = config.hidden_size, config.short_term_memory_size, config.short_term_dim
        self.segment = config.short_term_segment
        self.update_rate = config.memory_update_rate
        self.tokens = nn.Linear(C, 3 * E, bias=False)  # read query; write key and value
        self.slots_read = nn.Linear(E, 2 * E, bias=False)  # read key and value
        self.slots_write = nn.Linear(E, 2 * E, bias=False)  # write query and the slot's part of the update gate
        self.candidate_gate = nn.Linear(E, E)  # the candidate's part of the update gate
        self.output = nn.Linear(E, C, bias=False)
        self.initial_slots_SE = nn.Parameter(torch.empty(S, E))
        # Added to each slot's write query. Without it, slots that once hold the same content stay equal for ever.
        self.address_SE = nn.Parameter(torch.empty(S, E))

    def forward(self, x_BTC: Tensor, *, slots_BSE: Tensor | None = None, reset_B: Tensor | None = None,
                valid_BT: Tensor | None = None, cache: LayerCache | None = None,
                piece_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads and writes one window of each stream; T need not be a multiple of the segment.

        Args:
            x_BTC: normalised residual stream.
            slots_BSE: slots carried from the stream's last window; None starts from the learned initial slots.
            reset_B: bool, streams that return to the initial slots although slots were carried.
            valid_BT: bool, False at padding, which is never written; a segment of padding leaves the slots as they are.
            cache: is given the slots after the last complete segment and the tokens of the segment begun since.
            piece_BT: int64, the document within the window that each token belongs to, ascending from 0, which is the one
                that slots were carried for; None: there is one. Each document has slots of its own, and those of the last
                are returned.

        Returns:
            What each token read, [B, T, C] in the dtype of x; and the slots after the window, fp32 [B, S, E], detached.
        """
        T = x_BTC.shape[1]
        query_BTE, key_BTE, value_BTE = self.tokens(x_BTC).chunk(3, dim=-1)
        key_BTE = key_BTE.float() * key_BTE.shape[-1] ** -0.5
        # Attention is linear in its values, so the gate's share of the candidate can be computed per token, up front.
        written_BTP = torch.cat([value_BTE, self.candidate_gate(value_BTE)], dim=-1).float()
        slots_BSE = self._first_slots(x_BTC.shape[0], slots_BSE, reset_B)
        history: list[Tensor] = []
        for start in range(0, T, self.segment):
            history.append(slots_BSE)
            part = slice(start, start + self.segment)
            valid_BL = None if valid_BT is None else valid_BT[:, part]
            if piece_BT is not None:
                # Only the piece that the segment ends with may go on, so only its tokens are written, to its own slots.
                last_B1 = piece_BT[:, part][:, -1:]
                goes_on_B1 = last_B1 == piece_BT[:, max(0, start - 1), None] if start else last_B1 == 0
                slots_BSE = self._first_slots(x_BTC.shape[0], slots_BSE, ~goes_on_B1[:, 0])
                own_BL = piece_BT[:, part] == last_B1
                valid_BL = own_BL if valid_BL is None else own_BL & valid_BL
            slots_BSE = self.write(slots_BSE, key_BTE[:, part], written_BTP[:, part], valid_BL)
        if cache is not None:
            self._fill(cache, torch.stack([*history, slots_BSE], dim=1), key_BTE, written_BTP, valid_BT)
        slots_BGSE = torch.stack(history, dim=1)
        read_BTE = (self._read(query_BTE, slots_BGSE, self.segment) if piece_BT is None
                    else self._read_pieces(query_BTE, slots_BGSE, piece_BT))
        return self.output(read_BTE), slots_BSE.detach()

    def _fill(self, cache: LayerCache, slots_BGSE: Tensor, key_BTE: Tensor, written_BTP: Tensor,
              valid_BT: Tensor | None) -> None:
        """Leaves in `cache` each stream's slots before its unfinished segment, and that segment's tokens, from index 0."""
        B, T, _ = key_BTE.shape
        count_B = (torch.full((B,), T, device=key_BTE.device) if valid_BT is None else valid_BT.sum(dim=1))
        done_B, streams_B1 = count_B // self.segment, torch.arange(B, device=count_B.device)[:, None]
        cache.slots_BSE = slots_BGSE[streams_B1[:, 0], done_B].detach()
        place_BL = done_B[:, None] * self.segment + torch.arange(self.segment, device=count_B.device)
        place_BL = place_BL.clamp(max=T - 1)  # beyond the stream's tokens: overwritten before a write sees it
        segment_BLP = torch.cat([key_BTE, written_BTP], dim=-1)[streams_B1, place_BL]
        cache.fill("segment", segment_BLP.unsqueeze(1), length=self.segment)

    def _first_slots(self, num_streams: int, slots_BSE: Tensor | None, reset_B: Tensor | None) -> Tensor:
        """Carried slots, or initial ones where there are none; the initial slots stay in the graph either way."""
        initial_BSE = self.initial_slots_SE.float().expand(num_streams, -1, -1)
        if slots_BSE is None:
            return initial_BSE
        if reset_B is None:
            reset_B = torch.zeros(num_streams, dtype=torch.bool, device=initial_BSE.device)
        return torch.where(reset_B[:, None, None], initial_BSE, slots_BSE.float())

    def write(self, slots_BSE: Tensor, key_BLE: Tensor, written_BLP: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """One segment's update of the slots; `written_BLP` holds values and their part of the gate side by side, in fp32."""
        query_BSE, slot_gate_BSE = self.slots_write(self._normed(slots_BSE)).float().chunk(2, dim=-1)
        with without_autocast():
            score_BSL = (query_BSE + self.address_SE.float()) @ key_BLE.transpose(1, 2)
            if valid_BL is not None:
                score_BSL = score_BSL.masked_fill(~valid_BL[:, None], NO_SCORE)
            candidate_BSE, candidate_gate_BSE = (score_BSL.softmax(dim=-1) @ written_BLP).chunk(2, dim=-1)
        z_BSE = torch.sigmoid(slot_gate_BSE + candidate_gate_BSE)
        new_BSE = torch.lerp(slots_BSE, candidate_BSE, z_BSE * self.update_rate)
        if valid_BL is None:
            return new_BSE
        return torch.where(valid_BL.any(dim=1)[:, None, None], new_BSE, slots_BSE)

    def _read(self, query_BTE: Tensor, slots_BGSE: Tensor, segment: int) -> Tensor:
        """Every segment's tokens attend to the slots that its predecessor left, all segments at once."""
        B, T, E = query_BTE.shape
        G = slots_BGSE.shape[1]
        if G * segment != T:
            query_BTE = F.pad(query_BTE, (0, 0, 0, G * segment - T))
        key_BGSE, value_BGSE = self.slots_to_read(slots_BGSE)
        read_BGLE = F.scaled_dot_product_attention(query_BTE.view(B, G, segment, E), key_BGSE, value_BGSE)
        return read_BGLE.reshape(B, -1, E)[:, :T]

    def _read_pieces(self, query_BTE: Tensor, slots_BGSE: Tensor, piece_BT: Tensor) -> Tensor:
        """As `_read`; but tokens of documents that begin within a segment attend to the initial slots."""
        B, T, _ = query_BTE.shape
        before_BT = F.pad(piece_BT[:, self.segment - 1:T - 1:self.segment], (1, 0))  # what goes on into each segment
        goes_on_BT = piece_BT == before_BT.repeat_interleave(self.segment, dim=1)[:, :T]
        carried_BTE = self._read(query_BTE, slots_BGSE, self.segment)
        fresh_BTE = self._read(query_BTE, self._first_slots(B, None, None)[:, None], T)
        return torch.where(goes_on_BT[..., None], carried_BTE, fresh_BTE)

    def slots_to_read(self, slots_SE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values by which tokens read slots [..., S, E], in the dtype of the module's linear maps."""
        key_SE, value_SE = self.slots_read(self._normed(slots_SE)).chunk(2, dim=-1)
        return key_SE, value_SE

    def _normed(self, slots_SE: Tensor) -> Tensor:
        """What the linear maps see of slots: normalised, in the module's dtype."""
        return F.rms_norm(slots_SE, slots_SE.shape[-1:], eps=EPSILON).to(self.address_SE.dtype)
