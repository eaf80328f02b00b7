"""The sharding files and how they become a DeepSpeed config: one place for each number, nothing taken silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcode.config import ConfigError, RunConfig, build
from lmcode.train import ds_config
from lmcode.train.ds_config import OWNERS, SHARDING_KEYS, load_sharding, resolve
from tests.helpers.sources import CHECKOUT

FILES = sorted((CHECKOUT / "ds_configs").glob("*.json"))
STAGES = {"cpu": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def run_config(**train: object) -> RunConfig:
    return build(RunConfig, {"train": train})


def written(folder: Path, text: str) -> str:
    path = folder / "mine.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in leaves(child)]
    return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]


def test_the_files_are_the_five_named_ones() -> None:
    assert {path.stem for path in FILES} == set(STAGES)


def test_a_shipped_file_loads_by_name_and_by_path_with_its_stage() -> None:
    for path in FILES:
        sharding = load_sharding(path.stem)
        assert sharding == load_sharding(str(path)), path
        assert sharding["zero_optimization"]["stage"] == STAGES[path.stem], path
        assert set(sharding) <= SHARDING_KEYS, path


def test_deepspeed_knows_every_key_of_a_shipped_zero_section() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    for path in FILES:
        section = load_sharding(path.stem)["zero_optimization"]
        assert int(zero.DeepSpeedZeroConfig(**section).stage) == section["stage"], path


def test_no_key_is_both_a_sharding_key_and_owned_by_the_run() -> None:
    assert not SHARDING_KEYS & set(OWNERS)


def test_every_owner_exists() -> None:
    for owner in OWNERS.values():
        section, _, key = owner.split(" ")[0].partition(".")
        assert section == "lmcode" or key in getattr(RunConfig(), section).model_dump(), owner


@pytest.mark.parametrize("key", sorted(OWNERS))
def test_a_key_that_the_run_owns_is_refused_naming_both_places(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_sharding(written(tmp_path, json.dumps({"zero_optimization": {"stage": 1}, key: 1})))
    for word in ("mine.json", key, OWNERS[key]):
        assert word in str(refusal.value)


@pytest.mark.parametrize(("text", "message"), [
    ('{"zero_optimisation": {"stage": 2}}', "zero_optimisation.*Did you mean 'zero_optimization'"),
    ('{"zero_optimization": {"stage": 4}}', "0, 1, 2 or 3: got 4"),
    ('{"zero_optimization": {"stage": true}}', "0, 1, 2 or 3: got True"),
    ('{"zero_optimization": {"stage": "2"}}', "0, 1, 2 or 3: got '2'"),
    ('{"zero_optimization": 2}', "must be an object: got 2"),
    ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', r"zero_optimization\.reduce_bucket_size.*auto"),
    ('{"zero_optimization": {"offload_param": {"device": "auto"}}}', r"offload_param\.device.*auto"),
    ('{"communication_data_type": "auto"}', "communication_data_type.*auto"),
    ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "zero_optimization twice"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage twice"),
    ('{"gradient_predivide_factor": NaN}', "NaN"),
    ('{"zero_optimization": {"stage": 1},}', "is not JSON"),
    ("[]", "must hold a JSON object: got list"),
    ("", "is not JSON"),
])
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sharding(written(tmp_path, text))


@pytest.mark.parametrize(("name", "message"), [
    ("zero22", "Did you mean 'zero2'"),
    ("no/such.json", "no file 'no/such.json'"),
])
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sharding(name)


def test_a_file_without_a_stage_means_stage_0(tmp_path: Path) -> None:
    assert load_sharding(written(tmp_path, "{}")) == {"zero_optimization": {"stage": 0}}


def test_a_checkout_comes_before_an_installed_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("checkout", "installed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "zero2.json").touch()
    (tmp_path / "installed" / "other.json").touch()
    monkeypatch.setattr(ds_config, "folders", lambda: [tmp_path / "checkout", tmp_path / "installed"])
    assert ds_config.find("zero2") == tmp_path / "checkout" / "zero2.json"
    assert ds_config.find("other") == tmp_path / "installed" / "other.json"


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_resolved_config_is_whole(name: str, accumulation: int, world_size: int) -> None:
    config = run_config(deepspeed=name, streams=32, gradient_accumulation_steps=accumulation, gradient_clip=0.0,
                        learning_rate=0.5, weight_decay=0.25, betas=(0.5, 0.75), precision="bf16")
    resolved = resolve(config, world_size)
    assert resolved["train_batch_size"] == 32
    assert resolved["train_micro_batch_size_per_gpu"] * accumulation * world_size == 32
    assert resolved["gradient_accumulation_steps"] == accumulation
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["bf16"]["enabled"] is True
    optimizer = resolved["optimizer"]["params"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["betas"]) == (0.5, 0.25, [0.5, 0.75])
    assert load_sharding(name).items() <= resolved.items()
    assert "auto" not in leaves(resolved)
    assert json.loads(json.dumps(resolved)) == resolved


def test_fp32_is_written_out_too() -> None:
    assert resolve(run_config(precision="fp32"), 1)["bf16"]["enabled"] is False


def test_a_run_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of ranks x gradient_accumulation_steps: 32 % \(3 x 1\)"):
        resolve(run_config(streams=32), 3)
