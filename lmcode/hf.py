"""LMCODE as a transformers model: importing this module registers it with the Auto classes.

    import lmcode.hf
    model = AutoModelForCausalLM.from_pretrained(folder)      # a folder that `LMCODE.save_pretrained` wrote
    tokenizer = AutoTokenizer.from_pretrained(folder)         # not for the byte tokenizer, which transformers does not have

Programs that cannot be made to import it (the `hf` loader of the lm-evaluation-harness) pass `trust_remote_code=True`.
The only importer of transformers. The one thing to know: the wrapper adds no behaviour; weights, memory and decoding are
those of `LMCODE`, at `model.lmcode`.
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
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from lmcode.config import LMCODEConfig, MemoryConfig, build, near_match
from lmcode.lmcode import LMCODE
from lmcode.pretrained import MODEL_TYPE

# What transformers' own callers pass and what means nothing here, or only at its neutral value.
IGNORED = ("pad_token_id", "bos_token_id", "use_cache", "num_beams", "num_return_sequences", "transformers_version",
           "return_dict_in_generate", "_from_model_config", "cache_implementation", "output_attentions")
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")


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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, include_memory: bool = True,
                        **settings: Any) -> LMCODEForCausalLM:
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
            wrapped = wrapped.to(dtype)
        where = settings.get("device_map")
        where = where.get("") if isinstance(where, dict) else where
        return wrapped.to(where).eval() if where not in (None, "auto") else wrapped.eval()

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """`LMCODE.save_pretrained`."""
        self.lmcode.save_pretrained(save_directory, include_memory=settings.get("include_memory", True))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.lmcode.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lmcode.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                **ignored: Any) -> CausalLMOutput:
        """Loss and logits [B, T, V] of one window; padding on either side is left out of both by `attention_mask`."""
        if attention_mask is None or bool(attention_mask.all()):
            output = self.lmcode(input_ids, labels)
            return CausalLMOutput(loss=output.loss, logits=output.logits)
        # The model wants padding behind the text: sort positions by "is padding", keeping their order.
        order_BT = (attention_mask == 0).long().argsort(dim=1, stable=True)
        valid_BT = attention_mask.bool().gather(1, order_BT)
        moved = None if labels is None else labels.gather(1, order_BT).where(valid_BT, -100)
        output = self.lmcode(input_ids.gather(1, order_BT), moved, valid_BT=valid_BT)
        back_BTV = order_BT.argsort(dim=1)[..., None].expand_as(output.logits)
        return CausalLMOutput(loss=output.loss, logits=output.logits.gather(1, back_BTV))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None,
                 **settings: Any) -> Tensor:
        """`LMCODE.generate`, with transformers' names: `do_sample`, `max_length`, `max_new_tokens`, `temperature`, ...

        Raises:
            ValueError: for a setting that it does not have, with the nearest one that it has.
        """
        given = {} if generation_config is None else generation_config.to_diff_dict()
        given.update(settings)
        ids = given.pop("input_ids", inputs)
        if ids is None:
            raise ValueError("generate needs input_ids: got none")
        sample = given.pop("do_sample", False)
        words = {name: given.pop(name) for name in SAMPLING if given.get(name) is not None}
        if not sample:
            words["temperature"] = 0.0
        for name in ("max_length", "max_new_tokens", "attention_mask", "seed", "namespace"):
            if given.get(name) is not None:
                words[name] = given.pop(name)
        if "max_new_tokens" in words:
            words.pop("max_length", None)
        end = given.pop("eos_token_id", self.config.eos_token_id)
        words["eos_id"] = end[0] if isinstance(end, list) else end
        stops = given.pop("stopping_criteria", None)
        known = (*SAMPLING, "do_sample", "max_length", "max_new_tokens", "eos_token_id", "attention_mask", "input_ids")
        for name in IGNORED:
            if given.pop(name, None) not in (None, True, False, 0, 1) and name in ("num_beams", "num_return_sequences"):
                raise ValueError(f"generate returns one sampled or greedy text for each prompt: got {name} > 1")
        for name in given:
            raise ValueError(f"generate has no setting '{name}'.{near_match(name, known)}")
        return self.lmcode.generate(ids, **words) if not stops else self._until(ids, stops, words)

    def _until(self, ids_BT: Tensor, stops: Any, words: dict[str, Any]) -> Tensor:
        """Generates everything and cuts every text where its criterion is first met: criteria see whole prefixes."""
        written_BT = self.lmcode.generate(ids_BT, **words)
        done_B = torch.zeros(len(written_BT), dtype=torch.bool, device=written_BT.device)
        for end in range(ids_BT.shape[1] + 1, written_BT.shape[1] + 1):
            done_B = done_B | stops(written_BT[:, :end], None)
            if bool(done_B.all()):
                return written_BT[:, :end]
        return written_BT


AutoConfig.register(MODEL_TYPE, LMCODEHFConfig, exist_ok=True)
AutoModelForCausalLM.register(LMCODEHFConfig, LMCODEForCausalLM, exist_ok=True)
AutoTokenizer.register(LMCODEHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
