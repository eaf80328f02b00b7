"""tests/ mirrors lmcode/: where the test of a module is, and who in tests/ and tools/ may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.sources import CHECKOUT, FILES, imported_names, imports

TESTS = sorted(path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "tests").rglob("*.py"))
TOOLS = sorted(path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "tools").glob("*.py"))
NO_PACKAGE = {"cluster", "helpers", "launch", "tools"}  # folders of tests/ for what is no package of lmcode/
# Modules without a test file of their name, by the file in tests/ that holds what they promise.
TESTED_IN = {
    "__main__": "launch/test_starts",
    "bench/banks": "bench/test_evict",
    "bench/keys": "bench/test_search",
    "bench/memorizing": "bench/test_step",
    "bench/peers": "bench/test_search",
    "bench/turns": "bench/test_search",
    "bench/workers": "bench/test_search",
    "cli/answers": "cli/test_memory",
    "cli/bench": "bench/test_search",
    "cli/cluster": "jobs/test_slurm",
    "cli/console": "cli/test_command",
    "cli/doctor": "doctor/test_hosts",
    "cli/generating": "launch/test_starts",
    "data/parquet": "data/test_formats",
    "data/sources": "data/test_corpus",
    "data/zstd": "data/test_formats",
    "doctor/agent": "doctor/test_hosts",
    "doctor/compare": "doctor/test_hosts",
    "doctor/facts": "doctor/test_hosts",
    "doctor/folder": "doctor/test_host",
    "doctor/link": "doctor/test_hosts",
    "doctor/row": "doctor/test_host",
    "eval/consolidation": "cli/test_memory",
    "eval/learning": "eval/test_suite",
    "eval/reading": "eval/test_held_out",
    "eval/run": "cli/test_memory",
    "eval/tasks/needles": "eval/tasks/test_task",
    "eval/tasks/recall": "eval/tasks/test_task",
    "eval/tasks/shared": "eval/tasks/test_task",
    "eval/texts": "eval/test_suite",
    "eval/trial": "eval/test_suite",
    "files/commit": "files/test_durable",
    "files/replace": "saved/test_foreign_files",
    "jobs/verdict": "jobs/test_watch",
    "memories/experience_files": "memories/test_experiences",
    "memories/experience_input": "memories/test_experiences",
    "memories/files": "memories/test_deletion",
    "memories/memories": "test_language_model",
    "memories/remembering": "memories/test_experiences",
    "memory/entry": "memory/test_shard",
    "memory/ledger": "memory/test_shard",
    "memory/directory": "memory/test_shard",
    "memory/measure": "memory/test_bank",
    "memory/planning": "memory/search/test_ivf",
    "memory/read": "memory/test_bank",
    "memory/ring": "memory/test_evict",
    "memory/rounds": "memory/test_consolidate",
    "memory/searcher": "memory/test_shard",
    "memory/states": "memory/test_store",
    "memory/views": "memory/test_shard",
    "memory/search/choice": "memory/search/test_faiss_index",
    "memory/search/decide": "memory/search/test_exact",
    "memory/search/flat": "memory/search/test_faiss_index",
    "memory/search/graphs": "memory/search/test_hnsw",
    "memory/search/pairs": "memory/search/test_exact",
    "memory/search/plan": "memory/search/test_ivf",
    "memory/ticket": "memory/test_shard",
    "memory/write": "memory/test_bank",
    "model/generation/decode": "model/test_cache",
    "model/generation/layout": "model/generation/test_generate",
    "model/inputs": "model/test_lm",
    "model/layer": "model/test_lm",
    "model/loss": "model/test_lm",
    "model/rotary": "model/test_attention",
    "model/state": "model/test_lm",
    "presets": "test_config",
    "processor": "doctor/test_host",
    "protocol": "memory/test_bank",
    "backbone_config": "recipes/test_attached",
    "recipes/anatomy": "recipes/test_camelot",
    "recipes/attach": "recipes/test_attached",
    "recipes/foreign": "recipes/test_attached",
    "recipes/joint": "recipes/test_camelot",
    "recipes/own_read": "recipes/test_attached",
    "recipes/pool": "recipes/test_mplus",
    "recipes/recipe": "recipes/test_attached",
    "report/charts": "report/test_page",
    "report/facts": "report/test_page",
    "report/flow": "report/test_analysis",
    "report/history": "report/test_page",
    "report/suite": "eval/test_suite",
    "report/markup": "report/test_page",
    "report/plots": "saved/test_foreign_files",
    "report/reading": "report/test_page",
    "report/run": "report/test_page",
    "report/sections": "report/test_page",
    "report/sequences": "report/test_analysis",
    "report/style": "report/test_page",
    "saved/amend": "cli/test_memory",
    "saved/places": "test_opening",
    "train/engine": "train/test_train_step",
    "train/flops": "train/test_profiling",
    "train/metrics": "train/test_writers",
    "train/observe": "train/test_train_step",
    "train/optimizer_files": "train/test_trainer",
    "train/path_checkpoint": "train/test_trainer",
    "train/progress": "launch/test_starts",
    "train/resuming": "saved/test_checkpoint",
    "train/saving": "saved/test_checkpoint",
    "train/session": "train/test_loop",
    "train/start": "train/test_loop",
    "train/stream_files": "saved/test_checkpoint",
    "version": "launch/test_examples",
}


def modules(files: list[str]) -> list[str]:
    """'memory/search/exact' for 'lmcode/memory/search/exact.py'; the packages themselves hold only re-exports."""
    return [file.split("/", 1)[1].removesuffix(".py") for file in files if not file.endswith("__init__.py")]


def own_test(module: str) -> str:
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def strays(modules: list[str], tests: list[str], tested_in: dict[str, str]) -> Iterator[str]:
    """What breaks the mirror: modules without a test, rows of the table that are wrong, folders that are nobody's."""
    for module in modules:
        if own_test(module) not in tests and module not in tested_in:
            yield f"lmcode/{module}.py has neither tests/{own_test(module)}.py nor a row in TESTED_IN"
        if own_test(module) in tests and module in tested_in:
            yield f"lmcode/{module}.py has a test file of its own: take its row out of TESTED_IN"
    for module, test in tested_in.items():
        if module not in modules or test not in tests:
            yield f"the row '{module}': '{test}' of TESTED_IN names a file that does not exist"
    folders = {folder.as_posix() for module in modules for folder in Path(module).parents}
    for test in tests:
        if test.split("/")[0] not in NO_PACKAGE and Path(test).parent.as_posix() not in folders:
            yield f"tests/{test}.py lies in a folder that is no package of lmcode/"


def test_every_module_has_its_test_where_a_newcomer_looks() -> None:
    assert not [*strays(modules(FILES), modules(TESTS), TESTED_IN)]


def test_what_breaks_the_mirror_is_seen() -> None:
    tests = ["memory/test_bank", "test_config"]
    assert not [*strays(["memory/bank", "config"], tests, {})]
    assert len([*strays(["memory/bank", "config", "memory/new"], tests, {})]) == 1
    assert len([*strays(["memory/bank", "config"], tests, {"config": "memory/test_bank"})]) == 1
    assert len([*strays(["memory/bank", "config"], tests, {"memory/gone": "test_config"})]) == 1
    assert len([*strays(["memory/bank", "config"], [*tests, "elsewhere/test_bank"], {})]) == 1


def imports_of(file: str) -> set[str]:
    """What a file of tests/ or tools/ imports; a program in tools/ is imported by its bare name."""
    bare = {Path(tool).stem for tool in TOOLS}
    names = imports(file)
    return {f"tools.{name}" if name.split(".")[0] in bare else name for name in names}


def of_tests(names: set[str]) -> list[str]:
    """The names among these that are a test module or lie in one."""
    return sorted(name for name in names if any(part.startswith("test_") for part in name.split(".")))


def test_no_test_module_imports_another() -> None:
    """What two of them need is in tests/helpers/."""
    for file in [*TESTS, *TOOLS]:
        wrong = of_tests(imports_of(file))
        assert not wrong, f"{file} imports {wrong}"
    source = "from tests.memory.test_bank import x\nfrom tests.memory import test_merge\nfrom test_loop import y\n"
    assert len(of_tests({*imported_names(ast.parse(source), "tests/test_x.py")})) == 3, "the walk sees every spelling"


def test_tools_and_tests_share_the_helpers_alone() -> None:
    for file in TOOLS:
        wrong = [name for name in imports_of(file) if name.startswith("tests.") and not name.startswith("tests.helpers.")]
        assert not wrong, f"{file} imports {wrong}"
    for file in TESTS:
        wrong = [name for name in imports_of(file) if name.startswith("tools.")]
        assert not wrong or file.startswith("tests/tools/"), f"{file} imports {wrong}"
    assert any(name.startswith("tools.") for name in imports_of("tests/tools/test_chaos.py")), "the walk sees bare names"
