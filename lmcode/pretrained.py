"""Models as folders that other people load: weights, settings, tokenizer, and the memory if it is to go along.

The one thing to know: this is the path for strangers' files, so everything is safetensors or JSON and judged on the way in;
there is no pickle and no program that is run. A folder holds

    config.json            model_type, sizes under Hugging Face's names, `lmcode_model` and `lmcode_memory` (the settings)
    model.safetensors      fp32 weights; the head is the embedding and not repeated
    tokenizer.json, tokenizer_config.json
    banks/, experiences/   as in a checkpoint, one file per virtual shard; left out where the memory stays at home
    README.md              the model card, which says what the memory holds
    modeling_lmcode.py     two lines for transformers' `trust_remote_code`; never run from here

`LMCODE` takes both ways from `Pretrained`, a `huggingface_hub.ModelHubMixin`; any number of ranks loads what any wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin

from lmcode import __version__
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build, near_match
from lmcode.dist import Group, on_rank_0

if TYPE_CHECKING:
    from lmcode.lmcode import LMCODE

CONFIG, WEIGHTS, CARD, PROGRAM = "config.json", "model.safetensors", "README.md", "modeling_lmcode.py"
MODEL_TYPE = "lmcode"


class Pretrained(ModelHubMixin):
    """`save_pretrained` and `from_pretrained`. Collectives: every rank of the model's group calls them."""

    def save_pretrained(self, save_directory: str | Path, *, include_memory: bool = True, repo_id: str | None = None,
                        push_to_hub: bool = False, **hub: Any) -> str | None:
        """Writes the model as a folder, which appears whole or not at all; one of the same kind is replaced.

        Args:
            include_memory: banks and experiences too. They can hold what the model has read, word for word.
            repo_id: where `push_to_hub` uploads the folder; its own name when None.
            push_to_hub: upload it, by rank 0.
            **hub: for the upload: `token`, `private`, `commit_message`.

        Returns:
            The address of the upload on rank 0, else None.

        Raises:
            ConfigError: if the folder holds something else, or the file system refuses.
        """
        place = Path(save_directory).absolute()
        write(self, place, include_memory=include_memory)
        if not push_to_hub or self.group.rank:
            return None
        from huggingface_hub import HfApi

        api = HfApi(token=hub.get("token"))
        target = api.create_repo(repo_id or place.name, private=hub.get("private"), exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=target, folder_path=place, commit_message=hub.get("commit_message")))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
                         local_files_only: bool, token: str | bool | None, include_memory: bool = True,
                         group: Group | None = None, device: torch.device | str = "cpu", **ignored: Any) -> LMCODE:
        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model_id, revision=revision, cache_dir=cache_dir, token=token,
                                            force_download=force_download, local_files_only=local_files_only))
        return read(folder, include_memory=include_memory, group=group or Group(), device=device)


def write(model: LMCODE, place: Path, *, include_memory: bool) -> None:
    """See `Pretrained.save_pretrained`."""
    from lmcode.memory_files import save_memory

    new = place.with_name(f".{place.name}.new")
    on_rank_0(model.group, lambda: _begin(model, place, new, include_memory))
    problem = None
    try:
        if include_memory:
            save_memory(new, model)
    except (OSError, ValueError) as error:
        problem = f"rank {model.group.rank}: {error}"
    problems = [one for one in model.group.all_gather_object(problem) if one]
    if problems:
        raise ConfigError(f"'{place}' was not written: {'; '.join(problems)}")
    live = {layer: bank.stats()["live"] for layer, bank in model.banks.items()} if include_memory else {}
    spaces = ([str(one.namespace) for one in model.experiences.all()]
              if include_memory and model.banks and model.has_experiences else [])
    on_rank_0(model.group, lambda: _finish(place, new, card(model, live, spaces)))


def _begin(model: LMCODE, place: Path, new: Path, include_memory: bool) -> None:
    from safetensors.torch import save_file

    from lmcode.memory_files import make_folders

    if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or (place / CONFIG).is_file())):
        raise ConfigError(f"'{place}' exists and is no saved model: give another folder")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    if include_memory:
        make_folders(new, model)
    weights = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, new / WEIGHTS, metadata={"format": "pt"})
    _write_json(new / CONFIG, config_json(model))
    if model.tokenizer is not None:
        model.tokenizer.save(new)
    (new / PROGRAM).write_text("# For transformers' trust_remote_code; needs lmcode to be installed.\n"
                               "from lmcode.hf import LMCODEForCausalLM, LMCODEHFConfig  # noqa: F401\n", encoding="utf-8")


def _finish(place: Path, new: Path, text: str) -> None:
    (new / CARD).write_text(text, encoding="utf-8")
    old = place.with_name(f".{place.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    if old.exists():
        shutil.rmtree(old)


def config_json(model: LMCODE) -> dict[str, Any]:
    """What config.json says: our settings whole, and the sizes that programs of Hugging Face's ask for."""
    config = model.config
    end = None if model.tokenizer is None else model.tokenizer.end_id
    return {"model_type": MODEL_TYPE, "architectures": ["LMCODEForCausalLM"], "lmcode_version": __version__,
            "auto_map": {"AutoConfig": "modeling_lmcode.LMCODEHFConfig",
                         "AutoModelForCausalLM": "modeling_lmcode.LMCODEForCausalLM"},
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "max_position_embeddings": config.context_length,
            "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end,
            "lmcode_model": config.model_dump(mode="json"), "lmcode_memory": model.memory_config.model_dump(mode="json")}


def card(model: LMCODE, live: Mapping[int, int], spaces: Sequence[str]) -> str:
    """The model card, as Markdown.

    Args:
        live: entries in each layer's bank; empty if the memory is not in the folder.
        spaces: the namespace of each experience.
    """
    weights = sum(p.numel() for p in model.parameters())
    names = [f"- layer {layer}: {count:,} of {model.banks[layer].slots:,} slots hold an entry"
             for layer, count in live.items()]
    kinds = sorted(set(spaces))
    shown = ", ".join(kinds[:20]) + (f" and {len(kinds) - 20} more" if len(kinds) > 20 else "")
    held = [*names, f"- {len(spaces):,} experiences, texts that are stored word for word"
            + (f", in the namespaces: {shown}" if kinds else "")]
    memory = "\n".join(held) if live else "The long-term memory was left out: this model starts with an empty one."
    return f"""---
library_name: lmcode
pipeline_tag: text-generation
tags: [lmcode, memory]
---

# A language model with a long-term memory

{weights:,} weights, {model.config.num_layers} layers of width {model.config.hidden_size}, a window of \
{model.config.context_length} tokens, a vocabulary of {model.config.vocab_size:,}.

## What the memory holds

{memory}

Entries are keys and values made from texts that the model has read; whoever has this folder has what is in it.

## Use

```python
from lmcode import LMCODE

model = LMCODE.from_pretrained("FOLDER")
tokens = model.tokenizer.encode("Once upon a time")
print(model.tokenizer.decode(model.generate([tokens], max_new_tokens=50)[0].tolist()))
```
"""


def settings(folder: Path) -> tuple[LMCODEConfig, MemoryConfig]:
    """The settings of a saved model.

    Raises:
        ConfigError: no such folder or config.json, not JSON, another kind of model, settings that are refused.
    """
    file = folder / CONFIG
    if not file.is_file():
        names = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError(f"'{folder}' is no saved model: it has no {CONFIG}.{near_match(folder.name, names)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{file}' cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE:
        kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"'{file}' must have the model_type '{MODEL_TYPE}': got {kind!r}")
    sections = content.get("lmcode_model"), content.get("lmcode_memory", {})
    if not all(isinstance(section, dict) for section in sections):
        raise ConfigError(f"'{file}' must hold the objects lmcode_model and lmcode_memory")
    return build(LMCODEConfig, sections[0]), build(MemoryConfig, sections[1])


def read(folder: Path, *, include_memory: bool, group: Group, device: torch.device | str) -> LMCODE:
    """See `Pretrained.from_pretrained`.

    Raises:
        ConfigError: what is missing, damaged, or does not fit; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lmcode.lmcode import LMCODE
    from lmcode.memory_files import BANKS, load_memory
    from lmcode.tokenizer import TOKENIZER_FILE, load_tokenizer

    config, memory = settings(folder)
    model = LMCODE(config, memory=memory, group=group, device=device)
    file = folder / WEIGHTS
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{file}' is not a readable safetensors file: {error}") from None
    wanted = {name: p.shape for name, p in model.named_parameters()}
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted or weights[name].shape != wanted[name]:
            raise ConfigError(f"'{file}': '{name}' must be {list(wanted[name]) if name in wanted else 'absent'}: got "
                              f"{list(weights[name].shape) if name in weights else 'nothing'}")
        if not bool(torch.isfinite(weights[name]).all()):
            raise ConfigError(f"'{file}': '{name}' holds numbers that are not finite")
    model.load_state_dict(weights, strict=False)
    if (folder / TOKENIZER_FILE).is_file():
        model.tokenizer = load_tokenizer(folder)
    if include_memory and (folder / BANKS).is_dir():
        load_memory(folder, model)
    return model.to(device).eval()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
