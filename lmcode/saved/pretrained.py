"""Models as folders that other people load: weights, settings, tokenizer, and the memory if it is to go along.

The one thing to know: this is the path for strangers' files, so everything is safetensors or JSON and judged on the way in;
there is no pickle and no program that is run. A folder holds

    config.json            model_type, sizes under Hugging Face's names, `lmcode_model` and `lmcode_memory` (the settings)
    model.safetensors      fp32 weights, of a model in training those that the optimizer keeps; the head is the embedding
    tokenizer.json, tokenizer_config.json
    banks/, experiences/   as in a checkpoint, one file per virtual shard; left out where the memory stays at home
    README.md              the model card, which says what the memory holds
    modeling_lmcode.py     two lines for transformers' `trust_remote_code`; never run from here

    lmcode_files.json      which of the files in the folder these are, with size and hash

Other files may lie among them and stay as they are: `saved.files` says how ours are replaced, all of them or none. They may
be links only into the folder, or into the blobs of the hub's cache. Flipped bits in the numbers are not found: hash what
must not change.
`LMCODE` has both ways as methods; any number of ranks loads what any wrote.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build, near_match
from lmcode.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, load_tokenizer, save_for_transformers
from lmcode.dist import Group, on_rank_0, raise_together
from lmcode.files.durable import is_stray
from lmcode.files.replace import link
from lmcode.memories.files import BANKS, EXPERIENCES, forget_graphs, load_memory, make_folders, save_memory
from lmcode.model.lm import MemoryLM
from lmcode.saved import files
from lmcode.saved.files import CARD, CONFIG, MODEL_TYPE
from lmcode.version import __version__

log = logging.getLogger("lmcode")
WEIGHTS, PROGRAM = "model.safetensors", "modeling_lmcode.py"
Made = TypeVar("Made", bound=Backbone)


def download(name: str, **settings: Any) -> Path:
    """The folder of a repository of the hub, in its cache. ConfigError if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **settings))
    except (OSError, ValueError) as error:  # what the hub raises for bad names, missing repositories and no network
        place = Path(name)
        names = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"there is no folder '{name}', and no such model on the hub.{near_match(place.name, names)} "
                          f"({why})") from None


def find(name: str | Path, group: Group, **settings: Any) -> Path:
    """The folder of a saved model: at the path `name`, or of the repository of that name. A collective.

    Raises:
        ConfigError: on every rank, if it cannot be had on any.
    """
    problem, folder = None, files.whole(Path(name))
    if not folder.is_dir():
        try:
            folder = download(str(name), **settings)
        except ConfigError as error:
            problem = str(error)
    raise_together(group, problem)
    return folder


def push(model: Backbone, repo_id: str, *, include_memory: bool, private: bool | None, token: str | None,
         commit_message: str | None) -> str:
    """Saves the model in a temporary folder, which rank 0 uploads; returns the commit's address. A collective."""
    place = Path(on_rank_0(model.group, tempfile.mkdtemp))
    try:
        write(model, place / "model", include_memory=include_memory)
        return on_rank_0(model.group, lambda: upload(place / "model", repo_id, private=private, token=token,
                                                     commit_message=commit_message))
    finally:
        if model.group.rank == 0:
            shutil.rmtree(place)


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | None, commit_message: str | None) -> str:
    """Uploads a folder to a repository, which is made if need be; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=target, folder_path=folder, commit_message=commit_message))


def write(model: Backbone, place: Path, *, include_memory: bool, weights: Mapping[str, Tensor] | None = None,
          replace_tokenizer: bool = False) -> None:
    """See `LMCODE.save_pretrained`.

    Args:
        weights: those to save in place of the model's; rank 0's count.
        replace_tokenizer: also if another program has rewritten the one that the last save left there.
    """
    from safetensors import SafetensorError

    if weights is None:
        weights = exact_weights(model)
    with ExitStack() as stack:  # on rank 0 it holds the right to change the folder
        on_rank_0(model.group, lambda: _begin(stack, model, weights, place, include_memory))
        problem = None
        try:
            if include_memory:
                save_memory(files.draft(place), model.memories)
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"'{place}' was not written: {error}"
        raise_together(model.group, problem)
        text = card(model, include_memory)
        rewritten = (TOKENIZER_FILE, CONFIG_FILE) if replace_tokenizer else ()
        on_rank_0(model.group, lambda: _finish(stack, place, text, rewritten))


def rewrite_memory(model: Backbone, place: Path, change: Callable[[], Any]) -> Any:
    """Changes the memory of a model that was read from `place`, and replaces its files there, all of them or none; returns
    what `change` does. One process alone, which holds the right to (`files.replacing`).

    All other files stay as they are, but for a model card that nobody has edited.

    Raises:
        ConfigError: if the file system refuses, or a file of the memory has been changed by somebody else; what was there is
            as it was.
    """
    result, draft = change(), files.draft(place)
    try:
        for name in (CONFIG, WEIGHTS, TOKENIZER_FILE, CONFIG_FILE, PROGRAM):
            if (place / name).is_file():
                link((place / name).resolve(), draft / name)
        make_folders(draft, model.memories)
        save_memory(draft, model.memories)
        forget_graphs(place, model.memories)
        files.put_in_place(place, card(model, include_memory=True) if (place / CARD).is_file() else None)
    except OSError as error:
        raise ConfigError(f"'{place}' was not changed: {error}") from None
    return result


def exact_weights(model: Backbone) -> dict[str, Tensor]:
    """All weights, fp32 on the CPU, on rank 0 (elsewhere none): the optimizer's where the model is, or was, trained. A
    collective."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.kept_parameters():
        weight = parameter.detach().float().cpu() if model.masters is None else model.masters(parameter)
        if model.group.rank == 0:
            weights[name] = weight.contiguous()
    return weights


def _begin(stack: ExitStack, model: Backbone, weights: Mapping[str, Tensor], place: Path, include_memory: bool) -> None:
    """Takes the right to change the folder for the length of `stack`, and writes all but the memory and the card."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_weights("the model", weights, shapes_of(model))
    stack.enter_context(files.replacing(place))
    draft = files.draft(place)
    if include_memory:
        make_folders(draft, model.memories)
    try:
        save_file(dict(weights), draft / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"'{place}' was not written: {error}") from None
    _write_json(draft / CONFIG, config_json(model, include_memory))
    if model.tokenizer is not None:
        save_for_transformers(model.tokenizer, draft, max_length=model.config.context_length)
    (draft / PROGRAM).write_text("# For transformers' trust_remote_code; needs lmcode to be installed.\n"
                                 "from lmcode.hf import LMCODEForCausalLM, LMCODEHFConfig  # noqa: F401\n",
                                 encoding="utf-8")


def _finish(stack: ExitStack, place: Path, text: str, rewritten: Sequence[str]) -> None:
    files.put_in_place(place, text, rewritten)
    stack.close()  # before any rank goes on


def config_json(model: Backbone, holds_memory: bool) -> dict[str, Any]:
    """What config.json says: our settings whole, and the sizes that programs of Hugging Face's ask for."""
    config = model.config
    end = None if model.tokenizer is None else model.tokenizer.end_id
    return {"model_type": MODEL_TYPE, "architectures": ["LMCODEForCausalLM"], "lmcode_version": __version__,
            "auto_map": {"AutoConfig": "modeling_lmcode.LMCODEHFConfig",
                         "AutoModelForCausalLM": "modeling_lmcode.LMCODEForCausalLM"},
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "max_position_embeddings": config.context_length,
            "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "dtype": "float32",
            "lmcode_model": config.model_dump(mode="json"), "lmcode_memory": model.memory_config.model_dump(mode="json"),
            "lmcode_backbone": model.identity(), "lmcode_holds_memory": holds_memory and bool(model.banks),
            "lmcode_tokenizer": model.tokenizer is not None}


def card(model: Backbone, include_memory: bool) -> str:
    """The model card, as Markdown. A collective of the model's group."""
    weights = sum(math.prod(shape) for shape in shapes_of(model).values())
    return f"""---
library_name: lmcode
pipeline_tag: text-generation
tags: [lmcode, memory]
---

# A language model with a long-term memory

{weights:,} weights, {model.config.num_layers} layers of width {model.config.hidden_size}, a window of \
{model.config.context_length} tokens, a vocabulary of {model.config.vocab_size:,}.

## What the memory holds

{_held(model, include_memory)}

## Use

```python
from lmcode import LMCODE

model = LMCODE.from_pretrained("FOLDER")
tokens = model.tokenizer.encode("Once upon a time")
print(model.tokenizer.decode(model.generate([tokens], max_new_tokens=50)[0].tolist()))
```
"""


def _held(model: Backbone, include_memory: bool) -> str:
    if not model.banks:
        return "This model has no long-term memory."
    if not include_memory:
        return "The long-term memory was left out: this model starts with an empty one."
    lines = [f"- layer {layer}: {bank.stats()['live']:,} of {bank.slots:,} slots hold an entry"
             for layer, bank in model.banks.items()]
    spaces = [one.namespace for one in model.experiences.all()] if model.memories.has_experiences else []
    kinds = sorted({json.dumps(space, ensure_ascii=False) for space in spaces})
    shown = ", ".join(f"`{kind[:60]}`" for kind in kinds[:20]) + (f" and {len(kinds) - 20} more" if len(kinds) > 20 else "")
    lines.append(f"- {len(spaces):,} experiences, texts that are stored word for word"
                 + (f", in the namespaces: {shown}" if kinds else ""))
    return "\n".join([*lines, "", "Entries are keys and values made from texts that the model has read; whoever has this "
                                  "folder has what is in it."])


def settings(folder: Path) -> tuple[LMCODEConfig, MemoryConfig, bool]:
    """The settings of a saved model, and whether its memory is in the folder.

    Raises:
        ConfigError: no such folder or config.json, not JSON, another kind of model, settings that are refused.
    """
    file = folder / CONFIG
    if not file.is_file():
        names = [one.name for one in folder.parent.glob('*') if one.name != folder.name]
        raise ConfigError(f"'{folder}' is no saved model: it has no {CONFIG}.{near_match(folder.name, names)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{file}' cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE:
        kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"'{file}' must have the model_type '{MODEL_TYPE}': got {kind!r:.80}")
    model, memory = content.get("lmcode_model"), content.get("lmcode_memory", {})
    if not isinstance(model, dict) or not isinstance(memory, dict):
        raise ConfigError(f"'{file}' must hold the objects lmcode_model and lmcode_memory")
    try:
        return build(LMCODEConfig, model), build(MemoryConfig, memory), content.get("lmcode_holds_memory") is True
    except ConfigError as error:
        raise ConfigError(f"'{file}': {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer in the folder of a saved model belongs to it (somebody else's may lie there)."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return content.get("lmcode_tokenizer") is not False and (folder / TOKENIZER_FILE).is_file()


def read(folder: Path, make: Callable[..., Made], *, include_memory: bool, group: Group, device: torch.device | str,
         storage: MemoryConfig | None = None) -> Made:
    """A model of the class `make` from a saved model's folder. A collective of `group`: see `LMCODE.from_pretrained`.

    Args:
        storage: how its banks store and search, if not as they were saved.
    """

    problem, with_memory = None, False
    if strays := sorted(name for part in (BANKS, EXPERIENCES) for path in (folder / part).rglob("*")
                           if is_stray(name := path.relative_to(folder).as_posix())):
        log.warning("'%s': passed over what is no part of the model: %s", folder, ", ".join(strays))
    try:
        check_links(folder)
        config, memory, holds_memory = settings(folder)
        memory = storage or memory
        weights = {} if config.recipe else load_weights(folder / WEIGHTS, config)
    except ConfigError as error:
        problem = str(error)
    raise_together(group, problem)  # memory groups are made by all ranks or by none
    try:
        try:
            model = make(config, memory=memory, group=group, device=device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"'{folder / CONFIG}': there is no memory for banks of long_term_memory_slots = "
                              f"{config.long_term_memory_slots}: {' '.join(str(error).split())[:80]}") from None
        if config.recipe:
            model.check_identity(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("lmcode_backbone") or {})
            weights = read_weights(folder / WEIGHTS)
            check_weights(f"'{folder / WEIGHTS}'", weights, shapes_of(model))
        model.load_state_dict(weights, strict=False)
        if has_tokenizer(folder):
            model.tokenizer = load_tokenizer(folder)
        with_memory = include_memory and bool(model.banks) and holds_memory
    except ConfigError as error:
        problem = str(error)
    raise_together(group, problem)
    if with_memory:
        load_memory(folder, model.memories)
    return model.to(device).eval()


def load_weights(file: Path, config: LMCODEConfig) -> dict[str, Tensor]:
    """The weights of a file, all of them and judged, before a model of that size is made.

    Raises:
        ConfigError: no safetensors file; a weight that is missing, additional, of another shape or kind, or not finite.
    """
    weights = read_weights(file)
    if len(weights) < config.num_layers:  # before a stranger's config.json makes layers without number
        raise ConfigError(f"'{file}' holds {len(weights)} tensors, too few for {config.num_layers} layers")
    try:
        wanted = weight_shapes(config)
    except RuntimeError as error:
        raise ConfigError(f"'{file}': no tensor has the sizes that the settings ask for: {error!s:.120}") from None
    check_weights(f"'{file}'", weights, wanted)
    return weights


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights of a file. ConfigError if it is no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{file}' is not a readable safetensors file: {error}") from None


def shapes_of(model: Backbone) -> dict[str, list[int]]:
    """The weights that are saved with a model; of a parameter that ZeRO-3 has emptied the shape that it has in whole."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in model.kept_parameters()}


def weight_shapes(config: LMCODEConfig) -> dict[str, list[int]]:
    """The weights of a model of this config. RuntimeError for sizes that no tensor has."""
    with torch.device("meta"):
        return {name: list(p.shape) for name, p in MemoryLM(config).named_parameters()}


def check_weights(where: str, weights: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuses weights that have not these names and shapes, or are not finite."""
    for name in sorted(wanted.keys() | weights.keys()):
        came = list(weights[name].shape) if name in weights else "nothing"
        if name not in wanted:
            raise ConfigError(f"{where}: there is no weight '{name}'.{near_match(name, wanted)}")
        if came != wanted[name]:
            raise ConfigError(f"{where}: '{name}' must be {wanted[name]}: got {came}")
        if not weights[name].is_floating_point() or not bool(torch.isfinite(weights[name]).all()):
            raise ConfigError(f"{where}: '{name}' must hold finite floating-point numbers")


def check_links(folder: Path) -> None:
    """Refuses files of a saved model that are links to elsewhere: to outside the folder, unless into the hub's cache."""
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    names: Sequence[Path] = [folder / name for name in (CONFIG, WEIGHTS, TOKENIZER_FILE, CONFIG_FILE)]
    for path in [*names, *(path for part in (BANKS, EXPERIENCES) for path in [folder / part, *(folder / part).rglob("*")])]:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ConfigError(f"'{path}' is a link to outside the folder: got '{path.resolve()}'")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
