"""From the tensors on disk to the parameters of a model on the meta device, one decoder layer at a time.

transformers' own loader collects all tensors of a call before it fuses them, which would need two to three times a layer's memory. Here
the same rules for names and conversions decide what goes where, but the experts' matrices are read straight into their places in the
stacked parameter. What fits where is settled for the whole model when the loader is made, from the headers alone: a wrong shape in the
last layer is reported before the first one is read.
"""

import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.headers import damaged, shortened
from moesvd_core.errors import CheckpointError


@dataclass
class _Target:
    """One parameter or buffer of the model and the tensors on disk that make it.

    Attributes:
        name: its name in the model (the first of them, if the conversion makes several).
        converter: how transformers makes it from several tensors; None if it is stored as it is.
        sources: source pattern of the converter -> keys on disk, in natural order; a single key under "" without a converter.
    """

    name: str
    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def stacked(self) -> bool:
        """Whether making it means no more than laying matrices of single experts side by side."""
        if self.converter is None or len(self.converter.target_patterns) != 1:
            return False
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in self.converter.operations]
        if len(self.converter.source_patterns) == 1:
            return kinds == [(MergeModulelist, 0)]
        return kinds == [(MergeModulelist, 0), (Concatenate, 1)]


class WeightLoader:
    """Loads and frees the weights of one decoder layer, or of everything outside the layers.

    Attributes:
        unused: keys on disk for which the model has no place; transformers leaves them aside too.
    """

    def __init__(self, model: PreTrainedModel, files: ModelFiles, layers: str, device: torch.device, quantizer: Any = None) -> None:
        """Plan what goes where.

        Args:
            model: on the meta device, structure as it will be run.
            layers: module path of the list of decoder layers.
            device: where weights are loaded to.
            quantizer: the plug-in that shaped `model`, for checkpoints in a format of their own.

        Raises:
            CheckpointError: a tensor is missing, or does not fit the model's configuration.
        """
        self.unused: list[str] = []
        self._model, self._files, self._device = model, files, device
        self._layers = re.compile(re.escape(layers) + r"\.(\d+)\.")
        self._slots = _slots(model)
        targets = self._plan(quantizer)
        missing = self._missing(targets)
        self._check(targets)
        self._targets: dict[int | None, list[_Target]] = defaultdict(list)
        for target in targets:
            self._targets[self._layer_of(target.name)].append(target)
        self.load(None)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        _compute_buffers(model, device)

    def key_of(self, name: str) -> str:
        """The tensor on disk that is stored as it is for a parameter of the model.

        Raises:
            CheckpointError: there is none, because it is made from several, or in another form.
        """
        for target in self._targets[self._layer_of(name)]:
            if target.name == name and target.converter is None:
                return target.keys[0]
        raise CheckpointError(f"{self._files.folder}: no tensor is stored as {name} of the model, so that another cannot be written for it")

    def load(self, layer: int | None) -> None:
        """Load one decoder layer, or (None) everything outside the layers.

        Raises:
            CheckpointError: a tensor cannot be read, holds NaN or Inf, or cannot be converted.
        """
        for target in self._targets[layer]:
            for name, value in self._make(target).items():
                self._place(name, value)
                del value

    def announce(self, layer: int) -> None:
        """Have the system fetch a layer's tensors while something else is computed; no layer of that number: nothing to do."""
        self._files.announce([key for target in self._targets.get(layer, ()) for key in target.keys])

    def free(self, layer: int) -> None:
        """Give back what `load` took for a layer."""
        for target in self._targets[layer]:
            for name in _made_by(target):
                if name in self._slots:
                    self._place(name, self._slots[name])

    def _plan(self, quantizer: Any) -> list[_Target]:
        """Group the keys on disk by the parameter that they make, following transformers' rules for names."""
        rules = get_model_conversion_mapping(self._model, hf_quantizer=quantizer)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        targets: dict[str, _Target] = {}
        for key in sorted(self._files.weight_map, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._slots)
            if name not in self._slots and key in self._slots:
                name, pattern = rename_source_key(key, [], [], prefix, self._slots)
            if name not in self._slots:
                self.unused.append(key)
                continue
            target = targets.setdefault(name, _Target(name, by_pattern[pattern] if pattern else None))
            if bool(pattern) != bool(target.converter) or (not pattern and target.keys):
                raise self._wrong(key, f"makes the same parameter {name} as {shortened(target.keys[0])}")
            target.sources[pattern or ""].append(key)
        return list(targets.values())

    def _missing(self, targets: list[_Target]) -> set[str]:
        """Names that nothing on disk makes and that tying will fill; all others are an error."""
        made = {name for target in targets for name in _made_by(target)}
        tied: dict[str, str] = self._model.all_tied_weights_keys
        partners = defaultdict(set)
        for one, other in tied.items():
            partners[one].add(other)
            partners[other].add(one)
        missing = set(self._slots) - made
        for name in sorted(missing, key=dot_natural_key):
            if not partners[name] & made:
                hint = f" (and {shortened(self.unused[0])} has no place in the model)" if self.unused else ""
                raise CheckpointError(f"{self._files.folder}: no tensor makes parameter {name} of the model{hint}; fetch the model again")
        return missing

    def _check(self, targets: list[_Target]) -> None:
        """Test every tensor's dtype and shape against the place that it goes to."""
        for target in targets:
            slot = self._slots[target.name]
            for key in target.keys:
                dtype, shape = self._files.header(key)
                if dtype.is_floating_point != slot.dtype.is_floating_point or dtype.itemsize < 2 <= slot.dtype.itemsize:
                    raise self._wrong(key, f"is stored as {dtype}, the model needs {slot.dtype}; quantised weights cannot be read")
                if target.converter is None and shape != tuple(slot.shape):
                    raise self._wrong(key, f"has shape {list(shape)}, the model's configuration asks for {list(slot.shape)}")
            if target.stacked:
                self._check_stack(target, slot)

    def _check_stack(self, target: _Target, slot: torch.Tensor) -> None:
        """Every expert must bring each of its matrices once, and side by side they must fill the stacked parameter."""
        experts = slot.shape[0]
        rows = 0
        for pattern in target.converter.source_patterns:
            keys = target.sources.get(pattern, [])
            if not keys:
                raise CheckpointError(f"{self._files.folder}: no tensor like {pattern} on disk for {target.name}; fetch the model again")
            shape = self._files.header(keys[0])[1]
            numbers = _expert_numbers(keys)
            if numbers != list(range(experts)):
                lost = sorted(set(range(experts)) - set(numbers))
                found = f"expert {lost[0]} of {experts} is missing" if lost else f"experts {numbers} instead of 0 to {experts - 1}"
                raise self._wrong(keys[0], f"and its like make {target.name}, but {found}")
            for key in keys:
                if self._files.header(key)[1] != shape or shape[1:] != tuple(slot.shape[2:]):
                    raise self._wrong(key, f"has shape {list(self._files.header(key)[1])}, {target.name} is {list(slot.shape)}")
            rows += shape[0] if shape else 0
        if slot.dim() != 3 or rows != slot.shape[1]:
            raise self._wrong(target.keys[0], f"and its like have {rows} rows an expert, {target.name} is {list(slot.shape)}")

    def _make(self, target: _Target) -> dict[str, torch.Tensor]:
        """Read what a target is made of, and make it."""
        slot = self._slots[target.name]
        if target.converter is None:
            value = torch.empty(slot.shape, dtype=slot.dtype, device=self._device)
            self._files.read_into(target.keys[0], value)
            return {target.name: value}
        if target.stacked:
            return {target.name: self._stack(target, slot)}
        return self._convert(target, slot)

    def _stack(self, target: _Target, slot: torch.Tensor) -> torch.Tensor:
        """Read every expert's matrices into their places of the stacked parameter."""
        stacked = torch.empty(slot.shape, dtype=slot.dtype, device=self._device)
        row = 0
        for pattern in target.converter.source_patterns:
            keys = target.sources[pattern]
            rows = self._files.header(keys[0])[1][0]
            for expert, key in enumerate(keys):
                self._files.read_into(key, stacked[expert, row : row + rows])
            row += rows
        return stacked

    def _convert(self, target: _Target, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """Let transformers make the rarer forms (split, transposed, interleaved) from all their tensors at once."""
        converter = deepcopy(target.converter)
        for pattern, keys in target.sources.items():
            for key in keys:
                value = self._files.read(key, finite=True).to(device=self._device, dtype=slot.dtype)
                converter.add_tensor(target.name, key, pattern, value)
        try:
            made = converter.convert(target.name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise self._wrong(target.keys[0], f"and its like cannot be made into {target.name} ({shortened(str(error))})") from error
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name, value in values.items():
            if name not in self._slots or value.shape != self._slots[name].shape:
                wanted = list(self._slots[name].shape) if name in self._slots else "nothing of that name"
                raise self._wrong(target.keys[0], f"and its like make {name} {list(value.shape)}, the configuration asks for {wanted}")
        return values

    def _place(self, name: str, value: torch.Tensor) -> None:
        """Put a tensor into the model under its name, marked so that no initialisation touches it."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            value = module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        value._is_hf_initialized = True  # type: ignore[attr-defined]

    def _layer_of(self, name: str) -> int | None:
        found = self._layers.match(name)
        return int(found[1]) if found else None

    def _wrong(self, key: str, what: str) -> CheckpointError:
        return damaged(self._files.weight_map[key], what, key)


def _slots(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and stored buffer of a meta model by name, in the dtype to load it in (some modules insist on float32)."""
    slots: dict[str, torch.Tensor] = model.state_dict()
    single = list(model._get_dtype_plan(model.dtype))
    if single:
        insists, _, _ = build_glob_alternation(single)
        slots |= {name: slot.float() for name, slot in slots.items() if insists.search(name)}
    return slots


def _made_by(target: _Target) -> list[str]:
    """Names of all parameters that a target's conversion makes."""
    if target.converter is None:
        return [target.name]
    first, *others = target.converter.target_patterns
    return [target.name, *(target.name.replace(first, other) for other in others)]


def _expert_numbers(keys: list[str]) -> list[int]:
    """The numbers in which otherwise equal keys differ; a single key counts as number 0."""
    if len(keys) == 1:
        return [0]
    varying = [part for part in zip(*(key.split(".") for key in keys), strict=False) if len(set(part)) > 1]
    if len(varying) != 1 or not all(re.fullmatch("0|[1-9][0-9]{0,8}", number) for number in varying[0]):
        return []
    return [int(number) for number in varying[0]]


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies and their like), as loading the whole model would."""
    for module in model.modules():
        computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)  # type: ignore[arg-type]
        if computed:
            model._init_weights(module)
