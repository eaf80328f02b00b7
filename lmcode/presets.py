"""Where a run config comes from: a preset, which is a function that returns one, or a YAML file; then dotted overrides.

`tiny` is what `launch/local.sh` trains on a laptop; `small` and `base` are for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lmcode.backbone_config import resolved
from lmcode.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    LMCODEConfig,
    MemoryConfig,
    RunConfig,
    TrainConfig,
    build,
    near_match,
    read_yaml,
    with_overrides,
)


def tiny() -> RunConfig:
    """3 M parameters, minutes on two CPU cores: 8 streams of 256 tokens a step, a bank of 65,536 slots on the last layer,
    which points to the tokens that followed the last two."""
    return RunConfig(
        preset="tiny",
        model=LMCODEConfig(vocab_size=4096, hidden_size=192, num_layers=4, num_heads=6, context_length=256,
                           short_term_memory_size=16, short_term_dim=48, short_term_segment=64, memory_update_rate=0.5,
                           long_term_memory_slots=65536, memory_layers=(3,), memory_heads=2, memory_head_dim=64,
                           memory_temperature=16.0, memory_key_tokens=2, memory_values="token"),
        memory=MemoryConfig(virtual_shards=12),
        data=DataConfig(),
        train=TrainConfig(learning_rate=2e-3, warmup_steps=50, total_steps=400, streams=8, sequence_length=256),
        eval=EvalConfig(every=200, streams=8, windows=12, final_windows=48),
    )


def small() -> RunConfig:
    """About 50 M parameters, one GPU: 32 streams of 512 tokens, banks of 262,144 slots on two layers."""
    return RunConfig(
        preset="small",
        model=LMCODEConfig(vocab_size=16384, hidden_size=640, num_layers=8, num_heads=10, context_length=512,
                           short_term_memory_size=64, short_term_dim=48, memory_update_rate=0.5,
                           long_term_memory_slots=262144, memory_layers=(4, 6)),
        memory=MemoryConfig(virtual_shards=64, dtype="bf16"),
        train=TrainConfig(learning_rate=6e-4, warmup_steps=500, total_steps=20000, streams=32, sequence_length=512,
                          precision="bf16", save_every=1000),
        eval=EvalConfig(every=1000, streams=32, windows=16, final_windows=64),
    )


def base() -> RunConfig:
    """The shape of GPT-2 small with a byte-pair vocabulary of 32,768: 1,048,576 slots on each of two layers."""
    return RunConfig(
        preset="base",
        model=LMCODEConfig(vocab_size=32768, hidden_size=768, num_layers=12, num_heads=12, context_length=1024,
                           short_term_memory_size=128, short_term_dim=32, memory_update_rate=0.5,
                           long_term_memory_slots=1048576, memory_layers=(6, 9)),
        memory=MemoryConfig(virtual_shards=256, dtype="bf16"),
        train=TrainConfig(learning_rate=3e-4, warmup_steps=2000, total_steps=100000, streams=128, sequence_length=1024,
                          precision="bf16", activation_checkpointing=True, save_every=2000),
        eval=EvalConfig(every=2000, streams=64, windows=16, final_windows=64),
    )


ALL = {"tiny": tiny, "small": small, "base": base}


def by_name(name: str) -> RunConfig:
    """The preset called `name`.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    if name not in ALL:
        raise ConfigError(f"there is no preset '{name}': expected one of {', '.join(ALL)}.{near_match(name, ALL)}")
    return ALL[name]()


def load_run_config(source: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Builds a run config from a YAML file or a preset name, then overrides.

    Args:
        source: path of a YAML file (ending in .yaml or .yml), the name of a preset, or None for the preset 'tiny'.
        overrides: dotted settings such as 'train.total_steps=100'.

    Raises:
        ConfigError: unknown preset or key, missing file, bad value, impossible combination.
    """
    source = "tiny" if source is None else str(source)
    if source.endswith((".yaml", ".yml")):
        try:
            values = read_yaml(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no config file '{source}'") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{source}' cannot be read as YAML: {' '.join(str(error).split())}") from None
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"'{source}' must hold a mapping of sections: got {type(values).__name__}")
    else:
        values = by_name(source).model_dump()
    overrides = list(overrides)
    if any(one.startswith("model.backbone=") for one in overrides) and not source.endswith((".yaml", ".yml")):
        values["model"] = {}  # a preset's shape is not that of a backbone
    return build(RunConfig, resolved(with_overrides(values, overrides)))
