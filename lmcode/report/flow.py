"""What the tokens of one sequence attend to: the gate, and the shares of the softmax, of each memory layer's read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone
from lmcode.data.tokenizer import Tokenizer
from lmcode.memories.experiences import Namespace, namespace_number
from lmcode.memory.bank import LongTermMemory
from lmcode.protocol import Hits, InTwoSteps, NullRetriever, Retriever
from lmcode.report.analysis import quietly
from lmcode.report.reading import by_token
from lmcode.report.sequences import as_text, device_of, token_sequences, tokenizer_of


class Everything(InTwoSteps):
    """Reads a bank whatever its scope: all its entries can be found, of every namespace."""

    def __init__(self, bank: LongTermMemory) -> None:
        self._bank, self.top_k = bank, bank.top_k

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        return self._bank.search(query_HND, namespace_N, document_N, scope="global")

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        return self._bank.attend(query_HND, hits)

    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        return self._bank.fetch(hits)


class Flow(NamedTuple):
    """One sequence's way through the memory layers, fp32 arrays [layers, T]; shares are means over heads and add up to 1.

    layers: numbers of the memory layers. tokens: readable text of each token.
    gate_XT: 0 closed, 1 open. own_XT, bank_XT, null_XT: shares of the read's softmax; with a retrieval stride the tokens of
    a chunk share their mean.
    """

    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    gate_XT: np.ndarray
    own_XT: np.ndarray
    bank_XT: np.ndarray
    null_XT: np.ndarray


def memory_flow(model: Backbone, input_sequence: Any, *, namespace: Namespace | None = None,
                tokenizer: Tokenizer | None = None) -> Flow:
    """Reads one sequence and returns where its tokens looked. A collective; changes nothing.

    Args:
        input_sequence: a text, or token ids as a list or a tensor [T] or [1, T]; at most `context_length` tokens.
        namespace: the document to read, a number or a name; None reads all entries of the banks, whatever their scope.
        tokenizer: for texts and labels; the model's own when None.

    Raises:
        ValueError: a model without memory layers; a sequence that is empty, too long or no sequence at all; a negative
            namespace.
    """
    layers = model.memory_layers
    if not layers:
        raise ValueError("the model has no memory layer whose reads could be shown: memory_layers is empty")
    number = 0 if namespace is None else namespace_number(namespace)
    if isinstance(input_sequence, Tensor) and input_sequence.ndim == 2 and len(input_sequence) == 1:
        input_sequence = input_sequence[0]
    ids = token_sequences(model, [input_sequence], tokenizer=tokenizer, shortest=1)[0]
    if len(ids) > model.config.context_length:
        raise ValueError(f"a sequence may have at most context_length = {model.config.context_length} tokens: "
                         f"got {len(ids)}")
    device = device_of(model)
    retrievers: dict[int, Retriever] = {layer: NullRetriever() for layer in layers}
    retrievers.update({layer: Everything(bank) if namespace is None else bank for layer, bank in model.banks.items()})
    with quietly(model), model.reading_from(retrievers):
        output = model(torch.tensor([ids], device=device), namespace_B=torch.tensor([number], device=device))
    words = tuple(as_text(tokenizer_of(model, tokenizer), [one]) for one in ids)
    bank_XT, null_XT = (_per_token(share_XHN, model.config.retrieval_stride, len(ids)) for share_XHN in (
        [output.memory[layer].share_HN for layer in layers], [output.memory[layer].null_share_HN for layer in layers]))
    gate_XT = np.stack([output.memory[layer].gate_BT[0].cpu().numpy() for layer in layers])
    return Flow(layers, words, gate_XT, 1.0 - bank_XT - null_XT, bank_XT, null_XT)


def _per_token(share_XHN: Sequence[Tensor], stride: int, length: int) -> np.ndarray:
    asked = -(-length // stride)
    return np.stack([by_token(one.float(), asked).mean((0, 2)).cpu().numpy().repeat(stride)[:length] for one in share_XHN])
