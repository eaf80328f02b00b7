"""LMCODE as a transformers model: importing this module registers it with the Auto classes.

    import lmcode.hf
    model = AutoModelForCausalLM.from_pretrained(folder)      # a folder that `LMCODE.save_pretrained` wrote
    tokenizer = AutoTokenizer.from_pretrained(folder)

Programs that cannot be made to import it (the `hf` loader of the lm-evaluation-harness) pass `trust_remote_code=True`.
The only importer of transformers. The wrapper adds no behaviour: weights, memory and decoding are those of `LMCODE`, at
`model.lmcode`. The one thing to know: all rows of a batch read one namespace, 0 (where experiences go by default) unless
`namespace` says otherwise, so that what a text scores does not depend on its place in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmcode.config import LMCODEConfig, MemoryConfig, build, near_match
from lmcode.language_model import LMCODE
from lmcode.memories.experiences import Namespace, namespace_number
from lmcode.model.lm import LMCODEOutput
from lmcode.saved import pretrained
from lmcode.saved.files import MODEL_TYPE

# generate: arguments with the only value that is supported; arguments that are ignored; arguments that are used.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "min_length": 0}
IGNORED = ("pad_token_id", "bos_token_id", "use_cache", "transformers_version", "_from_model_config", "cache_implementation",
           "assistant_model", "assistant_tokenizer", "tokenizer", "custom_generate")
PASSED_ON = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens",
             "attention_mask", "seed", "namespace")
# forward: arguments with the only value that is supported (use_cache may have any). `cache` is the name of past_key_values
# in transformers 5.24.
FORWARD_NEUTRAL = {"past_key_values": None, "cache": None, "inputs_embeds": None, "position_ids": None,
                   "cache_position": None, "token_type_ids": None, "shift_labels": None, "output_attentions": False,
                   "output_hidden_states": False, "return_dict": True, "logits_to_keep": 0}
FORWARD_NAMES = ("input_ids", "attention_mask", "labels", "namespace", "num_items_in_batch", "use_cache", *FORWARD_NEUTRAL)
# from_pretrained: arguments for the download, arguments that are used, and arguments of transformers and its callers that
# are ignored. Any other is refused, unless it is None or False.
HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")
HONOURED = ("config", "dtype", "torch_dtype", "device_map")
LOAD_IGNORED = ("trust_remote_code", "code_revision", "adapter_kwargs", "attn_implementation", "low_cpu_mem_usage",
                "use_safetensors", "weights_only", "subfolder", "proxies", "max_memory", "offload_folder", "_commit_hash",
                "_from_auto", "_from_pipeline", "name_or_path", "tqdm_class")
ONE_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that leave a model where it was loaded
# save_pretrained: arguments that are ignored.
SAVE_IGNORED = ("safe_serialization", "save_function", "max_shard_size", "token", "save_peft_format",
                "save_original_format")


def check_known(method: str, given: Collection[str], known: Collection[str]) -> None:
    """ValueError for a name that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            raise ValueError(f"{method} has no argument '{name}'.{near_match(name, known)}")


class _Enough(Exception):
    """Every text of a batch has met its stopping criteria."""


class LMCODEHFConfig(PretrainedConfig):
    """The config.json of a saved model, for transformers."""

    model_type = MODEL_TYPE

    def __init__(self, lmcode_model: dict[str, Any] | None = None, lmcode_memory: dict[str, Any] | None = None,
                 **settings: Any) -> None:
        self.lmcode_model, self.lmcode_memory = lmcode_model or {}, lmcode_memory or {}
        super().__init__(**settings)


class LMCODEForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers' that is an `LMCODE` inside.

    Its `state_dict` has the names of `lmcode` behind "lmcode."; `load_state_dict` and `save_pretrained` also take those of
    the files that are saved, which have no prefix and no head (it is the embedding). `forward` divides the summed loss by
    `num_items_in_batch` as transformers' own models do, so that a Trainer's gradients do not depend on how it splits a
    batch.
    """

    config_class = LMCODEHFConfig
    base_model_prefix = "lmcode"
    accepts_loss_kwargs = True
    _supports_sdpa = True

    def __init__(self, config: LMCODEHFConfig, model: LMCODE | None = None) -> None:
        super().__init__(config)
        self.lmcode = model if model is not None else LMCODE(
            build(LMCODEConfig, config.lmcode_model), memory=build(MemoryConfig, config.lmcode_memory))
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id)
        self.register_load_state_dict_pre_hook(take_saved_names)  # type: ignore[no-untyped-call]  # torch's own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path,  # type: ignore[override]  # theirs names them all
                        *args: Any, include_memory: bool = True, **settings: Any) -> LMCODEForCausalLM:
        """Loads what `LMCODE.save_pretrained` wrote, with `LMCODE.from_pretrained`.

        Args:
            include_memory: banks and experiences too.
            **settings: transformers' own. `dtype` (or `torch_dtype`), a `device_map` that names one device, `config` and
                what says where to download from are honoured; those of `LOAD_IGNORED` have no effect.

        Raises:
            ValueError: for any other setting, and a `device_map` of several devices.
        """
        asked = [name for name, value in settings.items() if value is not None and value is not False]
        check_known("from_pretrained", asked, ("include_memory", *HUB, *HONOURED, *LOAD_IGNORED))
        device = one_device(settings.get("device_map"))
        hub = {name: settings[name] for name in HUB if settings.get(name) is not None}
        model = LMCODE.from_pretrained(pretrained_model_name_or_path, include_memory=include_memory, **hub)
        config = settings.get("config") or LMCODEHFConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        wrapped = cls(config, model)
        dtype = settings.get("dtype", settings.get("torch_dtype"))
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if isinstance(dtype, torch.dtype):
            wrapped = wrapped.to(dtype)  # type: ignore[arg-type]  # transformers wraps a method as if it were a function
        if device is not None:
            wrapped = wrapped.to(device)
        wrapped.train(False)
        return wrapped

    def save_pretrained(self, save_directory: str | Path, *,  # type: ignore[override]  # as `from_pretrained`
                        include_memory: bool = True, is_main_process: bool = True,
                        state_dict: Mapping[str, Tensor] | None = None, push_to_hub: bool = False, **settings: Any) -> None:
        """`LMCODE.save_pretrained`, which here also replaces a tokenizer that has been saved over the former one, as a
        Trainer does in every checkpoint.

        Args:
            is_main_process: whether to write at all, where each process has a model of its own.
            state_dict: weights to save in place of the model's, under the names of either `state_dict` or a saved file.
            **settings: those of `SAVE_IGNORED`, which have no effect.

        Raises:
            ConfigError: as there, also for weights in `state_dict` that are not this model's.
            ValueError: for `push_to_hub`, and any other setting.
        """
        if push_to_hub:
            raise ValueError("save_pretrained only saves: upload with model.lmcode.push_to_hub(repo_id)")
        asked = [name for name, value in settings.items() if value is not None]
        check_known("save_pretrained", asked, ("include_memory", "is_main_process", "state_dict", *SAVE_IGNORED))
        if not is_main_process and self.lmcode.group.size == 1:
            return
        pretrained.write(self.lmcode, Path(save_directory).absolute(), include_memory=include_memory, replace_tokenizer=True,
                         weights=None if state_dict is None else saved_names(state_dict))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.lmcode.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lmcode.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
                                mean_resizing: bool = True) -> torch.nn.Embedding:
        """`LMCODE.resize_token_embeddings` with transformers' arguments; new rows are the mean of the old ones.

        Raises:
            ValueError: as there, and for `mean_resizing=False`; nothing has changed then.
        """
        if not mean_resizing:
            raise ValueError("new rows of the embedding are the mean of the old ones: got mean_resizing=False")
        size = self.lmcode.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        embedding = self.lmcode.resize_token_embeddings(size)
        self.config.lmcode_model = self.lmcode.config.model_dump(mode="json")
        self.config.vocab_size = size
        return embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
                namespace: Namespace = 0, num_items_in_batch: Tensor | int | None = None, **others: Any) -> CausalLMOutput:
        """Loss and logits [B, T, V] of one window; padding on either side is left out of both by `attention_mask`.

        Args:
            num_items_in_batch: what the summed loss is divided by; None: the number of targets in this window.
            **others: transformers' own, of which each has one value only (`FORWARD_NEUTRAL`), and `use_cache`.

        Raises:
            ValueError: for what it does not have, such as `past_key_values` (also called `cache`) and `inputs_embeds`.
        """
        check_known("forward", others, FORWARD_NAMES)
        for name, value in others.items():
            if name in FORWARD_NEUTRAL and value is not None and value is not FORWARD_NEUTRAL[name]:
                raise ValueError("forward reads a whole window of input_ids and returns its loss and logits: "
                                 f"{name} must be {FORWARD_NEUTRAL[name]}, got {value!r:.60}")
        namespace_B = torch.full((len(input_ids),), namespace_number(namespace), device=input_ids.device)
        if attention_mask is None or bool(attention_mask.all()):
            output = self.lmcode(input_ids, labels, namespace_B=namespace_B)
            return CausalLMOutput(loss=loss_of(output, num_items_in_batch), logits=output.logits)
        # The model wants padding behind the text: sort positions by "is padding", keeping their order.
        order_BT = (attention_mask == 0).long().argsort(dim=1, stable=True)
        valid_BT = attention_mask.bool().gather(1, order_BT)
        moved_BT = None if labels is None else labels.gather(1, order_BT).where(valid_BT, -100)
        ids_BT = input_ids.gather(1, order_BT).where(valid_BT, 0)  # a pad token may lie outside the vocabulary
        output = self.lmcode(ids_BT, moved_BT, valid_BT=valid_BT, namespace_B=namespace_B)
        back_BTX = order_BT.argsort(dim=1)[..., None].expand_as(output.logits)
        return CausalLMOutput(loss=loss_of(output, num_items_in_batch), logits=output.logits.gather(1, back_BTX))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None,  # type: ignore[override]  # as `from_pretrained`
                 generation_config: GenerationConfig | None = None, stopping_criteria: Any = None,
                 **settings: Any) -> Tensor:
        """`LMCODE.generate` with transformers' names and defaults, but for the length: 128 new tokens.

        Args:
            generation_config: `self.generation_config` when None; `settings` change it.
            stopping_criteria: asked after every token; a text that meets one is padded from there on.
            **settings: `do_sample` (greedy without it), `temperature`, `top_k`, `top_p`, `repetition_penalty`,
                `no_repeat_ngram_size`, `max_length`, `max_new_tokens`, `eos_token_id`, `attention_mask`; and `seed` and
                `namespace`, which are ours.

        Raises:
            ValueError: for a setting that it does not have, with the nearest one that it has, and for beams.
        """
        given = {**(generation_config or self.generation_config).to_diff_dict(), **settings}
        for name in ("past_key_values", "cache", "inputs_embeds"):
            if given.pop(name, None) is not None:
                raise ValueError(f"generate begins with input_ids and keeps a cache of its own: it has no {name}")
        prompt_BT = given.pop("input_ids", inputs)
        if prompt_BT is None:
            raise ValueError("generate needs input_ids: got none")
        words = self._words(given)
        mask_BT = words.setdefault("attention_mask", torch.ones_like(prompt_BT))
        ids_BT = prompt_BT.where(mask_BT != 0, 0)  # a pad token may lie outside the vocabulary
        written_BT = self._until(ids_BT, StoppingCriteriaList(stopping_criteria or []), words)
        return torch.cat([prompt_BT, written_BT[:, prompt_BT.shape[1]:]], dim=1)

    def _words(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `LMCODE.generate` that these settings mean."""
        known = (*PASSED_ON, *NEUTRAL, *IGNORED, "do_sample", "eos_token_id", "stopping_criteria", "generation_config")
        for name, value in given.items():
            if name not in known and value is not None:
                raise ValueError(f"generate has no setting '{name}'.{near_match(name, known)}")
            if name in NEUTRAL and value not in (None, NEUTRAL[name]):
                raise ValueError("generate returns one text for each prompt, as a tensor, which may end at once: "
                                 f"{name} must be {NEUTRAL[name]}, got {value}")
        ends = given.get("eos_token_id", self.config.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        if len(ends) != 1:
            raise ValueError(f"a text ends with one token: eos_token_id must be one id, got {ends}")
        words = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "namespace": 0, "eos_id": ends[0],
                 **{name: given[name] for name in PASSED_ON if given.get(name) is not None}}
        if not given.get("do_sample"):
            words["temperature"] = 0.0
        if "max_new_tokens" in words:
            words.pop("max_length", None)
        return words

    def _until(self, ids_BT: Tensor, stops: StoppingCriteriaList, words: dict[str, Any]) -> Tensor:
        """Generates until every text has met a criterion or its end."""
        if not stops:
            written = self.lmcode.generate(ids_BT, **words)
            return written if isinstance(written, Tensor) else written.tokens_BT
        filler = self.config.eos_token_id or 0
        written_BT, done_B = ids_BT, torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

        def look(token_B: Tensor) -> None:
            nonlocal written_BT, done_B
            written_BT = torch.cat([written_BT, token_B.where(~done_B, filler)[:, None]], dim=1)
            done_B = done_B | stops(written_BT, None)
            if bool(done_B.all()):
                raise _Enough

        try:
            self.lmcode.generate(ids_BT, **words, on_token=look)
        except _Enough:
            pass
        return written_BT


def loss_of(output: LMCODEOutput, num_items_in_batch: Tensor | int | None) -> Tensor | None:
    """The mean loss over the targets of a window, or their sum divided by the number of a larger batch's."""
    if output.token_loss is None or num_items_in_batch is None:
        return output.loss
    return output.token_loss.sum() / torch.as_tensor(num_items_in_batch, device=output.token_loss.device)


def one_device(device_map: Any) -> Any:
    """The device that a `device_map` names; None: where the model is loaded. ValueError if it names several."""
    if isinstance(device_map, dict):
        if list(device_map) != [""]:
            raise ValueError(f"device_map must name one device for the whole model, as {{'': 'cpu'}}: got {device_map}")
        device_map = device_map[""]
    return None if device_map in ONE_DEVICE else device_map


def saved_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of a saved model, fp32 on the CPU; the head, which is the embedding, is left out."""
    weights = {name.removeprefix("lmcode."): weight for name, weight in state.items()}
    weights.pop("head.weight", None)
    return {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}


def take_saved_names(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: puts "lmcode." before names that are without, and the embedding for an absent head."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}lmcode.")]:
        state[f"{prefix}lmcode.{name.removeprefix(prefix)}"] = state.pop(name)
    if f"{prefix}lmcode.embedding.weight" in state:
        state.setdefault(f"{prefix}lmcode.head.weight", state[f"{prefix}lmcode.embedding.weight"])


MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = LMCODEForCausalLM.__name__  # label smoothing shifts labels for these only
AutoConfig.register(MODEL_TYPE, LMCODEHFConfig, exist_ok=True)
AutoModelForCausalLM.register(LMCODEHFConfig, LMCODEForCausalLM, exist_ok=True)
AutoTokenizer.register(LMCODEHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
