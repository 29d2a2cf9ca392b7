"""Safetensors files written tensor by tensor, as they are made, with no more memory than the tensor itself.

The header stands at the front of a safetensors file, but is known only when the last tensor is: so the bytes of a shard go to side files
first, one for each size of number (readers want every tensor aligned to its own numbers: the largest come first), and are joined behind
the header when the shard is full. Source: the format description of safetensors.
"""

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moesvd_core.architectures.files import INDEX, WEIGHTS
from moesvd_core.architectures.headers import DTYPES
from moesvd_core.errors import CheckpointError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = (8, 4, 2, 1)
_CHUNK = 1 << 22


class ShardWriter:
    """Writes tensors into a folder as model.safetensors, or as numbered shards with their index.

    Attributes:
        parameters: numbers written so far.
        bytes: their bytes.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        """Start in an empty folder; a shard holds at most `shard_size` bytes of tensors, or a single larger one."""
        self.parameters = self.bytes = 0
        self._folder, self._limit = folder, shard_size
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self._start()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, bit for bit.

        Raises:
            CheckpointError: a tensor of that name was written before, or its dtype is not part of the format.
            OSError: the disk is full.
        """
        if name in self._shard_of or name in self._header:
            raise CheckpointError(f"tensor '{name}' would be written twice into {self._folder}")
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"tensor '{name}' has dtype {tensor.dtype}, which safetensors files cannot hold")
        size = tensor.numel() * tensor.itemsize
        if self._header and self._filled + size > self._limit:
            self._close()
        stream = self._stream(tensor.itemsize)
        self._header[name] = (tensor.itemsize, stream.tell(), size, {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)})
        flat_B = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        stream.write(flat_B.numpy().data)
        self._filled += size
        self.bytes += size
        self.parameters += tensor.numel()

    def finish(self) -> None:
        """Close the last shard, give the files their final names and write the index."""
        if self._header:
            self._close()
        if self._shards == 1:
            self._part(1).rename(self._folder / WEIGHTS)
            return
        names = {shard: f"model-{shard:05d}-of-{self._shards:05d}.safetensors" for shard in range(1, self._shards + 1)}
        for shard, name in names.items():
            self._part(shard).rename(self._folder / name)
        weight_map = {key: names[shard] for key, shard in sorted(self._shard_of.items())}
        index = {"metadata": {"total_size": self.bytes, "total_parameters": self.parameters}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the side files, after an error too."""
        for stream in self._streams.values():
            stream.close()

    def _start(self) -> None:
        self._header: dict[str, tuple[int, int, int, dict[str, Any]]] = {}
        self._streams: dict[int, BinaryIO] = {}
        self._filled = 0

    def _stream(self, itemsize: int) -> BinaryIO:
        if itemsize not in self._streams:
            self._streams[itemsize] = (self._folder / f"side-{itemsize}").open("w+b")
        return self._streams[itemsize]

    def _part(self, shard: int) -> Path:
        return self._folder / f"part-{shard:05d}"

    def _close(self) -> None:
        """Join header and side files into the next shard."""
        base, start = {}, 0
        for itemsize in _SIZES:
            base[itemsize] = start
            start += self._streams[itemsize].tell() if itemsize in self._streams else 0
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(self._header.items(), key=lambda item: (-item[1][0], item[1][1]))
        for name, (itemsize, offset, size, entry) in ordered:
            begin = base[itemsize] + offset
            fields[name] = entry | {"data_offsets": [begin, begin + size]}
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._shards += 1
        with self._part(self._shards).open("wb") as shard:
            shard.write(len(header).to_bytes(8, "little") + header)
            for itemsize in _SIZES:
                if itemsize in self._streams:
                    stream = self._streams[itemsize]
                    stream.seek(0)
                    shutil.copyfileobj(stream, shard, _CHUNK)
                    stream.close()
                    (self._folder / f"side-{itemsize}").unlink()
        self._shard_of |= dict.fromkeys(self._header, self._shards)
        self._start()
