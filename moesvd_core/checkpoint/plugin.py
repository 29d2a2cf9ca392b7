"""The plug-in through which `from_pretrained` loads factored checkpoints: transformers asks the quantizer named in the configuration to put
its modules into the empty model, and fills them from the files.

An export carries a copy of this file, so it must import torch, transformers and the other files that are carried only (see `shim`).
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesvd_core import pivoted_side, rival_sides  # noqa: F401 - make `FactoredExperts` know their structures
from moesvd_core.experts import FactoredExperts, gate_of
from moesvd_core.kept_router import restrict

METHOD = "moesvd"
FORMAT_VERSION = 1


class MoesvdConfig(QuantizationConfigMixin):
    """`quantization_config` of a factored checkpoint: one description for each layer whose experts are factored (see `FactoredExperts`).

    `refitted_routers` names the layers whose routers are not the original's; they load as any tensor, so that nothing has to be done.
    """

    def __init__(
        self,
        layers: list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        refitted_routers: list[int] | None = None,
        **ignored: Any,
    ) -> None:
        """Take what the checkpoint's configuration says.

        Raises:
            ValueError: the checkpoint is of a format that this version does not know.
        """
        if format_version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION} for this version of moesvd, got {format_version}: update moesvd")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = layers or []
        self.refitted_routers = refitted_routers or []
        self.format_version = format_version


class MoesvdQuantizer(HfQuantizer):
    """Replaces experts by factored ones before the weights are loaded."""

    requires_calibration = True  # a dense checkpoint cannot be factored while it is loaded

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        for spec in config.layers:
            replace_module(model, spec)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes a checkpoint that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def replace_module(model: nn.Module, spec: dict[str, Any], device: torch.device | None = None) -> FactoredExperts:
    """Put an empty factored module where `spec` says the native experts are; it has their dtype and device (or the given one).

    Raises:
        ValueError: the model has no experts there.
    """
    found = experts_path(model, spec["layer"]["name"])
    native = model.get_submodule(found)
    example = next(native.parameters())
    factored = FactoredExperts(spec, gate_of(native, spec["layer"]["rows"]), device or example.device, example.dtype)
    model.set_submodule(found, factored.train(native.training))
    if spec.get("kept") is not None:
        restrict(model.get_submodule(found.rpartition(".")[0]), factored.num_experts, spec["kept"], spec["layer"]["active"])
    return factored


def experts_path(model: nn.Module, name: str) -> str:
    """Where a model of any class has the experts of one layer: with its head, without, or as the language model of a larger one.

    Args:
        name: where the class that they were described by has them ("model.layers.1.mlp.experts").

    Raises:
        ValueError: the model has no experts there, or several of its parts have.
    """
    paths: list[str] = [path for path, _ in model.named_modules()]
    if name in paths:
        return name
    tail = name[name.rindex("layers.") :]  # what stands before the layers is the only thing in which classes differ
    found = [path for path in paths if f".{path}".endswith(f".{tail}")]
    if len(found) != 1:
        has = f"has {len(found)} such modules" if found else "has no such module"
        raise ValueError(f"the checkpoint has factored experts at {name}, but {type(model).__name__} {has}")
    return found[0]


def language_config(config: Any) -> Any:
    """The configuration of the language model in one of a model around it, with the plug-in's settings; of a language model, itself."""
    language = config.get_text_config()
    language.quantization_config = config.quantization_config
    return language


def attach(model: Any, layers: list[dict[str, Any]], refitted_routers: list[int]) -> None:
    """Mark a model whose experts were replaced in memory as what loading the same checkpoint would have given."""
    quantizer = MoesvdQuantizer(MoesvdConfig(layers=layers, refitted_routers=refitted_routers))
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = quantizer.quantization_config


def register() -> None:
    """Make transformers know the format; harmless when repeated, and when a checkpoint's own copy of this file came first."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, MoesvdConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, MoesvdQuantizer)


register()
