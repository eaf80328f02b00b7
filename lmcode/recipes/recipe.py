"""The protocol of a recipe, and what it is told of a pass of the backbone.

A recipe is one class in one file, and a line in `config.RECIPES`. It says which layers have a memory and what their entries
are (`settings`), how what was found enters the model (`recall` joins the softmax of a layer's attention, `after_layer`
changes what a layer hands on, `after_model` what the head is given, `after_head` what it makes of that; `watched` sees all
layers), and what is offered for writing (`offered`). All else, searching over ranks, commits, checkpoints, deletion, is the
product's. A recipe reads and never writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lmcode.config import ConfigError, LMCODEConfig, Section
from lmcode.model.long_term import ReadTape
from lmcode.protocol import Candidates, Retriever
from lmcode.recipes.anatomy import Anatomy, Tables
from lmcode.recipes.carried import Carried
from lmcode.recipes.joint import per_query, share_per_query


class Options(Section):
    """Settings that every recipe has."""

    sinks: int = Field(4, ge=0, description="first tokens of a document that stay visible")
    cache: int = Field(128, ge=0, description="last tokens of the windows before that stay visible")


@dataclass
class Pass:
    """One pass of the backbone, from before its first layer until its state and candidates were made.

    A layer that is recomputed in the backward pass gets the same object: what is on its tape is not asked for again.

    Attributes:
        retrievers: who answers, by layer.
        namespace_B, document_B, valid_BT: as in `Backbone.forward`; of a call in transformers' manner [B], None, [B, T].
        reset_B: bool, streams that start a document here, or None.
        at_once: texts are read to be stored: no row is carried, and whole windows leave it.
        state: what the streams carried here; None in a call in transformers' manner, which keeps its past in its own cache.
        ids_BT: the window's tokens; None in a call in transformers' manner.
        tables, row_tables: of rotation, for the tokens of this window and for the row that was carried here.
        own: by layer, keys before their rotation and values of this window's tokens, detached: [B, H, T, D].
        tapes: by layer, as in our own model.
        notes: whatever the recipe keeps for the length of the pass.
    """

    retrievers: Mapping[int, Retriever]
    namespace_B: Tensor
    document_B: Tensor | None
    valid_BT: Tensor
    reset_B: Tensor | None = None
    state: Carried | None = None
    at_once: bool = False
    ids_BT: Tensor | None = None
    tables: Tables | None = None
    row_tables: Tables | None = None
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tapes: dict[int, ReadTape] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    attend: Any = None  # what `foreign.attend` calls

    def tape(self, layer: int) -> ReadTape:
        """The tape of a layer."""
        return self.tapes.setdefault(layer, ReadTape())

    def asking(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Namespace and document of each query, [N] as in `joint.queries_of`: -1 at padding, None where unknown.

        Args:
            group: heads of the attention that share a head of the bank.
        """
        namespace_N = per_query(self.namespace_B[:, None].where(self.valid_BT, -1), group)
        if self.document_B is None:
            return namespace_N, None
        return namespace_N, per_query(self.document_B[:, None].expand_as(self.valid_BT), group)

    def candidates(self, key_BHNX: Tensor, value_BHNX: Tensor, surprise_BN: Tensor, valid_BN: Tensor) -> Candidates:
        """Rows of the streams as candidates of their namespaces and documents; none of a negative namespace is valid."""
        namespace_BN = self.namespace_B[:, None].expand_as(valid_BN)
        document_B = torch.full_like(self.namespace_B, -1) if self.document_B is None else self.document_B
        return Candidates(key_BHNX.transpose(0, 1).flatten(1, 2), value_BHNX.transpose(0, 1).flatten(1, 2),
                          namespace_BN.flatten(), surprise_BN.flatten(), (valid_BN & (namespace_BN >= 0)).flatten(),
                          document_B[:, None].expand_as(valid_BN).flatten())

    def record_share(self, layer: int, share_BXT: Tensor, gate_BT: Tensor, kv_heads: int) -> None:
        """Puts on a layer's tape what of the attention went to the hits; padding credits nobody."""
        share_HN = share_per_query(share_BXT, kv_heads)
        valid_N = per_query(self.valid_BT, share_HN.shape[1] // self.valid_BT.numel())
        self.tape(layer).record(share_HN=share_HN, credit_HN=share_HN.where(valid_N, 0.0),
                                null_share_HN=torch.zeros_like(share_HN), gate_BT=gate_BT)


def check_settings(recipe: str, model: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses settings of the model that have another value than a recipe needs for its backbone, by ConfigError."""
    for name, value in wanted.items():
        if model.get(name, value) != value:
            raise ConfigError(f"with the recipe {recipe} model.{name} must be {value!r} for this backbone: got "
                              f"{model[name]!r}")


def check_one_layer(recipe: str, model: Mapping[str, Any], whose: str) -> None:
    """Refuses memories in any number of layers but one, by ConfigError, which says what that layer is for."""
    layers = model["memory_layers"]
    if layers == "all" or len(layers) != 1:
        raise ConfigError(f"with the recipe {recipe} model.memory_layers must be one layer, {whose}: got {layers!r}")


@dataclass(frozen=True)
class Left:
    """What a memory may be written from: the tokens that left a layer's carried row in this pass; [B, T], in their order.

    key_BHTD: before rotation. surprise_BT: fp32. valid_BT: bool, False beyond the last one.
    """

    key_BHTD: Tensor
    value_BHTD: Tensor
    surprise_BT: Tensor
    valid_BT: Tensor


class Recipe(nn.Module, ABC):
    """How one kind of memory works in a backbone. Its parameters are what is trained; they may be none.

    Class attributes:
        Options: its settings, a subclass of `recipe.Options`.
        joins_attention: whether `recall` is asked in the memory layers.
        changes_layers: whether `after_layer` is.
        changes_model: whether `after_model` is.
        changes_head: whether `after_head` is.
        watches: whether `watched` is told of all layers.
        offers_by_token: whether candidates are one for each token of the window.

    Attributes:
        own_layers: how many layers of its own it has that attend as the backbone's do. Their attention modules are numbered
            on from the backbone's (`layer_idx`); streams carry rows for them, too, and `after_attention` is asked in them.
    """

    Options: ClassVar[type[Options]] = Options
    joins_attention: ClassVar[bool] = False
    changes_layers: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False
    changes_head: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    offers_by_token: ClassVar[bool] = False
    own_layers: int = 0

    def __init__(self, anatomy: Anatomy, config: LMCODEConfig, options: Any) -> None:
        super().__init__()
        object.__setattr__(self, "anatomy", anatomy)  # the backbone is no part of the recipe's weights
        self.config, self.options = config, options

    anatomy: Anatomy

    @staticmethod
    @abstractmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """Settings of the model that follow from a backbone of these sizes, unless others are given: memory_layers,
        memory_heads and memory_head_dim at least."""

    @staticmethod
    def check(model: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        """Refuses settings of the model that do not fit this recipe, by ConfigError."""

    def recall(self, layer: int, query_BXTD: Tensor, current: Pass, *, scaling: float) -> tuple[Tensor, Tensor] | None:
        """What joins the softmax of a layer's attention: fp32 value [B, X, T, D] and log-sum-exp [B, X, T] of the X query
        heads, `NO_SCORE` where nothing was found. Queries are those before rotation."""
        return None

    def joined(self, layer: int, share_BXT: Tensor, current: Pass) -> None:
        """Told afterwards the share of that softmax which went to what was recalled."""

    def after_layer(self, layer: int, hidden_BTD: Tensor, current: Pass, call: LayerCall) -> Tensor:
        """What a layer hands on."""
        return hidden_BTD

    def watched(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: Tensor, current: Pass) -> None:
        """Told of every call of every layer: its arguments, hidden states first, and what it hands on."""

    def after_attention(self, layer: int, query_BXTD: Tensor, mixed_BXTD: Tensor, current: Pass) -> Tensor:
        """What the attention of a layer of its own hands on to its output projection. Queries are those before rotation."""
        return mixed_BXTD

    def after_model(self, hidden_BTD: Tensor, current: Pass) -> Tensor:
        """What the head is given: the last hidden states, normalised."""
        return hidden_BTD

    def after_head(self, logits_BTX: Tensor, current: Pass) -> Tensor:
        """The logits, X ids of the vocabulary, of the window's last T tokens where transformers was asked for no others."""
        return logits_BTX

    def auxiliary(self, current: Pass) -> Tensor | None:
        """A loss at each token, fp32 [B, T], that trains what the loss of the tokens does not; asked for in training only.
        Its gradient is added to theirs, and their value is left as it is."""
        return None

    @abstractmethod
    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """Entries that this pass offers to the bank of a layer.

        Args:
            known_BT: fp32, the surprise of each token of this window, nats; 0 where unknown.
        """

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        """See `Backbone.learned_numbers`."""
        return {}

    def blank_state(self, num_streams: int, device: torch.device | None) -> tuple[Tensor, ...]:
        """What this recipe's streams carry before they start, tensors [B, ...]."""
        return ()

    def next_state(self, current: Pass) -> tuple[Tensor, ...]:
        """What they carry after a pass, detached."""
        return ()


@dataclass(frozen=True)
class LayerCall:
    """How a layer was called. seen_B1TN: which keys each query saw, the window's own last. cache: transformers', or None."""

    seen_B1TN: Tensor
    cache: Any
