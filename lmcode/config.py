"""The settings of a run: frozen pydantic models, read from YAML, changed by dotted overrides.

A run is described by one `RunConfig` with five sections (`model`, `memory`, `data`, `train`, `eval`). Nothing else in the
project holds settings, and a section is handed on whole. Unknown keys are refused with the nearest known name, and
combinations that cannot work are refused here, before any rank starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

# What a setting may name besides its other values, and where that is, "module:name". Who adds a line can choose it.
TIERS = {"exact": "lmcode.memory.search.exact:ExactTier", "faiss-flat": "lmcode.memory.search.flat:FlatTier",
         "ivf": "lmcode.memory.search.ivf:IvfTier", "hnsw": "lmcode.memory.search.hnsw:HnswTier"}
EVICTIONS = {name: f"lmcode.memory.evict:{name}" for name in ("clock", "fifo", "lru", "oldest", "importance", "random")}
RECIPES = {"camelot": "lmcode.recipes.camelot:Camelot", "knn": "lmcode.recipes.knn:KnnLM",
           "lmcode": "lmcode.recipes.own_read:OwnRead",
           "longmem": "lmcode.recipes.longmem:LongMem", "memorag": "lmcode.recipes.memorag:MemoRAG",
           "mplus": "lmcode.recipes.mplus:MPlus"}
FAISS_GPU_MAX_K = 2048  # largest k of GPU FAISS without cuVS; kept on every machine so that a config is portable


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that states the rule, what was expected and what came."""


def near_match(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


Made = TypeVar("Made", bound="Section")


def name_in(table: Mapping[str, str], *others: str) -> AfterValidator:
    """For a setting that is a key of `table`, whatever it then holds, or one of `others`."""
    def check(name: str) -> str:
        if name not in (known := (*others, *table)):
            raise ValueError(f"must be one of {', '.join(map(repr, known))}: got '{name}'.{near_match(name, known)}")
        return name
    return AfterValidator(check)


class Section(BaseModel):
    """Base of every section: immutable, typed, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key '{key}' in {cls.__name__}.{near_match(str(key), cls.model_fields)}")
        return values


class LMCODEConfig(Section):
    """Shape of the model. Sizes are counts or widths; capital letters are those of `protocol` (H heads, D width)."""

    backbone: str = Field("lmcode", description="kind of model, a name in lmcode.opening.BACKBONES; or the folder of a "
                          "transformers model, from which the sizes are taken")
    recipe: str | None = Field(None, description="how the memory enters a backbone of transformers, a name in RECIPES")
    recipe_options: dict[str, Any] = Field({}, description="settings of the recipe alone: see lmcode/recipes/README.md")
    train_backbone: bool = Field(False, description="train the weights of a backbone of transformers, too")
    vocab_size: int = Field(50257, ge=2)
    hidden_size: int = Field(512, ge=8, description="width of the residual stream")
    num_layers: int = Field(6, ge=1)
    num_heads: int = Field(8, ge=1)
    feed_forward_size: int | None = Field(None, ge=1, description="inner width; 4 x hidden_size when None")
    context_length: int = Field(1024, ge=2, description="most tokens of one stream in one forward pass")
    positions: Literal["rotary", "learned"] = "rotary"
    cache_windows: int = Field(0, ge=0, description="windows of context_length tokens before its own that attention sees, "
                               "too, within the document (a Transformer-XL cache)")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    short_term_memory_size: int = Field(512, ge=0, description="slots per stream and layer; 0 leaves the module out")
    short_term_dim: int = Field(64, ge=1, description="width of a short-term slot")
    short_term_segment: int = Field(64, ge=1, description="tokens between two writes of the short-term memory")
    memory_update_rate: float = Field(0.1, gt=0.0, le=1.0, description="eta: most of a slot that one write replaces")

    long_term_memory_slots: int = Field(10000, ge=0, description="slots of one layer's bank over all ranks; 0 = no bank")
    memory_layers: Literal["all"] | tuple[int, ...] = Field("all", description="layers that have a long-term memory")
    memory_heads: int = Field(2, ge=1, description="H, heads of the long-term read")
    memory_head_dim: int = Field(64, ge=1, description="D, width of a memory key and value")
    memory_top_k: int = Field(32, ge=1, le=FAISS_GPU_MAX_K, description="K, hits per query and head")
    memory_temperature: float = Field(7.389, gt=0.0, description="initial factor on the cosine of query and key")
    memory_bias: float = Field(-4.0, description="initial logit bias on retrieved entries; learned per head")
    memory_key_tokens: int = Field(0, ge=0, description="last tokens whose embeddings join the layer's state in keys and "
                                   "queries")
    memory_values: Literal["state", "token"] = Field("state", description="what an entry's value is made from: the layer's "
                                                     "state at its token, or the embedding of the token alone")
    successor_values: bool = Field(True, description="an entry's value comes from the token after its key's token")
    retrieval_stride: int = Field(1, ge=1, description="tokens that share one retrieval")

    @model_validator(mode="after")
    def _check(self) -> LMCODEConfig:
        if self.recipe is not None and self.backbone == "lmcode":
            raise ValueError("model.recipe belongs to a model.backbone that is the folder of a transformers model: got "
                             f"'{self.recipe}' and no backbone")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads: {self.hidden_size} % {self.num_heads} != 0")
        if self.positions == "rotary" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError("rotary positions need an even head width: "
                             f"hidden_size / num_heads = {self.hidden_size // self.num_heads}")
        if self.cache_windows and self.positions != "rotary":
            raise ValueError(f"cache_windows needs relative positions, positions=rotary: got '{self.positions}'")
        if self.memory_layers != "all":
            for layer in self.memory_layers:
                if not 0 <= layer < self.num_layers:
                    raise ValueError(f"memory_layers must lie in 0..{self.num_layers - 1}: got {layer}")
            if len(set(self.memory_layers)) != len(self.memory_layers):
                raise ValueError(f"memory_layers must not repeat: got {self.memory_layers}")
        if self.long_term_memory_slots and self.memory_top_k > self.long_term_memory_slots:
            raise ValueError(f"memory_top_k must not exceed long_term_memory_slots: "
                             f"{self.memory_top_k} > {self.long_term_memory_slots}")
        return self

    @property
    def reads_embeddings(self) -> bool:
        """Whether keys or values are made from the tokens' embeddings, too."""
        return self.memory_key_tokens > 0 or self.memory_values == "token"

    @property
    def cache_tokens(self) -> int:
        """L, tokens of the cache of `cache_windows`."""
        return self.cache_windows * self.context_length

    @property
    def memory_layer_indices(self) -> tuple[int, ...]:
        """Layers with a long-term read, ascending (the read stays, with its local part, when there is no bank)."""
        return tuple(range(self.num_layers)) if self.memory_layers == "all" else tuple(sorted(self.memory_layers))


class MemoryConfig(Section):
    """How a bank stores, searches, exchanges and forgets. The number of slots is `model.long_term_memory_slots`."""

    virtual_shards: int = Field(16, ge=1, description="S, units of placement and storage; changed by "
                                "'lmcode memory reshard' only")
    group_size: int = Field(0, ge=0, description="consecutive ranks of a memory group: the bank is sliced inside a group "
                            "and replicated between groups; 0: all ranks are one group")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="storage of keys and values")
    tier: Annotated[str, name_in(TIERS, "auto")] = Field("auto", json_schema_extra={"enum": ["auto", *TIERS]})
    fetch: Literal["sums", "rows"] = Field("sums", description="phase 4 of the read protocol")
    exchange: Literal["all_gather", "all_to_all", "auto"] = Field("auto", description="phase 3")
    scope: Literal["document", "global"] = Field("document", description="which entries a query may see")
    write: Literal["all", "every_nth", "surprise"] = Field("all", description="which tokens become entries")
    write_every: int = Field(4, ge=1, description="n of write=every_nth")
    write_share: float = Field(0.25, gt=0.0, le=1.0, description="share of tokens that write=surprise keeps")
    value_store: Literal["device", "host", "mmap"] = Field("device", description="where values lie: beside the keys, in "
                                                           "host memory, or in a working file on disk")
    value_folder: str | None = Field(None, description="folder for the working files of value_store=mmap; that for "
                                     "temporary files when None")
    eviction: Annotated[str, name_in(EVICTIONS)] = Field("clock", json_schema_extra={"enum": [*EVICTIONS]},
                                                         description="who makes room for newcomers: the first in, with a "
                                                         "second chance for the important (clock) or without (fifo), the "
                                                         "least recently hit or written, the least important, or anybody")
    second_chance_importance: float = Field(1.5, gt=0.0, description="from here on the clock passes an entry over once; "
                                            "surprise alone does not reach 1.5")
    importance_weight: float = Field(0.25, ge=0.0, description="factor on log-importance in an entry's score")
    importance_growth: float = Field(0.25, ge=0.0, description="importance gained per unit of attention received: the whole "
                                     "softmax of one token and head")
    consolidation_threshold: float = Field(0.1, gt=0.0, le=2.0, description="cosine distance below which entries of a "
                                           "namespace merge, every train.memory_consolidation_interval steps")
    merge_above: float | None = Field(None, gt=0.0, lt=1.0, description="mean cosine of keys above which a newcomer joins "
                                      "the nearest entry of its text instead of taking a slot; null: none does")
    merge_keep: Literal["mean", "newest"] = Field("mean", description="what an entry becomes that newcomers join: the mean "
                                                  "of its parts, or the newest; then only the last of similar candidates "
                                                  "of one text and step is written")
    max_norm: float = Field(100.0, gt=0.0, description="longer values are scaled down to this length")
    experience_slots: int = Field(16384, ge=1, description="experiences that a model holds over all ranks")
    recall_queries: int = Field(64, ge=0, description="queries per logged step, of all ranks, that are checked against "
                                "exact search")
    recall_target: float = Field(0.95, gt=0.0, le=1.0, description="share of the exact hits that an approximate tier is to "
                                 "find; below it more lists are probed, centroids trained, or search is exact again")

    @model_validator(mode="before")
    @classmethod
    def _read_as_meant(cls, values: Any) -> Any:
        """Whole settings that an earlier version saved say 'fifo' for what is the clock; they know no value_store."""
        if isinstance(values, Mapping) and values.get("eviction") == "fifo" and "value_store" not in values and (
                "second_chance_importance" in values):
            return {**values, "eviction": "clock"}
        return values

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.group_size > self.virtual_shards:
            raise ValueError("memory.virtual_shards must be at least memory.group_size: "
                             f"{self.virtual_shards} < {self.group_size}")
        return self

    @property
    def newest_above(self) -> float | None:
        """The similarity of keys above which the later of two entries is the one that counts; None: both do."""
        return self.merge_above if self.merge_keep == "newest" else None

    def ranks_per_group(self, ranks: int) -> int:
        """The ranks of one memory group among `ranks`: all of them where groups of `group_size` do not share them out.

        So what was trained with groups can be opened by any number of ranks; a run is refused by `check_world_size`.
        """
        return ranks if self.group_size == 0 or ranks % self.group_size else self.group_size


class TextConfig(Section):
    """Documents, and which of them are held out."""

    path: str | None = Field(None, description="file, folder or glob of text, source code, JSON lines or Parquet, also "
                             "compressed")
    hf: str | None = Field(None, description="Hugging Face dataset, 'name' or 'name:config:split'")
    held_out: str | None = Field(None, description="file, folder or glob of the documents to hold out; 'share': whatever "
                                 "held_out_share takes, even where files are called valid or test")
    exclude: tuple[str, ...] = Field((), description="patterns of files and folders to leave out")
    text_field: str = Field("text", description="field of a JSON row, Parquet row or dataset row that holds the text")
    document_separator: str | None = Field("<|endoftext|>", min_length=1, description="a line of a text file between two "
                                           "documents; null: a text file is one document")

    @property
    def place(self) -> str:
        """Where these settings stand, for a message."""
        return "data"

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> TextConfig:
        if self.path is not None and self.hf is not None:
            raise ValueError("give either path or hf, not both")
        return self


class SourceConfig(TextConfig):
    """One of several places that text comes from."""

    name: str = Field(pattern=r"^[\w.-]+$", description="what its metrics are called after")
    weight: float = Field(1.0, gt=0.0, allow_inf_nan=False, description="its share of the tokens is proportional to this")

    @property
    def place(self) -> str:
        return f"data.sources.{self.name}"

    @model_validator(mode="after")
    def _some_place(self) -> SourceConfig:
        if self.path is None and self.hf is None:
            raise ValueError(f"the source '{self.name}' needs a path or hf")
        return self


class DataConfig(TextConfig):
    """Where text comes from. With neither `path` nor `hf` the corpus is the Python standard library's own source."""

    sources: tuple[SourceConfig, ...] = Field((), description="several places, mixed by weight; instead of path and hf")
    packing: Literal[True, False, "auto"] = Field("auto", description="short documents share a window; 'auto': where more "
                                                  "than 3 % of the positions would be padding")
    tokenizer: str = Field("bpe", description="'bytes', 'bpe' (trained on the corpus), or a tokenizers JSON / folder")
    held_out_share: float = Field(0.03, gt=0.0, lt=1.0, description="share of documents kept for evaluation (of the text, "
                                  "at its end, where it is one text file); without effect if held_out names some")
    min_document_tokens: int = Field(2, ge=2, description="shorter documents are left out and counted")
    cache: str | None = Field(None, description="folder for tokenized corpora; the run folder's parent when None")

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        if not self.sources:
            return self
        for name in ("path", "hf", "held_out", "exclude", "text_field", "document_separator"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"with data.sources, each source has its own {name}: leave data.{name} out, or set "
                                 "data.sources=[]")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources must have different names: got {', '.join(names)}")
        return self


class TrainConfig(Section):
    """The optimisation. `learning_rate`, `weight_decay`, `gradient_clip`, `memory_consolidation_interval`, `warmup_steps`
    and `total_steps` keep the meaning they have in the original README."""

    learning_rate: float = Field(1e-4, gt=0.0)
    min_learning_rate: float = Field(0.1, ge=0.0, le=1.0, description="share of the peak that the decay ends at")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field("cosine", description="the rate after the warm-up; "
                                                                     "wsd: the peak, and a decay at the end")
    decay_share: float = Field(0.1, gt=0.0, le=1.0, description="share of total_steps in which wsd decays")
    weight_decay: float = Field(0.01, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = Field(1.0, ge=0.0, description="largest global gradient norm; 0 does not clip")
    warmup_steps: int = Field(1000, ge=0)
    total_steps: int = Field(10000, ge=1)
    streams: int = Field(32, ge=1, description="documents read side by side in one step, over all ranks")
    sequence_length: int = Field(256, ge=2, description="tokens that one stream advances in one step")
    gradient_accumulation_steps: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    deepspeed: str = Field("zero2", description="name of a file in ds_configs/ or a path")
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(("tensorboard",), description="where metrics go "
                                                                          "beside metrics.jsonl")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves at the end only")
    max_skipped_steps: int = Field(20, ge=1, description="steps in a row with a refused update that end the run")
    save_total_limit: int = Field(2, ge=1)
    memory_consolidation_interval: int = Field(0, ge=0, description="steps between consolidations; 0 never")
    memory_sample_ratio: float = Field(0.0, ge=0.0, lt=1.0, description="share of the batch that is replayed from stored "
                                       "spans")
    replay_sampler: Literal["importance", "uniform", "recent"] = Field("importance", description="how spans are drawn")
    replay_slots: int = Field(2048, ge=1, description="spans (windows that were trained on) kept for replay")
    heartbeat_s: float = Field(30.0, ge=0.0, description="seconds; a rank without heartbeat or progress for two of these is "
                               "named and ends the job; 0 switches the watch off")
    profile_steps: str | None = Field(None, pattern=r"^[1-9]\d*:[1-9]\d*$", description="'10:12': a trace of these steps "
                                      "in the run folder's profile/ (in quotes in a YAML file)")
    peak_tflops: float | None = Field(None, gt=0.0, description="10^12 operations a second that a rank's processor can do; "
                                      "perf/mfu is the share of it that the model uses")
    run_dir: str | None = Field(None, description="the run folder; runs/<preset>-<time> when None")
    init_from: str | None = Field(None, description="run, checkpoint or saved model whose weights a new run starts from; "
                                  "--init-from takes its shape and tokenizer, too")
    init_memory: bool = Field(False, description="with what the model of init_from remembers")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.streams % self.gradient_accumulation_steps:
            raise ValueError("train.streams must be a multiple of train.gradient_accumulation_steps: "
                             f"{self.streams} % {self.gradient_accumulation_steps} != 0")
        first, _, last = (self.profile_steps or "1:1").partition(":")
        if int(first) > int(last):
            raise ValueError(f"train.profile_steps must not end before it begins: got {self.profile_steps}")
        return self


class EvalConfig(Section):
    """Held-out evaluation: its own streams and its own bank, so that measuring changes nothing."""

    every: int = Field(500, ge=0, description="steps between evaluations; 0 evaluates at the end only")
    streams: int = Field(32, ge=1, description="held-out documents read side by side, over all ranks")
    windows: int = Field(16, ge=1, description="windows that each stream reads in a periodic evaluation")
    final_windows: int = Field(64, ge=1, description="the same for the evaluation that ends a run")
    slots: int | None = Field(None, ge=1, description="slots of the evaluation bank; those of the model when None")


class RunConfig(Section):
    """Everything that decides what a run computes; the run folder's config.yaml is this, resolved."""

    preset: str = "custom"
    model: LMCODEConfig = LMCODEConfig()
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        slots, shards = self.model.long_term_memory_slots, self.memory.virtual_shards
        if slots and slots < shards:
            raise ValueError("model.long_term_memory_slots must be at least memory.virtual_shards: "
                             f"{slots} < {shards}")
        if slots and self.memory.experience_slots < shards:
            raise ValueError("memory.experience_slots must be at least memory.virtual_shards: "
                             f"{self.memory.experience_slots} < {shards}")
        if slots and self.eval.slots is not None and self.eval.slots < shards:
            raise ValueError(f"eval.slots must be at least memory.virtual_shards: {self.eval.slots} < {shards}")
        if self.train.sequence_length > self.model.context_length:
            raise ValueError("train.sequence_length must not exceed model.context_length: "
                             f"{self.train.sequence_length} > {self.model.context_length}")
        if self.train.sequence_length % self.model.retrieval_stride:
            raise ValueError("train.sequence_length must be a multiple of model.retrieval_stride: "
                             f"{self.train.sequence_length} % {self.model.retrieval_stride} != 0")
        if self.memory.scope == "global" and self.eval.slots not in (None, slots):
            raise ValueError("eval.slots must be left out with memory.scope=global, where an evaluation reads a copy of the "
                             f"bank: got {self.eval.slots}")
        return self

    def check_trains(self) -> None:
        """Refuses settings that are for memories which are read and not written.

        Raises:
            ConfigError: for memory.tier=hnsw.
        """
        if self.memory.tier == "hnsw" and self.model.long_term_memory_slots:
            others = ", ".join(repr(name) for name in ("auto", *TIERS) if name != "hnsw")
            raise ConfigError(f"memory.tier of a training must be one for banks that every step writes, {others}: got "
                              "'hnsw', whose graphs are for memories that are only read. Did you mean 'ivf'?")

    def check_world_size(self, world_size: int) -> None:
        """Refuses a number of ranks that this run cannot be spread over.

        Raises:
            ConfigError: if streams do not divide over the ranks and accumulation steps, memory groups do not share out the
                ranks, or there are more ranks in one than virtual shards.
        """
        parts = world_size * self.train.gradient_accumulation_steps
        if self.train.streams % parts:
            raise ConfigError(f"train.streams must be a multiple of ranks x gradient_accumulation_steps: "
                              f"{self.train.streams} % ({world_size} x {self.train.gradient_accumulation_steps}) != 0")
        if self.eval.streams % world_size:
            raise ConfigError("eval.streams must be a multiple of the number of ranks: "
                              f"{self.eval.streams} % {world_size} != 0")
        if self.memory.group_size and world_size % self.memory.group_size:
            raise ConfigError("the number of ranks must be a multiple of memory.group_size (0: all ranks are one group): "
                              f"{world_size} % {self.memory.group_size} != 0")
        if self.model.long_term_memory_slots and self.memory.ranks_per_group(world_size) > self.memory.virtual_shards:
            raise ConfigError("memory.virtual_shards must be at least the number of ranks: "
                              f"{self.memory.virtual_shards} < {world_size}")


def read_yaml(text: str) -> Any:
    """The value of a YAML text without aliases, with which a few lines can describe more than fits into memory, and without
    keys that are given twice, of which YAML drops one.

    Raises:
        ValueError: for anything else, in one line.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs of yaml say nothing of it
                raise ValueError(f"an alias is not allowed: got '*{event.anchor}'")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in seen:
                    raise ValueError(f"a key is given once: got '{key.value}' again in line {key.start_mark.line + 1}")
                seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=PlainLoader)
    # PyYAML lets through what its constructors meet in a day 2001-99-99, 5,000 digits, '!!timestamp x' or '!!bool x'.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Splits 'train.learning_rate=1e-3' into its path and its value: YAML, but for a setting that is text, which takes the
    words as they are. Where such a setting may be left out, 'null' or nothing leaves it out.

    Raises:
        ConfigError: without '=' or with an empty path part.
    """
    path, equals, value = text.partition("=")
    parts = tuple(path.split("."))
    if not equals or not all(parts):
        raise ConfigError(f"an override looks like section.key=value: got '{text}'")
    alternatives = alternatives_of(parts)
    if str in alternatives:
        return parts, None if type(None) in alternatives and value in ("", "null") else value
    try:
        parsed = read_yaml(value)
    except ValueError as error:
        raise ConfigError(f"the value of override '{path}' is not valid YAML: {value!r}") from error
    if isinstance(parsed, str):  # YAML 1.1 reads '1e-3' (no dot) as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    return parts, parsed


def alternatives_of(path: Sequence[str]) -> tuple[Any, ...]:
    """The types that the run config's setting of this dotted path may have; none for a section or an unknown name."""
    section: Any = RunConfig
    for part in path[:-1]:
        field = section.model_fields.get(part)
        section = None if field is None else field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            return ()
    field = section.model_fields.get(path[-1])
    return () if field is None else get_args(field.annotation) or (field.annotation,)


def expanded(setting: str, path: str) -> Path:
    """A path from the settings, '~' being the user's home; ConfigError, with the setting's name, if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting} = '{path}' begins with a home folder that cannot be found: {error}") from None


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a nested copy of `values` in which each dotted override has been set."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for text in overrides:
        path, value = parse_override(text)
        target = result
        for part in path[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override '{text}': '{part}' is a value, not a section")
        target[path[-1]] = value
    return result


def build(cls: type[Made], values: Mapping[str, Any]) -> Made:
    """Validates `values` as a `cls`, turning pydantic's report into one line.

    Raises:
        ConfigError: with the first thing that is wrong, its dotted place included.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("literal['all']", "tuple[int, ...]"))
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
        raise ConfigError(f"{place}: {message}{given}" if place else f"{message}{given}") from None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'seed': 0}} -> {'train.seed': 0}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def to_yaml(config: Section) -> str:
    """The YAML text that `load_run_config` reads back to an equal config."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
