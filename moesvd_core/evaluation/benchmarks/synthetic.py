"""Random layers and models of any size, so that time and memory can be measured without a download.

Inputs have a falling spectrum in a random basis, as hidden states of trained models do; with white ones activation weighting would have
nothing to weigh. Weights are random: figures of quality on them say little, figures of time and memory are those of a real model.

Shapes: E experts, d = D hidden size, m = M width, n = 2m input rows, T tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import InputError, require_seed

WEIGHT_STD = 0.02
Family = Literal["mixtral", "qwen3_moe"]


@dataclass(frozen=True)
class RandomLayer:
    """One MoE layer, what calibration would have collected for it, and tokens that calibration did not see.

    Attributes:
        held_out: hidden states [T, d] of fresh tokens for each expert.
    """

    layer: ExpertLayer
    weights: ExpertWeights
    statistics: LayerStatistics
    held_out: tuple[torch.Tensor, ...]


def random_layer(
    hidden: int, width: int, experts: int, *, active: int = 2, tokens: int = 4096, seed: int = 0, device: torch.device | str = "cpu"
) -> RandomLayer:
    """A layer with `tokens` calibration tokens for each expert, of equal routing weights 1/k, and a quarter as many held out.

    Args:
        device: where it is made, and where weights and tokens stay; statistics are on the host, as those of a calibration are. The
            numbers drawn from a seed are another device's own.

    Raises:
        InputError: a size below 1, or more active experts than experts.
    """
    for name, value in (("hidden", hidden), ("width", width), ("experts", experts), ("tokens", tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 1 <= active <= experts:
        raise InputError(f"active must be in [1, {experts}] (experts), got {active}")
    require_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise, device=device)

    layer = ExpertLayer(0, "model.layers.0.mlp.experts", experts, hidden, width, active)
    weights = ExpertWeights(drawn(experts, 2 * width, hidden) * hidden**-0.5, drawn(experts, hidden, width) * width**-0.5)
    falling_D = torch.arange(1, hidden + 1, device=device) ** -0.5
    basis_DD = torch.linalg.qr(drawn(hidden, hidden))[0] * falling_D * hidden**0.5 / 2
    inputs = [drawn(tokens, hidden) @ basis_DD.T for _ in range(experts)]
    held_out = tuple(drawn(max(1, tokens // 4), hidden) @ basis_DD.T for _ in range(experts))
    gradient_TD = drawn(tokens, hidden) @ basis_DD.roll(1, 0).T
    return RandomLayer(layer, weights, _statistics(layer, weights, inputs, gradient_TD), held_out)


def expert_output(input_ND: torch.Tensor, output_DM: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """y [T, d] of one expert with a SiLU gate."""
    gate_TM, up_TM = (x_TD @ input_ND.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate_TM) * up_TM) @ output_DM.T


def _statistics(layer: ExpertLayer, weights: ExpertWeights, inputs: list[torch.Tensor], gradient_TD: torch.Tensor) -> LayerStatistics:
    """The sums that calibration makes, with p = 1/k for every token; every expert's tokens have the same gradients."""
    square = layer.active**-2
    count_E = torch.tensor([len(x_TD) for x_TD in inputs])
    row_gram = Calibration().collects_rows(layer.input_rows)
    names = ("input", "output", "x", "h", "outlier", "saliency", "slope", "row square", "row gram", "weighted input")
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for x_TD, input_ND, output_DM in zip(inputs, weights.input_END, weights.output_EDM, strict=True):
        gate_TM, up_TM = (x_TD @ input_ND.T).chunk(2, -1)
        h_TM = torch.nn.functional.silu(gate_TM) * up_TM
        y_TD = h_TM @ output_DM.T
        sigmoid_TM = gate_TM.sigmoid()
        slope_TN = torch.cat([up_TM * sigmoid_TM * (1 + gate_TM * (1 - sigmoid_TM)), gate_TM * sigmoid_TM], -1)
        columns["input"].append(square * x_TD.T @ x_TD)
        columns["output"].append(square * y_TD.T @ y_TD)
        columns["x"].append(x_TD.abs().mean(0))
        columns["h"].append(h_TM.abs().mean(0))
        columns["outlier"].append((h_TM.abs() > 2 * h_TM.abs().mean()).float().mean())
        columns["saliency"].append(y_TD.norm(dim=-1).mean() / layer.active)
        columns["slope"].append(square * slope_TN.square().sum(0))
        delta_TN = (gradient_TD @ output_DM).repeat(1, 2) * slope_TN / layer.active
        columns["row square"].append(delta_TN.square().sum(0))
        if row_gram:
            columns["row gram"].append(delta_TN.T @ delta_TN)
        columns["weighted input"].append((delta_TN.square().sum(1, keepdim=True) * x_TD).T @ x_TD)
    stacked = {name: torch.stack(column).cpu() for name, column in columns.items() if column}
    gradient_gram_DD = (gradient_TD.T @ gradient_TD).cpu()
    tokens = int(count_E.sum()) // layer.active
    return LayerStatistics(
        layer=layer.index,
        tokens=tokens,
        count_E=count_E,
        weight_square_E=count_E * square,
        input_gram_EDD=stacked["input"],
        output_gram_EDD=stacked["output"],
        input_mean_ED=stacked["x"],
        intermediate_mean_EM=stacked["h"],
        outlier_E=stacked["outlier"],
        input_outlier=0.01,
        principal_rank_E=torch.full((layer.experts,), min(layer.input_rows, layer.hidden) + min(layer.hidden, layer.width)),
        saliency_E=stacked["saliency"],
        slope_EN=stacked["slope"],
        gradient_gram_DD=gradient_gram_DD * (tokens / len(gradient_TD)),
        gradient_tokens=tokens,
        gradient_gram_EDD=(square * gradient_gram_DD).repeat(layer.experts, 1, 1),
        gradient_weight_square_E=count_E * square,
        row_square_EN=stacked["row square"],
        row_gram_ENN=stacked.get("row gram"),
        weighted_input_gram_EDD=stacked["weighted input"],
    )


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a random model; as many layers as `bytes` need when `layers` is not given.

    Attributes:
        family: whose model.
        active: experts that answer a token.
        bytes: of all weights in bfloat16, at least.
    """

    family: Family = "mixtral"
    hidden: int = 1024
    width: int = 1792
    experts: int = 8
    active: int = 2
    layers: int | None = None
    bytes: int = 4_000_000_000
    vocabulary: int = 1024
    context: int = 2048

    def __post_init__(self) -> None:
        if self.hidden < 64 or self.hidden % 64:
            raise InputError(f"hidden must be a multiple of 64, the width of a head, got {self.hidden}")
        for name in ("width", "experts", "context", "bytes"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.family not in get_args(Family):
            raise InputError(f"family must be one of {', '.join(get_args(Family))}, got {self.family!r}")
        if not 1 <= self.active <= self.experts:
            raise InputError(f"active must be in [1, {self.experts}] (experts), got {self.active}")
        if self.vocabulary < 258:
            raise InputError(f"vocabulary must hold 256 bytes and 2 special tokens, got {self.vocabulary}")
        if self.layers is not None and self.layers < 1:
            raise InputError(f"layers must be at least 1, got {self.layers}")

    @property
    def layer_bytes(self) -> int:
        """Of one layer in bfloat16."""
        matrices = self.experts * (3 * self.hidden * self.width + self.hidden) + 4 * self.hidden**2
        return 2 * (matrices + 2 * self.hidden)

    def __str__(self) -> str:
        return f"{self.family}, d {self.hidden}, m {self.width}, {self.experts} experts, {self.active} active"

    def config(self) -> MixtralConfig | Qwen3MoeConfig:
        """The model's configuration."""
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.width, "dtype": "bfloat16",
            "num_hidden_layers": self.layers or -(-self.bytes // self.layer_bytes), "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64, "num_experts_per_tok": self.active, "max_position_embeddings": self.context,
            "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
        }
        if self.family == "mixtral":
            return MixtralConfig(num_local_experts=self.experts, architectures=["MixtralForCausalLM"], **common)
        own: dict[str, Any] = {"moe_intermediate_size": self.width, "num_experts": self.experts, "norm_topk_prob": True, "head_dim": 64}
        return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **own, **common)


def random_model(size: ModelSize, device: torch.device | str = "cpu", *, seed: int = 0) -> PreTrainedModel:
    """The model in bfloat16, made where it is used, asking for no gradients; the numbers drawn from a seed are each device's own."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(size.config(), dtype=torch.bfloat16).eval()
    noise = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=WEIGHT_STD, generator=noise)
    return model.requires_grad_(False)


def write_random_mixtral(folder: Path, size: ModelSize, *, seed: int = 0) -> None:
    """Write a model folder (safetensors under the hub's names, configuration, byte-level tokenizer), holding one layer in memory.

    Raises:
        InputError: the size is another family's.
    """
    if size.family != "mixtral":
        raise InputError(f"family must be mixtral to be written, got {size.family}")
    folder.mkdir(parents=True, exist_ok=True)
    config = size.config()
    noise = torch.Generator().manual_seed(seed)
    shards = config.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(config, noise), start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _shards(config: Any, noise: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of one file after the other: embedding and last norm, then layer by layer."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(std=WEIGHT_STD, generator=noise)

    d, m = config.hidden_size, config.intermediate_size
    ones_D = torch.ones(d, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": matrix(config.vocab_size, d), "model.norm.weight": ones_D}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{name}_proj.weight": matrix(d, d) for name in "qkvo"}
        tensors |= {f"{prefix}{name}_layernorm.weight": ones_D.clone() for name in ("input", "post_attention")}
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = matrix(config.num_local_experts, d)
        for expert in range(config.num_local_experts):
            for name, shape in (("w1", (m, d)), ("w2", (d, m)), ("w3", (m, d))):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
        yield tensors


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: a tokenizer that any text passes and no training made."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
