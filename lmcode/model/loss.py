"""The loss of predicting tokens, and what a memory takes from it: how surprising each token was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.model.inputs import IGNORED
from lmcode.model.long_term import Window
from lmcode.model.state import StreamState


def next_token_loss(logits_BTX: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats: the mean over counted targets, and per token [B, T], 0 where ignored; both fp32."""
    token_loss_X = F.cross_entropy(logits_BTX.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED,
                             reduction="none")
    counted = (target_BT != IGNORED).sum().clamp(min=1)
    return token_loss_X.sum() / counted, token_loss_X.view_as(target_BT)


def surprises(token_loss_BT: Tensor, window: Window, state: StreamState | None) -> tuple[Tensor, Tensor]:
    """Loss of predicting each token of this window [B, T] and the first token of the next one [B]; 0 where unknown."""
    first_B = torch.zeros_like(token_loss_BT[:, 0])
    if state is not None:
        first_B = state.pending_surprise_B.where(window.pending_valid_B, 0.0)
    surprise_BT = torch.cat([first_B[:, None], token_loss_BT[:, :-1]], dim=1)
    if window.piece_BT is not None:  # nothing predicts the first token of a document
        surprise_BT = surprise_BT.masked_fill(F.pad(window.piece_BT.diff(dim=1) != 0, (1, 0)), 0.0)
    if window.valid_BT is None:
        return surprise_BT, token_loss_BT[:, -1].clone()
    count_B = window.valid_BT.sum(dim=1)
    last_B = token_loss_BT.gather(1, (count_B - 1).clamp(min=0)[:, None]).squeeze(1)
    return surprise_BT, last_B.where(count_B > 0, first_B)
