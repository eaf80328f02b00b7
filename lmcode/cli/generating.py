"""`lmcode generate`: a text continued by the model at a path, on one process or on many that all do the same work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import ConfigError
from lmcode.dist import Group
from lmcode.memories.experiences import Namespace
from lmcode.model.generation.generate import Generation
from lmcode.opening import open_model


def generate_text(path: Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 50,
                  top_p: float = 0.9, repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, seed: int = 0,
                  namespace: Namespace = 0, stop_at_end: bool = True, memory: bool = True,
                  overrides: Sequence[str] = ()) -> str:
    """Continues `prompt` with the model at a path; returns prompt and continuation. A collective.

    Args:
        namespace: what is read of the banks; experiences are in 0 unless they were stored under another.
        stop_at_end: stop where the model ends the document, and not only after `max_new_tokens`.
        memory: read its banks.
        overrides: dotted settings that differ from the saved ones.

    Raises:
        ConfigError: for an empty prompt, a name of a namespace in which there is nothing, or if nothing can be opened there.
    """
    if not prompt:
        raise ConfigError("the prompt must not be empty")
    group, device = Group.world(), dist.device()
    model = open_model(path, overrides, group=group, device=device, memory=memory).model
    if (tokenizer := model.tokenizer) is None:
        raise ConfigError(f"the model in '{path}' has no tokenizer for the prompt")
    ids = torch.tensor([[tokenizer.end_id, *tokenizer.encode(prompt)]], device=dist.device())
    with model.reading_from(model.banks if memory else {}):
        written = model.generate(ids, namespace=namespace if memory else None, max_new_tokens=max_new_tokens,
                                 temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
                                 no_repeat_ngram_size=no_repeat_ngram_size, seed=seed,
                                 eos_id=tokenizer.end_id if stop_at_end else None)
    tokens_BT = written.tokens_BT if isinstance(written, Generation) else written
    text: str = tokenizer.decode(tokens_BT[0, 1:].tolist())
    return text
