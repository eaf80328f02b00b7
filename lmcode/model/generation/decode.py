"""One new token of each stream through the whole model, in as few operations as possible.

A small model's token costs little arithmetic and a hundred times the overhead of an operation, so what does not change
between tokens is prepared once: factors of norms and constant scales sit in the weights, maps of the same input are one
product, residual sums are part of products, and own past, hits and null slot share one softmax. The result is that of
`MemoryLM` on the whole window, which is the oracle of this file; rounding differs.

A `Decoder` takes weights from where they lie and calls no module, so it serves only models whose modules are unchanged
(`steppable`); its weights are those of the moment it was made. Scores and what they mix are fp32. Autocast does not reach in
here: it would cast every weight anew for every token. Letters here: X streams x heads, or outputs of a linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.model.attention import SelfAttention
from lmcode.model.cache import Cache, LayerCache, Step
from lmcode.model.generation.layout import Product
from lmcode.model.generation.shortlist import Shortlist, worthwhile
from lmcode.model.layer import FeedForward, MemoryAugmentedLayer
from lmcode.model.lm import MemoryLM, unit
from lmcode.model.long_term import BEFORE_OWN, FOUND, LongTermRead
from lmcode.model.rotary import rotary_table
from lmcode.model.short_term import ShortTermMemory
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE

LEAST_LENGTH = 1e-12  # of what is divided by its length: F.normalize's
PLAIN = {nn.ModuleList, nn.Linear, nn.Embedding, nn.RMSNorm, nn.Dropout, MemoryAugmentedLayer, SelfAttention, FeedForward,
         ShortTermMemory, LongTermRead}


def steppable(model: nn.Module) -> bool:
    """Whether the model consists of our own modules as they are, with all weights here: no adapters, no hooks that expect to
    be called, not ZeRO-3's. What hangs on the model itself is no obstacle."""
    return all(type(module) in PLAIN and "forward" not in vars(module)
               and not module._forward_hooks and not module._forward_pre_hooks
               and all(p.numel() for p in module.parameters(recurse=False))
               for module in model.modules() if module is not model)


class Decoder:
    """Reads one token per stream after those in a filled `Cache`.

    Args:
        model: in eval mode, `steppable`.
        rows: number of streams.
        copies: keep copies of all weights that are faster for so few rows; see `Product`.
        best: how many of the best logits must be right, while others may be -inf; None: all.
    """

    @without_autocast()
    def __init__(self, model: MemoryLM, *, rows: int, copies: bool, best: int | None = None) -> None:
        config = model.config
        self._model, self._rows = model, rows
        self._layers = [LayerDecoder(model.layer(index), model, rows, copies) for index in range(len(model.layers))]
        self._best, self._shortlist = best, None
        if copies and best is not None and worthwhile(model.head.weight, rows):
            self._shortlist = Shortlist(model.head.weight)
        self._head = Product(model.head.weight, norm=model.norm, rows=rows, copy=copies and self._shortlist is None)
        self._rotation = None
        if model.positions is None:
            self._rotation = rotation_table(config.context_length, config.hidden_size // config.num_heads,
                                            device=model.embedding.weight.device)

    @torch.inference_mode()  # 15 % of a small model's step goes into what autograd notes of every operation
    @without_autocast()
    def __call__(self, token_B: Tensor, cache: Cache, *, namespace_B: Tensor, valid: list[bool]) -> Tensor:
        """Logits of each id after each stream's new token, [B, X]; any numbers for streams that have none (`valid` False).

        Args:
            token_B: int64 ids in the vocabulary.
            namespace_B: int64, the document that each stream is in.

        Raises:
            ValueError: for another number of streams than the cache's, or if a valid stream's window is full.
        """
        if not len(token_B) == len(valid) == len(cache.lengths) == self._rows:
            raise ValueError("a step of cached decoding takes one token for each of the cache's streams: expected "
                             f"{self._rows}, got {len(token_B)} for a cache of {len(cache.lengths)}")
        model = self._model
        step = cache.step(valid, segment=model.config.short_term_segment, device=token_B.device)
        if step.valid_B is not None:
            namespace_B = namespace_B.where(step.valid_B, -1)
        x_BD = model.embedding(token_B)
        token_BD = unit(x_BD) if model.config.reads_embeddings else x_BD
        rotation = None
        if self._rotation is not None:
            (cos, sin), at = self._rotation, step.index_B if step.place is None else step.place
            rotation = cos[at], sin[at]
        elif model.positions is not None:
            x_BD = x_BD + model.positions(step.index_B)
        for decoder, layer_cache in zip(self._layers, cache.layers, strict=True):
            x_BD = decoder.attend(x_BD, layer_cache, step, rotation)
            x_BD = decoder.use_short_term(x_BD, layer_cache, step)
            x_BD = decoder.use_long_term(x_BD, layer_cache, step, namespace_B, token_BD)
            x_BD = decoder.feed_forward(x_BD)
        if self._shortlist is not None and self._best is not None:
            return self._shortlist(self._head.normed(x_BD), self._best)
        return self._head(x_BD)


class LayerDecoder:
    """What one layer does with a token; each method takes the residual stream [B, D] and adds its branch to it."""

    def __init__(self, layer: MemoryAugmentedLayer, model: MemoryLM, rows: int, copies: bool) -> None:
        def product(linear: nn.Linear, norm: nn.RMSNorm | None = None) -> Product:
            return Product(linear.weight, norm=norm, rows=rows, copy=copies)

        config = model.config
        self._layer, self._num_heads, self._head_dim = layer, config.num_heads, config.hidden_size // config.num_heads
        self._attention_in = product(layer.attention.query_key_value, layer.attention_norm)
        self._attention_out = product(layer.attention.output)
        self._feed_forward_in = product(layer.feed_forward.input, layer.feed_forward_norm)
        self._feed_forward_out = product(layer.feed_forward.output)
        if layer.short_term is not None:
            weight_XD, bias_X = short_term_map(layer.short_term)
            self._short_term_in = Product(weight_XD, bias_X, norm=layer.short_term_norm, rows=rows, copy=copies)
            self._short_term_out = product(layer.short_term.output)
        if layer.long_term_read is not None:
            read = layer.long_term_read
            state_XD, tokens = long_term_maps(read)
            self._long_term_in = Product(torch.cat([state_XD, read.gate.weight]),
                                         F.pad(read.gate.bias, (len(state_XD), 0)),
                                         norm=layer.long_term_norm, rows=rows, copy=copies)
            self._long_term_tokens = None if tokens is None else Product(tokens, rows=rows, copy=copies)
            self._long_term_out = product(read.output)
            self._key_length = torch.cat([(-read.log_temperature_H.float()).exp(),
                                          torch.ones_like(read.log_temperature_H).float()])[:, None]  # [2 H, 1]
            self._bias_X1, self._null_X1 = (values_H.float().repeat_interleave(rows)[:, None]
                                            for values_H in (read.retrieved_bias_H, read.null_logit_H))

    def attend(self, x_BD: Tensor, cache: LayerCache, step: Step, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Self-attention; the token's key and value go into the cache."""
        B, H, D, n = len(x_BD), self._num_heads, self._head_dim, step.num_seen
        qkv_B3HD = self._attention_in(x_BD).view(B, 3, H, D)
        scale = D**-0.5
        if rotation is not None:
            qkv_B3HD, scale = turned(qkv_B3HD, rotation), 1.0
        key_value_2BHTD = cache.put("attention", qkv_B3HD[:, 1:].transpose(0, 1), step.index_B, step.place)
        key_XTD, value_XTD = (part.flatten(0, 1)[:, :n] for part in key_value_2BHTD)
        query_X1D = qkv_B3HD[:, 0].reshape(B * H, 1, D).float()
        score_X1T = torch.bmm(query_X1D, key_XTD.float().transpose(1, 2))
        if scale != 1.0:
            score_X1T = score_X1T * scale
        if step.unseen_BT is not None:
            score_X1T = score_X1T.view(B, H, n).masked_fill(step.unseen_BT[:, None], NO_SCORE).view(B * H, 1, n)
        mixed_X1D = torch.bmm(score_X1T.softmax(dim=-1), value_XTD.float())
        return self._attention_out.added(x_BD, mixed_X1D.view(B, H * D).to(x_BD.dtype))

    def use_short_term(self, x_BD: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """Reads the slots, and writes those whose segment ends with this token."""
        module = self._layer.short_term
        if module is None:
            return x_BD
        D, place = module.address_SE.shape[1], None if step.place is None else step.place % module.segment
        mapped = self._short_term_in(x_BD)  # [B, 4 D]: the read's query, and what a write takes of the token
        segment = cache.put("segment", mapped[:, None, D:], step.index_B % module.segment, place)
        if cache.slots_read is None:
            key_BMD, value_BMD = module.slots_to_read(cache.slots_BMD)
            cache.slots_read = key_BMD.float(), value_BMD.float()
        key_BMD, value_BMD = cache.slots_read
        score_B1M = torch.bmm(mapped[:, None, :D].float(), key_BMD.transpose(1, 2))
        read_B1D = torch.bmm(score_B1M.softmax(dim=-1), value_BMD)
        if step.ends_B is not None:
            key_BTD, written = segment[:, 0].split([D, 2 * D], dim=-1)
            written_BMD = module.write(cache.slots_BMD, key_BTD, written)
            cache.slots_BMD = written_BMD.where(step.ends_B[:, None, None], cache.slots_BMD)
            cache.slots_read = None
        return self._short_term_out.added(x_BD, read_B1D[:, 0].to(x_BD.dtype))

    def use_long_term(self, x_BD: Tensor, cache: LayerCache, step: Step, namespace_B: Tensor, token_BD: Tensor) -> Tensor:
        """Reads own past, bank and null slot in one softmax, behind the gate; `token_BD` is what the tokens' values are made
        from, where that is not the state.

        A bank's answer (value, log-sum-exp) takes part in it like one more token of that value and logit.
        """
        read = self._layer.long_term_read
        if read is None:
            return x_BD
        B, H, D = len(x_BD), read.num_heads, read.head_dim
        mapped = self._long_term_in(x_BD)  # [B, 3 H D + 1]: query, key and value of each head, and the gate
        qkv = mapped[:, :-1]
        if self._long_term_tokens is not None:
            qkv = qkv + self._long_term_tokens(self._last_tokens(token_BD, read.key_tokens, cache, step))
        vectors = qkv.float().view(B, 3 * H, D)  # queries, keys, values
        query_key = vectors[:, :2 * H]
        length = torch.linalg.vector_norm(query_key, dim=-1, keepdim=True).clamp_(min=LEAST_LENGTH)
        directed = (query_key / length.mul_(self._key_length)).transpose(0, 1)
        query_HBD, key_HBD, value_HBD = directed[:H], directed[H:], vectors[:, 2 * H:].transpose(0, 1)

        key_XTD = cache.put("own_key", key_HBD.unsqueeze(2), step.index_B, step.place).view(H * B, -1, D)
        value_row = BEFORE_OWN - read.successor_values
        value_HB1TD = cache.put("own_value", value_HBD.unsqueeze(2), step.index_B + value_row,
                                None if step.place is None else step.place + value_row)
        found_HBD, found_lse_HB = self._found(read.stride, query_HBD, cache, step, namespace_B)
        value_HB1TD[:, :, 0, FOUND] = found_HBD

        n = step.num_seen - 1
        own_X1T = torch.bmm(query_HBD.reshape(H * B, 1, D), key_XTD[:, :n].transpose(1, 2))
        if step.unseen_BT is not None:
            own_X1T = own_X1T.view(H, B, n).masked_fill(step.unseen_BT[:, 1:], NO_SCORE).view(H * B, 1, n)
        found_X1 = found_lse_HB.reshape(-1, 1) + self._bias_X1
        share_XT = torch.cat([self._null_X1, found_X1, own_X1T[:, 0]], dim=1).softmax(dim=-1)
        mixed_X1D = torch.bmm(share_XT[:, None], value_HB1TD.view(H * B, -1, D)[:, :n + BEFORE_OWN])
        recalled = mixed_X1D.view(H, B, D).transpose(0, 1).reshape(B, H * D).to(x_BD.dtype)
        return self._long_term_out.added(x_BD, recalled * torch.sigmoid(mapped[:, -1:]))

    def _last_tokens(self, token_BD: Tensor, count: int, cache: LayerCache, step: Step) -> Tensor:
        """The tokens that keys and values are made from, [B, max(count, 1) * D]: see `long_term.last_tokens`."""
        if count < 2:
            return token_BD
        cache.put("token", token_BD.unsqueeze(1), step.index_B, step.place)
        before = [cache.get("token", (step.index_B - back).clamp(min=0))[:, 0].where((step.index_B >= back)[:, None], 0.0)
                  for back in range(1, count)]
        return torch.cat([token_BD, *before], dim=1)

    def _found(self, stride: int, query_HBD: Tensor, cache: LayerCache, step: Step,
               namespace_B: Tensor) -> tuple[Tensor, Tensor]:
        """The bank's answer to each token: to its own query or, with a stride, to that of its chunk.

        A chunk's later tokens ask again, so that every pass makes the same calls wherever the streams stand.
        """
        bank = self._layer.long_term_memory
        if stride == 1:
            return bank.look_up(query_HBD, namespace_B)
        cache.put("own_query", query_HBD.unsqueeze(2), step.index_B, step.place)
        asks_B = step.index_B // stride * stride - 1
        query_HB1D = cache.get("own_query", asks_B.clamp(min=0))
        return bank.look_up(query_HB1D[:, :, 0], namespace_B.where(asks_B >= 0, -1))

    def feed_forward(self, x_BD: Tensor) -> Tensor:
        """The feed-forward part."""
        return self._feed_forward_out.added(x_BD, F.gelu(self._feed_forward_in(x_BD)))


def long_term_maps(read: LongTermRead) -> tuple[Tensor, Tensor | None]:
    """A long-term read's query, key and value as the sum of two linear maps, weights [3 H D, X]: of the layer's
    normed state, and of the last tokens side by side; None where tokens give nothing."""
    width, weight = read.gate.in_features, read.query_key_value.weight
    if read.value is None and not read.key_tokens:
        return weight, None
    state_XD, tokens = weight.split([width, weight.shape[1] - width], dim=1)
    if read.value is None:
        return state_XD, tokens
    value_XD = read.value.weight
    tokens = torch.cat([F.pad(tokens, (0, max(0, width - tokens.shape[1]))),
                        F.pad(value_XD, (0, max(0, tokens.shape[1] - width)))])
    return F.pad(state_XD, (0, 0, 0, len(value_XD))), tokens


def rotation_table(num_tokens: int, head_dim: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rotary_table` for queries, keys and values side by side: queries are scaled, too, and values stay as they are.

    Returns:
        fp32 [T, 3, 1, 1, D/2] and [T, 3, 1, 2, D/2], see `turned`.
    """
    cos, sin = rotary_table(num_tokens, head_dim, device=device)
    scale = head_dim**-0.5
    cos = torch.stack([cos * scale, cos, torch.ones_like(cos)], dim=1)
    sin = torch.stack([sin * scale, sin, torch.zeros_like(sin)], dim=1)
    return cos.unsqueeze(2), sin.unsqueeze(2)


def turned(qkv_B3HD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`rotary.rotate` of queries, keys and values [B, 3, H, D] by one place's, or each stream's own, rows of the tables."""
    pair = qkv_B3HD.float().unflatten(-1, (2, -1))
    cos, sin = rotation
    return torch.addcmul(pair * cos, pair.flip(-2), sin).flatten(-2)


def short_term_map(module: ShortTermMemory) -> tuple[Tensor, Tensor]:
    """All that a token is to its slots as one linear map, its weight and its bias: the read's query, the write's key, value
    and the value's part of the gate, each as wide as a slot. Both attentions' scales are in it."""
    query_XD, key_XD, value_XD = module.tokens.weight.chunk(3)
    gate, scale = module.candidate_gate, query_XD.shape[0] ** -0.5
    weight_XD = torch.cat([query_XD * scale, key_XD * scale, value_XD, gate.weight @ value_XD])
    return weight_XD, F.pad(gate.bias, (weight_XD.shape[0] - len(gate.bias), 0))
