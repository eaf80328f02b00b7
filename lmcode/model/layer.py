"""One layer: self-attention, short-term memory, long-term read with gate, feed-forward, all pre-norm residual.

The layer returns its tensor and nothing else; hits, candidates and new slots go on the `ReadTape` it is handed. Its
`long_term_memory` is a plain attribute: whoever shards, casts or saves the modules must not see the bank.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model.attention import SelfAttention
from lmcode.model.long_term import LongTermRead, ReadTape, Window
from lmcode.model.past import carried_on
from lmcode.model.short_term import ShortTermMemory
from lmcode.protocol import NullRetriever, Retriever

NORM_EPSILON = 1e-6  # the default of nn.RMSNorm would be bf16's own, 0.008


def norm(width: int) -> nn.RMSNorm:
    """The normalisation used before every branch and the head (Zhang and Sennrich 2019)."""
    return nn.RMSNorm(width, eps=NORM_EPSILON)


class FeedForward(nn.Module):
    """Two linear maps around a GELU: [B, T, D] -> [B, T, D], inner width `feed_forward_size` or 4 D."""

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        inner = config.feed_forward_size or 4 * config.hidden_size
        self.input = nn.Linear(config.hidden_size, inner, bias=False)
        self.output = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self.output(F.gelu(self.input(x_BTD)))
        return output_BTD


class MemoryAugmentedLayer(nn.Module):
    """Layer number `index` of the model.

    long_term_memory: the retriever this layer reads, never a submodule; one that finds nothing if there is no bank.
    """

    long_term_memory: Retriever

    def __init__(self, config: LMCODEConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        has_slots, has_read = config.short_term_memory_size > 0, index in config.memory_layer_indices
        self.cache_tokens = config.cache_tokens
        self.dropout = nn.Dropout(config.dropout)
        self.attention_norm, self.attention = norm(width), SelfAttention(config)
        self.short_term_norm = norm(width) if has_slots else None
        self.short_term = ShortTermMemory(config) if has_slots else None
        self.long_term_norm = norm(width) if has_read else None
        self.long_term_read = LongTermRead(config) if has_read else None
        self.feed_forward_norm, self.feed_forward = norm(width), FeedForward(config)
        self.read_from(NullRetriever())

    def read_from(self, retriever: Retriever) -> None:
        """Sets `long_term_memory`, past nn.Module's own bookkeeping: even a module stays outside."""
        object.__setattr__(self, "long_term_memory", retriever)

    def forward(self, x_BTD: Tensor, *, window: Window, tape: ReadTape) -> Tensor:
        """Runs one window of each stream; [B, T, D] -> [B, T, D], side products on `tape`."""
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.dropout(self.attention(normed_BTD, rotation=window.rotation, cache=window.cache,
                                                    seen_BTT=window.seen_BTT, past_BXD=window.past_BXD,
                                                    seen_past_BTX=window.seen_past_BTX))
        if self.cache_tokens:
            tape.record(past_BXD=carried_on(window.past_BXD, normed_BTD, window.valid_BT, self.cache_tokens))
        if self.short_term is not None and self.short_term_norm is not None:
            read_BTD, slots_BMD = self.short_term(self.short_term_norm(x_BTD), slots_BMD=window.slots_BMD,
                                                  reset_B=window.reset_B, valid_BT=window.valid_BT,
                                                  cache=window.cache, piece_BT=window.piece_BT)
            tape.record(slots_BMD=slots_BMD)
            x_BTD = x_BTD + self.dropout(read_BTD)
        if self.long_term_read is not None and self.long_term_norm is not None:
            recalled_BTD = self.long_term_read(self.long_term_norm(x_BTD), window=window,
                                               retriever=self.long_term_memory, tape=tape)
            x_BTD = x_BTD + self.dropout(recalled_BTD)
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD
