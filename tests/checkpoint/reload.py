"""Run as a process of its own: load exports as a user would, and keep the logits that a batch gives.

    python reload.py import|trust|both|neither BATCH

The way says what makes the factored format known: the package's import, the file of code in the export, both, or neither. In ways without
the package it cannot be imported. Each line of the input is a list of an output file and folders to load, in JSON; each line of the answer
says that one was worked through. The output holds each folder's logits by its path's last two names; errors stand in its metadata.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(way: str, batch: str) -> None:
    """Work through the input, line by line."""
    if way in ("import", "both"):
        import moesvd_core  # noqa: F401
    else:
        sys.modules["moesvd_core"] = None
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for line in sys.stdin:
        output, *folders = json.loads(line)
        load(way, batch, output, folders)
        print("done", flush=True)


def load(way: str, batch: str, output: str, folders: list[str]) -> None:
    """Load every folder and save what it answers."""
    from transformers import AutoModelForCausalLM

    logits: dict[str, torch.Tensor] = {}
    errors: dict[str, str] = {}
    for path in map(Path, folders):
        name = f"{path.parent.name}/{path.name}"
        try:
            model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=way in ("trust", "both"), output_loading_info=True)
            if any(info.values()):
                raise AssertionError(f"loading reports {info}")
            with torch.no_grad():
                logits[name] = model(**load_file(batch)).logits
        except Exception as error:  # whatever it is, it is what the user would see
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(logits, output, metadata=errors)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
