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

from lmcode.config import LMCODEConfig, MemoryConfig, build, near_match
from lmcode.language_model import LMCODE
from lmcode.memories.experiences import Namespace, namespace_number
from lmcode.saved.files import MODEL_TYPE

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "min_length": 0}  # all we can do
IGNORED = ("pad_token_id", "bos_token_id", "use_cache", "transformers_version", "_from_model_config", "cache_implementation",
           "assistant_model", "assistant_tokenizer", "tokenizer", "custom_generate")  # mean nothing here
PASSED_ON = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens",
             "attention_mask", "seed", "namespace")


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
    """A causal language model of transformers' that is an `LMCODE` inside."""

    config_class = LMCODEHFConfig
    base_model_prefix = "lmcode"
    _supports_sdpa = True

    def __init__(self, config: LMCODEHFConfig, model: LMCODE | None = None) -> None:
        super().__init__(config)
        self.lmcode = model if model is not None else LMCODE(
            build(LMCODEConfig, config.lmcode_model), memory=build(MemoryConfig, config.lmcode_memory))
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path,  # type: ignore[override]  # theirs names them all
                        *args: Any, include_memory: bool = True, **settings: Any) -> LMCODEForCausalLM:
        """Loads what `LMCODE.save_pretrained` wrote, with `LMCODE.from_pretrained`.

        Args:
            include_memory: banks and experiences too.
            **settings: transformers' own. `dtype` (or `torch_dtype`), a `device_map` that names one device, and what says
                where to download from are honoured; the rest does not apply to this model.
        """
        hub = {name: settings[name] for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")
               if settings.get(name) is not None}
        model = LMCODE.from_pretrained(pretrained_model_name_or_path, include_memory=include_memory, **hub)
        config = settings.get("config") or LMCODEHFConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        wrapped = cls(config, model)
        dtype = settings.get("dtype", settings.get("torch_dtype"))
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if isinstance(dtype, torch.dtype):
            wrapped = wrapped.to(dtype)  # type: ignore[arg-type]  # transformers wraps a method as if it were a function
        where = settings.get("device_map")
        where = where.get("") if isinstance(where, dict) else where
        if where not in (None, "auto"):
            wrapped = wrapped.to(where)
        wrapped.train(False)
        return wrapped

    def save_pretrained(self, save_directory: str | Path, *,  # type: ignore[override]  # as `from_pretrained`
                        include_memory: bool = True, push_to_hub: bool = False, **ignored: Any) -> None:
        """`LMCODE.save_pretrained`; of transformers' own settings none applies."""
        if push_to_hub:
            raise ValueError("save_pretrained only saves: upload with model.lmcode.push_to_hub(repo_id)")
        self.lmcode.save_pretrained(save_directory, include_memory=include_memory)

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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: Any = None, inputs_embeds: Tensor | None = None, namespace: Namespace = 0,
                **ignored: Any) -> CausalLMOutput:
        """Loss and logits [B, T, V] of one window; padding on either side is left out of both by `attention_mask`.

        Raises:
            ValueError: for what it does not have: `past_key_values`, `inputs_embeds`.
        """
        if past_key_values is not None or inputs_embeds is not None:
            raise ValueError("forward reads a whole window of input_ids: it has no past_key_values and no inputs_embeds")
        namespace_B = torch.full((len(input_ids),), namespace_number(namespace), device=input_ids.device)
        if attention_mask is None or bool(attention_mask.all()):
            output = self.lmcode(input_ids, labels, namespace_B=namespace_B)
            return CausalLMOutput(loss=output.loss, logits=output.logits)
        # The model wants padding behind the text: sort positions by "is padding", keeping their order.
        order_BT = (attention_mask == 0).long().argsort(dim=1, stable=True)
        valid_BT = attention_mask.bool().gather(1, order_BT)
        moved_BT = None if labels is None else labels.gather(1, order_BT).where(valid_BT, -100)
        ids_BT = input_ids.gather(1, order_BT).where(valid_BT, 0)  # a pad token may lie outside the vocabulary
        output = self.lmcode(ids_BT, moved_BT, valid_BT=valid_BT, namespace_B=namespace_B)
        back_BTV = order_BT.argsort(dim=1)[..., None].expand_as(output.logits)
        return CausalLMOutput(loss=output.loss, logits=output.logits.gather(1, back_BTV))

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


AutoConfig.register(MODEL_TYPE, LMCODEHFConfig, exist_ok=True)
AutoModelForCausalLM.register(LMCODEHFConfig, LMCODEForCausalLM, exist_ok=True)
AutoTokenizer.register(LMCODEHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
