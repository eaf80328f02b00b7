"""The language model: embedding, memory-augmented layers, norm, tied head; and what one forward pass returns.

A forward pass reads memory and never writes it: it returns candidate entries, which the training loop commits after the
optimizer step. Parameters are touched only inside the forward of the module that owns them, because
ZeRO-3 gathers a module's parameters around its call and nowhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lmcode.config import LMCODEConfig, build
from lmcode.model.cache import Cache
from lmcode.model.inputs import Inputs, aligned_targets, check_inputs, places, same_piece
from lmcode.model.layer import NORM_EPSILON, MemoryAugmentedLayer, norm
from lmcode.model.long_term import LongTermRead, ReadTape, Window
from lmcode.model.loss import next_token_loss, surprises
from lmcode.model.past import length_after, visible
from lmcode.model.rotary import rotary_table
from lmcode.model.short_term import ShortTermMemory
from lmcode.model.state import StreamState, check_state
from lmcode.protocol import EntryShape, LayerMemory, NullRetriever, Retriever

INITIAL_STD = 0.02  # of every matrix (Radford et al. 2019)
COPY_SCALE = 0.5  # a read of one token's value adds its embedding times this to the residual stream, before training


class LMCODEOutput(NamedTuple):
    """What `MemoryLM` returns.

    logits: [B, T, X], X ids of the vocabulary, in the model's dtype.
    loss: fp32 scalar, mean of `token_loss` over counted targets (0 if none is counted); None without targets.
    token_loss: fp32 [B, T], nats, 0 where ignored; None without targets.
    state: for the streams' next window.
    memory: by number of the memory layer.
    """

    logits: Tensor
    loss: Tensor | None
    token_loss: Tensor | None
    state: StreamState
    memory: dict[int, LayerMemory]


@torch.no_grad()
def begin_read(read: LongTermRead, config: LMCODEConfig) -> None:
    """Sets the learned numbers of a read, and its queries to its keys, so that a head begins by matching equal contexts and
    need not find that first."""
    nn.init.constant_(read.log_temperature_H, math.log(config.memory_temperature))
    nn.init.constant_(read.retrieved_bias_H, config.memory_bias)
    nn.init.zeros_(read.null_logit_H)
    query_XD, key_XD = read.query_key_value.weight.chunk(3 if read.value is None else 2)[:2]
    query_XD.copy_(key_XD)
    if read.value is not None:
        # What is read points to where the tied head looks for it, so that a hit raises its token's logit at once.
        nn.init.normal_(read.value.weight, std=config.hidden_size ** -0.5)
        read.output.weight.copy_(COPY_SCALE * read.value.weight.T)


def memory_shapes(config: LMCODEConfig) -> dict[int, EntryShape]:
    """The entries of each memory layer."""
    return {layer: EntryShape(config.memory_heads, config.memory_head_dim, config.memory_head_dim)
            for layer in config.memory_layer_indices}


class MemoryLM(nn.Module):
    """A causal transformer language model with short-term slots and reads of a long-term memory.

    Args:
        config: the shape of the model.
        retrievers: who answers the reads, by layer; memory layers that are left out find nothing.

    Attributes:
        activation_checkpointing: recompute layers in the backward pass. Searches are not repeated: the recomputation
            uses the first execution's hits (`attend`, being differentiable, runs again).

    Raises:
        ValueError: if `retrievers` names a layer that has no long-term memory.
    """

    def __init__(self, config: LMCODEConfig, retrievers: Mapping[int, Retriever] | None = None) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: bool = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = (nn.Embedding(config.context_length, config.hidden_size)
                          if config.positions == "learned" else None)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MemoryAugmentedLayer(config, index) for index in range(config.num_layers))
        self.norm = norm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise()
        self.head.weight = self.embedding.weight
        self.set_retrievers(retrievers or {})

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws all parameters anew from torch's global generator.

        Matrices are normal(0, 0.02); those that write into the residual stream are divided by sqrt(2 * num_layers)
        (Radford et al. 2019). Slot addresses are normal(0, 1), on the scale of the write keys they are compared with.
        Values made from embeddings are normal(0, 1/D), their way back into the residual stream the transpose.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = math.sqrt(2 * self.config.num_layers) if name.endswith(".output") else 1.0
                nn.init.normal_(module.weight, std=INITIAL_STD / scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, ShortTermMemory):
                nn.init.normal_(module.initial_slots_SE, std=INITIAL_STD)
                nn.init.normal_(module.address_SE)
        for read in (module for module in self.modules() if isinstance(module, LongTermRead)):
            begin_read(read, self.config)

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """Gives the model another vocabulary: ids that stay keep their rows, new ones get the mean of all old rows, so that
        at first none of them is likelier than the average token. The head is the embedding, before and after.

        Make optimizers and engines after it, since the weight is a new parameter.

        Raises:
            ValueError: for fewer than 2 ids, or where the weights are not the model's own to change (ZeRO-3 has taken them
                away, an adapter or a quantiser has replaced the module); nothing has changed then.
        """
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 2:
            raise ValueError(f"a vocabulary has at least 2 ids: got {vocab_size!r}")
        old_XD = self.embedding.weight
        own = type(self.embedding) is nn.Embedding and type(self.head) is nn.Linear and self.head.weight is old_XD
        if not own or tuple(old_XD.shape) != (self.config.vocab_size, self.config.hidden_size):
            raise ValueError("the embedding can be resized only where it is this model's own and whole: got "
                             f"{type(self.embedding).__name__} {list(old_XD.shape)} and {type(self.head).__name__}")
        config = build(LMCODEConfig, {**self.config.model_dump(), "vocab_size": vocab_size})
        kept_XD = old_XD[:vocab_size]
        added_XD = old_XD.float().mean(0).to(old_XD.dtype).expand(vocab_size - len(kept_XD), -1)
        weight_XD = nn.Parameter(torch.cat([kept_XD, added_XD]), requires_grad=old_XD.requires_grad)
        self.embedding.weight = self.head.weight = weight_XD
        self.embedding.num_embeddings = self.head.out_features = vocab_size
        self.config = config
        return self.embedding

    def set_retrievers(self, retrievers: Mapping[int, Retriever]) -> None:
        """Gives memory layers their retrievers; those left out find nothing from now on.

        Raises:
            ValueError: if a key is not the number of a memory layer.
        """
        memory_layers = self.config.memory_layer_indices
        for index in retrievers:
            if index not in memory_layers:
                raise ValueError(f"a retriever belongs to a memory layer, one of {memory_layers}: got layer {index}")
        for index in memory_layers:
            self.layer(index).read_from(retrievers.get(index, NullRetriever()))

    def layer(self, index: int) -> MemoryAugmentedLayer:
        """Layer number `index`."""
        return cast(MemoryAugmentedLayer, self.layers[index])  # a ModuleList does not say what modules it has

    @contextmanager
    def reading_from(self, retrievers: Mapping[int, Retriever]) -> Iterator[None]:
        """Reads from `retrievers` inside the `with` block ({}: from nothing) and from the former ones after it."""
        former = {index: self.layer(index).long_term_memory for index in self.config.memory_layer_indices}
        self.set_retrievers(retrievers)
        try:
            yield
        finally:
            self.set_retrievers(former)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, targets_BT: Tensor | None = None,
                state: StreamState | None = None, reset_B: Tensor | None = None, namespace_B: Tensor | None = None,
                document_B: Tensor | None = None, valid_BT: Tensor | None = None, cache: Cache | None = None,
                piece_BT: Tensor | None = None) -> LMCODEOutput:
        """Runs one window of B streams.

        Args:
            input_ids: integer token ids [B, T].
            labels: int64 [B, T], the ids themselves in the manner of Hugging Face, shifted in here; -100 is ignored.
            targets_BT: int64, the next token of each position, already aligned; -100 is ignored.
            state: the streams' state after their last window; None: they start here.
            reset_B: bool, streams that start a new document here: initial slots, nothing pending.
            namespace_B: int64, the document each stream is in; arange(B) if None. A negative one is no document: it
                finds nothing and offers nothing for writing.
            document_B: int64, the text that each stream reads: the same number whenever, and under whatever namespace, it
                is read. What was written from it under another namespace is not seen. Negative, or None: unknown.
            valid_BT: bool, False marks padding, which must trail. Targets there are ignored.
            cache: an empty one, filled by this pass over the streams' first tokens of a window; see `decode.py`.
            piece_BT: int64, where documents share a window: which of them each token belongs to, ascending from 0, which is
                the one that `state` and `reset_B` are about; `namespace_B` and `document_B` are then [B, P], of each of
                them. Each is read as if it had begun in a window of its own, and sees nothing of the others; the state that
                is returned is that of the last. (Short-term segments are those of the window.)

        Raises:
            ValueError: wrong shape, dtype or range of an argument; a state of other streams or another model; both
                labels and targets; padding that does not trail; a cache that is not empty.
        """
        inputs = Inputs(input_ids, labels, targets_BT, reset_B, namespace_B, document_B, valid_BT, piece_BT)
        check_inputs(inputs, self.config)
        if state is not None:
            check_state(state, self.config, len(input_ids))
        window = self._window(inputs, state)
        if piece_BT is not None:
            if cache is not None or labels is not None or namespace_B is None:
                raise ValueError("documents that share a window need their namespaces, and targets instead of labels; they "
                                 "cannot fill a cache")
            window = window._replace(piece_BT=piece_BT, seen_BTT=same_piece(piece_BT))
        if window.past_length_B is not None:
            window = window._replace(seen_past_BTX=visible(window.past_length_B, self.config.cache_tokens, piece_BT))
        if cache is not None:
            self._begin(cache, input_ids, valid_BT)
        x_BTD = self.embedding(input_ids)
        if self.config.reads_embeddings:
            window = window._replace(token_BTD=unit(x_BTD.detach()))
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(places(input_ids, piece_BT))
        x_BTD, tapes = self._run_layers(self.dropout(x_BTD), window, state, cache)
        logits_BTX = self.head(self.norm(x_BTD))

        loss = token_loss_BT = None
        target_BT = aligned_targets(labels, targets_BT, valid_BT)
        if target_BT is not None:
            loss, token_loss_BT = next_token_loss(logits_BTX, target_BT)
        known_BT = (torch.zeros_like(input_ids, dtype=torch.float32) if token_loss_BT is None
                    else token_loss_BT.detach())
        surprise_BT, pending_surprise_B = surprises(known_BT, window, state)
        memory = {index: layer_memory(tapes[index], surprise_BT) for index in self.config.memory_layer_indices}
        return LMCODEOutput(logits_BTX, loss, token_loss_BT,
                            self._next_state(tapes, window, pending_surprise_B, input_ids.shape[1]), memory)

    def blank_state(self, num_streams: int, *, device: torch.device | None = None) -> StreamState:
        """The state of streams that are yet to start: zeros with nothing pending, to be passed with `reset_B` all True."""
        config, B = self.config, num_streams
        slots_BMD = torch.zeros(B, config.short_term_memory_size, config.short_term_dim, device=device)
        key_BHD = torch.zeros(B, config.memory_heads, config.memory_head_dim, device=device)
        past_BXD = torch.zeros(B, config.cache_tokens, config.hidden_size, device=device)
        cached = config.cache_tokens > 0
        return StreamState((slots_BMD,) * (config.num_layers if config.short_term_memory_size else 0),
                           (key_BHD,) * len(config.memory_layer_indices),
                           torch.zeros(B, dtype=torch.bool, device=device), torch.zeros(B, device=device),
                           (past_BXD,) * config.num_layers * cached,
                           (torch.zeros(B, dtype=torch.int64, device=device),) * cached)

    def _begin(self, cache: Cache, input_ids_BT: Tensor, valid_BT: Tensor | None) -> None:
        """Makes an empty cache ready for its first pass."""
        (B, T), config = input_ids_BT.shape, self.config
        if config.cache_tokens:
            raise ValueError("a model with cache_windows reads whole windows: it fills no cache for single tokens")
        if cache.lengths:
            raise ValueError("a window is read into an empty cache: this one has streams of "
                             f"{cache.lengths} tokens")
        if not T <= cache.window <= config.context_length:
            raise ValueError(f"a cache's window must lie between the tokens of its first pass, {T}, and context_length, "
                             f"{config.context_length}: got {cache.window}")
        cache.begin(config.num_layers, [T] * B if valid_BT is None else valid_BT.sum(dim=1).tolist())

    def _window(self, inputs: Inputs, state: StreamState | None) -> Window:
        """What all layers share about this window; the carried state of each layer is added by `_run_layers`."""
        (B, T), device = inputs.input_ids_BT.shape, inputs.input_ids_BT.device
        reset_B, namespace_B = inputs.reset_B, inputs.namespace_B
        rotation, past_length_B = None, None
        if state is not None and state.past_length:
            past_length_B = state.past_length[0]
            past_length_B = past_length_B if reset_B is None else past_length_B.masked_fill(reset_B, 0)
        if self.positions is None:
            past = 0 if past_length_B is None else self.config.cache_tokens
            rotation = rotary_table(past + T, self.config.hidden_size // self.config.num_heads, device=device)
        if namespace_B is None:
            namespace_B = torch.arange(B, device=device)
        pending_valid_B = (torch.zeros(B, dtype=torch.bool, device=device) if state is None
                           else state.pending_valid_B)
        if reset_B is not None:
            pending_valid_B = pending_valid_B & ~reset_B
        return Window(namespace_B, pending_valid_B, reset_B, inputs.valid_BT, rotation, document_B=inputs.document_B,
                      past_length_B=past_length_B)

    def _run_layers(self, x_BTD: Tensor, window: Window, state: StreamState | None,
                    cache: Cache | None) -> tuple[Tensor, list[ReadTape]]:
        """All layers in turn, each with its own tape; recomputed in the backward pass if so wished."""
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        if recompute and not x_BTD.requires_grad:
            x_BTD.requires_grad_()  # a frozen embedding: reentrant checkpoints need an input with a gradient
        tapes = [ReadTape() for _ in self.layers]
        for index, (layer, tape) in enumerate(zip(self.layers, tapes, strict=True)):
            layer_window = self._layer_window(index, window, state)
            if cache is not None:
                layer_window = layer_window._replace(cache=cache.layers[index])
            run = functools.partial(layer, window=layer_window, tape=tape)
            # Reentrant, since only this kind runs the hooks with which ZeRO-3 gathers parameters in the recomputation.
            x_BTD = checkpoint(run, x_BTD, use_reentrant=True) if recompute else run(x_BTD)
        return x_BTD, tapes

    def _next_state(self, tapes: list[ReadTape], window: Window, pending_surprise_B: Tensor, num_tokens: int) -> StreamState:
        """What the streams carry to their next window; a stream that had only padding here carries what it came with."""
        pending_valid_B = (torch.ones_like(window.pending_valid_B) if window.valid_BT is None
                           else window.valid_BT.any(dim=1) | window.pending_valid_B)
        past_length: tuple[Tensor, ...] = ()
        if size := self.config.cache_tokens:
            before_B = (torch.zeros_like(pending_valid_B, dtype=torch.int64) if window.past_length_B is None
                        else window.past_length_B)
            past_length = (length_after(before_B, num_tokens, window.valid_BT, window.piece_BT, size),)
        return StreamState(tuple(tape.slots_BMD for tape in tapes if tape.slots_BMD is not None),
                           tuple(tape.pending_key_BHD for tape in tapes if tape.pending_key_BHD is not None),
                           pending_valid_B, pending_surprise_B,
                           tuple(tape.past_BXD for tape in tapes if tape.past_BXD is not None), past_length)

    def _layer_window(self, index: int, window: Window, state: StreamState | None) -> Window:
        """`window` with the state that layer `index` carried over."""
        if state is None:
            return window
        memory_layers = self.config.memory_layer_indices
        return window._replace(
            slots_BMD=state.slots[index] if state.slots else None,
            past_BXD=state.past[index] if state.past else None,
            pending_key_BHD=state.pending_key[memory_layers.index(index)] if index in memory_layers else None)

def unit(x_BTD: Tensor) -> Tensor:
    """Vectors of mean square 1, as the norms make them: embeddings of rare and of frequent tokens differ a lot in length."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPSILON)


def layer_memory(tape: ReadTape, surprise_BT: Tensor) -> LayerMemory:
    """A memory layer's tape as it is handed out, with the surprises that the layer could not know.

    Raises:
        ValueError: if the layer has not read its memory.
    """
    hits, candidates, gate_BT = tape.hits, tape.candidates, tape.gate_BT
    share_HN, null_share_HN = tape.share_HN, tape.null_share_HN
    if hits is None or candidates is None or gate_BT is None or share_HN is None or null_share_HN is None:
        raise ValueError("a memory layer must read its memory in a forward pass: this one has recorded nothing")
    return LayerMemory(hits._replace(credit_HN=tape.credit_HN), candidates._replace(surprise_N=surprise_BT.flatten()),
                       gate_BT, share_HN, null_share_HN)
