"""What the documents promise of the code, and a reader cannot check: no exception that hides more than it names."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT, FILES, tree

SOURCES = sorted(path.relative_to(CHECKOUT).as_posix() for part in ("lmcode", "tests", "tools")
                 for path in (CHECKOUT / part).rglob("*.py"))
DIRECTIVE = re.compile(r"#\s*(type:\s*ignore|noqa)\b(.*)")
CODED = {"type": re.compile(r"\[[a-z-]+(, ?[a-z-]+)*\]"), "noqa": re.compile(r": [A-Z]+\d+(, ?[A-Z]+\d+)*")}


def exceptions(text: str) -> list[tuple[int, str, str]]:
    """Line, kind ("type" or "noqa") and what follows of every exception from mypy or ruff in the comments of a source."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        for match in DIRECTIVE.finditer(token.string) if token.type == tokenize.COMMENT else ():
            found.append((token.start[0], match[1][:4], match[2]))
    return found


@pytest.mark.parametrize("text, blanket", [
    ("x = 1  # type: ignore\n", True), ("x = 1  # type: ignore[arg-type]  # torch's\n", False),
    ("x = 1  # noqa\n", True), ("x = 1  # noqa: E501, F401  (why)\n", False), ("x = '# noqa'\n", False),
    ("x = 1  # type: ignore  # noqa: E501\n", True)])
def test_a_blanket_exception_is_found(text: str, blanket: bool) -> None:
    assert any(CODED[kind].match(rest) is None for _, kind, rest in exceptions(text)) is blanket


def test_exceptions_from_mypy_and_ruff_name_their_code() -> None:
    for file in SOURCES:
        for line, kind, rest in exceptions((CHECKOUT / file).read_text(encoding="utf-8")):
            assert CODED[kind].match(rest), f"{file}:{line} hides every error of its line: name the code"


def test_an_exception_in_the_package_says_why() -> None:
    for file in (file for file in SOURCES if file.startswith("lmcode/")):
        for line, kind, rest in exceptions((CHECKOUT / file).read_text(encoding="utf-8")):
            assert CODED[kind].sub("", rest, count=1).strip(" #()"), f"{file}:{line} needs a word on why"


def test_mypy_is_strict_for_the_whole_package() -> None:
    settings = ConfigParser()
    settings.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    assert settings["mypy"].getboolean("strict") and settings["mypy"]["packages"] == "lmcode"
    assert "pydantic.mypy" in settings["mypy"]["plugins"]
    assert not {"disable_error_code", "ignore_errors", "exclude", "follow_imports"} & {*settings["mypy"]}
    assert not [section for section in settings.sections() if section.startswith("mypy-")], "no module is left out"


def test_py_typed_is_shipped() -> None:
    settings = ConfigParser()
    settings.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    assert "py.typed" in settings["options.package_data"]["lmcode"].split()
    assert (CHECKOUT / "lmcode/py.typed").is_file()


def test_the_suite_begins_with_ruff_and_mypy_and_a_part_of_it_does_not(tmp_path: Path) -> None:
    """With a Python that only notes how it is called, and then one that says that mypy has found something."""
    for name in ("tests/run.sh", "launch/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$2"\n[ "$2" != "$FAILS" ]\n', encoding="utf-8")
    python.chmod(0o755)

    def modules(*arguments: str, fails: str = "nothing") -> tuple[list[str], bool]:
        env = {"PATH": "/usr/bin:/bin", "LMCODE_SKIP_INSTALL": "1", "LMCODE_VENV": str(tmp_path / "venv"), "FAILS": fails}
        done = subprocess.run(["bash", str(tmp_path / "tests/run.sh"), *arguments], capture_output=True, text=True,
                              timeout=PATIENCE_S, env=env)
        return done.stdout.split(), done.returncode == 0

    assert modules() == (["ruff", "mypy", "pytest"], True)
    assert modules("tests/cli/test_command.py") == (["pytest"], True)
    assert modules(fails="ruff") == (["ruff"], False)
    assert modules(fails="mypy") == (["ruff", "mypy"], False)
    assert modules(fails="pytest") == (["ruff", "mypy", "pytest"], False)


def test_what_checks_the_sources_is_installed_with_the_tests_in_pinned_versions() -> None:
    settings = ConfigParser()
    settings.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    wanted = {re.split(r"[=<>]", line)[0].lower() for line in settings["options.extras_require"]["dev"].split()}
    assert {"mypy", "ruff"} <= wanted
    assert re.search(r"--editable .*\[[^]]*\bdev\b[^]]*\]", (CHECKOUT / "launch/environment.sh").read_text(encoding="utf-8"))
    pins = (CHECKOUT / "launch/constraints.txt").read_text(encoding="utf-8")
    assert wanted <= {line.split("==")[0].lower() for line in pins.splitlines() if "==" in line}


def test_security_names_only_what_exists() -> None:
    text = (CHECKOUT / "SECURITY.md").read_text(encoding="utf-8")
    # `dist.py`, `lmcode/files/durable.py`, `ds_configs/*.json`: a name with a folder or a suffix is one of a file.
    named = [name for name in re.findall(r"`([\w./*-]+)`", text) if "/" in name or name.endswith((".py", ".sh", ".md"))]
    linked = [name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name]
    assert named, "SECURITY.md names at least the sharding files"
    for name in (*named, *linked):
        assert any(CHECKOUT.glob(name)) or any((CHECKOUT / "lmcode").rglob(name)), f"SECURITY.md names {name}: there is none"


STORED_NAMES = {"initial_slots_SE", "address_SE"}  # parameters: their names are in every checkpoint


def shape_letters(module: ast.Module) -> dict[str, str]:
    """The letters of every name that ends in a shape, as `key_HND` does, by that name."""
    found = {node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else node.attr
             for node in ast.walk(module) if isinstance(node, ast.Name | ast.arg | ast.Attribute)}
    shapes = {name: re.search(r"_([A-Z0-9]+)$", name) for name in found if not name.isupper()}
    return {name: re.sub(r"\d", "", match[1]) for name, match in shapes.items() if match}


def test_the_letters_of_shapes_are_those_of_the_one_legend() -> None:
    text = ast.get_docstring(tree("lmcode/protocol.py"), clean=False)
    legend = {*re.findall(r"(?:^ {4}|  )([A-Z])  \w", text, re.MULTILINE)}
    assert len(legend) == 10
    assert shape_letters(ast.parse("x_BTD.y_GHE = [z_X1 for z_X1 in g(k_HN)]")) == {
        "x_BTD": "BTD", "y_GHE": "GHE", "z_X1": "X", "k_HN": "HN"}
    for file in FILES:
        wrong = {name for name, letters in shape_letters(tree(file)).items()
                 if name not in STORED_NAMES and not {*letters} <= legend}
        assert not wrong, f"{file}: {wrong} have letters that the legend in lmcode/protocol.py lacks"
