"""Which model families are supported, read from `families.yaml`: a family is data, never a subclass."""

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

import yaml

from moesvd_core.architectures.layout import RowOrder
from moesvd_core.errors import UnsupportedModelError

Part = Literal["gate", "up", "down", "gate_up", "gate_up_bias", "down_bias"]
"""What a tensor of a checkpoint holds: one matrix of an expert ("gate", "up", "down"), both input matrices stacked, or a bias."""


@dataclass(frozen=True)
class Family:
    """One layout of routed experts; see the head of `families.yaml` for the fields.

    Attributes:
        disk: (part, name under a decoder layer) of every tensor name that a checkpoint may use; "{expert}" stands for the expert's
            number, and a name without it holds all experts of the layer, stacked.
    """

    name: str
    model_types: tuple[str, ...]
    experts: str
    router: str
    shared: tuple[str, ...] = ()
    shared_count: str | None = None
    active: str = "num_experts_per_tok"
    rows: RowOrder = "concatenated"
    transposed: bool = False
    biased: bool = False
    routing: Literal["weights", "scaled-inputs"] = "weights"
    disk: tuple[tuple[Part, str], ...] = field(default=())

    @property
    def input_parameter(self) -> str:
        """Name of the stacked input matrices in the experts module."""
        return "up_proj" if self.rows == "plain" else "gate_up_proj"

    def disk_patterns(self) -> tuple[tuple[Part, re.Pattern[str]], ...]:
        """(part, pattern of the full tensor name) with the groups `layer` and, for one expert's tensor, `expert`."""
        return _patterns(self)


@cache
def _patterns(family: Family) -> tuple[tuple[Part, re.Pattern[str]], ...]:
    # Layers for multi-token prediction (`mtp.layers.0...`) are numbered anew and are no decoder layers.
    start = r"^(?!(?:.*\.)?mtp\.)(?:.*\.)?layers\.(?P<layer>\d+)\."
    return tuple(
        (part, re.compile(start + re.escape(name).replace(r"\{expert\}", r"(?P<expert>\d+)") + "$")) for part, name in family.disk
    )


def _family(name: str, entry: dict[str, Any]) -> Family:
    """One entry of the file; the names that the model has in memory are added to those of the hub."""
    rows: RowOrder = entry.get("rows", "concatenated")
    stacked: list[tuple[Part, str]] = [("up", "up_proj") if rows == "plain" else ("gate_up", "gate_up_proj"), ("down", "down_proj")]
    if entry.get("biased", False):
        stacked += [("gate_up_bias", "gate_up_proj_bias"), ("down_bias", "down_proj_bias")]
    disk = [*entry.pop("disk", {}).items(), *((part, f"{entry['experts']}.{parameter}") for part, parameter in stacked)]
    return Family(
        name=name,
        model_types=tuple(entry.pop("model_types")),
        shared=tuple(entry.pop("shared", ())),
        disk=tuple(disk),
        **entry,
    )


@cache
def _data() -> tuple[dict[str, Family], dict[str, str]]:
    """(model type -> family, model type -> reason for refusing it)."""
    text = files("moesvd_core.architectures").joinpath("families.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    families = [_family(name, dict(entry)) for name, entry in data["families"].items()]
    return {model_type: family for family in families for model_type in family.model_types}, data["refused"]


def supported_model_types() -> tuple[str, ...]:
    """Model types whose experts can be factored, in alphabetical order."""
    return tuple(sorted(_data()[0]))


def text_config(config: Any) -> Any:
    """The configuration of the language model: that of a multimodal model's text part, else the configuration itself."""
    return config.get_text_config(decoder=True)


def family_of(config: Any) -> Family:
    """The family of a transformers configuration (for a multimodal model: of its text part).

    Raises:
        UnsupportedModelError: the model type has no routed experts, or keeps them in a form that cannot be factored.
    """
    families, refused = _data()
    model_type = cast(str, text_config(config).model_type)
    if model_type in families:
        return families[model_type]
    supported = f"supported model types: {', '.join(supported_model_types())}"
    if model_type in refused:
        raise UnsupportedModelError(f"model type '{model_type}' cannot be compressed: {refused[model_type]}; {supported}")
    if _counts_experts(text_config(config)):
        raise UnsupportedModelError(f"model type '{model_type}' has routed experts in a form that is not known here; {supported}")
    raise UnsupportedModelError(
        f"model type '{model_type}' is dense: it has no routed experts, and only those are compressed; {supported}"
    )


def _counts_experts(config: Any) -> bool:
    """Whether a configuration speaks of more than one routed expert."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(config, name, None) for name in names]
    return any(isinstance(count, int) and count > 1 for count in counts)
