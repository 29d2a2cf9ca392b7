"""A model folder that was checked before anything of it is used, and the tensors in it, read without mapping files into memory.

Model folders come from strangers. Only `config.json` and safetensors files are opened here, only inside the folder, and whatever does not
fit together is a `CheckpointError` that names the file and the tensor. Tensors are read into buffers of our own, not mapped: mapped pages
would count as this process's memory long after the layer they belong to was dropped.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from moesvd_core.architectures import deepseek  # noqa: F401 - makes the family native, so that its auto_map code is not needed
from moesvd_core.architectures.headers import StoredTensor, damaged, parse_json, read_header, shortened
from moesvd_core.architectures.hub_download import download_model
from moesvd_core.errors import CheckpointError, InputError, UnsupportedModelError
from moesvd_core.progress import Report, silent

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 100_000_000
STAGED_BYTES = 4 << 20
"""What is held at once of a tensor whose dtype or device changes on reading (at least one of its rows)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,240}\.safetensors")


class ModelFiles:
    """A checked model folder.

    Attributes:
        folder: the folder, resolved.
        config: content of config.json.
        weight_map: tensor name -> the safetensors file that holds it, for every tensor of the model.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.config = config
        self.weight_map = {key: tensor.file for key, tensor in tensors.items()}
        self._tensors = tensors

    @classmethod
    def open(cls, path: Path | str, *, allow_remote_code: bool = False) -> "ModelFiles":
        """Check a model folder: configuration, index, and the header of every weights file. No tensor is read.

        Raises:
            CheckpointError: a file is missing, damaged, unsafe or inconsistent.
            UnsupportedModelError: the model needs code of its own and `allow_remote_code` is false.
        """
        folder = real_folder(path)
        _refuse_links_outside(folder)
        config = read_config(folder)
        if not allow_remote_code:
            refuse_remote_code(config, folder)
        return cls(folder, config, _tensors(folder))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.stop - tensor.start for tensor in self._tensors.values())

    def header(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor as stored, without reading it.

        Raises:
            CheckpointError: no such tensor.
        """
        tensor = self._stored(key)
        return tensor.dtype, tensor.shape

    def read(self, key: str, *, finite: bool = False) -> torch.Tensor:
        """Read one tensor as stored, on the host.

        Args:
            finite: also require that a floating tensor holds neither NaN nor Inf.

        Raises:
            CheckpointError: no such tensor, the file became shorter, or a value that is not finite.
        """
        return self._read(self._stored(key), 0, None, finite)

    def read_slice(self, key: str, start: int, stop: int, *, finite: bool = False) -> torch.Tensor:
        """Read rows `start` to `stop` (exclusive) of a tensor's first dimension, and only their bytes.

        Raises:
            CheckpointError: as `read`, and rows that the tensor does not have.
        """
        tensor = self._stored(key)
        rows = tensor.shape[0] if tensor.shape else 0
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"{tensor.file}: rows {start}:{stop} of tensor {shortened(key)} asked for, it has {rows}")
        return self._read(tensor, start, stop, finite)

    def read_into(self, key: str, target: torch.Tensor) -> None:
        """Read a tensor straight into `target`, converting dtype and device on the way; floating values must be finite.

        Raises:
            CheckpointError: as `read`, and a shape that differs from the target's.
        """
        tensor = self._stored(key)
        if tensor.shape != tuple(target.shape):
            raise damaged(tensor.file, f"has shape {list(tensor.shape)}, the model's configuration asks for {list(target.shape)}", key)
        if tensor.dtype == target.dtype and target.device.type == "cpu" and target.is_contiguous():
            _fill(tensor, tensor.start, target.view(-1).view(torch.uint8))
            require_finite(target, tensor)
        elif not tensor.shape:
            target.copy_(self._read(tensor, 0, None, finite=True))
        else:
            rows = max(1, STAGED_BYTES * tensor.shape[0] // max(tensor.stop - tensor.start, 1))
            for start in range(0, tensor.shape[0], rows):
                stop = min(start + rows, tensor.shape[0])
                target[start:stop].copy_(self._read(tensor, start, stop, finite=True))

    def announce(self, keys: Sequence[str]) -> None:
        """Ask the system to fetch tensors into its own cache, where it can be asked; returns at once, and takes no memory of the process.

        Raises:
            CheckpointError: no such tensor.
        """
        for tensor in map(self._stored, keys):
            _announce(tensor)

    def _read(self, tensor: StoredTensor, start: int, stop: int | None, finite: bool) -> torch.Tensor:
        shape = tensor.shape if stop is None else (stop - start, *tensor.shape[1:])
        row_bytes = (tensor.stop - tensor.start) // max(tensor.shape[0], 1) if tensor.shape else 0
        value = torch.empty(shape, dtype=tensor.dtype)
        _fill(tensor, tensor.start + start * row_bytes, value.view(-1).view(torch.uint8))
        if finite:
            require_finite(value, tensor)
        return value

    def _stored(self, key: str) -> StoredTensor:
        try:
            return self._tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no weights file holds tensor {shortened(key)}; fetch the model again") from None


def resolve_model(
    name_or_path: Path | str, *, roots: Sequence[Path] | None = None, allow_remote_code: bool = False, report: Report = silent
) -> Path:
    """The folder of a model that a person named: a local folder, or a model of the hub, which is fetched (weights in safetensors only).

    A local folder wins over a model of the hub of the same name.

    Args:
        roots: folders in which local models must lie, links followed; None allows any place.
        allow_remote_code: also accept (and fetch the code of) models that only run with code of their own.
        report: called with stage "fetch" while a model is downloaded.

    Raises:
        InputError: neither a folder nor a name of the hub, or outside the roots.
        CheckpointError: the hub cannot deliver it, or its configuration is damaged.
        ResourceError: it does not fit on the disk of the hub's cache.
        Cancelled: `report` said so.
        UnsupportedModelError: the model needs code of its own and `allow_remote_code` is false.
    """

    def accept(folder: Path) -> None:
        if not allow_remote_code:
            refuse_remote_code(read_config(folder), folder)

    text = str(name_or_path)
    if _exists(text):
        folder = real_folder(text)
        if roots is not None and not any(folder.is_relative_to(Path(root).resolve()) for root in roots):
            allowed = ", ".join(str(root) for root in roots)
            raise InputError(f"{shortened(text)} lies outside the folders that models may come from ({allowed}); move it into one of them")
    else:
        require_hub_id(text)
        return download_model(text, accept, code=allow_remote_code, report=report)
    accept(folder)
    return folder


def require_hub_id(text: str) -> None:
    """Nothing for what can be the name of a model on the hub; whether there is one is not looked up.

    Raises:
        InputError: no model can have this name.
    """
    if not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise InputError(f"{shortened(text)} is neither a model folder nor a name of the hub ('owner/name'); check the spelling")


def require_finite(value: torch.Tensor, tensor: StoredTensor) -> None:
    """Raise a `CheckpointError` that names the tensor if a floating `value` holds NaN or Inf.

    The extremes tell (both are passed on by them), in one pass and without a temporary as large as the tensor.
    """
    if not value.is_floating_point() or value.itemsize < 2 or value.numel() == 0:
        return
    extremes = torch.stack(torch.aminmax(value))
    if not torch.isfinite(extremes).all():
        raise damaged(tensor.file, f"holds NaN or Inf (its extremes are {extremes.tolist()})", tensor.key)


def real_folder(path: Path | str) -> Path:
    """The folder behind `path`, resolved.

    Raises:
        CheckpointError: there is none.
    """
    try:
        folder = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{shortened(str(path))}: no such model folder; give the folder that holds config.json") from error
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give the folder that holds config.json")
    return folder


def file_inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a model folder, links followed.

    A link must end inside the folder, or, in the cache of the hub, among the blobs of the same repository.

    Raises:
        CheckpointError: missing, not a regular file, or outside.
    """
    try:
        real = (folder / name).resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / name}: is missing; fetch the model again") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {shortened(name)} cannot be opened ({type(error).__name__}); fetch the model again") from error
    _refuse_outside(folder, folder / name, real)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{folder / name}: is not a regular file; replace it by the file itself")
    return real


def _refuse_outside(folder: Path, path: Path, real: Path) -> None:
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise CheckpointError(f"{path}: points outside the model folder; replace the link by the file itself")


def _refuse_links_outside(folder: Path) -> None:
    """Other libraries read tokenizers, templates and settings from the folder, and follow every link in it."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            try:
                _refuse_outside(folder, path, path.resolve())
            except (OSError, RuntimeError):
                pass  # it leads round in a circle, so nobody can read it


def read_config(folder: Path) -> dict[str, Any]:
    """Content of a folder's config.json.

    Raises:
        CheckpointError: missing, damaged, or without a model type.
    """
    if not os.path.lexists(folder / CONFIG) and len(_homes(folder)) == 1:  # what was fetched from the hub lies beside its blobs
        raise CheckpointError(f"no {CONFIG} in {folder}: this is no model folder; give the folder that holds one")
    file = file_inside(folder, CONFIG)
    config = _read_json(file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise damaged(file, f"must name its model_type, got {shortened(model_type)}")
    return config


def refuse_remote_code(config: dict[str, Any], folder: Path) -> None:
    """Refuse a model that only runs with code of its own (`auto_map` on a type that transformers does not know).

    For types that it knows, the code of transformers is used and `auto_map` is never looked at.

    Raises:
        UnsupportedModelError: it does.
    """
    if config.get("auto_map") and config["model_type"] not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder}: model type {shortened(config['model_type'])} is not part of transformers and brings code of its own (auto_map), "
            "which is not run; allow remote code if you trust its author"
        )


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files; one file wins over an index, as in transformers."""
    if (folder / WEIGHTS).is_symlink() or (folder / WEIGHTS).exists():
        return read_header(file_inside(folder, WEIGHTS))
    if (folder / INDEX).is_symlink() or (folder / INDEX).exists():
        return dict(_indexed(folder))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: pickled weights can run code when they are opened and are refused; convert them to safetensors first"
        )
    raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; give the folder of a model in safetensors format")


def _indexed(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors that the index names, each checked against the header of its file; nothing may be left over on either side."""
    index_file = file_inside(folder, INDEX)
    names = _read_json(index_file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise damaged(index_file, f"must map tensors to files in weight_map, got {shortened(names)}")
    for key, name in names.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise damaged(index_file, f"is said to be in {shortened(name)}, which is not the plain name of a safetensors file", key)
    headers = {name: read_header(file_inside(folder, name)) for name in dict.fromkeys(names.values())}
    for key, name in names.items():
        if key not in headers[name]:
            raise damaged(folder / name, "is not in this file, although the index says so", key)
        yield key, headers[name][key]
    for name, header in headers.items():
        for key in header:
            if names.get(key) != name:
                raise damaged(folder / name, f"is in this file, but the index {'names another' if key in names else 'omits it'}", key)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        size = file.stat().st_size
        if size > LARGEST_JSON:
            raise damaged(file, f"has {size} bytes, the largest allowed is {LARGEST_JSON}")
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check that it exists and is readable") from error
    return parse_json(text, file)


def _exists(path: str) -> bool:
    """Whether there is something at `path`; a text that can be no path (empty, too long, with a zero byte) names nothing."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False


def _homes(folder: Path) -> list[Path]:
    """Where files of the folder may really lie: in it, or among the blobs of its repository in the hub's cache."""
    blobs = folder.parent.parent / "blobs"
    return [folder, blobs] if folder.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else [folder]


def _announce(tensor: StoredTensor) -> None:
    """Have the bytes of a tensor fetched; what cannot be fetched now is reported when it is read."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), tensor.file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), tensor.start, tensor.stop - tensor.start, os.POSIX_FADV_WILLNEED)


def _fill(tensor: StoredTensor, start: int, bytes_B: torch.Tensor) -> None:
    """Fill a flat uint8 host tensor with the bytes of the file from `start` on."""
    view = memoryview(bytes_B.numpy())  # type: ignore[arg-type]
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(start)
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise damaged(tensor.file, f"ends after {done} of {len(view)} bytes: the file became shorter", tensor.key)
                done += got
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: tensor {shortened(tensor.key)} cannot be read ({error.strerror}); check the disk") from error
