"""What a model is, told in seconds: from its configuration and the headers of its files, without loading a weight."""

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import Family, family_of, text_config
from moesvd_core.architectures.files import ModelFiles, file_inside
from moesvd_core.architectures.find import decoder_layers, expert_layers, submodule
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.hub_download import cached_model
from moesvd_core.architectures.hub_headers import hub_headers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.skeleton import skeleton
from moesvd_core.errors import CheckpointError, InputError, UnreachableHubError

LARGEST_CARD = 1_000_000
"""Characters of a model card that are looked at."""


@dataclass(frozen=True)
class ModelFacts:
    """What a person wants to know of a model before compressing it.

    Attributes:
        source: the folder or hub id asked about.
        family: entry of `families.yaml`.
        model_type: of the configuration (of a multimodal model: of its text part).
        layers, moe_layers: decoder layers, and how many of them have routed experts.
        experts, active, shared_experts: routed experts a layer, those that answer a token, and those that answer every token.
        hidden, width: d and m of the experts. This and the line above are of the first layer with experts; `expert_layers` has all.
        parameters: all numbers stored in the files.
        expert_parameters: those of routed experts.
        active_parameters: those that a token of text meets: the language model's (see `text_parameters`) but for the experts that do not
            answer it; averaged where experts differ in size.
        bytes: of all tensors on disk.
        dtype: in which most bytes are stored ("bfloat16").
        context_length: tokens that the model reads at most, or None where the configuration does not say.
        licence: as the model card names it, or None.
        factored: whether this is a compressed checkpoint of our own format.
        warnings: sentences for a person.
    """

    source: str
    family: str
    model_type: str
    layers: int
    moe_layers: int
    experts: int
    active: int
    shared_experts: int
    hidden: int
    width: int
    parameters: int
    expert_parameters: int
    active_parameters: int
    bytes: int
    dtype: str
    context_length: int | None
    licence: str | None
    factored: bool
    warnings: tuple[str, ...]
    expert_layers: tuple[ExpertLayer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(path_or_id: str | Path, *, trust_remote_code: bool = False) -> ModelFacts:
    """Tell what a model is.

    Args:
        path_or_id: a model folder, or a hub id ("owner/name"), of which only the configuration and the headers are fetched. Where the hub
            cannot be asked, the model that it delivered earlier is told.
        trust_remote_code: let a local model's own code describe it. Code of a model on the hub is never run here.

    Raises:
        InputError: neither a folder nor a name.
        CheckpointError: no such model, a damaged or unsafe file, or (as `UnreachableHubError`) a hub that cannot be asked.
        UnsupportedModelError: the model has no routed experts, or keeps them in a form that cannot be factored.
    """
    if not isinstance(path_or_id, str | Path):
        raise InputError(f"path_or_id must be a folder or a hub id, got {type(path_or_id).__name__}: a loaded model tells of itself")
    source = str(path_or_id)
    if "\0" in source or Path(source).exists():
        files = ModelFiles.open(source, allow_remote_code=trust_remote_code)
        return _facts(source, files, _licence(files.folder), gated=False, trust_remote_code=trust_remote_code)
    try:
        headers = hub_headers(source)
    except UnreachableHubError:
        cached = _cached(source, trust_remote_code)
        if cached is None:
            raise
        return _facts(source, cached, _licence(cached.folder), gated=False, trust_remote_code=trust_remote_code)
    return _facts(source, headers.files, headers.licence, gated=headers.gated, trust_remote_code=False)


def _cached(name: str, trust_remote_code: bool) -> ModelFiles | None:
    """What was fetched of a model of the hub earlier, or None where that is not all of it."""
    folder = cached_model(name)
    try:
        return None if folder is None else ModelFiles.open(folder, allow_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def _facts(source: str, files: ModelFiles, licence: str | None, *, gated: bool, trust_remote_code: bool) -> ModelFacts:
    model: Any = skeleton(files, allow_remote_code=trust_remote_code)[0]
    config, text, family = model.config, text_config(model.config), family_of(model.config)
    layers, decoder = expert_layers(model), decoder_layers(model)[1]
    modules = [model.get_submodule(layer.name) for layer in layers]
    parameters = sum(prod(files.header(key)[1]) for key in files.weight_map)
    silent = sum(_count(module) - _active(module, layer) for module, layer in zip(modules, layers, strict=True))
    first = layers[0]
    return ModelFacts(
        source=source,
        family=family.name,
        model_type=text.model_type,
        layers=len(decoder),
        moe_layers=len(layers),
        experts=first.experts,
        active=first.active,
        shared_experts=_shared(decoder[first.index], text, family),
        hidden=first.hidden,
        width=first.width,
        parameters=parameters,
        expert_parameters=sum(_count(module) for module in modules),
        active_parameters=text_parameters(model) - silent,
        bytes=files.bytes,
        dtype=_dtype(files),
        context_length=getattr(text, "max_position_embeddings", None),
        licence=licence,
        factored=getattr(config, "quantization_config", None) is not None,  # `skeleton` refuses all formats but ours
        warnings=tuple(_warnings(config, files, family, len(decoder), licence, gated)),
        expert_layers=tuple(layers),
    )


def text_parameters(model: Any) -> int:
    """All numbers of the language model: its decoder and its head, with those that are tied once; works without weights too.

    What a model has beside them is for pictures or sound, and what only its files hold is for several tokens at once: text meets neither.
    """
    decoder, head = model.get_submodule(decoder_layers(model)[0].rpartition(".")[0]), model.get_output_embeddings()
    tensors = [tensor for part in (decoder, head) if part is not None for tensor in part.state_dict(keep_vars=True).values()]
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active(module: nn.Module, layer: ExpertLayer) -> int:
    """Parameters of an experts module that a token meets: k of E parts of what experts have of their own, and all that they share.

    What belongs to single experts is stacked in three dimensions (biases: in two), also in factored modules, whose bases have two.
    """
    parameters = list(module.named_parameters())
    own = sum(parameter.numel() for name, parameter in parameters if parameter.ndim == 3 or name.endswith("bias"))
    return _count(module) - own + own * layer.active // layer.experts


def _shared(decoder_layer: nn.Module, config: Any, family: Family) -> int:
    """Shared experts of one layer: as the configuration counts them, else 1 where there is such a module."""
    if not any(submodule(decoder_layer, path) for path in family.shared):
        return 0
    return int(getattr(config, family.shared_count)) if family.shared_count else 1


def _dtype(files: ModelFiles) -> str:
    """The dtype in which most bytes are stored."""
    bytes_of: Counter[torch.dtype] = Counter()
    for dtype, shape in map(files.header, files.weight_map):
        bytes_of[dtype] += dtype.itemsize * prod(shape)
    return dtype_name(bytes_of.most_common(1)[0][0])


def _warnings(config: Any, files: ModelFiles, family: Family, layers: int, licence: str | None, gated: bool) -> list[str]:
    """What a person should know before starting."""
    found = []
    if gated:
        found.append("The model is gated: its terms must be accepted on the hub before it can be downloaded.")
    if files.config.get("auto_map"):
        found.append("The model brings code of its own, which is not needed and not run: its type is known here.")
    if config.model_type != text_config(config).model_type:
        found.append("The model also reads other input than text; only the experts of its language model are compressed.")
    tensors = (expert_tensor(key, family) for key in files.weight_map)
    if any(tensor is not None and tensor.layer >= layers for tensor in tensors):
        found.append("The files hold further layers for multi-token prediction; they are carried over unchanged.")
    if licence is None:
        found.append("No licence is named: ask the model's author before passing on a compressed copy.")
    return found


def _licence(folder: Path) -> str | None:
    """The licence that the front matter of a folder's README.md names."""
    if not (folder / "README.md").exists():
        return None
    with file_inside(folder, "README.md").open(encoding="utf-8", errors="replace") as stream:
        before, *matter = stream.read(LARGEST_CARD).split("---\n", 2)
    if len(matter) < 2 or before.strip():
        return None
    try:
        card = yaml.safe_load(matter[0])
    except yaml.YAMLError:
        return None  # a card that cannot be read names no licence
    licence = card.get("license") if isinstance(card, dict) else None
    return licence if isinstance(licence, str) else None
