"""A safetensors header is believed only where it agrees with the file: every damage ends in an error that names the file."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesvd_core.architectures.headers import read_header
from moesvd_core.errors import CheckpointError

HALF, WIDE = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]}


def written(file: Path, header: Any, data: int = 28, length: int | None = None) -> Path:
    """A file with the given header (an object, or raw bytes) and `data` zero bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return file


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A real file with three tensors, written by the library itself."""
    file = tmp_path / "small.safetensors"
    tensors = {"a.weight": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7)}
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def test_says_what_the_library_wrote(small: Path) -> None:
    found = read_header(small)
    assert {key: (one.dtype, one.shape) for key, one in found.items()} == {
        "a.weight": (torch.float32, (2, 3)),
        "b": (torch.bfloat16, (4,)),
        "c": (torch.int64, ()),
    }
    assert sum(one.stop - one.start for one in found.values()) == 24 + 8 + 8


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"x": HALF, "y": {**WIDE, "data_offsets": [10, 26]}}, r"'y' overlaps"),
        ({"x": HALF, "y": {**WIDE, "data_offsets": [14, 30]}}, r"'y' leaves a gap"),
        ({"x": {**HALF, "data_offsets": [2, 14]}}, r"'x' leaves a gap"),
        ({"x": HALF}, r"'x' ends at byte \d+, but the file has"),
        ({}, r"ends at byte"),
        ({"x": HALF, "y": {**WIDE, "shape": [5]}}, r"'y' has 16 bytes, its shape \[5\] and dtype F32 need 20"),
        ({"x": HALF, "y": {**WIDE, "dtype": "F64"}}, r"'y' has 16 bytes"),
        ({"x": HALF, "y": {**WIDE, "dtype": "F33"}}, r"'y' has dtype 'F33', known are"),
        ({"x": HALF, "y": {**WIDE, "dtype": ["F32"]}}, r"'y' has dtype"),
        ({"x": HALF, "y": {**WIDE, "shape": [-4]}}, r"'y' has shape \[-4\]"),
        ({"x": HALF, "y": {**WIDE, "shape": [4.0]}}, r"'y' has shape \[4.0\]"),
        ({"x": HALF, "y": {**WIDE, "shape": [True, 4]}}, r"'y' has shape"),
        ({"x": HALF, "y": {**WIDE, "shape": [2**63, 0]}}, r"'y' has shape"),
        ({"x": HALF, "y": {**WIDE, "shape": "4"}}, r"'y' has shape '4'"),
        ({"x": HALF, "y": {**WIDE, "data_offsets": [28, 12]}}, r"'y' has data_offsets"),
        ({"x": HALF, "y": {**WIDE, "data_offsets": [12]}}, r"'y' has data_offsets"),
        ({"x": HALF, "y": {**WIDE, "data_offsets": [-4, 12]}}, r"'y' has data_offsets"),
        ({"x": HALF, "y": {"dtype": "F32", "shape": [4]}}, r"'y' must have exactly"),
        ({"x": HALF, "y": {**WIDE, "strides": [1]}}, r"'y' must have exactly"),
        ({"x": HALF, "y": [1]}, r"'y' must have exactly"),
        ([HALF], r"must hold a JSON object, got list"),
        (b'{"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"x":{}}', r"'x' is named twice"),
        (b'{"x":{"dtype":"F16","dtype":"F32"}}', r"'dtype' is named twice"),
        (b"\xff\xfe", r"not readable JSON \(UnicodeDecodeError"),
        (b'{"x":', r"not readable JSON"),
        (b"[" * 200_000, r"not readable JSON \(RecursionError"),
        (b'{"x":{"dtype":"F16","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,12]}}', r"not readable JSON|has shape"),
    ],
)
def test_refuses_a_header_that_contradicts_itself_or_the_file(header: Any, reason: str, tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=reason) as raised:
        read_header(file)
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) < len(str(file)) + 500


@pytest.mark.parametrize("length", [29, 2**31, 2**63, 2**64 - 1])
def test_refuses_a_header_longer_than_the_file_without_allocating_it(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ends before its header does"):
        read_header(written(tmp_path / "x.safetensors", b"", data=28, length=length))


def test_refuses_a_header_above_the_limit_of_the_format(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # a hole: takes no disk
    with pytest.raises(CheckpointError, match="the largest allowed is 100000000"):
        read_header(file)


def test_refuses_a_file_cut_at_any_byte(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(cut)


def test_refuses_or_changes_nothing_that_a_tensor_depends_on_for_every_flipped_bit_of_the_header(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    original = read_header(small)
    flipped_file = tmp_path / "flipped.safetensors"
    refused = 0
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * header_bytes):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        flipped_file.write_bytes(flipped)
        try:
            found = read_header(flipped_file)
        except CheckpointError:
            refused += 1
            continue
        # Accepted: at most one tensor has another name (which the model, that asks for the old one, will miss); the rest is as it was.
        assert len(set(original) - set(found)) <= 1
        for key in set(original) & set(found):
            assert (found[key].start, found[key].stop) == (original[key].start, original[key].stop)
            assert (found[key].dtype, found[key].shape) == (original[key].dtype, original[key].shape)
    assert refused > 4 * header_bytes


def test_names_from_a_file_are_escaped_in_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_header(written(tmp_path / "x.safetensors", {"\x1b[2J\n<script>" + "z" * 500: [1]}))
    assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value) and "z" * 150 not in str(raised.value)
