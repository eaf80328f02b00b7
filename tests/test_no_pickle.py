"""No pickle, and nothing else that runs what it reads, on any path in the library: an `ast` walk over all its files.

There is one exception, and it reads nothing from a disk: `dist.Group.all_gather_object` sends small values between the
ranks of one job, which torch pickles on the way; no call here says so. `np.load` refuses pickles unless told otherwise.
"""

from __future__ import annotations

import ast

import pytest

from tests.helpers.sources import FILES, imported_names, tree

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg", "runpy", "code"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package",
         "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "faiss.read_index", "faiss.deserialize_index"}
BUILT_INS = {"eval", "exec", "compile", "__import__"}
SAFE_LOADERS = {"yaml.SafeLoader", "PlainLoader"}  # PlainLoader: a SafeLoader without aliases


def dangers(module: ast.Module, file: str) -> list[str]:
    """What a file does that could run what it reads."""
    found = [f"imports {name}" for name in imported_names(module, file) if {*name.split(".")[:2]} & MODULES]
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS or name in BUILT_INS or name.split(".")[-1] in ("load_pickle", "read_pickle"):
            found.append(f"calls {name}")
        if name == "yaml.load" and options.get("Loader") not in SAFE_LOADERS:
            found.append(f"calls yaml.load with {options.get('Loader')}")
        if options.get("allow_pickle") == "True" or options.get("trust_remote_code") == "True":
            found.append(f"calls {name} with {options}")
    return found


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads as l", "import torch\ntorch.load('x')", "torch.save(a, b)", "import shelve",
    "def f():\n    import marshal", "eval('1')", "exec(text)", "np.load(f, allow_pickle=True)",
    "yaml.load(text, Loader=yaml.Loader)", "yaml.load(text)", "yaml.unsafe_load(text)", "__import__(name)", "import dill",
    "AutoModel.from_pretrained(x, trust_remote_code=True)", "pandas.read_pickle(x)", "faiss.read_index(x)"])
def test_the_walk_sees_it(source: str) -> None:
    assert dangers(ast.parse(source), "lmcode/x.py")


@pytest.mark.parametrize("source", ["model.eval()", "load_file(path)", "yaml.safe_load(text)", "re.compile(x)",
                                    "json.loads(text)", "yaml.load(text, Loader=yaml.SafeLoader)",
                                    "np.load(path)"])
def test_the_walk_lets_this_pass(source: str) -> None:
    assert not dangers(ast.parse(source), "lmcode/x.py")


def test_nothing_that_is_read_is_run() -> None:
    found = {file: dangers(tree(file), file) for file in FILES}
    assert not {file: wrong for file, wrong in found.items() if wrong}
