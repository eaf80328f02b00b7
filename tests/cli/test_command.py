"""The command line: what reaches the subcommands, what is refused, in how many lines, by which rank, with what code."""

from __future__ import annotations

import codecs
import io
import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lmcode.train
from lmcode import presets
from lmcode.cli import command as cli
from lmcode.cli.console import Spelling
from lmcode.config import ConfigError, RunConfig
from lmcode.presets import load_run_config
from tests.helpers.sources import CHECKOUT

COMMANDS = (["train"], ["eval"], ["generate"], ["submit"], ["estimate"], ["doctor"],
            ["config", "show"], ["config", "check"], ["config", "schema"])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Puts a training loop in place that only records its config, and returns 75."""
    configs: list[RunConfig] = []
    loop = types.ModuleType("lmcode.train.loop")
    loop.run = lambda config: configs.append(config) or 75  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmcode.train.loop", loop)
    monkeypatch.setattr(lmcode.train, "loop", loop, raising=False)
    return configs


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a bad command line leaves on stderr."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lmcode: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [[], *COMMANDS, ["config"]], ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "usage: " + " ".join(["lmcode", *command]) in text
    assert ("examples:" in text) == (command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_examples_in_the_help_are_understood(command: list[str]) -> None:
    needed = {"eval": ["run"], "generate": ["run", "--prompt", "x"], "estimate": ["--world", "1"],
              "submit": ["tiny", "--nodes", "1"]}.get(command[0], [])
    for line in cli.parse([*command, *needed]).parser.epilog.splitlines()[1:]:
        words = shlex.split(line.split(" > ")[0])
        assert cli.parse(words[words.index("lmcode") + 1:]).parser.prog == " ".join(["lmcode", *command])


def test_train_hands_on_the_config_and_returns_its_exit_code(trained: list[RunConfig]) -> None:
    assert cli.main(["train", "--preset", "small", "train.seed=7", "model.memory_top_k=3"]) == 75
    assert trained == [load_run_config("small", ["train.seed=7", "model.memory_top_k=3"])]


@pytest.mark.parametrize("argv", [
    ["--local_rank=1", "train", "--preset", "tiny", "train.seed=7"],
    ["--local_rank", "1", "train", "train.seed=7"],
    ["train", "--local_rank=1", "train.seed=7"],
    ["train", "train.seed=6", "--preset=tiny", "train.seed=7"],
    ["train", "train.seed=7", "--preset", "tiny"],
])
def test_order_and_the_launchers_rank_do_not_matter(trained: list[RunConfig], argv: list[str]) -> None:
    assert cli.main(argv) == 75
    assert trained == [load_run_config("tiny", ["train.seed=7"])]


def test_train_reads_a_config_file(trained: list[RunConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: mine\ntrain: {seed: 5}\n", encoding="utf-8")
    assert cli.main(["train", "--config", str(path), "train.streams=64"]) == 75
    assert (trained[0].preset, trained[0].train.seed, trained[0].train.streams) == ("mine", 5, 64)


@pytest.mark.parametrize(("argv", "message"), [
    (["trian"], "Did you mean 'train'?"),
    (["config", "shwo"], "Did you mean 'show'?"),
    ([], "COMMAND"),
    (["config"], "show|check|schema"),
    (["train", "--prest", "tiny"], "Did you mean '--preset'?"),
    (["train", "steps"], "section.key=value"),
    (["train", "train.total_stps=3"], "Did you mean 'total_steps'?"),
    (["train", "train.total_steps=x"], "train.total_steps"),
    (["train", "--preset", "tiyn"], "Did you mean 'tiny'?"),
    (["train", "--preset", "tiny", "--config", "a.yaml"], "not allowed with"),
    (["train", "--config", "no-such.yaml"], "no-such.yaml"),
    (["train", "--config", "tiny"], "ending in .yaml"),
    (["config", "check", "train.deepspeed=zero5"], "got 'zero5'"),
    (["config", "check", "--world", "3"], "8 % (3 x 1)"),
    (["config", "check", "--world", "4", "memory.group_size=3"], "4 % 3 != 0"),
    (["config", "check", "--world", "0"], "expected 1 or more: got 0"),
    (["config", "check", "--world", "two"], "invalid int value: 'two'"),
    (["config", "schema", "a.b=1"], "does not understand 'a.b=1'"),
    (["doctor", "a.b=1"], "does not understand 'a.b=1'"),
    (["eval"], "RUN"),
    (["eval", "run", "--windows", "0"], "expected 1 or more: got 0"),
    (["generate", "run"], "--prompt"),
    (["generate", "run", "--prompt", "x", "--top-p", "1.5"], "1 or less: got 1.5"),
    (["generate", "run", "--prompt", "x", "--top-p", "0"], "got 0"),
    (["generate", "run", "--prompt", "x", "--temperature", "nan"], "got nan"),
    (["generate", "run", "--prompt", "x", "--temperature", "-1"], "got -1"),
    (["generate", "run", "--prompt", "x", "steps"], "section.key=value"),
])
def test_bad_usage_is_one_line_and_exit_code_2(argv: list[str], message: str, trained: list[RunConfig],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *argv)
    assert not trained


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("nonsense", 1)])
@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_only_rank_0_complains(names: tuple[str, str], rank: str, lines: int, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(names[0], rank)
    monkeypatch.setenv(names[1], "2")
    assert cli.main(["train", "nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


def test_a_refusal_from_inside_a_command_is_one_line_too(monkeypatch: pytest.MonkeyPatch, trained: list[RunConfig],
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(config: RunConfig) -> int:
        raise ConfigError("it cannot\n  work")

    monkeypatch.setattr(sys.modules["lmcode.train.loop"], "run", refuse)
    assert refused(capsys, "train") == "lmcode: error: it cannot work\n"


def test_a_failure_that_is_nobodys_setting_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch,
                                                               trained: list[RunConfig]) -> None:
    def fail(config: RunConfig) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(sys.modules["lmcode.train.loop"], "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])


def test_eval_and_generate_hand_on_what_they_were_given() -> None:
    assert cli.parse(["eval", "runs/a", "--task", "recall"]).task == "recall"
    arguments = cli.parse(["eval", "runs/a", "--windows", "3", "eval.slots=64"])
    assert (arguments.path, arguments.windows, arguments.overrides) == (Path("runs/a"), 3, ["eval.slots=64"])
    arguments = cli.parse(["generate", "runs/a", "--prompt=-x", "--top-k", "5", "--no-memory", "--seed", "9"])
    assert (arguments.prompt, arguments.top_k, arguments.memory, arguments.seed) == ("-x", 5, False, 9)
    assert cli.parse(["generate", "runs/a", "--prompt", "x"]).memory is True


@pytest.mark.parametrize("preset", sorted(presets.ALL))
def test_every_preset_passes_the_check_and_survives_show(preset: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "--preset", preset, "--world", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"ok: preset {preset}, ")
    assert cli.main(["config", "show", "--preset", preset, "train.seed=3"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_run_config(path) == load_run_config(preset, ["train.seed=3"])


def test_the_schema_is_json_and_knows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(RunConfig.model_fields)


def run_with(*words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "lmcode", *words], cwd=CHECKOUT, capture_output=True,
                          timeout=300, env={**os.environ, **env})


def test_an_encoding_that_lacks_characters_shows_escapes_and_warns() -> None:
    done = run_with("config", "check", "preset=\u00fcber \U0001f600", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith(rb"ok: preset \u00fcber \ud83d\ude00, ")
    line, = done.stderr.decode("ascii").splitlines()
    assert line.startswith("lmcode: warning: the output's encoding (ascii) lacks some characters")


@pytest.mark.parametrize("words", [["generate", "run", "--prompt", "a\udcffb"], ["eval", "r\udcffn"],
                                   ["train", "data.path=\udcff"]])
def test_words_that_are_no_utf_8_are_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert r"must be UTF-8: got '" in refused(capsys, *words)


def test_settings_without_effect_are_named_by_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "memory.write_every=9"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: ")
    assert err == "lmcode: warning: memory.write_every = 9 has no effect here: it needs memory.write=every_nth\n"


def test_spelling_keeps_json_and_bytes() -> None:
    buffer = io.BytesIO()
    stream, spelling = io.TextIOWrapper(buffer, encoding="ascii"), Spelling()
    codecs.register_error("lmcode-test", spelling)
    stream.reconfigure(errors="lmcode-test")
    print("a\udcffb", file=stream, flush=True)
    assert buffer.getvalue() == b"a\xffb\n" and not spelling.escaped
    print(json.dumps("\u00e9 \U0001f600", ensure_ascii=False), file=stream, flush=True)
    assert json.loads(buffer.getvalue().splitlines()[1]) == "\u00e9 \U0001f600" and spelling.escaped
