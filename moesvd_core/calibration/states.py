"""Where hidden states and gradients wait between layers: in host memory, or in files when they are many or must outlive the process.

A state is a name and one tensor a batch. It is there as a whole or not at all.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from moesvd_core.atomic import sync
from moesvd_core.tensor_files import load_tensors, save_tensors

_TENSOR = "state"


class States(Protocol):
    """Tensors by name and batch."""

    def put(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        """Keep one tensor a batch, moved to the host as they are made; replaces what was there."""
        ...

    def get(self, name: str, batch: int) -> torch.Tensor:
        """A batch's tensor, on the host."""
        ...

    def count(self, name: str) -> int:
        """Number of batches kept under the name."""
        ...

    def drop(self, name: str) -> None:
        """Forget a state; nothing happens if it is not there."""
        ...


class MemoryStates:
    """States in host memory."""

    def __init__(self) -> None:
        self._batches: dict[str, list[torch.Tensor]] = {}

    def put(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        self._batches[name] = [tensor.detach().cpu() for tensor in batches]

    def get(self, name: str, batch: int) -> torch.Tensor:
        return self._batches[name][batch]

    def count(self, name: str) -> int:
        return len(self._batches.get(name, []))

    def drop(self, name: str) -> None:
        self._batches.pop(name, None)


class DiskStates:
    """States in a folder each, a file a batch; a folder gets its name when its last batch is written.

    Raises (all methods):
        StatisticsError: a file is missing or damaged.
        ResourceError: the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        temporary = self._folder / f".{name}.unfinished"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for number, tensor in enumerate(batches):
            save_tensors(self._file(temporary, number), {_TENSOR: tensor.detach().cpu()}, {})
        self.drop(name)
        os.replace(temporary, self._folder / name)
        sync(self._folder)

    def get(self, name: str, batch: int) -> torch.Tensor:
        return load_tensors(self._file(self._folder / name, batch))[0][_TENSOR]

    def count(self, name: str) -> int:
        return len(list((self._folder / name).glob("*.safetensors")))

    def drop(self, name: str) -> None:
        shutil.rmtree(self._folder / name, ignore_errors=True)

    @staticmethod
    def _file(folder: Path, batch: int) -> Path:
        return folder / f"{batch:05d}.safetensors"
