"""Settings: what is read back equals what was written, and what cannot work is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcode import presets
from lmcode.config import ConfigError, LMCODEConfig, RunConfig, build, expanded, parse_override, read_yaml, to_yaml
from lmcode.presets import load_run_config


@pytest.mark.parametrize("name", presets.ALL)
def test_a_written_config_reads_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(presets.by_name(name)))
    assert load_run_config(path) == presets.by_name(name)


@pytest.mark.parametrize("name", presets.ALL)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_presets_fit_the_usual_numbers_of_ranks(name: str, world_size: int) -> None:
    presets.by_name(name).check_world_size(world_size)


def test_overrides_win_and_leave_the_rest_alone() -> None:
    changed = load_run_config("tiny", ["train.seed=7", "train.learning_rate=1e-3", "model.memory_layers=[0, 3]"])
    assert (changed.train.seed, changed.train.learning_rate, changed.model.memory_layers) == (7, 1e-3, (0, 3))
    assert changed.data == presets.tiny().data


@pytest.mark.parametrize(("override", "words"), [
    ("train.learing_rate=1", ["learing_rate", "learning_rate"]),
    ("modle.hidden_size=64", ["modle", "model"]),
    ("model.hidden_size=100", ["hidden_size", "num_heads", "100"]),
    ("model.num_heads=64", ["even", "3"]),
    ("model.memory_top_k=2049", ["memory_top_k", "2048", "2049"]),
    ("model.long_term_memory_slots=11", ["11"]),
    ("model.memory_layers=[4]", ["0..3", "4"]),
    ("model.memory_layers=[1, 1]", ["repeat"]),
    ("memory.tier=annoy", ["tier", "exact", "annoy"]),
    ("memory.group_size=13", ["virtual_shards", "group_size", "12 < 13"]),
    ("memory.group_size=-2", ["group_size", "-2"]),
    ("train.sequence_length=512", ["sequence_length", "context_length", "512"]),
    ("model.retrieval_stride=7", ["multiple", "retrieval_stride"]),
    ("train.gradient_accumulation_steps=3", ["multiple", "3"]),
    ("train.seed", ["section.key=value"]),
    ("train.seed=[", ["YAML"]),
    ("train=5", ["train"]),
    ("train.seed.deep=1", ["seed"]),
    ("data.path=a", []),
    ("eval.slots=100", ["global", "100"]),
])
def test_a_bad_override_is_one_line_that_names_it(override: str, words: list[str]) -> None:
    together = {"data.path=a": ["data.hf=b"], "eval.slots=100": ["memory.scope=global"]}
    overrides = [override, *together.get(override, [])]
    with pytest.raises(ConfigError) as error:
        load_run_config("tiny", overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_fewer_slots_than_virtual_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="virtual_shards: 8 < 12"):
        load_run_config("tiny", ["model.long_term_memory_slots=8", "model.memory_top_k=4"])


@pytest.mark.parametrize(("world_size", "words"), [(3, "multiple"), (16, "multiple")])
def test_a_number_of_ranks_that_cannot_share_the_run_is_refused(world_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        presets.tiny().check_world_size(world_size)


def test_more_ranks_than_virtual_shards_are_refused() -> None:
    config = load_run_config("tiny", ["train.streams=16", "eval.streams=16"])
    with pytest.raises(ConfigError, match="virtual_shards must be at least the number of ranks: 12 < 16"):
        config.check_world_size(16)


@pytest.mark.parametrize(("size", "world_size"), [(2, 1), (3, 2), (3, 4), (8, 4)])
def test_memory_groups_that_do_not_share_out_the_ranks_are_refused(size: int, world_size: int) -> None:
    config = load_run_config("tiny", [f"memory.group_size={size}"])
    with pytest.raises(ConfigError, match=f"must be a multiple of memory.group_size .*: {world_size} % {size} != 0"):
        config.check_world_size(world_size)
    assert config.memory.ranks_per_group(world_size) == world_size, "opened by these ranks the memory is one group's"


def test_only_a_memory_groups_ranks_need_virtual_shards() -> None:
    config = load_run_config("tiny", ["train.streams=16", "eval.streams=16", "memory.group_size=8"])
    config.check_world_size(16)
    assert config.memory.ranks_per_group(16) == 8


def test_python_users_get_the_near_match_too() -> None:
    with pytest.raises(ValueError, match="Did you mean 'hidden_size'"):
        LMCODEConfig(hiden_size=64)


@pytest.mark.parametrize("content", ["[1, 2]", "model: {hidden_size: [", "model: 3", "\x00"])
def test_a_file_that_is_no_config_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_run_config(path)


def test_missing_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="no config file 'nowhere.yaml'"):
        load_run_config("nowhere.yaml")
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        load_run_config("tinny")


@given(st.text(max_size=40))
def test_any_text_as_override_parses_or_is_refused(text: str) -> None:
    try:
        path, _ = parse_override(text)
    except ConfigError:
        return
    assert all(path)


@given(st.dictionaries(st.sampled_from(["model", "memory", "data", "train", "eval", "x"]),
                       st.dictionaries(st.text(max_size=8), st.one_of(st.none(), st.integers(), st.text(max_size=4)),
                                       max_size=3), max_size=3))
def test_any_mapping_validates_or_is_refused_in_one_line(values: dict) -> None:
    try:
        build(RunConfig, values)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("words", ["books/#1", "#1", "*.txt", "{a,b}.txt", "@x", "&a", "2024-11-25", "yes", "1e3", "12", "~",
                                   "-", "a: b", "[1]", "'quoted'", "  spaces ", "!!str x", "|", "=", "a=b", "%", "Null"])
def test_a_setting_that_is_text_takes_the_words_as_they_are(words: str, tmp_path: Path) -> None:
    config = load_run_config("tiny", [f"{name}={words}" for name in ("data.path", "data.text_field", "preset", "data.cache",
                                                                     "train.run_dir", "data.tokenizer", "train.deepspeed")])
    assert config.data.path == config.data.text_field == config.preset == config.train.run_dir == words
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "run.yaml") == config


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_words_reach_a_setting_that_is_text_and_come_back_from_the_file(words: str) -> None:
    config = load_run_config("tiny", [f"data.text_field={words}"])
    assert config.data.text_field == words
    assert build(RunConfig, read_yaml(to_yaml(config))) == config


def test_text_that_may_be_left_out_is_left_out_by_null_or_nothing() -> None:
    for words in ("null", ""):
        config = load_run_config("tiny", ["data.path=a", f"data.path={words}", f"data.text_field={words}"])
        assert (config.data.path, config.data.text_field) == (None, words)


def test_other_settings_are_yaml_as_before() -> None:
    changed = load_run_config("tiny", ["train.learning_rate=1e-3", "train.betas=[0.8, 0.9]", "eval.slots=null",
                                       "train.activation_checkpointing=yes", "model.memory_layers=all",
                                       "memory.write=surprise"])
    assert (changed.train.betas, changed.eval.slots, changed.train.activation_checkpointing) == ((0.8, 0.9), None, True)
    assert (changed.model.memory_layers, changed.memory.write, changed.train.learning_rate) == ("all", "surprise", 1e-3)


@pytest.mark.parametrize("content", ["train: {seed: 1}\ntrain: {streams: 8}\n",
                                     "train:\n  seed: 1\n  streams: 8\n  seed: 2\n"])
def test_a_key_that_is_given_twice_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"given once: got '(train|seed)' again in line [24]"):
        load_run_config(tmp_path / "run.yaml")


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("data.cache", "~/cache") == Path("/home/me/cache") and expanded("data.cache", "a~") == Path("a~")
    with pytest.raises(ConfigError, match="data.cache = '~nobody-here/x' begins with a home folder that cannot be found"):
        expanded("data.cache", "~nobody-here/x")
