"""`lmcode eval`: opening what lies at a path and measuring it, on one process or on many, which all do the same work."""

from __future__ import annotations

import json
from pathlib import Path

from lmcode import dist
from lmcode.config import ConfigError, near_match
from lmcode.dist import Group
from lmcode.eval.documents import OTHER_CORPUS, held_out_documents
from lmcode.eval.held_out import NOTHING_FAR, evaluate, held_out_sampler, void_controls
from lmcode.eval.reading import MODES
from lmcode.eval.tasks import TASKS
from lmcode.eval.tasks.task import run_task
from lmcode.opening import open_model


def evaluate_path(path: Path, overrides: list[str], *, as_json: bool = False) -> str:
    """Held-out loss of what lies at a path, in every mode of `reading.MODES`, as text or JSON. A collective.

    What these documents cannot tell (`void_controls`) is named with the reason: "not measurable", or null in JSON.

    Raises:
        ConfigError: if nothing can be opened there, or its held-out documents cannot be found again.
    """
    group = Group.world()
    opened = open_model(path, overrides, group=group, device=dist.device())
    model, config, step = opened.model, opened.config, opened.step
    if config.eval.streams % group.size:
        raise ConfigError(f"eval.streams must be a multiple of the number of ranks: {config.eval.streams} % {group.size}")
    held_out = held_out_documents(opened)
    sampler = held_out_sampler(held_out.documents, config)
    # A text that was named for this is read to its end, unless windows were asked for.
    windows = config.eval.final_windows
    if held_out.whole and not any(setting.startswith("eval.final_windows=") for setting in overrides):
        windows = sampler.num_steps or windows
    void = void_controls(sampler, scope=config.memory.scope, windows=windows) if model.banks else {}
    modes = [mode for mode in MODES if mode not in void] if model.banks else ["on"]
    results = {mode: evaluate(model, sampler, banks=model.banks, group=group, mode=mode, slots=config.eval.slots,
                              windows=windows) for mode in modes}
    if as_json:
        return json.dumps({"step": step, "same_corpus": held_out.same_corpus, "tokens_in_all": sampler.num_counted,
                           "not_measurable": void, **dict.fromkeys(void),
                           **{mode: result._asdict() for mode, result in results.items()}})
    kind = "" if held_out.whole else "held-out "
    lines = [f"step {step}, {results['on'].tokens:,} of {sampler.num_counted:,} {kind}tokens, nats per token "
             "(far: 16 windows into a document)"]
    lines += [f"  memory {mode:<9} {r.loss:.4f}   far {'not measurable' if r.far_loss is None else f'{r.far_loss:.4f}'}"
              for mode, r in results.items()]
    lines += [f"  memory {mode:<9} not measurable: {reason}" for mode, reason in void.items()]
    lines += [f"  {name:<16} {loss:.4f}" for name, loss in results["on"].by_source.items()]
    lines += [f"  far is not measurable: {NOTHING_FAR}"] if results["on"].far_loss is None else []
    return "\n".join(lines if held_out.same_corpus else [*lines, OTHER_CORPUS])


def ask_path(path: Path, name: str, overrides: list[str], *, as_json: bool = False) -> str:
    """What a task says of the model at a path, by mode, as text or JSON. A collective.

    Raises:
        ConfigError: for an unknown task, one that this model cannot be asked, or if nothing can be opened there.
    """
    if name not in TASKS:
        raise ConfigError(f"--task must be one of {', '.join(TASKS)}: got '{name}'.{near_match(name, TASKS)}")
    opened = open_model(path, overrides, group=Group.world(), device=dist.device())
    config, modes = opened.config, list(MODES) if opened.model.banks else ["on"]
    try:
        results = {mode: run_task(opened.model, TASKS[name], seed=config.train.seed, mode=mode, slots=config.eval.slots,
                                  length=config.train.sequence_length) for mode in modes}
    except ValueError as error:
        raise ConfigError(f"the model in '{path}' cannot be asked '{name}': {error}") from None
    if as_json:
        return json.dumps({"step": opened.step, "task": name, **{mode: one._asdict() for mode, one in results.items()}})
    return "\n".join([f"step {opened.step}, {results['on'].cases} cases of {name}: share that is right, nats per token",
                      *(f"  memory {mode:<9} {one.score:.4f}   {one.nats:.4f}" for mode, one in results.items())])
