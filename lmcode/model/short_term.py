"""Short-term memory: a few recurrent slots per stream, read by every token and written once per segment.

Segment s reads the slots as they were after segment s-1 and then writes them. All segments of one forward pass share a
graph, because a write that is detached before it is read would never be trained. Whatever depends on tokens alone is
computed for the whole window at once; the loop over segments holds only what is recurrent (three small matmuls).
Letters here: X segments; T tokens of a window, or of one segment; D the model's width, or a slot's.
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
        candidate = softmax(query(slot) . key(token) / sqrt(D)) value(token)
        z         = sigmoid(update gate of [slot, candidate])
        slot     <- (1 - z * eta) * slot + z * eta * candidate
    Slots are kept in fp32 whatever the module's dtype: steps of size eta would be lost to bf16 rounding. So is all that a
    write computes but its linear maps.
    """

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        width, M, D = config.hidden_size, config.short_term_memory_size, config.short_term_dim
        self.segment = config.short_term_segment
        self.update_rate = config.memory_update_rate
        self.tokens = nn.Linear(width, 3 * D, bias=False)  # read query; write key and value
        self.slots_read = nn.Linear(D, 2 * D, bias=False)  # read key and value
        self.slots_write = nn.Linear(D, 2 * D, bias=False)  # write query and the slot's part of the update gate
        self.candidate_gate = nn.Linear(D, D)  # the candidate's part of the update gate
        self.output = nn.Linear(D, width, bias=False)
        self.initial_slots_SE = nn.Parameter(torch.empty(M, D))
        # Added to each slot's write query. Without it, slots that once hold the same content stay equal for ever.
        self.address_SE = nn.Parameter(torch.empty(M, D))

    def forward(self, x_BTD: Tensor, *, slots_BMD: Tensor | None = None, reset_B: Tensor | None = None,
                valid_BT: Tensor | None = None, cache: LayerCache | None = None,
                piece_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads and writes one window of each stream; T need not be a multiple of the segment.

        Args:
            x_BTD: normalised residual stream.
            slots_BMD: slots carried from the stream's last window; None starts from the learned initial slots.
            reset_B: bool, streams that return to the initial slots although slots were carried.
            valid_BT: bool, False at padding, which is never written; a segment of padding leaves the slots as they are.
            cache: is given the slots after the last complete segment and the tokens of the segment begun since.
            piece_BT: int64, the document within the window that each token belongs to, ascending from 0, which is the one
                that slots were carried for; None: there is one. Each document has slots of its own, and those of the last
                are returned.

        Returns:
            What each token read, [B, T, D] in the dtype of x; and the slots after the window, fp32 [B, M, D], detached.
        """
        T = x_BTD.shape[1]
        query_BTD, key_BTD, value_BTD = self.tokens(x_BTD).chunk(3, dim=-1)
        key_BTD = key_BTD.float() * key_BTD.shape[-1] ** -0.5
        # Attention is linear in its values, so the gate's share of the candidate can be computed per token, up front.
        written = torch.cat([value_BTD, self.candidate_gate(value_BTD)], dim=-1).float()  # [B, T, 2 D]
        slots_BMD = self._first_slots(x_BTD.shape[0], slots_BMD, reset_B)
        history: list[Tensor] = []
        for start in range(0, T, self.segment):
            history.append(slots_BMD)
            part = slice(start, start + self.segment)
            part_valid_BT = None if valid_BT is None else valid_BT[:, part]
            if piece_BT is not None:
                # Only the piece that the segment ends with may go on, so only its tokens are written, to its own slots.
                last_B1 = piece_BT[:, part][:, -1:]
                goes_on_B1 = last_B1 == piece_BT[:, max(0, start - 1), None] if start else last_B1 == 0
                slots_BMD = self._first_slots(x_BTD.shape[0], slots_BMD, ~goes_on_B1[:, 0])
                own_BT = piece_BT[:, part] == last_B1
                part_valid_BT = own_BT if part_valid_BT is None else own_BT & part_valid_BT
            slots_BMD = self.write(slots_BMD, key_BTD[:, part], written[:, part], part_valid_BT)
        if cache is not None:
            self._fill(cache, torch.stack([*history, slots_BMD], dim=1), key_BTD, written, valid_BT)
        slots_BXMD = torch.stack(history, dim=1)
        read_BTD = (self._read(query_BTD, slots_BXMD, self.segment) if piece_BT is None
                    else self._read_pieces(query_BTD, slots_BXMD, piece_BT))
        return self.output(read_BTD), slots_BMD.detach()

    def _fill(self, cache: LayerCache, slots_BXMD: Tensor, key_BTD: Tensor, written: Tensor,
              valid_BT: Tensor | None) -> None:
        """Leaves in `cache` each stream's slots before its unfinished segment, and that segment's tokens, from index 0."""
        B, T, _ = key_BTD.shape
        count_B = (torch.full((B,), T, device=key_BTD.device) if valid_BT is None else valid_BT.sum(dim=1))
        done_B, streams_B1 = count_B // self.segment, torch.arange(B, device=count_B.device)[:, None]
        cache.slots_BMD = slots_BXMD[streams_B1[:, 0], done_B].detach()
        place_BT = done_B[:, None] * self.segment + torch.arange(self.segment, device=count_B.device)
        place_BT = place_BT.clamp(max=T - 1)  # beyond the stream's tokens: overwritten before a write sees it
        segment = torch.cat([key_BTD, written], dim=-1)[streams_B1, place_BT]  # [B, T, 3 D]
        cache.fill("segment", segment.unsqueeze(1), length=self.segment)

    def _first_slots(self, num_streams: int, slots_BMD: Tensor | None, reset_B: Tensor | None) -> Tensor:
        """Carried slots, or initial ones where there are none; the initial slots stay in the graph either way."""
        initial_BMD = self.initial_slots_SE.float().expand(num_streams, -1, -1)
        if slots_BMD is None:
            return initial_BMD
        if reset_B is None:
            reset_B = torch.zeros(num_streams, dtype=torch.bool, device=initial_BMD.device)
        return torch.where(reset_B[:, None, None], initial_BMD, slots_BMD.float())

    def write(self, slots_BMD: Tensor, key_BTD: Tensor, written: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """One segment's update of the slots; `written` holds values and their part of the gate, fp32 [B, T, 2 D]."""
        query_BMD, slot_gate_BMD = self.slots_write(self._normed(slots_BMD)).float().chunk(2, dim=-1)
        with without_autocast():
            score_BMT = (query_BMD + self.address_SE.float()) @ key_BTD.transpose(1, 2)
            if valid_BT is not None:
                score_BMT = score_BMT.masked_fill(~valid_BT[:, None], NO_SCORE)
            candidate_BMD, candidate_gate_BMD = (score_BMT.softmax(dim=-1) @ written).chunk(2, dim=-1)
        z_BMD = torch.sigmoid(slot_gate_BMD + candidate_gate_BMD)
        new_BMD = torch.lerp(slots_BMD, candidate_BMD, z_BMD * self.update_rate)
        if valid_BT is None:
            return new_BMD
        return torch.where(valid_BT.any(dim=1)[:, None, None], new_BMD, slots_BMD)

    def _read(self, query_BTD: Tensor, slots_BXMD: Tensor, segment: int) -> Tensor:
        """Every segment's tokens attend to the slots that its predecessor left, all segments at once."""
        B, T, D = query_BTD.shape
        X = slots_BXMD.shape[1]
        if X * segment != T:
            query_BTD = F.pad(query_BTD, (0, 0, 0, X * segment - T))
        key_BXMD, value_BXMD = self.slots_to_read(slots_BXMD)
        read_BXTD = F.scaled_dot_product_attention(query_BTD.view(B, X, segment, D), key_BXMD, value_BXMD)
        return read_BXTD.reshape(B, -1, D)[:, :T]

    def _read_pieces(self, query_BTD: Tensor, slots_BXMD: Tensor, piece_BT: Tensor) -> Tensor:
        """As `_read`; but tokens of documents that begin within a segment attend to the initial slots."""
        B, T, _ = query_BTD.shape
        before_BT = F.pad(piece_BT[:, self.segment - 1:T - 1:self.segment], (1, 0))  # what goes on into each segment
        goes_on_BT = piece_BT == before_BT.repeat_interleave(self.segment, dim=1)[:, :T]
        carried_BTD = self._read(query_BTD, slots_BXMD, self.segment)
        fresh_BTD = self._read(query_BTD, self._first_slots(B, None, None)[:, None], T)
        return torch.where(goes_on_BT[..., None], carried_BTD, fresh_BTD)

    def slots_to_read(self, slots_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values by which tokens read slots [..., M, D], in the dtype of the module's linear maps."""
        key_MD, value_MD = self.slots_read(self._normed(slots_MD)).chunk(2, dim=-1)
        return key_MD, value_MD

    def _normed(self, slots_MD: Tensor) -> Tensor:
        """What the linear maps see of slots: normalised, in the module's dtype."""
        return F.rms_norm(slots_MD, slots_MD.shape[-1:], eps=EPSILON).to(self.address_SE.dtype)
