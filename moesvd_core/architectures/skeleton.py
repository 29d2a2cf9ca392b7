"""A model without weights: the structure that a checked folder's configuration describes, on the meta device."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from moesvd_core.architectures.files import CONFIG, ModelFiles, file_inside
from moesvd_core.architectures.find import quantisation
from moesvd_core.architectures.headers import damaged, shortened
from moesvd_core.errors import CheckpointError, MoesvdError, UnsupportedModelError


def skeleton(
    files: ModelFiles,
    dtype: torch.dtype | None = None,
    *,
    allow_remote_code: bool = False,
    kind: type[PreTrainedModel] | None = None,
    like: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Build the model of a folder on the meta device, in evaluation mode, and the plug-in that shaped it (None for ordinary checkpoints).

    Args:
        dtype: floating type of its parameters; None takes that of the configuration, or else of the first floating tensor on disk.
        kind: its class; None takes the one that answers with logits of the next token.
        like: a loaded model of which it has the class, the type of every tensor, and the ways to compute attention and experts.

    Raises:
        CheckpointError: the configuration makes no model, or the weights are quantised.
        UnsupportedModelError: transformers does not know the model type.
    """
    try:
        config = _configuration(files, allow_remote_code)
        _check_depth(config, files)
        trusted = allow_remote_code and config.model_type not in CONFIG_MAPPING
        settings = {"dtype": dtype or _stored_dtype(config, files)}
        kind = kind if like is None else type(like)
        with torch.device("meta"):
            if kind is None:
                model: Any = AutoModelForCausalLM.from_config(config, **settings, trust_remote_code=trusted).eval()
            else:
                model = kind._from_config(config, **settings, **({} if like is None else _ways(like))).eval()
        quantizer = _plug_in(model, files)
        if like is not None:
            _give_types(model, like)
    except MoesvdError:
        raise
    except Exception as error:  # transformers answers a damaged configuration with whatever error comes first
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise CheckpointError(
            f"{files.folder / CONFIG}: describes no model that transformers can build ({reason}); fetch it again"
        ) from error
    return model, quantizer


def _ways(like: Any) -> dict[str, Any]:
    """How a model computes attention and experts, as settings of another."""
    parts = {"": like.config} | {key: getattr(like.config, key, None) for key in like.config.sub_configs}
    attention = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"attn_implementation": attention, "experts_implementation": like.get_experts_implementation()}


def _give_types(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Give every tensor that is stored the type of the same one of a loaded model: some keep single ones in float32 on purpose."""
    held = like.state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in held and tensor.dtype != held[name].dtype:
            tensor.data = tensor.data.to(held[name].dtype)


def _configuration(files: ModelFiles, allow_remote_code: bool) -> Any:
    """The configuration object, made from the checked file alone: transformers' own search follows further files that this one names."""
    model_type = files.config["model_type"]
    if model_type in CONFIG_MAPPING:
        native: Any = CONFIG_MAPPING[model_type]
        config = native.from_dict(native._dict_from_json_file(file_inside(files.folder, CONFIG)))
        config._name_or_path = str(files.folder)
        return config
    if allow_remote_code and files.config.get("auto_map"):
        return AutoConfig.from_pretrained(files.folder, trust_remote_code=True)
    what = f"model type {shortened(model_type)} is unknown to transformers {transformers.__version__}"
    raise UnsupportedModelError(f"{files.folder / CONFIG}: {what}; check the spelling, or use a newer version of moesvd")


def _check_depth(config: Any, files: ModelFiles) -> None:
    """A model has no more layers than tensors: a damaged number must not make us build a million modules."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(files.weight_map):
        raise damaged(files.folder / CONFIG, f"asks for {layers} layers, but there are only {len(files.weight_map)} tensors")


def _stored_dtype(config: Any, files: ModelFiles) -> torch.dtype:
    """What `from_pretrained(dtype="auto")` would choose."""
    named = config.get_text_config().dtype
    if isinstance(named, torch.dtype):
        return named
    dtypes = (files.header(key)[0] for key in files.weight_map)
    return next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16, torch.float32)), torch.float32)


def _plug_in(model: Any, files: ModelFiles) -> Any:
    """Let the plug-in of factored checkpoints (`import moesvd_core` registers it) put its modules into the model; refuse quantised ones."""
    method = quantisation(model.config)
    if method is not None:
        what = f"weights are quantised with {shortened(method)}, which cannot be read"
        raise UnsupportedModelError(f"{files.folder / CONFIG}: {what}; use a bfloat16 copy of the model")
    settings = getattr(model.config, "quantization_config", None)
    if not settings:
        return None
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map={"": "meta"})
    return quantizer
