"""The example run files are accepted as they stand, explain themselves, and have no setting without effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmcode.cli.command import main
from lmcode.effects import without_effect
from lmcode.presets import load_run_config
from lmcode.version import __version__
from tests.helpers.sources import CHECKOUT

EXAMPLES = sorted((CHECKOUT / "launch" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "--config", str(example), "--world", "8"]) == 0, capsys.readouterr().err
    config = load_run_config(example)
    assert config.preset == example.stem and without_effect(config, 8) == []
    said = example.read_text(encoding="utf-8")
    assert f"launch/examples/{example.name}" in said.split("\n\n")[0] and said.startswith("# ")


def test_there_are_examples_and_a_wrong_one_would_be_seen(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 3
    (tmp_path / "wrong.yaml").write_text(EXAMPLES[0].read_text(encoding="utf-8").replace("hidden_size", "hiden_size"))
    assert main(["config", "check", "--config", str(tmp_path / "wrong.yaml")]) == 2


def test_the_citation_names_this_version() -> None:
    citation = (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE).group(1) == __version__
