"""Models as folders that other people load: weights, settings, tokenizer, and the memory if it is to go along.

The one thing to know: this is the path for strangers' files, so everything is safetensors or JSON and judged on the way in;
there is no pickle and no program that is run. A folder holds

    config.json            model_type, sizes under Hugging Face's names, `lmcode_model` and `lmcode_memory` (the settings)
    model.safetensors      fp32 weights; the head is the embedding and not repeated
    tokenizer.json, tokenizer_config.json
    banks/, experiences/   as in a checkpoint, one file per virtual shard; left out where the memory stays at home
    README.md              the model card, which says what the memory holds
    modeling_lmcode.py     two lines for transformers' `trust_remote_code`; never run from here

It appears whole or not at all, and takes the place of an older one as `saved.replace` describes. Files may be links only
into the folder, or into the blobs of the hub's cache. Flipped bits in the numbers are not found: hash what must not change.
`LMCODE` takes both ways from `Pretrained`, a `huggingface_hub.ModelHubMixin`; any number of ranks loads what any wrote.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from lmcode import __version__
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build, near_match
from lmcode.dist import Group, check_same, on_rank_0, raise_together
from lmcode.model.lm import MemoryLM
from lmcode.saved import replace
from lmcode.tokenizer import CONFIG_FILE, TOKENIZER_FILE, load_tokenizer, save_for_transformers
from lmcode.train.durable import is_stray

if TYPE_CHECKING:
    from lmcode.lmcode import LMCODE

log = logging.getLogger("lmcode")
CONFIG, WEIGHTS, CARD, PROGRAM = "config.json", "model.safetensors", "README.md", "modeling_lmcode.py"
MODEL_TYPE = "lmcode"


class Pretrained(ModelHubMixin):
    """`save_pretrained`, `from_pretrained`, `push_to_hub`. Collectives: every rank of the model's group calls them."""

    def save_pretrained(self, save_directory: str | Path, *, include_memory: bool = True) -> None:
        """Writes the model as a folder, which appears whole or not at all; one of the same kind is replaced.

        Args:
            save_directory: the same on every rank, on a file system that all ranks share.
            include_memory: banks and experiences too. They can hold what the model has read, word for word.

        Raises:
            ConfigError: on every rank, if the folder holds something else, a weight is not finite or not there (ZeRO-3
                keeps it elsewhere), or the file system refuses; what was there is as it was.
        """
        check_same(self.group, "save_pretrained", str(save_directory), include_memory)
        write(self, Path(save_directory).absolute(), include_memory=include_memory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, include_memory: bool = True,
                        group: Group | None = None, device: torch.device | str = "cpu", revision: str | None = None,
                        cache_dir: str | Path | None = None, force_download: bool = False,
                        local_files_only: bool = False, token: str | bool | None = None) -> LMCODE:
        """Loads what `save_pretrained` wrote, in eval mode. A collective of `group`.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository of the Hugging Face hub.
            include_memory: the memory too, if the folder holds it; otherwise it is empty.
            group: the ranks that share the banks, `Group.world()` in a job of several; this process alone by default.
            device: where weights and banks go.
            revision, cache_dir, force_download, local_files_only, token: of the download.

        Raises:
            ConfigError: on every rank: what is missing, damaged, or does not fit; the message names the file.
        """
        group, place = group or Group(), Path(pretrained_model_name_or_path)
        check_same(group, "from_pretrained", include_memory)
        problem, folder = None, replace.left_by_a_kill(place.absolute()) or place
        if not folder.is_dir():
            try:
                folder = download(str(pretrained_model_name_or_path), revision=revision, cache_dir=cache_dir, token=token,
                                  force_download=force_download, local_files_only=local_files_only)
            except ConfigError as error:
                problem = str(error)
        raise_together(group, problem)
        return read(folder, include_memory=include_memory, group=group, device=device)

    def push_to_hub(self, repo_id: str, *, include_memory: bool = True, private: bool | None = None,
                    token: str | None = None, commit_message: str | None = None) -> str:
        """Saves the model in a temporary folder, which rank 0 uploads; returns the commit's address.
        See `save_pretrained`."""
        check_same(self.group, "push_to_hub", repo_id, include_memory)
        place = Path(on_rank_0(self.group, tempfile.mkdtemp))
        try:
            self.save_pretrained(place / "model", include_memory=include_memory)
            return on_rank_0(self.group, lambda: upload(place / "model", repo_id, private=private, token=token,
                                                        commit_message=commit_message))
        finally:
            if self.group.rank == 0:
                shutil.rmtree(place)


def is_saved_model(path: Path) -> bool:
    """Whether `save_pretrained` wrote what is there, or what a kill has left beside it."""
    return ((replace.left_by_a_kill(path.absolute()) or path) / CONFIG).is_file()


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


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | None, commit_message: str | None) -> str:
    """Uploads a folder to a repository, which is made if need be; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=target, folder_path=folder, commit_message=commit_message))


def write(model: LMCODE, place: Path, *, include_memory: bool) -> None:
    """See `Pretrained.save_pretrained`."""
    from safetensors import SafetensorError

    from lmcode.saved.memory import save_memory

    temporary = replace.beside(place) / ".new.tmp"
    try:
        on_rank_0(model.group, lambda: _begin(model, place, temporary, include_memory))
        problem = None
        try:
            if include_memory:
                save_memory(temporary, model)
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"'{place}' was not written: {error}"
        raise_together(model.group, problem)
        text = card(model, include_memory)
        on_rank_0(model.group, lambda: _finish(place, temporary, text))
    except ConfigError:
        if model.group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def rewrite_memory(model: LMCODE, place: Path, change: Callable[[], Any]) -> Any:
    """Changes the memory of a model that was read from `place`, and replaces that folder by one with the new memory, all of
    it or none; returns what `change` does. One process alone.

    All other files stay as they are, but for a model card that nobody has edited.

    Raises:
        ConfigError: if the file system refuses; what was there is as it was.
    """
    from lmcode.saved.memory import BANKS, EXPERIENCES, make_folders, save_memory

    former_card, file = card(model, include_memory=True), place / CARD
    result = change()
    replace.make_way(place)
    temporary, anew = replace.beside(place) / ".new.tmp", {BANKS, EXPERIENCES}
    if file.is_file() and file.read_text(encoding="utf-8") == former_card:
        anew.add(CARD)
    try:
        shutil.copytree(place, temporary, copy_function=replace.link,
                        ignore=lambda folder, names: anew.intersection(names) if Path(folder) == place else ())
        make_folders(temporary, model)
        save_memory(temporary, model)
        if CARD in anew:
            (temporary / CARD).write_text(card(model, include_memory=True), encoding="utf-8")
        replace.complete(temporary, replace.beside(place) / "new")
    except OSError as error:  # shutil.Error too
        shutil.rmtree(replace.beside(place), ignore_errors=True)
        raise ConfigError(f"'{place}' was not changed: {error}") from None
    replace.take_place(place)
    return result


def _begin(model: LMCODE, place: Path, temporary: Path, include_memory: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from lmcode.saved.memory import make_folders

    if os.path.lexists(place) and not (place.is_dir() and (not any(place.iterdir()) or (place / CONFIG).is_file())):
        raise ConfigError(f"'{place}' exists and is no saved model: give another folder")
    weights = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    check_weights("the model", weights, model.config)
    place.parent.mkdir(parents=True, exist_ok=True)
    replace.make_way(place)
    temporary.mkdir(parents=True)
    if include_memory:
        make_folders(temporary, model)
    try:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"'{place}' was not written: {error}") from None
    _write_json(temporary / CONFIG, config_json(model, include_memory))
    if model.tokenizer is not None:
        save_for_transformers(model.tokenizer, temporary, max_length=model.config.context_length)
    (temporary / PROGRAM).write_text("# For transformers' trust_remote_code; needs lmcode to be installed.\n"
                                     "from lmcode.hf import LMCODEForCausalLM, LMCODEHFConfig  # noqa: F401\n",
                                     encoding="utf-8")


def _finish(place: Path, temporary: Path, text: str) -> None:
    (temporary / CARD).write_text(text, encoding="utf-8")
    replace.complete(temporary, replace.beside(place) / "new")
    replace.take_place(place)


def config_json(model: LMCODE, holds_memory: bool) -> dict[str, Any]:
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
            "lmcode_holds_memory": holds_memory and bool(model.banks)}


def card(model: LMCODE, include_memory: bool) -> str:
    """The model card, as Markdown. A collective of the model's group."""
    weights = sum(p.numel() for p in model.parameters())
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


def _held(model: LMCODE, include_memory: bool) -> str:
    if not model.banks:
        return "This model has no long-term memory."
    if not include_memory:
        return "The long-term memory was left out: this model starts with an empty one."
    lines = [f"- layer {layer}: {bank.stats()['live']:,} of {bank.slots:,} slots hold an entry"
             for layer, bank in model.banks.items()]
    spaces = [one.namespace for one in model.experiences.all()] if model.has_experiences else []
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
    sections = content.get("lmcode_model"), content.get("lmcode_memory", {})
    if not all(isinstance(section, dict) for section in sections):
        raise ConfigError(f"'{file}' must hold the objects lmcode_model and lmcode_memory")
    try:
        return build(LMCODEConfig, sections[0]), build(MemoryConfig, sections[1]), content.get("lmcode_holds_memory") is True
    except ConfigError as error:
        raise ConfigError(f"'{file}': {error}") from None


def read(folder: Path, *, include_memory: bool, group: Group, device: torch.device | str) -> LMCODE:
    """See `Pretrained.from_pretrained`."""
    from lmcode.lmcode import LMCODE
    from lmcode.saved.memory import BANKS, load_memory

    model, problem, with_memory = None, None, False
    if strays := sorted(name for path in folder.rglob("*") if is_stray(name := path.relative_to(folder).as_posix())):
        log.warning("'%s': passed over what is no part of the model: %s", folder, ", ".join(strays))
    try:
        check_links(folder)
        config, memory, holds_memory = settings(folder)
        weights = load_weights(folder / WEIGHTS, config)
    except ConfigError as error:
        problem = str(error)
    raise_together(group, problem)  # memory groups are made by all ranks or by none
    try:
        try:
            model = LMCODE(config, memory=memory, group=group, device=device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"'{folder / CONFIG}': there is no memory for banks of long_term_memory_slots = "
                              f"{config.long_term_memory_slots}: {' '.join(str(error).split())[:80]}") from None
        model.load_state_dict(weights, strict=False)
        if (folder / TOKENIZER_FILE).is_file():
            model.tokenizer = load_tokenizer(folder)
        with_memory = include_memory and bool(model.banks) and (holds_memory or (folder / BANKS).is_dir())
    except ConfigError as error:
        problem = str(error)
    raise_together(group, problem)
    if with_memory:
        load_memory(folder, model)
    return model.to(device).eval()


def load_weights(file: Path, config: LMCODEConfig) -> dict[str, Tensor]:
    """The weights of a file, all of them and judged, before a model of that size is made.

    Raises:
        ConfigError: no safetensors file; a weight that is missing, additional, of another shape or kind, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{file}' is not a readable safetensors file: {error}") from None
    if len(weights) < config.num_layers:  # before a stranger's config.json makes layers without number
        raise ConfigError(f"'{file}' holds {len(weights)} tensors, too few for {config.num_layers} layers")
    check_weights(f"'{file}'", weights, config)
    return weights


def check_weights(where: str, weights: Mapping[str, Tensor], config: LMCODEConfig) -> None:
    """Refuses weights that are not those of a model of this config."""
    try:
        with torch.device("meta"):
            wanted = {name: list(p.shape) for name, p in MemoryLM(config).named_parameters()}
    except RuntimeError as error:
        raise ConfigError(f"{where}: no tensor has the sizes that the settings ask for: {error!s:.120}") from None
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
    from lmcode.saved.memory import BANKS, EXPERIENCES

    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    names: Sequence[Path] = [folder / name for name in (CONFIG, WEIGHTS, TOKENIZER_FILE, CONFIG_FILE)]
    for path in [*names, *(path for part in (BANKS, EXPERIENCES) for path in [folder / part, *(folder / part).rglob("*")])]:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ConfigError(f"'{path}' is a link to outside the folder: got '{path.resolve()}'")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
