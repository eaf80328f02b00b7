"""Recipe `camelot`: keys and values that leave the row become slots of a bank, and join the attention's own softmax.

After CAMELoT (He et al., "CAMELoT: Towards Large Language Models with Training-Free Consolidated Associative Memory",
arXiv 2402.13449). Nothing is trained. The one thing to know: keys are stored before their rotation and read as if all of
them lay at one constant distance; README.md says what the paper does, what this does, and what each choice earned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lmcode.protocol import NO_SCORE, Candidates, NullRetriever
from lmcode.recipes import recipe
from lmcode.recipes.joint import answers_of, queries_of
from lmcode.recipes.recipe import Left, Pass, check_settings


class Options(recipe.Options):
    """Settings of this recipe beside `sinks` and `cache`."""

    distance: int = Field(256, ge=0, description="positions that every slot lies before the query that reads it")


class Camelot(recipe.Recipe):
    """A slot is a key and a value of every key-value head of a layer. See the module."""

    Options = Options
    joins_attention = True

    @staticmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """Memories in the upper half of the layers, with a bias of -2 on what they hold: see README.md."""
        layers = sizes["num_layers"]
        return {"memory_layers": tuple(range(layers // 2, layers)), "memory_heads": sizes["kv_heads"],
                "memory_head_dim": sizes["head_dim"], "memory_bias": -2.0, "successor_values": False}

    @staticmethod
    def check(model: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        check_settings("camelot", model, {"memory_heads": sizes["kv_heads"], "memory_head_dim": sizes["head_dim"],
                                          "retrieval_stride": 1, "successor_values": False})

    def recall(self, layer: int, query_BXTD: Tensor, current: Pass, *, scaling: float) -> tuple[Tensor, Tensor] | None:
        """The slots nearest to each query, under a softmax of their own, with its log-sum-exp."""
        tape, retriever = current.tape(layer), current.retrievers[layer]
        heads, (B, X, T, _) = self.config.memory_heads, query_BXTD.shape
        namespace_N, document_N = current.asking(X // heads)
        query_HND = queries_of(self.anatomy.at_distance(query_BXTD, self.options.distance), heads).float()
        if isinstance(retriever, NullRetriever):
            tape.record(hits=retriever.search(query_HND, namespace_N))
            self.joined(layer, query_HND.new_zeros(B, X, T), current)
            return None
        if current.state is None:  # nobody will ask for the hits
            value_HND, lse_HN = (retriever.look_up(query_HND, namespace_N) if not query_HND.requires_grad
                                 else retriever.attend(query_HND, retriever.search(query_HND.detach(), namespace_N)))
        else:
            if tape.hits is None:
                tape.record(hits=retriever.search(query_HND.detach(), namespace_N, document_N))
            assert tape.hits is not None
            value_HND, lse_HN = retriever.attend(query_HND, tape.hits)
        lse_HN = torch.where(lse_HN > NO_SCORE / 2, lse_HN + self.config.memory_bias, lse_HN)
        return (answers_of(value_HND.float(), query_BXTD), answers_of(lse_HN.unsqueeze(-1), query_BXTD).squeeze(-1))

    def joined(self, layer: int, share_BXT: Tensor, current: Pass) -> None:
        open_BT = torch.ones_like(current.valid_BT, dtype=torch.float32)
        current.record_share(layer, share_BXT.float(), open_BT, self.config.memory_heads)

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """What has left the row, keys scaled as the attention scales its logits."""
        scaling: Any = self.anatomy.attention(layer).scaling
        return current.candidates(left.key_BHTD.float() * scaling, left.value_BHTD.float(), left.surprise_BT, left.valid_BT)
