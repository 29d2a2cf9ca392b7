"""Where hidden states and gradients wait between layers: in host memory, or in files when they are many or must outlive the process; in
front of either on the card that they come from, as far as it has room.

A state is a name and one tensor a batch. It is there as a whole or not at all.
"""

import os
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch

from moesvd_core.atomic import sync
from moesvd_core.devices import on_card, room, to_host
from moesvd_core.tensor_files import load_tensors, save_tensors

_TENSOR = "state"


class States(Protocol):
    """Tensors by name and batch."""

    def put(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        """Keep one tensor a batch, put away as they are made; replaces what was there."""
        ...

    def get(self, name: str, batch: int) -> torch.Tensor:
        """A batch's tensor, wherever it was kept."""
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
        self._batches[name] = [to_host(tensor.detach()) for tensor in batches]

    def get(self, name: str, batch: int) -> torch.Tensor:
        return self._batches[name][batch]

    def count(self, name: str) -> int:
        return len(self._batches.get(name, []))

    def drop(self, name: str) -> None:
        self._batches.pop(name, None)


class DeviceStates:
    """States on a graphics card, the first batches of each as far as there is room, the others in another place."""

    def __init__(self, device: torch.device, others: States) -> None:
        self._device, self._others = device, others
        self._batches: dict[str, list[torch.Tensor]] = {}

    def put(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        kept: list[torch.Tensor] = []
        left = iter(batches)
        for tensor in left:
            if tensor.nbytes > room(self._device):
                self._others.put(name, chain([tensor], left))
                break
            kept.append(tensor.detach().to(self._device))
        else:
            self._others.drop(name)
        self._batches[name] = kept

    def get(self, name: str, batch: int) -> torch.Tensor:
        kept = self._batches[name]
        return kept[batch] if batch < len(kept) else self._others.get(name, batch - len(kept))

    def count(self, name: str) -> int:
        return len(self._batches.get(name, [])) + self._others.count(name)

    def drop(self, name: str) -> None:
        self._batches.pop(name, None)
        self._others.drop(name)


def before(device: torch.device, others: States) -> States:
    """States of a device: on it where it is a card, and in another place what it has no room for."""
    return DeviceStates(device, others) if on_card(device) else others


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
            save_tensors(self._file(temporary, number), {_TENSOR: to_host(tensor.detach())}, {})
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
