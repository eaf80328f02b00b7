"""Autoregressive generation with the memories in use.

A stream is read as in training: in windows of at most `context_length` tokens. When a window is full, the short-term state
is carried on, the window's candidates are handed to `commit`, and the next window starts; so whatever lies further back
than one window reaches the model through its memories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmcode.model.lm import LMCODEOutput, MemoryLM


def next_token(logits_BV: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               generator: torch.Generator | None = None) -> Tensor:
    """Draws one token per row: int64 [B]. `temperature` 0 takes the most likely; `top_k` 0 and `top_p` 1 cut nothing.

    Top-p keeps the smallest set of tokens whose probability reaches p (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", ICLR 2020).

    Raises:
        ValueError: for a negative temperature or top_k, or top_p outside (0, 1].
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("need temperature >= 0, top_k >= 0 and 0 < top_p <= 1: "
                         f"got temperature={temperature}, top_k={top_k}, top_p={top_p}")
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        probability_BV = sorted_BV.softmax(-1)
        beyond_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(model: MemoryLM, input_ids_BT: Tensor, *, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, namespace_B: Tensor | None = None, window: int | None = None,
             commit: Callable[[LMCODEOutput], None] | None = None) -> Tensor:
    """Continues every row by `max_new_tokens`; returns int64 [B, T + max_new_tokens], the prompt included.

    Args:
        model: left in the mode it came in.
        input_ids_BT: prompts of equal length, at least one token.
        window: tokens read in one pass; the model's context length when None.
        commit: called with the output of every full window, to write what was read.

    Raises:
        ValueError: for an empty prompt or sampling settings out of range.
    """
    if input_ids_BT.ndim != 2 or input_ids_BT.shape[1] == 0:
        raise ValueError(f"generate needs prompts of shape [B, T] with T >= 1: got {tuple(input_ids_BT.shape)}")
    window = window or model.config.context_length
    generator = torch.Generator(device=input_ids_BT.device).manual_seed(seed)
    was_training, state, start = model.training, None, 0
    reset_B = torch.ones(len(input_ids_BT), dtype=torch.bool, device=input_ids_BT.device)
    model.eval()
    for _ in range(max_new_tokens):
        while input_ids_BT.shape[1] - start > window:
            full = model(input_ids_BT[:, start:start + window], state=state, reset_B=reset_B, namespace_B=namespace_B)
            state, reset_B, start = full.state, torch.zeros_like(reset_B), start + window
            if commit is not None:
                commit(full)
        output = model(input_ids_BT[:, start:], state=state, reset_B=reset_B, namespace_B=namespace_B)
        token_B = next_token(output.logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p,
                             generator=generator)
        input_ids_BT = torch.cat([input_ids_BT, token_B[:, None]], dim=1)
    model.train(was_training)
    return input_ids_BT
