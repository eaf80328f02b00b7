"""Who may import whom: the rules that keep the model free of ranks and the bank free of the model.

An `ast` walk over the package, so that imports inside functions count too. Files that do not exist break no rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "lmcode"
FILES = sorted(path.relative_to(CHECKOUT).as_posix() for path in PACKAGE.rglob("*.py"))
COLLECTIVES = {"all_gather", "all_gather_int", "all_gather_rows", "all_to_all", "reduce_scatter", "all_reduce",
               "all_gather_object", "broadcast"}
OWNERS = {  # the one file or folder that may import a package
    "faiss": "lmcode/memory/faiss_index.py",
    "deepspeed": "lmcode/train/engine.py",
    "tensorboard": "lmcode/train/metrics.py",
    "torch.utils.tensorboard": "lmcode/train/metrics.py",
    "mpi4py": "lmcode/dist.py",
    "torch.distributed": "lmcode/dist.py",
    "tokenizers": "lmcode/tokenizer.py",
    "matplotlib": "lmcode/report/plots.py",
    "transformers": "lmcode/hf.py",
    "huggingface_hub": "lmcode/saved/pretrained.py",
    "zstandard": "lmcode/train/zstd.py",
    "pyarrow": "lmcode/train/parquet.py",
}
LAZY = ("deepspeed", "faiss", "tensorboard", "tokenizers", "yaml", "mpi4py", "matplotlib", "transformers", "datasets",
        "zstandard", "pyarrow")
MAY_PRINT = ("lmcode/cli/command.py",)


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((CHECKOUT / file).read_text(encoding="utf-8"), file)


def imported_names(module: ast.Module, file: str) -> Iterator[str]:
    """Every dotted name that a file imports: 'import a.b' gives a.b, 'from a import b' gives a.b."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.removesuffix(".py").split("/")[:-node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(file: str) -> set[str]:
    return set(imported_names(tree(file), file))


def reaches(names: set[str], package: str) -> set[str]:
    """The names that are `package` or lie in it."""
    return {name for name in names if name == package or name.startswith(package + ".")}


def dotted_attributes(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def calls(module: ast.Module) -> Iterator[tuple[str, int]]:
    """The last part of the name of everything that is called, and the line."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            yield name, node.lineno


def test_the_walk_sees_every_way_to_import() -> None:
    source = "import a.b\ndef f():\n    from c import d as e\n    from . import g\nfrom ..h import i\nimport os as j\n"
    assert set(imported_names(ast.parse(source), "lmcode/memory/x.py")) == {
        "a.b", "c.d", "lmcode.memory.g", "lmcode.h.i", "os"}


def test_there_is_a_package_to_look_at() -> None:
    assert {"lmcode/config.py", "lmcode/dist.py", "lmcode/cli/command.py"} <= set(FILES)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("lmcode/model/")])
def test_the_model_can_be_read_with_torch_alone(file: str) -> None:
    for package in ("torch.distributed", "faiss", "deepspeed", "os", "lmcode.memory", "lmcode.train", "lmcode.dist",
                    "lmcode.lmcode", "lmcode.eval"):
        assert not reaches(imports(file), package)
    assert not [name for name in dotted_attributes(tree(file)) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("lmcode/memory/")])
def test_the_memory_knows_no_model_and_no_training(file: str) -> None:
    for package in ("lmcode.model", "lmcode.train", "lmcode.lmcode", "lmcode.eval"):
        assert not reaches(imports(file), package)


@pytest.mark.parametrize("file", FILES)
def test_a_heavy_package_has_one_importer(file: str) -> None:
    for package, owner in OWNERS.items():
        if not file.startswith(owner):
            assert not reaches(imports(file), package), f"{package} belongs to {owner}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("lmcode/memory/")])
def test_in_the_memory_only_the_bank_and_its_consolidation_use_collectives(file: str) -> None:
    if file not in ("lmcode/memory/bank.py", "lmcode/memory/rounds.py"):
        assert not [(name, line) for name, line in calls(tree(file)) if name in COLLECTIVES]


@pytest.mark.parametrize("file", FILES)
def test_torch_distributed_is_reached_through_dist_alone(file: str) -> None:
    if file != "lmcode/dist.py":
        assert not [name for name in dotted_attributes(tree(file)) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("file", FILES)
def test_the_library_imports_nothing_around_it(file: str) -> None:
    for package in ("launch", "tools", "tests"):
        assert not reaches(imports(file), package)


@pytest.mark.parametrize("file", [file for file in FILES if file not in MAY_PRINT])
def test_the_library_does_not_print(file: str) -> None:
    assert not [line for name, line in calls(tree(file)) if name == "print"]


@pytest.mark.parametrize("file", FILES)
def test_every_module_says_what_it_owns(file: str) -> None:
    assert ast.get_docstring(tree(file))


@pytest.mark.parametrize("file", FILES)
def test_no_handler_is_bare(file: str) -> None:
    handlers = [node for node in ast.walk(tree(file)) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


@pytest.mark.parametrize("module", ["lmcode", "lmcode.cli", "lmcode.doctor.host", "lmcode.train.ds_config"])
def test_importing_it_needs_torch_at_most(module: str) -> None:
    code = f"import sys, {module}\nsys.exit(', '.join(name for name in {LAZY!r} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "")
