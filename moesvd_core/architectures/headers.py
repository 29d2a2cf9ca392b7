"""What a safetensors file says about itself, believed only as far as it can be checked.

A header is the one part of a weights file that steers where we read and how much we allocate. So every statement in it is tested before a
byte of any tensor is read: sizes against shapes, offsets against the file, and that the tensors lie side by side without gap or overlap.
Source: the format description of safetensors (8 bytes little-endian header length, JSON header, data).
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from moesvd_core.errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """A type of numbers as configurations and moesvd.json call it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        key: its name in the file.
        file: the file.
        dtype, shape: as stored.
        start, stop: its bytes, counted from the beginning of the file.
    """

    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def damaged(file: Path, what: str, key: str | None = None) -> CheckpointError:
    """The error for a file (and tensor) that cannot be believed; `what` says what is wrong."""
    tensor = "" if key is None else f" tensor {shortened(key)}"
    return CheckpointError(f"{file}:{tensor} {what}; fetch the file again")


def shortened(text: object) -> str:
    """A name from a file as it may be shown: escaped, and never longer than a line."""
    shown = repr(text)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a name given twice, or nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise damaged(file, "is named twice", name)
            found[name] = value
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(file, f"is not readable JSON ({type(error).__name__}: {shortened(str(error))})") from error
    if not isinstance(parsed, dict):
        raise damaged(file, f"must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file; tensors in the order of their bytes.

    Raises:
        CheckpointError: anything that is not exactly as the format wants it; the message names the file and, where known, the tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise damaged(file, f"ends before its header does: the header needs {8 + length} bytes, the file has {size}")
            if length > LARGEST_HEADER:
                raise damaged(file, f"has a header of {length} bytes, the largest allowed is {LARGEST_HEADER}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check that it exists and is readable") from error
    fields = parse_json(text, file)
    fields.pop("__metadata__", None)
    stored = sorted((_entry(key, value, file, 8 + length) for key, value in fields.items()), key=lambda one: (one.start, one.stop))
    end = 8 + length
    for tensor in stored:
        if tensor.start != end:
            what = "overlaps the one before" if tensor.start < end else "leaves a gap before it"
            raise damaged(file, f"{what} (begins at byte {tensor.start}, not {end})", tensor.key)
        end = tensor.stop
    if end != size:
        last = stored[-1].key if stored else None
        raise damaged(file, f"ends at byte {end}, but the file has {size} bytes", last)
    return {tensor.key: tensor for tensor in stored}


def _entry(key: str, value: Any, file: Path, base: int) -> StoredTensor:
    """One tensor's line of the header, with offsets counted from the beginning of the file."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged(file, "must have exactly dtype, shape and data_offsets in the header", key)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise damaged(file, f"has dtype {shortened(value['dtype'])}, known are {', '.join(DTYPES)}", key)
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape):
        raise damaged(file, f"has shape {shortened(shape)}, which is not a list of sizes", key)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(file, f"has data_offsets {shortened(offsets)}, which are not [begin, end]", key)
    needed = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        given = offsets[1] - offsets[0]
        raise damaged(file, f"has {given} bytes, its shape {shortened(shape)} and dtype {value['dtype']} need {needed}", key)
    return StoredTensor(key, file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers that fit 63 bits (`True` is an integer to Python, not to us)."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
