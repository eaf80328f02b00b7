"""`Attached`: a transformers model with a recipe, as a `Backbone`, so that all that trains, measures and saves takes it.

The one thing to know: there are two ways to call it. In ours (`forward`) a batch of streams is read window by window; each
carries its first and its last tokens with it, and what leaves that row is offered to the banks. In transformers' way (the
model itself, its `generate`, a Trainer) the model keeps its own cache, reads the banks, and offers nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.backbone import Backbone
from lmcode.backbone_config import options_of, recipe_of
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig
from lmcode.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from lmcode.dist import Group, check_same
from lmcode.memories.experiences import Namespace, namespace_number
from lmcode.model.generation.generate import Generation, Prompts, padded_prompts
from lmcode.model.generation.sampling import Decoding, next_token
from lmcode.model.inputs import IGNORED, aligned_targets
from lmcode.model.lm import LMCODEOutput
from lmcode.model.long_term import Window, merge_partials
from lmcode.model.loss import next_token_loss, surprises
from lmcode.model.mode import in_eval_mode
from lmcode.precision import without_autocast
from lmcode.protocol import EntryShape, LayerMemory, NullRetriever, Retriever
from lmcode.recipes import foreign
from lmcode.recipes.anatomy import Anatomy, hash_of
from lmcode.recipes.carried import Carried, moves, pick
from lmcode.recipes.joint import attend_own, seen_of
from lmcode.recipes.recipe import LayerCall, Left, Pass, Recipe
from lmcode.saved import pretrained


def count_parameters(config: LMCODEConfig) -> tuple[int, int]:
    """Weights of the backbone and of the recipe that the settings name, from the backbone's config.json alone."""
    with torch.device("meta"):
        model = foreign.blank(config.backbone)
        recipe = recipe_of(config.recipe)(Anatomy(model), config, options_of(config.recipe, config.recipe_options))
        return tuple(sum(p.numel() for p in one.parameters()) for one in (model, recipe))


class Attached(Backbone):
    """A causal language model of transformers' that reads and offers to the banks of some of its layers.

    Args:
        config: with `backbone`, the folder of the model, and `recipe`.
        memory, group, device: as in `LMCODE`.
        model: the model itself, if it has been read already.

    Attributes:
        backbone: the transformers model, in which hooks lie; `backbone.lmcode` is this object.
        recipe: how the memory works; its parameters are trained, and those of the backbone with `train_backbone`.

    Raises:
        ConfigError: no such model, an architecture that is not supported.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu", model: Any = None) -> None:
        super().__init__()
        self.begin(config, memory, group=group, device=device)
        model = foreign.load(config.backbone) if model is None else model
        self.anatomy = Anatomy(model)
        self.hash = hash_of(model)
        for parameter in model.parameters():
            parameter.requires_grad_(config.train_backbone)
        if not config.train_backbone:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # nothing frozen is regularised
        self.options: Any = options_of(config.recipe, config.recipe_options)
        self.recipe: Recipe = recipe_of(config.recipe)(self.anatomy, config, self.options)
        model.lmcode_recipe = self.recipe
        self.backbone = model.to(device)
        object.__setattr__(model, "lmcode", self)  # a plain attribute: the model is a part of this, not this of the model
        self._tokenizer = None
        if (Path(config.backbone) / TOKENIZER_FILE).is_file():
            self.tokenizer = load_tokenizer(config.backbone)
        self._retrievers: dict[int, Retriever] = {}
        self.set_retrievers(self.banks)
        self._pass: Pass | None = None
        self._namespaces: Namespace | Sequence[Namespace] | Tensor = 0
        self._at_once = self._recomputes = False
        self._hook()

    @classmethod
    def memory_shapes(cls, config: LMCODEConfig) -> dict[int, EntryShape]:
        return {layer: EntryShape(config.memory_heads, config.memory_head_dim, config.memory_head_dim)
                for layer in config.memory_layer_indices}

    @property
    def offers_by_token(self) -> bool:
        return self.recipe.offers_by_token

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        return self.recipe.learned_numbers(layer)

    def identity(self) -> dict[str, Any]:
        return {"backbone": self.config.backbone, "recipe": self.config.recipe,
                "model_type": self.backbone.config.model_type, "hash": self.hash}

    def check_identity(self, saved: Mapping[str, Any]) -> None:
        for name in ("recipe", "model_type", "hash"):
            if saved.get(name) != self.identity()[name]:
                raise ConfigError(f"this memory was made with the backbone '{saved.get('backbone')}' and the recipe "
                                  f"'{saved.get('recipe')}': its {name} is {saved.get(name)!r}, and that of "
                                  f"'{self.config.backbone}' {self.identity()[name]!r}")

    def kept_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    # Hooks

    def _hook(self) -> None:
        """Puts our hooks into the model, for good."""
        base, recipe = self.anatomy.base, self.recipe
        self.backbone.set_attn_implementation(foreign.NAME)
        base.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        if self.anatomy.rotary is not None:
            self.anatomy.rotary.register_forward_hook(self._note_tables)
        if recipe.changes_layers:
            for layer in self.config.memory_layer_indices:
                self.anatomy.layers[layer].register_forward_hook(functools.partial(self._after_layer, layer),
                                                                 with_kwargs=True)
        if recipe.watches:
            for number, module in enumerate(self.anatomy.layers):
                module.register_forward_hook(functools.partial(self._watched, number), with_kwargs=True)
        if recipe.changes_model:
            base.register_forward_hook(self._after_model)
        if recipe.changes_head:
            self.backbone.get_output_embeddings().register_forward_hook(self._after_head)

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current = self._pass
        if current is None or foreign.PASS in current.notes:  # the model is called in transformers' way
            current = self._pass_of_call(args, kwargs)
        current.notes[foreign.PASS] = True
        current.attend = functools.partial(self._attend, current)
        self._running = current
        return args, {**kwargs, foreign.PASS: current}

    def _pass_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        ids = args[0] if args else kwargs.get("input_ids")
        given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        B, T = given.shape[:2]
        mask = kwargs.get("attention_mask")
        valid_BT = torch.ones(B, T, dtype=torch.bool, device=given.device)
        if mask is not None and mask.dim() == 2:
            valid_BT = mask[:, -T:].bool()
        return Pass(self._retrievers, self._namespaces_of(B, given.device), None, valid_BT)

    def _note_tables(self, module: nn.Module, args: Any, tables: tuple[Tensor, Tensor]) -> None:
        self._running.tables = tables

    def _after_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                     hidden_BTD: Tensor) -> Tensor:
        given = [*args, *kwargs.values()]
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        cache = foreign.cache_in(given)
        B, T, _ = hidden_BTD.shape
        keys = T if mask is None else mask.shape[-1]
        seen = seen_of(mask, rows=B, queries=T, keys=keys, device=hidden_BTD.device)
        return self.recipe.after_layer(layer, hidden_BTD, kwargs[foreign.PASS], LayerCall(seen, cache))

    def _watched(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 hidden_BTD: Tensor) -> None:
        self.recipe.watched(layer, args, kwargs, hidden_BTD, kwargs[foreign.PASS])

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self.recipe.after_model(output.last_hidden_state, self._running)
        return output

    def _after_head(self, module: nn.Module, args: Any, logits_BTX: Tensor) -> Tensor:
        return self.recipe.after_head(logits_BTX, self._running)

    def _attend(self, current: Pass, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
                scaling: float, dropout: float = 0.0, sliding_window: int | None = None, **others: Any) -> Tensor:
        """One layer's attention: over the window, the carried row and what the memory holds. [B, T, heads, D]."""
        layer, (B, _, T, _) = module.layer_idx, query.shape
        dropout = dropout if self.config.train_backbone else 0.0
        if mask is not None:  # a room in a cache holds all keys, also where the model's own layers keep a sliding window
            key, value = key[:, :, -mask.shape[-1]:], value[:, :, -mask.shape[-1]:]
        seen = seen_of(mask, rows=B, queries=T, keys=key.shape[2], device=query.device)
        if current.state is not None:
            own = self.anatomy.rotate(key, current.tables, back=True).detach()
            current.own.setdefault(layer, (own, value.detach()))
            if current.state.key and not self._at_once:
                row_key, row_value, row_seen = self._row(current, layer, T, sliding_window)
                key, value = torch.cat([row_key.to(key), key], dim=2), torch.cat([row_value.to(value), value], dim=2)
                seen = torch.cat([row_seen, seen], dim=-1)
        found = None
        if self.recipe.joins_attention and layer in self.config.memory_layer_indices:
            unrotated = self.anatomy.rotate(query, current.tables, back=True)
            found = self.recipe.recall(layer, unrotated, current, scaling=scaling)
        if found is None:
            mixed = foreign.plain(module, query, key, value, seen, scaling=scaling, dropout=dropout)[0]
            if layer < self.anatomy.sizes["num_layers"]:
                return mixed
            unrotated = self.anatomy.rotate(query, current.tables, back=True)
            mixed = self.recipe.after_attention(layer, unrotated, mixed.transpose(1, 2), current)
            return mixed.transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):
            own_value, own_lse = attend_own(query, key, value, seen, scaling=scaling, dropout=dropout)
            merged, share = merge_partials([own_value, found[0]], [own_lse, found[1]])
        self.recipe.joined(layer, share[1].detach(), current)
        return merged.to(query.dtype).transpose(1, 2)

    def _row(self, current: Pass, layer: int, length: int, sliding_window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The carried row of a layer as keys at their places, values, and who sees them."""
        state: Any = current.state
        key_BHMD, count_B = state.key[layer], state.count_B
        place_M = torch.arange(key_BHMD.shape[2], device=key_BHMD.device)
        seen_BTM = (place_M < count_B[:, None])[:, None].expand(-1, length, -1)
        if sliding_window is not None:
            place_BT1 = (count_B[:, None] + torch.arange(length, device=count_B.device))[..., None]
            seen_BTM = seen_BTM & (place_BT1 - place_M < sliding_window)
        if current.row_tables is None and self.anatomy.rotary is not None:
            current.row_tables = self.anatomy.tables(place_M[None], key_BHMD)
        return self.anatomy.rotate(key_BHMD, current.row_tables), state.value[layer], seen_BTM[:, None]

    # Reading in our way

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, targets_BT: Tensor | None = None,
                state: Any = None, reset_B: Tensor | None = None, namespace_B: Tensor | None = None,
                document_B: Tensor | None = None, valid_BT: Tensor | None = None,
                piece_BT: Tensor | None = None) -> LMCODEOutput:
        """Reads one window of each stream; see `MemoryLM.forward` for the arguments.

        Raises:
            ValueError: for arguments that cannot be, and for documents that share a window.
        """
        self._check(input_ids, labels, targets_BT, valid_BT, piece_BT)
        (B, T), device = input_ids.shape, input_ids.device
        state = self.blank_state(B, device=device) if state is None else state
        if reset_B is not None:
            state = state._replace(count_B=state.count_B.masked_fill(reset_B, 0),
                                   pending_valid_B=state.pending_valid_B & ~reset_B)
        namespace_B = torch.arange(B, device=device) if namespace_B is None else namespace_B
        seen_BT = torch.ones_like(input_ids, dtype=torch.bool) if valid_BT is None else valid_BT
        current = Pass(self._retrievers, namespace_B, document_B, seen_BT, reset_B, state, self._at_once, input_ids)
        logits_BTX = self._run(current, input_ids)
        loss = token_loss_BT = None
        target_BT = aligned_targets(labels, targets_BT, valid_BT)
        if target_BT is not None:
            loss, token_loss_BT = self._with_auxiliary(current, target_BT, *next_token_loss(logits_BTX, target_BT))
        known_BT = (torch.zeros(B, T, dtype=torch.float32, device=device) if token_loss_BT is None
                    else token_loss_BT.detach())
        window = Window(namespace_B, state.pending_valid_B, reset_B, valid_BT)
        surprise_BT, pending_surprise_B = surprises(known_BT, window, state)
        memory, after = self._after(current, surprise_BT, pending_surprise_B)
        return LMCODEOutput(logits_BTX, loss, token_loss_BT, after, memory)  # type: ignore[arg-type]  # its own state

    def _with_auxiliary(self, current: Pass, target_BT: Tensor, loss: Tensor,
                        token_loss_BT: Tensor) -> tuple[Tensor, Tensor]:
        """In training: losses of the same value that have the gradient of the recipe's own loss, too, at counted tokens."""
        own_BT = self.recipe.auxiliary(current) if self.training and torch.is_grad_enabled() else None
        if own_BT is None:
            return loss, token_loss_BT
        counted_BT = target_BT != IGNORED
        silent_BT = (own_BT - own_BT.detach()).where(counted_BT, 0.0)
        return loss + silent_BT.sum() / counted_BT.sum().clamp(min=1), token_loss_BT + silent_BT

    def _run(self, current: Pass, input_ids: Tensor) -> Tensor:
        """The logits of the backbone over a window at the places behind the carried row."""
        if self._recomputes != self.activation_checkpointing:
            self._recomputes = self.activation_checkpointing
            foreign.recompute(self.backbone, self._recomputes)
        begin_B = current.state.count_B if current.state is not None and not self._at_once else current.namespace_B * 0
        place_BT = begin_B[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        self._pass = current
        try:
            logits: Tensor = self.backbone(input_ids=input_ids, attention_mask=current.valid_BT.long(),
                                           position_ids=place_BT, use_cache=False).logits
        finally:
            self._pass = None
        return logits

    @torch.no_grad()
    def _after(self, current: Pass, surprise_BT: Tensor,
               pending_surprise_B: Tensor) -> tuple[dict[int, LayerMemory], Carried]:
        """What the layers with a memory did and offer, and what the streams carry on."""
        state: Any = current.state
        length_B, T = current.valid_BT.sum(dim=1), surprise_BT.shape[1]
        places = 0 if self._at_once else self.places
        sinks = min(self.options.sinks, places)
        count_B = state.count_B if places else torch.zeros_like(state.count_B)
        row_BM = state.surprise_BM[:, :places]
        moved = moves(count_B, length_B, sinks=sinks, places=places, window=T)
        both_BX = torch.cat([row_BM, surprise_BT], dim=1)
        memory: dict[int, LayerMemory] = {}
        keys, values = [], []
        for layer in range(self.rows):
            key_BHTD, value_BHTD = current.own[layer]
            row = (state.key[layer], state.value[layer]) if places else (key_BHTD[:, :, :0], value_BHTD[:, :, :0])
            if places:
                keys.append(pick(row[0], key_BHTD, moved.kept_BM))
                values.append(pick(row[1], value_BHTD, moved.kept_BM))
            if layer in self.config.memory_layer_indices:
                left = Left(pick(row[0], key_BHTD, moved.left_BT), pick(row[1], value_BHTD, moved.left_BT),
                            both_BX.gather(1, moved.left_BT), moved.left_valid_BT)
                candidates = self.recipe.offered(layer, current, left, surprise_BT)
                memory[layer] = self._layer_memory(current, layer, candidates)
        any_B = current.valid_BT.any(dim=1) | state.pending_valid_B
        if not places:
            keys, values, kept_BM = list(state.key), list(state.value), state.surprise_BM
        else:
            kept_BM = both_BX.gather(1, moved.kept_BM)
        after = Carried(tuple(keys), tuple(values), moved.kept_B, kept_BM, self.recipe.next_state(current), any_B,
                        pending_surprise_B)
        return memory, after

    def _layer_memory(self, current: Pass, layer: int, candidates: Any) -> LayerMemory:
        tape = current.tape(layer)
        parts: Any = (tape.hits, tape.gate_BT, tape.share_HN, tape.null_share_HN)
        if any(part is None for part in parts):
            raise ValueError(f"a recipe must read the memory of layer {layer} in a pass: it has recorded nothing")
        hits, gate_BT, share_HN, null_share_HN = parts
        return LayerMemory(hits._replace(credit_HN=tape.credit_HN), candidates, gate_BT, share_HN, null_share_HN)

    @property
    def places(self) -> int:
        """M, the tokens that a stream carries."""
        return int(self.options.sinks + self.options.cache)

    @property
    def rows(self) -> int:
        """The layers that a stream carries tokens of: the backbone's, then the recipe's own."""
        return self.anatomy.sizes["num_layers"] + self.recipe.own_layers

    def blank_state(self, num_streams: int, *, device: torch.device | None = None) -> Carried:
        B, sizes, M = num_streams, self.anatomy.sizes, self.places
        row_BHMD = torch.zeros(B, sizes["kv_heads"], M, sizes["head_dim"], device=device)
        rows = (row_BHMD,) * (self.rows if M else 0)
        return Carried(rows, rows, torch.zeros(B, dtype=torch.int64, device=device), torch.zeros(B, M, device=device),
                       self.recipe.blank_state(B, device), torch.zeros(B, dtype=torch.bool, device=device),
                       torch.zeros(B, device=device))

    def _check(self, input_ids: Tensor, labels: Tensor | None, targets_BT: Tensor | None, valid_BT: Tensor | None,
               piece_BT: Tensor | None) -> None:
        if piece_BT is not None:
            raise ValueError("documents cannot share a window that a backbone reads: set data.packing=false")
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or 0 in input_ids.shape:
            raise ValueError("input_ids must be integer [B, T] with at least one token: got "
                             f"{input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.shape[1] > self.config.context_length:
            raise ValueError(f"input_ids must have at most context_length = {self.config.context_length} tokens, to leave "
                             f"room for {self.places} carried ones: got {input_ids.shape[1]}")
        if labels is not None and targets_BT is not None:
            raise ValueError("give labels (shifted here) or targets (already aligned), not both")
        if valid_BT is not None and bool((valid_BT[:, 1:] & ~valid_BT[:, :-1]).any()):
            raise ValueError("padding must trail: valid_BT has a True after a False")

    # Retrievers, namespaces

    def set_retrievers(self, retrievers: Mapping[int, Retriever]) -> None:
        known = self.config.memory_layer_indices
        for layer in retrievers:
            if layer not in known:
                raise ValueError(f"a retriever belongs to a memory layer, one of {known}: got layer {layer}")
        self._retrievers = {layer: retrievers.get(layer, NullRetriever(self.config.memory_top_k)) for layer in known}

    @contextmanager
    def reading_from(self, retrievers: Mapping[int, Retriever]) -> Iterator[None]:
        former = self._retrievers
        self.set_retrievers(retrievers)
        try:
            yield
        finally:
            self._retrievers = former

    @contextmanager
    def storing(self) -> Iterator[None]:
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def namespace(self, namespace: Namespace | Sequence[Namespace] | Tensor) -> Iterator[None]:
        """What calls in transformers' way read inside the block: a namespace, or one for each row; 0 otherwise."""
        former, self._namespaces = self._namespaces, namespace
        try:
            yield
        finally:
            self._namespaces = former

    def _namespaces_of(self, rows: int, device: torch.device) -> Tensor:
        given: Any = self._namespaces
        if isinstance(given, Tensor):
            given = given.tolist()
        if isinstance(given, str) or not isinstance(given, Sequence):
            return torch.full((rows,), namespace_number(given), dtype=torch.int64, device=device)
        if len(given) != rows:
            raise ValueError(f"namespaces must be one, or one for each row: got {len(given)} for {rows} rows (beams and "
                             "several returned sequences make rows of their own)")
        return torch.tensor([namespace_number(one) for one in given], dtype=torch.int64, device=device)

    # Writing text

    @torch.no_grad()
    @without_autocast()
    def generate(self, input_ids: Prompts, *settings: Any, max_length: int | None = None, temperature: float = 0.8,
                 top_k: int = 50, top_p: float = 0.9, max_new_tokens: int | None = None, repetition_penalty: float = 1.0,
                 no_repeat_ngram_size: int = 0, eos_id: int | None = None, seed: int | None = None,
                 attention_mask: Tensor | None = None,
                 namespace: Namespace | Sequence[Namespace] | Tensor | None = None,
                 on_token: Callable[[Tensor], None] | None = None, **others: Any) -> Tensor:
        """Continues prompts, reading the banks, with the model's own cache: see `LMCODE.generate`. A collective.

        Raises:
            ValueError: as there; for what a backbone does not have (`write_memory`, `state`), and for more tokens than it
                has positions.
        """
        if settings or others:
            raise ValueError(f"generate with a backbone has no such setting: got {settings or tuple(others)}")
        check_same(self.group, "generate", str(input_ids), str(namespace), max_length, max_new_tokens, seed)
        decoding = Decoding(max_length=max_length, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, repetition_penalty=repetition_penalty, eos_id=eos_id, seed=seed,
                            no_repeat_ngram_size=no_repeat_ngram_size)
        device = next(self.parameters()).device
        ids_BT, valid_BT = padded_prompts(input_ids, attention_mask, decoding, device=device)
        new, most = decoding.num_new_tokens(ids_BT.shape[1]), self.anatomy.sizes["positions"]
        if ids_BT.shape[1] + new > most:
            raise ValueError(f"prompt and new tokens must not exceed the backbone's {most} positions: got "
                             f"{ids_BT.shape[1]} + {new}")
        with in_eval_mode(self), self.namespace(range(len(ids_BT)) if namespace is None else namespace):
            return self._write(ids_BT, valid_BT, decoding, new, on_token)

    def _write(self, ids_BT: Tensor, valid_BT: Tensor, decoding: Decoding, new: int,
               on_token: Callable[[Tensor], None] | None) -> Tensor:
        """`generate` token by token; all ranks take the tokens that rank 0 draws."""
        generator = None if decoding.seed is None else torch.Generator(ids_BT.device).manual_seed(decoding.seed)
        rows = [ids_T[valid_T].tolist() for ids_T, valid_T in zip(ids_BT, valid_BT, strict=True)]
        past, name = foreign.new_cache(self.backbone), foreign.cache_name(self.backbone)
        given_BT, live_B = ids_BT, torch.ones(len(rows), dtype=torch.bool, device=ids_BT.device)
        while new > 0 and bool(live_B.any()):
            place_BT = (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0)[:, -given_BT.shape[1]:]
            logits_BX = self.backbone(input_ids=given_BT, attention_mask=valid_BT.long(), position_ids=place_BT,
                                      use_cache=True, **{name: past}).logits[:, -1]
            token_B = self.group.all_gather(next_token(logits_BX, rows, decoding, generator), phase="tokens")[:len(rows)]
            if decoding.eos_id is not None:
                token_B = token_B.where(live_B, decoding.eos_id)
                live_B = live_B & (token_B != decoding.eos_id)
            for row, token in zip(rows, token_B.tolist(), strict=True):
                row.append(token)
            if on_token is not None:
                on_token(token_B)
            given_BT = token_B[:, None]
            ids_BT = torch.cat([ids_BT, given_BT], dim=1)
            valid_BT = torch.cat([valid_BT, torch.ones_like(valid_BT[:, :1])], dim=1)
            new -= 1
        return ids_BT

    @torch.no_grad()
    @without_autocast()
    def write_on(self, prompts: Prompts, decoding: Decoding, *, window: int, commit: Callable[[Any], None],
                 agree: Callable[[Tensor], Tensor]) -> Generation:
        """Continues prompts window by window, each token then a window of its own: what lies behind the carried row reaches
        the model through its memory alone."""
        device = next(self.parameters()).device
        ids_BT, valid_BT = padded_prompts(prompts, None, decoding, device=device)
        rows = [ids_T[valid_T].tolist() for ids_T, valid_T in zip(ids_BT, valid_BT, strict=True)]
        generator = None if decoding.seed is None else torch.Generator(device).manual_seed(decoding.seed)
        parts = [[row[start:start + window] for row in rows] for start in range(0, max(map(len, rows)), window)]
        live_B = torch.ones(len(rows), dtype=torch.bool, device=device)
        state: Any = None
        last_BX: Any = None
        new = decoding.num_new_tokens(ids_BT.shape[1])
        with in_eval_mode(self):
            while True:
                for part in parts:
                    output, last_BX = self._read_part(part, state, last_BX)
                    state = output.state
                    commit(output)
                if new == 0 or not bool(live_B.any()):
                    return Generation(ids_BT, valid_BT, state)
                token_B = agree(next_token(last_BX, rows, decoding, generator))
                if decoding.eos_id is not None:
                    token_B = token_B.where(live_B, decoding.eos_id)
                ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
                valid_BT = torch.cat([valid_BT, live_B[:, None]], dim=1)
                parts = [[[token] if live else [] for token, live in zip(token_B.tolist(), live_B.tolist(), strict=True)]]
                for row, token in zip(rows, token_B.tolist(), strict=True):
                    row.append(token)
                if decoding.eos_id is not None:
                    live_B = live_B & (token_B != decoding.eos_id)
                new -= 1

    def _read_part(self, part: list[list[int]], state: Any, last_BX: Tensor | None) -> tuple[Any, Tensor]:
        """One window of streams that may have different lengths, and the logits behind the last token of each."""
        device, longest = next(self.parameters()).device, max(map(len, part))
        ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part], device=device)
        count_B = torch.tensor([len(row) for row in part], device=device)
        output = self(ids_BT, state=state, valid_BT=torch.arange(longest, device=device) < count_B[:, None])
        logits_BX = output.logits[torch.arange(len(part), device=device), (count_B - 1).clamp(min=0)]
        return output, logits_BX if last_BX is None else torch.where((count_B > 0)[:, None], logits_BX, last_BX)

    def save_pretrained(self, save_directory: str | Path, *, include_memory: bool = True) -> None:
        """Writes what was trained, the banks, and which backbone it was, into a folder: see `LMCODE.save_pretrained`."""
        check_same(self.group, "save_pretrained", str(save_directory), include_memory)
        pretrained.write(self, Path(save_directory).absolute(), include_memory=include_memory)
