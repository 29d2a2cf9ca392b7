"""A finished export without a model: what those who list, download and push exports need."""

import json
from pathlib import Path

from moesvd_core.checkpoint.manifest import write_manifest
from moesvd_core.runs.folder import RunFolder

NAME = "tiny-auto-40-factored"


def add_export(run: RunFolder, name: str = NAME, size: int = 1000) -> Path:
    """An export whose weights are `size` zero bytes."""
    folder = run.station("exports") / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(size))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny, compressed\n\nFactors.\n", encoding="utf-8")
    facts = {"format": "factored", "ratio": 0.41, "parameters": 59, "original_parameters": 100, "method": "auto", "bytes": size}
    (folder / "moesvd.json").write_text(json.dumps(facts), encoding="utf-8")
    write_manifest(folder)
    return folder
