"""A Transformer-XL cache: what each layer's attention also sees of the windows before this one (Dai et al. 2019).

A layer keeps the normalised inputs of its attention, detached, of the stream's last X tokens, ending with the last one read;
keys and values are made from them anew, so their projections are trained by what lies in the cache, too. Positions are
rotary and count on from the cache's first token, hence relative. Of another document nothing is seen: `length_B` says how
many of the X are of the document that goes on.
Letters: X tokens of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def visible(length_B: Tensor, size: int, piece_BT: Tensor | None) -> Tensor:
    """Which tokens of a cache of `size` tokens (last dim) a window's tokens may see: bool [B, T, X], or [B, 1, X] where all
    see the same.

    Args:
        length_B: int64, how many of the cache's last tokens are of the document that the window begins with.
        piece_BT: int64, the document within the window that each token belongs to; only those of 0 go on. None: all do.
    """
    kept_B1X = (torch.arange(size, device=length_B.device) >= size - length_B[:, None])[:, None]
    return kept_B1X if piece_BT is None else kept_B1X & (piece_BT == 0)[:, :, None]


def carried_on(past_BXD: Tensor | None, x_BTD: Tensor, valid_BT: Tensor | None, size: int) -> Tensor:
    """The last `size` inputs after a window, detached [B, X, D]; a stream of padding keeps those that it came with."""
    B, T, D = x_BTD.shape
    x_BTD = x_BTD.detach()
    both = (F.pad(x_BTD, (0, 0, size, 0)) if past_BXD is None
                else torch.cat([past_BXD.to(x_BTD.dtype), x_BTD], dim=1))
    if valid_BT is None:
        return both[:, T:].clone()
    index_BX = valid_BT.sum(dim=1)[:, None] + torch.arange(size, device=x_BTD.device)
    return both.gather(1, index_BX[:, :, None].expand(-1, -1, D))


def length_after(length_B: Tensor, num_tokens: int, valid_BT: Tensor | None, piece_BT: Tensor | None,
                 size: int) -> Tensor:
    """How many of the tokens that `carried_on` returns are of the document that a window of `num_tokens` ends with, [B].

    Args:
        length_B: the same before the window; 0 where a document begins with it.
    """
    if valid_BT is None:
        valid_BT = torch.ones(len(length_B), num_tokens, dtype=torch.bool, device=length_B.device)
    if piece_BT is not None:
        last_B1 = piece_BT[:, -1:]
        valid_BT = valid_BT & (piece_BT == last_B1)
        length_B = length_B.where(last_B1[:, 0] == 0, 0)
    return (length_B + valid_BT.sum(dim=1)).clamp(max=size)
