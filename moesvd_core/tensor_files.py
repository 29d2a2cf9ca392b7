"""Tensors on disk: whole or not there, and damage is noticed before a number is used.

A safetensors file says where each tensor lies, but not whether its bytes are still those that were written; a digest in the file's metadata
does.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moesvd_core.atomic import is_disk_full, replacing
from moesvd_core.errors import MoesvdError, ResourceError, StatisticsError

_KEY = "moesvd"
_FIX = "remove the folder of statistics and calibrate again"
MADE_AGAIN = "delete it, it will be made again"
"""What to do about a damaged file that follows from statistics and weights."""


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write host tensors and plain facts to a safetensors file.

    Raises:
        ResourceError: the disk is full.
        OSError: the folder cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps({"facts": dict(facts), "digest": _digest(contiguous, facts)})}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            needed = sum(tensor.nbytes for tensor in contiguous.values())
            free = shutil.disk_usage(path.parent).free
            raise ResourceError(f"the disk is full: {path} needs {needed:,} bytes, {free:,} are free; free some and start again") from error
        raise


def load_tensors(
    path: Path, *, error_type: type[MoesvdError] = StatisticsError, fix: str = _FIX, undigested: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts of a file that `save_tensors` wrote, in memory of their own.

    Args:
        error_type: of what is raised.
        fix: what to do about a bad file, for its message.
        undigested: also take a file of an earlier version, which has no digest: its metadata are the facts.

    Raises:
        StatisticsError (or `error_type`): missing or damaged; names the file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if undigested and _KEY not in metadata:
            return tensors, metadata
        signed = json.loads(metadata[_KEY])
        facts, digest = signed["facts"], signed["digest"]
    except FileNotFoundError as error:
        raise error_type(f"{path} is missing: {fix}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise error_type(f"{path} is damaged ({type(error).__name__}: {error}): {fix}") from error
    if digest != _digest(tensors, facts):
        raise error_type(f"{path} is damaged (its content does not match its digest): {fix}")
    return tensors, facts


def facts_in(path: Path) -> dict[str, Any]:
    """The facts of a file alone, of whichever version; none of one that is missing or damaged, which `load_tensors` tells."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return dict(json.loads(metadata[_KEY])["facts"]) if _KEY in metadata else metadata
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}


def has_format(path: Path, form: str) -> bool:
    """Whether a file is in this form, as far as it tells; that it is damaged is told by whoever reads it."""
    return bool(facts_in(path).get("format", form) == form)


def _digest(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """SHA-256 over the facts, and the names, formats, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
