"""Opening a saved run and using it: `lmcode eval` and `lmcode generate`.

Both work on one process or on many; with many, every rank holds its slice of the banks and does the same work.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import ConfigError
from lmcode.dist import Group, on_rank_0
from lmcode.eval.documents import OTHER_CORPUS, held_out_documents
from lmcode.eval.held_out import MODES, evaluate, held_out_sampler
from lmcode.experience.experiences import Namespace
from lmcode.lmcode import LMCODE
from lmcode.saved.pretrained import is_saved_model
from lmcode.train.checkpoint import find, load_model


def evaluate_run(run: Path, overrides: list[str], *, as_json: bool = False) -> str:
    """Held-out loss of a run's newest checkpoint with the memory on, off and shuffled, as text or JSON. A collective.

    Raises:
        ConfigError: if there is no checkpoint, or its held-out documents cannot be found again.
    """
    group = Group.world()
    checkpoint = Path(on_rank_0(group, lambda: str(find(run).resolve())))  # found once: a run may be saving newer ones
    model, config, _, step = load_model(checkpoint, overrides, group=group, device=dist.device())
    if config.eval.streams % group.size:
        raise ConfigError(f"eval.streams must be a multiple of the number of ranks: {config.eval.streams} % {group.size}")
    held_out = held_out_documents(checkpoint, config)
    sampler = held_out_sampler(held_out.documents, config)
    modes = MODES if model.banks else ("on",)
    # A text that was named for this is read to its end, unless windows were asked for.
    windows = config.eval.final_windows
    if held_out.whole and not any(setting.startswith("eval.final_windows=") for setting in overrides):
        windows = sampler.num_steps or windows
    results = {mode: evaluate(model, sampler, banks=model.banks, group=group, mode=mode, slots=config.eval.slots,
                              windows=windows) for mode in modes}
    if as_json:
        return json.dumps({"step": step, "same_corpus": held_out.same_corpus, "tokens_in_all": sampler.num_targets,
                           **{mode: result._asdict() for mode, result in results.items()}})
    kind = "" if held_out.whole else "held-out "
    lines = [f"step {step}, {results['on'].tokens:,} of {sampler.num_targets:,} {kind}tokens, nats per token "
             "(far: 16 windows into a document)"]
    lines += [f"  memory {mode:<9} {r.loss:.4f}   far {r.far_loss:.4f}" for mode, r in results.items()]
    lines += [f"  {name:<16} {loss:.4f}" for name, loss in results["on"].by_source.items()]
    return "\n".join(lines if held_out.same_corpus else [*lines, OTHER_CORPUS])


def generate_text(run: Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 50,
                  top_p: float = 0.9, repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, seed: int = 0,
                  namespace: Namespace = 0, stop_at_end: bool = True, memory: bool = True) -> str:
    """Continues `prompt` with a run's newest checkpoint, or a saved model; returns prompt and continuation. A collective.

    Args:
        namespace: what is read of the banks; experiences are in 0 unless they were stored under another.
        stop_at_end: stop where the model ends the document, and not only after `max_new_tokens`.
        memory: read the run's banks.

    Raises:
        ConfigError: for an empty prompt, a name of a namespace in which there is nothing, or if there is no checkpoint.
    """
    if not prompt:
        raise ConfigError("the prompt must not be empty")
    group, device = Group.world(), dist.device()
    if is_saved_model(run):
        model = LMCODE.from_pretrained(run, include_memory=memory, group=group, device=device)
    else:
        model, *_ = load_model(run, [], group=group, device=device, memory=memory)
    if (tokenizer := model.tokenizer) is None:
        raise ConfigError(f"the model in '{run}' has no tokenizer for the prompt")
    ids = torch.tensor([[tokenizer.end_id, *tokenizer.encode(prompt)]], device=dist.device())
    with model.reading_from(model.banks if memory else {}):
        written = model.generate(ids, namespace=namespace if memory else None, max_new_tokens=max_new_tokens,
                                 temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
                                 no_repeat_ngram_size=no_repeat_ngram_size, seed=seed,
                                 eos_id=tokenizer.end_id if stop_at_end else None)
    return tokenizer.decode(written[0, 1:].tolist())
