"""Who may import whom: the order of the packages, and the rules that keep the model free of ranks and the bank of models.

An `ast` walk over the package, so that imports inside functions count too. Files that do not exist break no rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT, FILES, imported_names, imports, tree

COLLECTIVES = {"all_gather", "all_gather_int", "all_gather_rows", "all_to_all", "reduce_scatter", "all_reduce",
               "all_gather_object", "broadcast"}
OWNERS: dict[str, str | tuple[str, ...]] = {  # the one file or folder that may import a package
    "faiss": ("lmcode/memory/search/faiss_index.py", "lmcode/bench/peers.py"),  # peers
    "memorizing_transformers_pytorch": "lmcode/bench/memorizing.py",
    "deepspeed": "lmcode/train/engine.py",
    "tensorboard": "lmcode/train/metrics.py",
    "torch.utils.tensorboard": "lmcode/train/metrics.py",
    "mpi4py": "lmcode/dist.py",
    "torch.distributed": "lmcode/dist.py",
    "tokenizers": "lmcode/data/tokenizer.py",
    "matplotlib": "lmcode/report/plots.py",
    "transformers": ("lmcode/hf.py", "lmcode/recipes/foreign.py"),
    "huggingface_hub": "lmcode/saved/pretrained.py",
    "zstandard": "lmcode/data/zstd.py",
    "pyarrow": "lmcode/data/parquet.py",
    "wandb": "lmcode/train/writers.py",
    "mlflow": "lmcode/train/writers.py",
}
LAZY = ("deepspeed", "faiss", "tensorboard", "tokenizers", "yaml", "mpi4py", "matplotlib", "transformers", "datasets",
        "zstandard", "pyarrow", "wandb", "mlflow")
MAY_PRINT = ("lmcode/cli/command.py",)
# The parts of lmcode from the ground up: each imports only those before it.
ORDER = ("version", "processor", "config", "backbone_config", "precision", "protocol", "presets", "effects", "dist", "files",
         "model", "memory", "data", "memories", "jobs", "backbone", "saved", "language_model", "recipes", "opening", "eval",
         "train", "bench", "report", "estimate", "doctor", "cli", "hf")


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


def broken(rule: Callable[[str], object], files: Iterable[str] = FILES) -> dict[str, object]:
    """The files that break a rule, each with what is wrong."""
    return {file: wrong for file in files if (wrong := rule(file))}


def in_folder(*folders: str) -> list[str]:
    return [file for file in FILES if file.startswith(folders)]


def names_of(file: str, *packages: str) -> set[str]:
    return {name for package in packages for name in reaches(imports(file), package)}


def torch_distributed(file: str) -> list[str]:
    return [name for name in dotted_attributes(tree(file)) if name.startswith("torch.distributed")]


def package_of(name: str) -> str:
    """The part of lmcode that a file or a dotted name belongs to: a folder or a file of the top level."""
    return name.replace("/", ".").removesuffix(".py").split(".")[1]


def upwards(file: str) -> set[str]:
    """What a file imports of a part that stands above its own."""
    floor = ORDER.index(package_of(file))
    names = {name for name in reaches(imports(file), "lmcode") if name.count(".") > 0}
    return {name for name in names if package_of(name) in ORDER and ORDER.index(package_of(name)) > floor}


def test_no_import_runs_upwards() -> None:
    """So there is no circle either. Imports inside functions and for type checkers count."""
    inside = [file for file in FILES if file not in ("lmcode/__init__.py", "lmcode/__main__.py")]
    assert {package_of(file) for file in inside} == set(ORDER)
    assert not broken(upwards, inside)


def test_an_import_upwards_would_be_seen() -> None:
    """Of every part the highest: nothing below may import `cli`, and `config` imports nothing of ours."""
    assert not names_of("lmcode/config.py", "lmcode")
    floors = [ORDER.index(name) for name in ("model", "memory", "memories", "saved", "train", "cli")]
    assert floors == sorted(floors)


def test_the_model_can_be_read_with_torch_alone() -> None:
    ranks = ("torch.distributed", "faiss", "deepspeed", "os", "lmcode.dist")
    assert not broken(lambda file: [*names_of(file, *ranks), *torch_distributed(file)], in_folder("lmcode/model/"))


def test_the_memory_knows_no_model_and_no_training() -> None:
    assert not broken(lambda file: names_of(file, "lmcode.model", "lmcode.train", "lmcode.data"),
                      in_folder("lmcode/memory/"))


def test_only_opening_names_a_class_of_model() -> None:
    """The commands, training, evaluation and reports ask for a `Backbone`."""
    owners = ("lmcode/opening.py", "lmcode/hf.py", "lmcode/__init__.py")
    assert not broken(lambda file: names_of(file, "lmcode.language_model"), [file for file in FILES if file not in owners])


def test_a_heavy_package_has_one_importer() -> None:
    assert not broken(lambda file: [package for package, owner in OWNERS.items()
                                    if not file.startswith(owner) and names_of(file, package)])


def test_in_the_memory_only_what_the_ranks_do_together_uses_collectives() -> None:
    allowed = {f"lmcode/memory/{name}.py" for name in ("read", "write", "measure", "rounds", "joining", "planning", "bank",
                                                       "lifecycle")}
    assert not broken(lambda file: [call for call in calls(tree(file)) if call[0] in COLLECTIVES],
                      [file for file in in_folder("lmcode/memory/") if file not in allowed])


def test_torch_distributed_is_reached_through_dist_alone() -> None:
    assert not broken(torch_distributed, [file for file in FILES if file != "lmcode/dist.py"])


def test_the_library_imports_nothing_around_it() -> None:
    assert not broken(lambda file: names_of(file, "launch", "tools", "tests"))


def test_the_library_does_not_print() -> None:
    assert not broken(lambda file: [line for name, line in calls(tree(file)) if name == "print"],
                      [file for file in FILES if file not in MAY_PRINT])


def test_every_module_says_what_it_owns() -> None:
    assert not broken(lambda file: not ast.get_docstring(tree(file)))


def test_no_handler_is_bare() -> None:
    assert not broken(lambda file: [node.lineno for node in ast.walk(tree(file))
                                    if isinstance(node, ast.ExceptHandler) and node.type is None])


@pytest.mark.parametrize("module", ["lmcode", "lmcode.cli", "lmcode.doctor.host", "lmcode.train.ds_config"])
def test_importing_it_needs_torch_at_most(module: str) -> None:
    code = f"import sys, {module}\nsys.exit(', '.join(name for name in {LAZY!r} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr.strip()) == (0, "")
