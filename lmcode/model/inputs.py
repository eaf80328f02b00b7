"""What a forward pass is given, what of it is refused, and what follows from it alone.

Every argument is judged here and before anything is computed, so nothing further inside checks a shape or an id again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import LMCODEConfig

IGNORED = -100  # the target that is not counted, as in torch and Hugging Face


class Inputs(NamedTuple):
    """The tensors of a window, as `MemoryLM.forward` explains them; None: not given."""

    input_ids_BT: Tensor
    labels_BT: Tensor | None = None
    targets_BT: Tensor | None = None
    reset_B: Tensor | None = None
    namespace_B: Tensor | None = None
    document_B: Tensor | None = None
    valid_BT: Tensor | None = None
    piece_BT: Tensor | None = None


def check_inputs(inputs: Inputs, config: LMCODEConfig) -> None:
    """Raises ValueError for what a model of this shape cannot read."""
    input_ids_BT, labels_BT, targets_BT, reset_B, namespace_B, document_B, valid_BT, piece_BT = inputs
    longest = config.context_length
    if not isinstance(input_ids_BT, Tensor):
        raise ValueError(f"input_ids must be an integer tensor [B, T]: got {type(input_ids_BT).__name__}")
    if input_ids_BT.dim() != 2 or 0 in input_ids_BT.shape or input_ids_BT.dtype not in (torch.int64, torch.int32):
        raise ValueError("input_ids must be integer [B, T] with at least one token: "
                         f"got {input_ids_BT.dtype} {list(input_ids_BT.shape)}")
    B, T = input_ids_BT.shape
    if T > longest:
        raise ValueError(f"input_ids must have at most context_length = {longest} tokens: got {T}")
    if labels_BT is not None and targets_BT is not None:
        raise ValueError("give labels (shifted here) or targets (already aligned), not both")
    of_documents = (B,) if piece_BT is None or namespace_B is None else (B, *namespace_B.shape[1:2])
    for name, tensor, dtype, shape in (("labels", labels_BT, torch.int64, (B, T)),
                                       ("targets", targets_BT, torch.int64, (B, T)),
                                       ("reset_B", reset_B, torch.bool, (B,)),
                                       ("namespace_B", namespace_B, torch.int64, of_documents),
                                       ("document_B", document_B, torch.int64, of_documents),
                                       ("piece_BT", piece_BT, torch.int64, (B, T)),
                                       ("valid_BT", valid_BT, torch.bool, (B, T))):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            raise ValueError(f"{name} must be {dtype} {list(shape)}: got {tensor.dtype} {list(tensor.shape)}")
    _check_ids("input_ids", input_ids_BT, config.vocab_size)
    for name, tensor in (("labels", labels_BT), ("targets", targets_BT)):
        if tensor is not None:
            _check_ids(name, tensor.masked_fill(tensor == IGNORED, 0), config.vocab_size)
    if valid_BT is not None and bool((valid_BT[:, 1:] & ~valid_BT[:, :-1]).any()):
        raise ValueError("padding must trail: valid_BT has a True after a False")
    if piece_BT is not None and namespace_B is not None:
        _check_pieces(piece_BT, namespace_B)


def _check_ids(name: str, ids_BT: Tensor, vocab_size: int) -> None:
    """Refuses ids outside the vocabulary: one pass over the ids and one wait for the device."""
    smallest, largest = torch.stack(torch.aminmax(ids_BT)).tolist()
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(f"{name} must lie in 0..{vocab_size - 1}: got {smallest}..{largest}")


def _check_pieces(piece_BT: Tensor, namespace_BP: Tensor) -> None:
    """Refuses numbers of documents that do not ascend from 0, or for which there is no namespace."""
    steps_BT = piece_BT.diff(dim=1)
    if namespace_BP.dim() != 2 or bool((piece_BT[:, 0] != 0).any() | ((steps_BT != 0) & (steps_BT != 1)).any()
                                       | (piece_BT[:, -1] >= namespace_BP.shape[1]).any()):
        raise ValueError("piece_BT must ascend from 0 by 0 or 1, within the P documents of namespace_B [B, P]: got up to "
                         f"{int(piece_BT.max())}, namespaces {list(namespace_BP.shape)}")


def same_piece(piece_BT: Tensor) -> Tensor:
    """Which tokens (last dim) each token may attend to: those of its own document, at or before it; bool [B, T, T]."""
    T = piece_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=piece_BT.device).tril()
    return (piece_BT[:, :, None] == piece_BT[:, None, :]) & causal_TT


def places(input_ids_BT: Tensor, piece_BT: Tensor | None) -> Tensor:
    """The place of each token in its window, [T]; or in its part of the window, [B, T], where documents share one."""
    place_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    if piece_BT is None:
        return place_T
    begins_BT = F.pad(piece_BT.diff(dim=1) != 0, (1, 0))
    return place_T - (place_T * begins_BT).cummax(dim=1).values


def aligned_targets(labels_BT: Tensor | None, targets_BT: Tensor | None, valid_BT: Tensor | None) -> Tensor | None:
    """The token that each position is to predict, from labels or targets; padding and the unknown are -100."""
    given_BT = targets_BT if labels_BT is None else labels_BT
    if given_BT is None:
        return None
    if valid_BT is not None:
        given_BT = given_BT.masked_fill(~valid_BT, IGNORED)
    return given_BT if labels_BT is None else F.pad(given_BT[:, 1:], (0, 1), value=IGNORED)
