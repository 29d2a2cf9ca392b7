"""DeepSeek-MoE-16B (`model_type: deepseek`), which transformers does not know, as a native model: Llama's attention, DeepSeek-V2's experts.

Importing this module registers it, so that a checkpoint of the family loads without running the code that it brings along.
"""

from typing import Any, ClassVar, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, initialization
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2Moe, DeepseekV2TopkRouter
from transformers.models.llama.modeling_llama import LlamaModel

from moesvd_core.errors import UnsupportedModelError


class DeepseekConfig(LlamaConfig):
    """Llama's configuration with the fields that the checkpoints of the family carry."""

    model_type = "deepseek"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    # Read by DeepSeek-V2's router; this family always takes the k largest scores as they are.
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0


class DeepseekModel(LlamaModel):
    """Llama's decoder whose feed-forward blocks from `first_k_dense_replace` on are mixtures of experts."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        if config.norm_topk_prob or config.scoring_func != "softmax":
            raise UnsupportedModelError(
                "deepseek models must have norm_topk_prob false and scoring_func 'softmax' (as DeepSeek-MoE-16B has), "
                f"got {config.norm_topk_prob} and '{config.scoring_func}'"
            )
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if config.n_routed_experts and index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekV2Moe(cast(Any, config))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, DeepseekV2TopkRouter | DeepseekV2Experts):  # Llama knows neither
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekForCausalLM(LlamaForCausalLM):
    """The language model; its parameter names are those of the checkpoints."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.post_init()  # type: ignore[no-untyped-call]


def register() -> None:
    """Make `AutoConfig`, `AutoModelForCausalLM` and the checkpoint conversion know the family; harmless when repeated."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    mapping: Any = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)


register()
