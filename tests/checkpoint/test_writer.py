"""Safetensors files written tensor by tensor: the library must read them as if it had written them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moesvd_core.architectures.headers import read_header
from moesvd_core.checkpoint.writer import ShardWriter
from moesvd_core.errors import CheckpointError

TENSORS = {
    "three bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "wide": torch.randn(3, 5, dtype=torch.float64),
    "odd bfloat16": torch.randn(7).bfloat16(),
    "single": torch.tensor(3.5),
    "empty": torch.zeros(1, 2, 0),
    "view": torch.randn(6, 4).T,
    "flags": torch.tensor([True, False]),
    "numbers": torch.arange(5),
    "eighths": torch.randn(3).to(torch.float8_e4m3fn),
}


def written(folder: Path, limit: int) -> dict[str, torch.Tensor]:
    writer = ShardWriter(folder, limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    writer.close()
    assert writer.bytes == sum(tensor.numel() * tensor.itemsize for tensor in TENSORS.values())
    assert writer.parameters == sum(tensor.numel() for tensor in TENSORS.values())
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
            found |= {name: stream.get_tensor(name) for name in stream.keys()}
    return found


@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, limit: int) -> None:
    found = written(tmp_path, limit)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def test_every_tensor_starts_at_a_multiple_of_its_numbers(tmp_path: Path) -> None:
    written(tmp_path, 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    for stored in read_header(tmp_path / "model.safetensors").values():
        assert stored.start % stored.dtype.itemsize == 0


def test_shards_are_numbered_and_indexed(tmp_path: Path) -> None:
    written(tmp_path, 60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / file)


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 4)
    for name in ("first", "second"):
        writer.add(name, torch.zeros(1))
    for name in ("first", "second"):
        with pytest.raises(CheckpointError, match=f"'{name}' would be written twice"):
            writer.add(name, torch.zeros(1))
    writer.close()


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"'z' has dtype torch\.complex128"):
        writer.add("z", torch.zeros(1, dtype=torch.complex128))
