"""From a run config and a file of `ds_configs/` to the whole DeepSpeed config; imports no DeepSpeed.

A number lives in one place: the JSON files say how ZeRO shards and nothing else, the run config says the rest, and a
key that is set in both is refused. DeepSpeed itself takes a misspelt top-level key without a word and runs without
sharding, and drops or keeps "auto" by rules of its own, so both are refused here, before any rank starts.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lmcode.config import ConfigError, RunConfig, expanded, near_match

SHARDING_KEYS = frozenset({
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "disable_allgather", "aio",
})
OWNERS = {
    "train_batch_size": "train.streams",
    "train_micro_batch_size_per_gpu": "train.streams",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clip",
    "optimizer": "train.learning_rate (with train.betas and train.weight_decay)",
    "scheduler": "train.learning_rate (with train.warmup_steps and train.total_steps)",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "steps_per_print": "train.log_every",
    "wall_clock_breakdown": "train.log_every",
    "tensorboard": "train.log_every",
    "zero_allow_untested_optimizer": "lmcode.train.ds_config",
    "zero_force_ds_cpu_optimizer": "lmcode.train.ds_config",
}
NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines: the run logs for itself


def folders() -> list[Path]:
    """Where a sharding file is looked up by name: beside the package in a checkout, else where `pip install` put it."""
    return [Path(__file__).resolve().parents[2] / "ds_configs",
            Path(sysconfig.get_path("data")) / "share" / "lmcode" / "ds_configs"]


def find(name_or_path: str | Path) -> Path:
    """The file meant by `train.deepspeed`: a path if it ends in .json, else a name such as 'zero2'.

    Raises:
        ConfigError: if there is no such file, with the nearest known name.
    """
    text = str(name_or_path)
    if text.endswith(".json"):
        file = expanded("train.deepspeed", text)
        if not file.is_file():
            raise ConfigError(f"train.deepspeed: there is no file '{text}'")
        return file
    known = {path.stem: path for folder in reversed(folders()) for path in sorted(folder.glob("*.json"))}
    if text not in known:
        raise ConfigError(f"train.deepspeed: expected a path ending in .json or one of {', '.join(sorted(known))}: "
                          f"got '{text}'.{near_match(text, known)}")
    return known[text]


def load_sharding(name_or_path: str | Path) -> dict[str, Any]:
    """Reads the sharding keys of a DeepSpeed config file.

    Args:
        name_or_path: 'zero2' for ds_configs/zero2.json, or the path of a .json file.

    Returns:
        The file's content with `zero_optimization.stage` filled in (0 if the file leaves it out).

    Raises:
        ConfigError: no such file, not JSON, a key given twice, an unknown or misspelt top-level key, a key that the run
            config owns, the value "auto" anywhere, or a stage other than 0, 1, 2, 3.
    """
    path = find(name_or_path)
    sharding = _read_json(path)
    if not isinstance(sharding, dict):
        raise ConfigError(f"{path.name} must hold a JSON object: got {type(sharding).__name__}")
    for key in sharding:
        if key in OWNERS:
            raise ConfigError(f"{path.name} sets {key}, which {OWNERS[key]} owns: a setting lives in one place")
        if key not in SHARDING_KEYS:
            raise ConfigError(f"{path.name} sets {key}, which is not a sharding key.{near_match(key, SHARDING_KEYS)}")
    for place in _places_of_auto(sharding):
        raise ConfigError(f"{path.name} sets {place} to \"auto\": give a number, or leave the key out")
    return {**sharding, "zero_optimization": _zero_section(path, sharding.get("zero_optimization", {}))}


def _zero_section(path: Path, section: Any) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ConfigError(f"{path.name}: zero_optimization must be an object: got {section!r}")
    stage = section.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path.name}: zero_optimization.stage must be 0, 1, 2 or 3: got {stage!r}")
    return {**section, "stage": stage}


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path.name} gives the key {key} twice")
            seen[key] = value
        return seen

    def refuse(word: str) -> NoReturn:
        raise ConfigError(f"{path.name} holds {word}, which is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from None


def _places_of_auto(value: Any, place: str = "") -> Iterator[str]:
    if value == "auto":
        yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places_of_auto(child, f"{place}.{key}" if place else str(key))


def resolve(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed config of a run on `world_size` ranks: no "auto", and no default where it would matter.

    The optimizer is torch's own AdamW at every stage and on every device: it needs no compiler, and the same arithmetic
    everywhere is what makes runs comparable. A batch is counted in streams.

    Raises:
        ConfigError: if the run cannot be spread over `world_size` ranks, or its sharding file is refused.
    """
    config.check_world_size(world_size)
    train = config.train
    accumulation = train.gradient_accumulation_steps
    return {
        **load_sharding(train.deepspeed),
        "train_batch_size": train.streams,
        "train_micro_batch_size_per_gpu": train.streams // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clip,  # written even when 0: DeepSpeed clips at 1.0 if the key is missing
        "bf16": {"enabled": train.precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {
            "lr": train.learning_rate, "betas": list(train.betas), "eps": 1e-8, "weight_decay": train.weight_decay,
            "torch_adam": True, "adam_w_mode": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW, see above
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
