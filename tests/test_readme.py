"""No README can rot: its Python runs, its commands parse, the files it names exist, no snippet of the first is missing."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmcode.cli import command as cli
from lmcode.dist import free_port
from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

READMES = {folder: (CHECKOUT / folder / "README.md").read_text(encoding="utf-8")
           for folder in (".", "lmcode", "lmcode/memory", "lmcode/recipes", "launch", "tools", "tests")}
PROGRAM = READMES["."] + READMES["lmcode"]  # the second goes on where the first ends
SHELL = "\n".join("\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)) + "\n" + "\n".join(
    re.findall(r"`((?:deepspeed|mpirun|srun|lmcode \w+|python -m lmcode) [^`]+)`", text)) for text in READMES.values())
NOT_OURS = {"script.py", "modeling_lmcode.py"}  # the reader's own program; a file of saved models
ORIGINAL = """
config = LMCODEConfig(vocab_size=50257, hidden_size=512, num_layers=6, num_heads=8, short_term_memory_size=512,
                      long_term_memory_slots=10000)
model = LMCODE(config)
input_ids = torch.randint(0, config.vocab_size, (1, 10))
generated = model.generate(input_ids, max_length=100, temperature=0.8, top_k=50, top_p=0.9)
train_data = create_synthetic_dataset(num_samples=1000, seq_len=50)
train_dataset = MemoryDataset(train_data, memory_sample_ratio=0.2)
trainer_config = {'learning_rate': 1e-4, 'weight_decay': 0.01, 'gradient_clip': 1.0, 'memory_consolidation_interval': 1000,
                  'warmup_steps': 1000, 'total_steps': 10000}
trainer = MemoryAwareTrainer(model, trainer_config)
history = trainer.train(train_dataset, num_epochs=10, batch_size=32, eval_dataset=None)
trainer.save_checkpoint('best_model.pt')
model.store_experience("This is important information to remember")
retrieved, indices = model.query_memory("important information", top_k=5)
for layer in model.layers:
    layer.long_term_memory.consolidate_memories(threshold=0.1)
monitor = MemoryMonitor(model)
outputs = model(input_ids)
monitor.record_step(step, outputs)
stats = monitor.get_statistics()
monitor.plot_history('memory_stats.png')
analysis = analyze_memory_capacity(model, test_sequences)
efficiency = compute_memory_efficiency(model)
report = generate_memory_report(model, dataset)
fig = visualize_memory_flow(model, input_sequence)
fig = plot_training_history(history)
"""


def python_blocks() -> list[str]:
    """The Python of the READMEs; without transformers, without the blocks that need it."""
    blocks = re.findall(r"```python\n(.*?)```", PROGRAM, re.DOTALL)
    here = importlib.util.find_spec("transformers") is not None
    return [block for block in blocks if here or "transformers" not in block]


def statements(source: str) -> list[str]:
    """Top-level statements in one spelling, imports left out."""
    return [ast.unparse(node) for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom)]


def command_lines() -> list[list[str]]:
    """The arguments of every call of our program, however it is started."""
    calls = []
    for line in SHELL.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "lmcode" in line else []
        words = words[:next((at for at, word in enumerate(words) if word in (">", "|", "&&", "2>&1")), None)]
        at = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == "lmcode"), None)
        if at is not None and at + 1 < len(words):
            calls.append(words[at + 1:])
    return calls


def test_the_first_readmes_snippets_are_all_there_in_their_order() -> None:
    ours = iter(statements("\n".join(python_blocks())))
    missing = [one for one in statements(ORIGINAL) if one not in ours]  # `in` reads the iterator on: order counts
    assert not missing


ENDING = """
import json, os
assert retrieved[0].text == 'This is important information to remember' and len(indices) == 1
assert len(history['loss']) > 1 and history['loss'][-1] < history['loss'][0]
with open(f"rank-{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump([history['loss'], retrieved[0].id, retrieved[0].score, indices, outputs.logits.tolist(), stats, analysis,
               efficiency, str(report)], file, default=str)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_python_runs_in_order_as_it_stands(tmp_path: Path, ranks: int) -> None:
    """As a reader would have it: one fresh process, or the same program under the DeepSpeed launcher, where every rank gets
    the same answers. It must end well and leave the files that the text speaks of."""
    (tmp_path / "program.py").write_text("\n".join([*python_blocks(), ENDING]), encoding="utf-8")
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null", "--log_level", "error", "--master_port",
                str(free_port()), "--num_gpus", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=PATIENCE_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert {"best_model.pt", "my_model", "memory_stats.png"} <= {path.name for path in tmp_path.iterdir()}
    answers = [(tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8") for rank in range(ranks)]
    assert len(set(answers)) == 1


def test_there_are_command_lines_to_parse() -> None:
    assert {"train", "eval", "generate", "config", "doctor"} <= {line[0] for line in command_lines()}


def test_every_command_line_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for line in command_lines():
        try:
            assert cli.parse(line).run
        except SystemExit:
            pytest.fail(f"lmcode {' '.join(line)}: {capsys.readouterr().err}")


def test_the_first_page_can_be_read_in_ten_minutes() -> None:
    assert READMES["."].count("\n") <= 220


def named_files(text: str) -> set[str]:
    """What a text calls a file of the checkout: links, and names in backticks that end like a source file."""
    links = re.findall(r"\]\(([^)#]+)\)", text)
    quoted = re.findall(r"`(?:python |bash )?([\w./*-]+\.(?:py|sh|sbatch|md))\b[^`]*`", text)
    return {name for name in [*links, *quoted] if not name.startswith(("http", "/"))}


def test_every_file_that_is_named_exists() -> None:
    """Beside the README, in the checkout, or anywhere in the package for a bare name; a pattern must match something."""
    for folder, text in READMES.items():
        places = [CHECKOUT / folder, CHECKOUT, CHECKOUT / "lmcode"]
        missing = {name for name in named_files(text) - NOT_OURS
                   if not any(any(place.glob(name.removeprefix("../"))) for place in places)}
        assert not missing, f"{folder}/README.md"


def test_the_laboratory_lists_every_program() -> None:
    listed = re.findall(r"`([\w*]+\.py)`", READMES["tools"])
    programs = [path for path in (CHECKOUT / "tools").glob("*.py") if path.name != "__init__.py"]
    missing = [path.name for path in programs if not any(path.match(name) for name in listed)]
    assert programs and not missing
