"""From logits to the next token: settings of decoding, and the pure functions that apply them.

The order is that of Hugging Face: repetition penalty, repeated n-grams, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_NEW_TOKENS = 128  # where neither max_length nor max_new_tokens is given


@dataclass(frozen=True)
class Decoding:
    """How a text is continued.

    max_length: tokens of the result, prompt included (of the longest prompt, padding counted, as in Hugging Face).
    max_new_tokens: tokens to add. Give one of both at most; `DEFAULT_NEW_TOKENS` are added without either.
    temperature: the logits' divisor; 0 takes the most likely token (greedy decoding).
    top_k: draw from so many most likely tokens; 0 from all.
    top_p: draw from the smallest set of tokens whose probability reaches p (Holtzman et al., "The Curious Case of Neural
        Text Degeneration", ICLR 2020); 1 from all.
    repetition_penalty: see `penalise_repetition`; 1 changes nothing.
    no_repeat_ngram_size: no run of so many tokens may occur twice, prompt included; 0 allows all.
    eos_id: the token that ends a stream; None: none does.
    seed: of the draws; None draws from torch's global generator.

    Raises:
        ValueError: for a setting out of range.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError("give max_length (prompt included) or max_new_tokens, not both: "
                             f"got {self.max_length} and {self.max_new_tokens}")
        for name in ("max_length", "max_new_tokens", "top_k", "no_repeat_ngram_size", "eos_id", "seed"):
            value, optional = getattr(self, name), name not in ("top_k", "no_repeat_ngram_size")
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be an integer: got {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number: got {value!r}")
        for name, rule, fine in (
            ("max_new_tokens", ">= 1", self.max_new_tokens is None or self.max_new_tokens >= 1),
            ("temperature", "finite and >= 0", 0 <= self.temperature < float("inf")),
            ("top_k", ">= 0", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("repetition_penalty", "finite and > 0", 0 < self.repetition_penalty < float("inf")),
            ("no_repeat_ngram_size", ">= 0", self.no_repeat_ngram_size >= 0),
        ):
            if not fine:
                raise ValueError(f"{name} must be {rule}: got {getattr(self, name)}")

    @property
    def best(self) -> int | None:
        """How many of the best logits decide the next token; None if any might."""
        if self.repetition_penalty != 1 or self.no_repeat_ngram_size:
            return None
        return 1 if self.temperature == 0 else self.top_k or None

    def num_new_tokens(self, prompt_length: int) -> int:
        """Most tokens that are added to a batch of prompts of this (padded) length.

        Raises:
            ValueError: if `max_length` leaves no room.
        """
        if self.max_length is None:
            return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        if self.max_length <= prompt_length:
            raise ValueError("max_length counts the prompt and must exceed its length: "
                             f"got max_length={self.max_length} for {prompt_length} tokens")
        return self.max_length - prompt_length


def next_token(logits_BX: Tensor, rows: Sequence[Sequence[int]], decoding: Decoding,
               generator: torch.Generator | None = None) -> Tensor:
    """Chooses one token per row: int64 [B].

    Args:
        rows: all tokens that each row has so far, prompt included; only repetition controls look at them.

    Raises:
        ValueError: if `no_repeat_ngram_size` leaves a row no token.
    """
    logits_BX = logits_BX.float()
    if decoding.repetition_penalty != 1:
        logits_BX = penalise_repetition(logits_BX, rows, decoding.repetition_penalty)
    if decoding.no_repeat_ngram_size:
        logits_BX = forbid_repeats(logits_BX, rows, decoding.no_repeat_ngram_size)
    if decoding.temperature == 0:
        return logits_BX.argmax(-1)
    scaled_BX = (logits_BX - logits_BX.amax(-1, keepdim=True)) / decoding.temperature  # however small, no inf - inf
    return draw(scaled_BX, top_k=decoding.top_k, top_p=decoding.top_p, generator=generator)


def penalise_repetition(logits_BX: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Makes tokens that a row already has less likely: their logit is divided by `penalty`, or multiplied if negative.

    The division is Keskar et al., "CTRL", 2019, section 4.1; for negative logits it would reward repetition instead, hence
    the multiplication, as in Hugging Face.
    """
    logits_BX = logits_BX.clone()
    for logits_X, row in zip(logits_BX, rows, strict=True):
        seen = torch.tensor(sorted(set(row)), device=logits_X.device)
        score = logits_X[seen]
        logits_X[seen] = torch.where(score > 0, score / penalty, score * penalty)
    return logits_BX


def forbid_repeats(logits_BX: Tensor, rows: Sequence[Sequence[int]], size: int) -> Tensor:
    """Rules out every token that would complete a run of `size` tokens which the row already holds.

    Raises:
        ValueError: if nothing is left.
    """
    logits_BX = logits_BX.clone()
    for logits_X, row in zip(logits_BX, rows, strict=True):
        banned = completions(row, size)
        if len(banned) == len(logits_X):
            raise ValueError(f"no_repeat_ngram_size={size} leaves no token: a row holds all {len(banned)} continuations")
        logits_X[sorted(banned)] = -torch.inf
    return logits_BX


def completions(row: Sequence[int], size: int) -> set[int]:
    """The tokens that followed earlier occurrences of the row's last `size` - 1 tokens."""
    last = list(row[len(row) - size + 1:]) if size > 1 else []
    return {row[end] for end in range(size - 1, len(row)) if list(row[end - size + 1:end]) == last}


def draw(logits_BX: Tensor, *, top_k: int, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token per row, int64 [B], from the `top_k` most likely ones and the nucleus `top_p` of these."""
    if top_k == 0 and top_p == 1:
        return torch.multinomial(logits_BX.softmax(-1), 1, generator=generator).squeeze(-1)
    V = logits_BX.shape[-1]
    score_BK, token_BK = logits_BX.topk(min(top_k, V) if top_k else V, dim=-1)  # descending
    probability_BK = score_BK.softmax(-1)
    beyond_BK = probability_BK.cumsum(-1) - probability_BK >= top_p
    drawn_B1 = torch.multinomial(probability_BK.masked_fill(beyond_BK, 0.0), 1, generator=generator)
    return token_BK.gather(-1, drawn_B1).squeeze(-1)
