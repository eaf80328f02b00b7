"""Recipe `knn`: tokens that followed contexts like the present one get a share of the probability of the next token.

After the continuous cache (Grave, Joulin & Usunier, "Improving Neural Language Models with a Continuous Cache", ICLR 2017,
arXiv 1612.04426) and kNN-LM (Khandelwal et al., "Generalization through Memorization", ICLR 2020, arXiv 1911.00172). An
entry's key is a small projection of a hidden state, its value the token that followed. The one thing to know: what was found
enters behind the head, as a mixture of two distributions, so the backbone computes what it computes without a memory;
README.md says what the papers do, what this does, and what each choice earned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import ConfigError, LMCODEConfig
from lmcode.model.long_term import Window, last_keys, make_candidates
from lmcode.protocol import Candidates, Hits, NullRetriever
from lmcode.recipes import recipe
from lmcode.recipes.anatomy import Anatomy
from lmcode.recipes.recipe import LayerCall, Left, Pass, check_one_layer, check_settings

FOUND, KEYS = "knn found", "knn keys"  # notes of a pass
DIGITS, BASE = 3, 128  # of a token's id in a value: exact in bf16, and enough for two million tokens
SIGN = 0.125  # size of the components of a value that prove it is one token's
TEMPERATURE, SLOPE, SPREAD, USUAL = 29.0, 14.0, -0.4, 0.7  # where training begins; see README.md
BIAS = -4.4


class Options(recipe.Options):
    """Settings of this recipe beside `sinks` and `cache`."""

    seed: int = Field(0, ge=0, description="of the projection of hidden states to keys")


class Found(NamedTuple):
    """The neighbours of each token of a window: cosine_BTK fp32, with what `memory.importance_weight` adds, over the
    temperature; token_BTK int64, -1 where there is none."""

    cosine_BTK: Tensor
    token_BTK: Tensor


class KnnLM(recipe.Recipe):
    """A projection that is never trained, and four numbers that may be: a temperature, and how far the share opens."""

    Options = Options
    changes_layers = changes_head = offers_by_token = True

    def __init__(self, anatomy: Anatomy, config: LMCODEConfig, options: Any) -> None:
        super().__init__(anatomy, config, options)
        self.memory_layer = config.memory_layer_indices[0]
        generator = torch.Generator().manual_seed(options.seed)
        projection_DX = torch.randn(config.hidden_size, config.memory_head_dim, generator=generator, device="cpu")
        self.register_buffer("projection_DX", projection_DX, persistent=False)
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(TEMPERATURE)))
        self.bias, self.slope, self.spread = (nn.Parameter(torch.full((1,), number))
                                              for number in (config.memory_bias, SLOPE, SPREAD))

    @staticmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """One memory at four fifths of the depth, keys of 64 numbers: see README.md."""
        return {"memory_layers": (max(0, 4 * sizes["num_layers"] // 5 - 1),), "memory_heads": 1, "memory_head_dim": 64,
                "memory_top_k": 64, "long_term_memory_slots": 131072, "memory_bias": BIAS}

    @staticmethod
    def check(model: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        check_settings("knn", model, {"memory_heads": 1, "retrieval_stride": 1, "successor_values": True})
        check_one_layer("knn", model, "whose hidden states are keys")
        if model["memory_head_dim"] < 2 * DIGITS:
            raise ConfigError(f"with the recipe knn model.memory_head_dim must be at least {2 * DIGITS}, to hold a token: "
                              f"got {model['memory_head_dim']}")

    # Reading

    def after_layer(self, layer: int, hidden_BTD: Tensor, current: Pass, call: LayerCall) -> Tensor:
        """Looks the hidden states up and hands them on as they are."""
        tape = current.tape(layer)
        if tape.hits is None:
            with torch.no_grad():
                key_BTX = self.keys_of(hidden_BTD)
                current.notes[KEYS] = key_BTX
                query_HND = (key_BTX * self.log_temperature.exp()).flatten(0, 1)[None]
                namespace_N, document_N = current.asking(1)
                hits = current.retrievers[layer].search(query_HND, namespace_N, document_N)
                tape.record(hits=hits)
                current.notes[FOUND] = self._found(hits, current)
        return hidden_BTD

    def keys_of(self, hidden_BTD: Tensor) -> Tensor:
        """What is stored and looked up: hidden states as the last norm would have them, projected, of length 1, fp32.

        Without that norm a few components that are large everywhere would be all that a cosine sees.
        """
        normed_BTD: Tensor = self.anatomy.norm(hidden_BTD)
        projection: Any = self.projection_DX
        return F.normalize(normed_BTD.float() @ projection.float(), dim=-1)  # a model may be made bf16 afterwards

    def _found(self, hits: Hits, current: Pass) -> Found:
        B, T = current.valid_BT.shape
        retriever = current.retrievers[self.memory_layer]
        cosine_NK = (hits.score_HNK / self.log_temperature.exp())[0]
        token_NK = torch.full_like(hits.id_HNK[0], -1)
        if not isinstance(retriever, NullRetriever):
            token_NK = tokens_in(retriever.fetch(hits)[1][0]).where(hits.valid_HNK[0], -1)
        return Found(cosine_NK.unflatten(0, (B, T)), token_NK.unflatten(0, (B, T)))

    def after_head(self, logits_BTX: Tensor, current: Pass) -> Tensor:
        """log((1 - share) * p + share * p_knn), as logits; those of the plain model where nothing was found."""
        found = current.notes[FOUND]
        share_BT, weight_BTK = self.mixture(found)
        current.record_share(self.memory_layer, share_BT.detach()[:, None], share_BT.detach(), 1)
        T = logits_BTX.shape[1]  # transformers leaves out the first ones if they are not asked for
        token_BTK, share_BT, weight_BTK = found.token_BTK[:, -T:], share_BT[:, -T:], weight_BTK[:, -T:]
        any_BT = (token_BTK >= 0).any(-1)
        if not bool(any_BT.any()):
            return logits_BTX
        mixed_BTX = mixed(logits_BTX.float(), token_BTK, weight_BTK, share_BT)
        return mixed_BTX.to(logits_BTX.dtype).where(any_BT[..., None], logits_BTX)

    def mixture(self, found: Found) -> tuple[Tensor, Tensor]:
        """The share of the neighbours in the mixture, [B, T], 0 where there are none, and the weight of each, [B, T, K].

        Weights are a softmax of cosines; the share is a sigmoid of how near the nearest one is and of how evenly they are
        weighed (the logarithm of how many count).
        """
        is_BTK = found.token_BTK >= 0
        score_BTK = (found.cosine_BTK * self.log_temperature.exp()).masked_fill(~is_BTK, -torch.inf)
        any_BT = is_BTK.any(-1)
        score_BTK = score_BTK.masked_fill(~any_BT[..., None], 0.0)
        best_BT = found.cosine_BTK.where(is_BTK, -1.0).amax(-1)
        even_BT = score_BTK.logsumexp(-1) - score_BTK.amax(-1)
        share_BT = torch.sigmoid(self.bias + self.slope * (best_BT - USUAL) + self.spread * even_BT)
        return share_BT.where(any_BT, 0.0), score_BTK.softmax(-1)

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        numbers = {"temperature": self.log_temperature.exp(), "bias": self.bias, "slope": self.slope, "spread": self.spread}
        return {name: number.detach().tolist() for name, number in numbers.items()}

    # Writing

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """One entry for each token of the window: the key of the token before it, which may be the last of the window
        before, and itself as the value."""
        if current.ids_BT is None:
            raise ValueError("the recipe knn writes tokens: it must be given their ids, window by window")
        value_BTX = values_of(current.ids_BT, self.config.memory_head_dim)
        made = make_candidates(current.notes[KEYS][None], value_BTX[None], self._window(current), successor_values=True)
        return made._replace(surprise_N=known_BT.flatten())

    @staticmethod
    def _window(current: Pass) -> Window:
        state: Any = current.state
        return Window(current.namespace_B, state.pending_valid_B, current.reset_B, current.valid_BT,
                      pending_key_BHD=state.recipe[0][:, None], document_B=current.document_B)

    def blank_state(self, num_streams: int, device: torch.device | None) -> tuple[Tensor, ...]:
        """The key of the last token."""
        return (torch.zeros(num_streams, self.config.memory_head_dim, device=device),)

    def next_state(self, current: Pass) -> tuple[Tensor, ...]:
        return (last_keys(current.notes[KEYS][None], self._window(current))[:, 0],)


def values_of(id_BT: Tensor, width: int) -> Tensor:
    """Tokens as values, fp32 [B, T, width], exact in bf16: three digits, and signs that follow from the id.

    Entries that are merged are means. One of two tokens then is no token's value, as it lacks some of the signs.
    """
    place = torch.arange(width - DIGITS, device=id_BT.device)
    digit_BTX = id_BT[..., None] // BASE ** torch.arange(DIGITS, device=id_BT.device) % BASE
    mixed_BTX = (id_BT[..., None] + 1) * 2654435761 + place * 40503  # Knuth's multiplicative hash, a bit for each place
    sign_BTX = (mixed_BTX ^ (mixed_BTX >> 13)) >> (place % 11 + 7) & 1
    return torch.cat([digit_BTX / BASE, (2.0 * sign_BTX - 1.0) * SIGN], dim=-1).float()


def tokens_in(value_NKX: Tensor) -> Tensor:
    """The ids that these are the values of, int64 [N, K]; -1 where they are no token's."""
    digit_NKX = (value_NKX[..., :DIGITS] * BASE).round().long().clamp(0, BASE - 1)
    id_NK = (digit_NKX * BASE ** torch.arange(DIGITS, device=value_NKX.device)).sum(-1)
    exact_NK = (values_of(id_NK, value_NKX.shape[-1]) - value_NKX).abs().amax(-1) < 1 / (4 * BASE)
    return id_NK.where(exact_NK, -1)


def mixed(logits_BTX: Tensor, token_BTK: Tensor, weight_BTK: Tensor, share_BT: Tensor) -> Tensor:
    """Logits of the mixture of softmax(logits) and of the weights of these tokens, which has the share; fp32.

    The log-sum-exp stays what it is. Most ids of the vocabulary are nobody's next token and only lose the share, so all are
    passed over twice, and logarithms of sums are taken of K alone. A token may come several times: each time adds its part
    of what changes. X: ids of the vocabulary.
    """
    tiny, is_BTK = torch.finfo(torch.float32).tiny, token_BTK >= 0
    at_BTK, weight_BTK = token_BTK.clamp(min=0), weight_BTK.where(is_BTK, 0.0)
    share_BT1 = share_BT.clamp(tiny, 1.0 - 1e-6)[..., None]
    near_BTK = torch.zeros_like(logits_BTX).scatter_add(-1, at_BTK, weight_BTK).gather(-1, at_BTK).clamp(min=tiny)
    lse_BT1, kept_BT1 = logits_BTX.logsumexp(-1, keepdim=True), torch.log1p(-share_BT1)
    own_BTK = logits_BTX.gather(-1, at_BTK) + kept_BT1
    both_BTK = torch.logaddexp(own_BTK, near_BTK.log() + share_BT1.log() + lse_BT1)
    change_BTK = ((both_BTK - own_BTK) * weight_BTK / near_BTK).where(is_BTK, 0.0)
    return (logits_BTX + kept_BT1).scatter_add(-1, at_BTK, change_BTK)
