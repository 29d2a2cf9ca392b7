"""Curves on disk: planning then needs neither weights nor statistics, and takes milliseconds.

One safetensors file a layer and decomposition holds the arrays of its curves, with what is not an array in the metadata.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moesvd_core.atomic import replacing
from moesvd_core.errors import RunError
from moesvd_core.planning import SideCurve

FORMAT = "moesvd-curves-1"


def save_curves(path: Path, curves: Sequence[SideCurve]) -> None:
    """Write curves to `path`, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {}
    facts: list[dict[str, Any]] = []
    for number, curve in enumerate(curves):
        values = {item.name: getattr(curve, item.name) for item in fields(curve)}
        tensors |= {f"{number}.{name}": np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        facts.append({name: value for name, value in values.items() if not isinstance(value, np.ndarray)})
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "curves": json.dumps(facts)})


def load_curves(path: Path) -> list[SideCurve] | None:
    """Curves as they were saved, or None when there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["curves"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        return [
            SideCurve(**fact, **{name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{number}.")})
            for number, fact in enumerate(facts)
        ]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}): delete it, it will be made again") from error
