"""Writing a compressed model: streamed from a checkpoint that may be larger than the memory, or from a model in memory.

Two formats. *Factored* holds the factors themselves: small on disk and in memory, loaded through the plug-in or the file of code that comes
with it. *Dense* multiplies them out under the tensor names of the hub: as large as the original (unless experts were pruned), and loads
anywhere. Either becomes visible under its name only after it was reloaded from disk, run, and found equal.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.disk_names import expert_tensor, to_disk
from moesvd_core.architectures.experts_io import write_experts
from moesvd_core.architectures.families import Family, family_of
from moesvd_core.architectures.files import CONFIG, ModelFiles, file_inside
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.inspect import inspect
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.architectures.router import rerouted, router_step
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.atomic import is_disk_full
from moesvd_core.checkpoint import fewer_experts
from moesvd_core.checkpoint.apply import factored_modules, is_factored, replaced
from moesvd_core.checkpoint.card import CardFacts, Counts, describe
from moesvd_core.checkpoint.factored import Spec, is_dense, keeps_whole, layer_spec, layer_tensors
from moesvd_core.checkpoint.manifest import MANIFEST
from moesvd_core.checkpoint.native import native_copy
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.checkpoint.plugin import MoesvdConfig
from moesvd_core.checkpoint.shim import FILE, auto_map, needs_code, shim_source
from moesvd_core.checkpoint.staging import FACTS, staged
from moesvd_core.checkpoint.verify import Verification, check_batch, run_layers, verify
from moesvd_core.checkpoint.writer import ShardWriter
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import CheckpointError, InputError, ResourceError
from moesvd_core.experts import FactoredExperts
from moesvd_core.progress import Progress, Report, silent

Format = Literal["factored", "dense"]
FORMATS: tuple[Format, ...] = ("factored", "dense")
SHARD_SIZE = 5_000_000_000
Factors = Callable[[ExpertLayer], LayerFactors | None]
"""A layer's factors, made when they are asked for; None leaves the layer as it is. Asked once a layer, in order."""

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: its folder.
        format: "factored" or "dense".
        counts: what was written, beside what the source holds.
        verification: how it was checked.
    """

    path: Path
    format: Format
    counts: Counts
    verification: Verification


def export_streamed(
    source: ModelFiles | LayerStream,
    factors: Factors,
    destination: Path | str,
    *,
    format: Format = "factored",
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    card: CardFacts | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> Export:
    """Write a compressed copy of a checkpoint, holding one decoder layer in memory at a time.

    Tensors that are neither factored nor a refitted router's are copied bit for bit under their own names, but for what `dtype` casts, and
    what belongs to pruned experts in the dense format.

    Args:
        source: a checked folder, or a stream over one: then that stream holds the layer whose factors are asked for.
        factors: gives each routed layer's factors.
        dtype: floating type to write what has the experts' type in; None keeps every tensor's own.
        shard_size: bytes of tensors a file, at most.

    Raises:
        InputError: an unknown format, a source that is factored already, a destination that may not be replaced, or a dense format for
            layers that keep different numbers of experts.
        CheckpointError: the source is damaged, or the export did not pass verification; nothing is left of it.
        ResourceError: the disk is full; nothing is left of the export.
    """
    stream = source if isinstance(source, LayerStream) else LayerStream(source, dtype=dtype)
    files = stream.files
    _check(format, files.config)
    if dtype not in (None, stream.dtype):
        stream = LayerStream(files, dtype=dtype, device=stream.device)
    with staged(Path(destination), overwrite=overwrite) as folder:
        writer = ShardWriter(folder, shard_size)
        try:
            work = _Streamed(stream, factors, writer, format, dtype)
            expected = work.write(report)
            writer.finish()
        finally:
            writer.close()
        _copy_side_files(files.folder, folder)
        config = files.config
        if work.kept:
            config = fewer_experts.configured(config, stream.expert_layers[0].experts, len(next(iter(work.kept.values()))))
        settings = MoesvdConfig(layers=work.specs, refitted_routers=work.refitted)
        _write_config(folder, config, settings, type(stream.model).__name__, format, dtype)
        sizes = writer.parameters, _parameters(files), writer.bytes, files.bytes
        layers = work.factored, len(stream.layers), len(work.refitted)
        whole = bool(work.kept) and all(work.whole)
        counts = Counts(*sizes, *layers, _active(folder, format), bool(work.kept), whole, work.cast)
        describe(folder, card or CardFacts(files.folder.name), counts, format, dtype_name(work.stored))
        verification = verify(folder, expected=expected, source=files, dtype=stream.dtype, device=stream.device, report=report)
    return Export(Path(destination), format, counts, verification)


class _Streamed:
    """The tensors of a streamed export, and the logits that it must give when it is loaded again."""

    def __init__(
        self, stream: LayerStream, factors: Factors, writer: ShardWriter, format_name: Format, dtype: torch.dtype | None
    ) -> None:
        self.specs: list[Spec] = []
        self.refitted: list[int] = []
        self.factored = 0
        self.kept: dict[int, Sequence[int]] = {}
        self._beside: dict[str, tuple[int, torch.Size]] | None = None
        self._seen: list[ExpertLayer] = []
        self._replaced: set[str] = set()
        self._stream, self._factors, self._writer, self._format, self._dtype = stream, factors, writer, format_name, dtype
        self._files = stream.files
        self._family: Family = family_of(stream.config)
        self._layers = {layer.index: layer for layer in stream.expert_layers}
        self._keys: dict[int, list[str]] = {index: [] for index in self._layers}
        for key in self._files.weight_map:
            tensor = expert_tensor(key, self._family)
            if tensor is not None and tensor.layer in self._keys:
                self._keys[tensor.layer].append(key)
        first = next(iter(self._layers))
        self._main = self._files.header(self._keys[first][0])[0]
        self.stored = dtype or self._main
        self.cast = None if self.stored == self._main else (dtype_name(self._main), dtype_name(self.stored))
        self.whole: list[bool] = []

    def write(self, report: Report) -> Tensor:
        """Write every tensor; returns the logits of `check_batch`."""
        total = len(self._stream.layers)

        def each_layer() -> Iterator[int]:
            for index in range(total):
                with self._stream.layer(index):
                    layer = self._layers.get(index)
                    found = self._factors(layer) if layer else None
                    if layer is not None and self._format == "dense":
                        self._note_kept(layer, found)
                    if layer is None or found is None:
                        yield index
                    else:
                        with rerouted(self._stream.model, layer, self._router(layer, found.router_EF)):
                            yield from self._layer(layer, found)
                    del found  # before the next layer's are made
                report(Progress("export", index + 1, total + 1, f"layer {index} of {total}"))

        expected = run_layers(self._stream, check_batch(self._stream.config), each_layer())
        for key in self._files.weight_map:
            if key not in self._replaced:
                tensor = self._rows(key, self._files.read(key))
                self._writer.add(key, tensor.to(self._stored(tensor.dtype)))
        report(Progress("export", total + 1, total + 1, "everything else copied"))
        return expected

    def _layer(self, layer: ExpertLayer, factors: LayerFactors) -> Iterator[int]:
        """Write one layer's factors, and let the layer run with them while its number is out."""
        if is_dense(factors):
            yield layer.index
            return
        self._replaced.update(self._keys[layer.index])
        self.factored += 1
        stored, model = self.stored, self._stream.model
        if self._format == "dense" and factors.kept is not None:
            yield from self._kept_layer(layer, factors, stored)
            return
        if self._format == "dense":
            dense = _multiplied_out(factors, stored)
            for key, tensor in to_disk(dense, self._keys[layer.index], layer, self._family):
                self._writer.add(key, tensor)
            write_experts(model.get_submodule(layer.name), layer, dense)
            yield layer.index
            return
        self.specs.append(layer_spec(layer, factors))
        tensors = dict(layer_tensors(layer, factors, stored, neuron_order(factors)))
        for name, tensor in tensors.items():
            self._writer.add(f"{self._place(layer)}.{name}", tensor)
        with replaced(model, self.specs[-1], tensors.items()):
            yield layer.index

    def _place(self, layer: ExpertLayer) -> str:
        """Where the layer's factors go in the checkpoint: behind what the source's names begin with, as all classes that read it expect.

        That is not what the model's own begin with where the class that is streamed is the language model of a larger one.
        """
        layers = f"layers.{layer.index}."
        key = self._keys[layer.index][0]
        return key[: key.rindex(layers)] + layer.name[layer.name.rindex(layers) :]

    def _router(self, layer: ExpertLayer, weight_EF: Tensor | None) -> Tensor | None:
        """Write a refitted router's matrix in the place of the original's; gives it as it is read again, None where there is none."""
        if weight_EF is None:
            return None
        key = self._stream.key_of(router_step(self._stream.model, layer).name)
        written_EF = weight_EF.to(self._stored(self._files.header(key)[0]))
        self._writer.add(key, self._rows(key, written_EF))
        self._replaced.add(key)
        self.refitted.append(layer.index)
        return written_EF

    def _note_kept(self, layer: ExpertLayer, factors: LayerFactors | None) -> None:
        """Remember which experts a layer keeps, and stop at the first one that does not go with those before it."""
        self._seen.append(layer)
        if factors is not None and factors.kept is not None:
            self.kept[layer.index] = factors.kept
        if self.kept:
            fewer_experts.check(self._seen, self.kept, self._stream.config.get_text_config().to_dict())

    def _kept_layer(self, layer: ExpertLayer, factors: LayerFactors, stored: torch.dtype) -> Iterator[int]:
        """Write the experts that one layer keeps under the first numbers, and let it run with them."""
        kept = self.kept[layer.index]
        weights = fewer_experts.of_layer(_multiplied_out(factors, stored), kept)
        numbers = {key: expert_tensor(key, self._family) for key in self._keys[layer.index]}
        keys = [key for key, found in numbers.items() if found and (found.expert or 0) < len(kept)]
        for key, tensor in to_disk(weights, keys, layer, self._family):
            self._writer.add(key, tensor)
        self.whole.append(keeps_whole(layer_spec(layer, factors)))
        with replaced(self._stream.model, layer_spec(layer, factors), layer_tensors(layer, factors, stored)):
            yield layer.index

    def _rows(self, key: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor that is not an expert's, in a dense export of pruned experts."""
        if self.kept and self._beside is None:
            self._beside = fewer_experts.beside(self._stream, len(next(iter(self.kept.values()))))
        index, shape = (self._beside or {}).get(key, (None, tensor.shape))
        return tensor if index is None else fewer_experts.rows(tensor, shape, self.kept[index])

    def _stored(self, own: torch.dtype) -> torch.dtype:
        """Only what has the experts' dtype is written in another: some families keep single tensors in float32 on purpose."""
        return self._dtype if self._dtype is not None and own == self._main else own


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Path | str,
    *,
    format: Format = "factored",
    shard_size: int = SHARD_SIZE,
    card: CardFacts | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> Export:
    """Write a compressed model that is in memory (made by `compress`, loaded from an export, fine-tuned).

    Args:
        model: has factored experts; in evaluation mode.
        shard_size: bytes of tensors a file, at most.

    Raises:
        InputError: an unknown format, a model without factored experts, a destination that may not be replaced, or a dense format for
            layers that keep different numbers of experts.
        CheckpointError: the export did not pass verification; nothing is left of it.
        ResourceError: the disk is full, or the model's device is; nothing is left of the export.
    """
    _check(format, None)
    modules = factored_modules(model)
    if not modules:
        raise InputError("model must have factored experts, got none: compress it first, or save it with save_pretrained")
    written: Any = native_copy(model) if format == "dense" else model
    with torch.no_grad():
        device = written.get_input_embeddings().weight.device
        batch = {name: ids.to(device) for name, ids in check_batch(model.config).items()}
        expected = written(**batch, use_cache=False).logits.cpu()
    refitted = list(getattr(getattr(model.config, "quantization_config", None), "refitted_routers", []))
    with staged(Path(destination), overwrite=overwrite) as folder:
        written.save_pretrained(folder, max_shard_size=shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings = MoesvdConfig(layers=[module.spec for module in modules.values()], refitted_routers=refitted)
        _write_config(folder, config, settings, type(model).__name__, format, None)
        counts = _counts(model, modules, ModelFiles.open(folder), len(refitted), format)
        describe(folder, card or CardFacts(), counts, format, dtype_name(model.dtype))
        try:
            verification = verify(folder, expected=expected, like=written, dtype=model.dtype, device=device, report=report)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{device} has no room to load one layer of the export beside the model: move the model to the CPU and export it again"
            ) from error
    return Export(Path(destination), format, counts, verification)


def _check(format_name: str, config: dict[str, Any] | None) -> None:
    if format_name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")
    if config is not None and is_factored(config):
        raise InputError("the source must be an uncompressed model, got a factored export: export from the original with a new plan")


def _multiplied_out(factors: LayerFactors, dtype: torch.dtype) -> ExpertWeights:
    dense = factors.multiplied_out()
    biases = [None if bias is None else bias.to(dtype) for bias in (dense.input_bias_EN, dense.output_bias_ED)]
    return ExpertWeights(dense.input_END.to(dtype), dense.output_EDM.to(dtype), *biases)


def _copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, licence: everything a loader or a reader needs beside weights and configuration.

    Raises:
        CheckpointError: one of them leads outside the source, or cannot be read.
    """
    ours = {CONFIG, FACTS, MANIFEST}
    for path in sorted(source.iterdir()):
        named = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        wanted = named or (path.suffix in _COPIED and not path.name.endswith(".index.json"))
        if not wanted or path.name in ours or path.name.startswith(".") or path.is_dir():
            continue
        found = file_inside(source, path.name)
        try:
            shutil.copyfile(found, folder / path.name)
        except OSError as error:
            if is_disk_full(error) or error.filename != found:
                raise
            raise CheckpointError(f"{found}: cannot be read ({error.strerror}); fetch the file again") from error


def _write_config(
    folder: Path, source: dict[str, Any], settings: MoesvdConfig, architecture: str, format_name: Format, dtype: torch.dtype | None
) -> None:
    """config.json, and where transformers alone is not enough, what makes it load: the plug-in's settings and the file of code.

    The source's own `auto_map` is dropped: native code loads all supported families, and the code that it points to is not copied.
    """
    config = {name: value for name, value in source.items() if name != "auto_map"}
    if dtype is not None:
        config["dtype"] = dtype_name(dtype)
        config.pop("torch_dtype", None)
    if format_name == "factored":
        config["quantization_config"] = settings.to_dict()
    (folder / FILE).unlink(missing_ok=True)
    if needs_code(architecture, format_name == "factored"):
        declared = (source.get("architectures") or [None])[0]
        config["auto_map"] = auto_map(architecture, declared)
        (folder / FILE).write_text(shim_source(architecture, format_name == "factored", declared), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _parameters(files: ModelFiles) -> int:
    return sum(torch.Size(files.header(key)[1]).numel() for key in files.weight_map)


def _active(folder: Path, format_name: Format) -> int | None:
    """Parameters of a written model that a token meets, where that is one number: in whole matrices, all experts are of one size."""
    return inspect(folder).active_parameters if format_name == "dense" else None


def _counts(
    model: PreTrainedModel, modules: dict[str, FactoredExperts], files: ModelFiles, refitted: int, format_name: Format
) -> Counts:
    """Counts of a written model, and of the same with its experts unfactored."""
    parameters, layers = _parameters(files), model.config.get_text_config().num_hidden_layers
    held = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}.values()  # tied ones once
    factored = [tensor for module in modules.values() for tensor in (*module.parameters(), *module.buffers())]
    native = sum(ExpertLayer(**module.expert_layer).parameters for module in modules.values())
    original = sum(tensor.numel() for tensor in held) - sum(tensor.numel() for tensor in factored) + native
    original_bytes = sum(tensor.nbytes for tensor in held) - sum(tensor.nbytes for tensor in factored) + native * model.dtype.itemsize
    sizes = parameters, original, files.bytes, original_bytes
    fewer = format_name == "dense" and any(module.spec.get("kept") is not None for module in modules.values())
    whole = fewer and all(keeps_whole(module.spec) for module in modules.values())
    return Counts(*sizes, len(modules), layers, refitted, _active(files.folder, format_name), fewer, whole, in_memory=True)
