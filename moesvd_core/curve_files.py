"""Curves on disk: planning then needs neither weights nor statistics, and takes milliseconds.

One safetensors file a layer and decomposition holds the arrays of its curves, with what is not an array in the metadata, and a
digest of both.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesvd_core.errors import MoesvdError, RunError
from moesvd_core.planning import SideCurve
from moesvd_core.tensor_files import MADE_AGAIN, has_format, load_tensors, save_tensors

FORMAT = "moesvd-curves-1"
"""Version of the files; curves in another are made again."""


def save_curves(path: Path, curves: Sequence[SideCurve]) -> None:
    """Write curves to `path`, whole or not at all.

    Raises:
        ResourceError: the disk is full.
        OSError: the file cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {}
    facts: list[dict[str, Any]] = []
    for number, curve in enumerate(curves):
        values = {item.name: getattr(curve, item.name) for item in fields(curve)}
        tensors |= {f"{number}.{name}": np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        facts.append({name: value for name, value in values.items() if not isinstance(value, np.ndarray)})
    written = {name: torch.from_numpy(array) for name, array in tensors.items()}
    save_tensors(path, written, {"format": FORMAT, "curves": json.dumps(facts)})


def are_current(path: Path) -> bool:
    """Whether there is a file of curves in today's form."""
    return path.exists() and has_format(path, FORMAT)


def load_curves(path: Path) -> list[SideCurve] | None:
    """Curves as they were saved, or None when there is no such file, or one in the form of another version.

    Raises:
        RunError: the file is damaged.
    """
    if not are_current(path):
        return None
    tensors, facts = load_tensors(path, error_type=RunError, fix=MADE_AGAIN, undigested=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    try:
        return [
            SideCurve(**fact, **{name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{number}.")})
            for number, fact in enumerate(json.loads(facts["curves"]))
        ]
    except (ValueError, KeyError, TypeError, MoesvdError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}): {MADE_AGAIN}") from error
