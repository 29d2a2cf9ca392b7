"""What planning gives back: ranks of every layer, why, and what they come to. Plain data that goes through JSON and back."""

from dataclasses import dataclass
from typing import Any, Literal

from moesvd_core.errors import InputError
from moesvd_core.planning.curves import SIDES, Structure
from moesvd_core.planning.recipe import Finished, Metric


@dataclass(frozen=True)
class ModelShape:
    """The whole model's size, which ratios are counted against.

    Attributes:
        parameters: of every tensor that the export writes.
        active_parameters: that one token of text passes: k experts of each layer, and nothing that is for pictures or further tokens.
        bytes: of all tensors as the export writes them uncompressed.
        expert_parameters: of the routed experts of all layers, biases included.
        bytes_per_expert_parameter: of the type in which the export writes experts (2 for bfloat16).
        embedding_parameters: of the input embedding: active, but looked up and not multiplied; 0 if it is also the head.

    Raises:
        InputError: sizes that contradict each other.
    """

    parameters: int
    active_parameters: int
    bytes: int
    expert_parameters: int
    bytes_per_expert_parameter: float
    embedding_parameters: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.expert_parameters <= self.parameters:
            raise InputError(f"expert_parameters must be in [1, {self.parameters}], the whole model's, got {self.expert_parameters}")
        if not 0 < self.active_parameters <= self.parameters:
            raise InputError(f"active_parameters must be in [1, {self.parameters}], the whole model's, got {self.active_parameters}")
        if self.bytes < self.expert_parameters * self.bytes_per_expert_parameter:
            raise InputError(f"bytes must be at least those of the experts, got {self.bytes}")


@dataclass(frozen=True)
class SidePlan:
    """What happens to one side of one layer.

    Attributes:
        structure: "dense" when every slot stays as it is.
        ranks: rank of each slot; DENSE (-1) for a slot stored as the original matrix; 0 prunes it.
        parameters: stored parameters of the side.
        predicted_loss: nats a token, from the curve.
    """

    structure: Structure | Literal["dense"]
    ranks: tuple[int, ...]
    parameters: int
    predicted_loss: float


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer, and why.

    Attributes:
        layer: index of the decoder layer.
        selected: something of it is decomposed.
        reason: one sentence for a person.
        input, output: its two sides.
        original_parameters: of both sides, without biases, which stay as they are (but where neurons go, and theirs with them).
    """

    layer: int
    selected: bool
    reason: str
    input: SidePlan
    output: SidePlan
    original_parameters: int

    @property
    def parameters(self) -> int:
        """Stored parameters of both sides."""
        return self.input.parameters + self.output.parameters

    @property
    def predicted_loss(self) -> float:
        """Nats a token lost by this layer."""
        return self.input.predicted_loss + self.output.predicted_loss

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what both sides have is a mapping by side."""
        sides = {"input": self.input, "output": self.output}
        return {
            "layer": self.layer,
            "selected": self.selected,
            "reason": self.reason,
            "structure": {name: side.structure for name, side in sides.items()},
            "ranks": {name: list(side.ranks) for name, side in sides.items()},
            "parameters": self.parameters,
            "original_parameters": self.original_parameters,
            "predicted_loss": self.predicted_loss,
            "side_parameters": {name: side.parameters for name, side in sides.items()},
            "side_predicted_loss": {name: side.predicted_loss for name, side in sides.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerPlan":
        """The layer that `as_dict` described; KeyError or TypeError when it did not."""
        sides = [
            SidePlan(
                structure=data["structure"][name],
                ranks=tuple(int(rank) for rank in data["ranks"][name]),
                parameters=int(data["side_parameters"][name]),
                predicted_loss=float(data["side_predicted_loss"][name]),
            )
            for name in SIDES
        ]
        return cls(int(data["layer"]), bool(data["selected"]), str(data["reason"]), sides[0], sides[1], int(data["original_parameters"]))


@dataclass(frozen=True)
class Plan(Finished):
    """Ranks of every layer for one method and ratio; `as_dict` is its JSON.

    Attributes:
        method: name of the method.
        asked_ratio: what was asked for.
        ratio: 1 - parameters / original_parameters of the whole model, as reached (never below the ratio asked for).
        expert_ratio: the same over routed experts only.
        original_parameters, parameters: stored, of the whole model, before and after.
        original_active_parameters, active_parameters: that one token passes, on average over the calibration text's routing.
        original_bytes, bytes: of all tensors as written.
        original_flops, flops: floating-point operations a token in matrices (two a multiply-add), attention scores not counted.
        predicted_loss: nats a token, second-order; it ranks plans well, its size has to be calibrated on measured ones.
        layers: in the model's order.
        metric: what the factors are to minimise; None: what the method says.
        compensate: shared bases are refined, output factors fitted to the compressed stream; ranks and sizes do not depend on it.
        refit_router: routers are fitted to the compressed stream, so that they choose as before; the same.
    """

    method: str
    asked_ratio: float
    ratio: float
    expert_ratio: float
    original_parameters: int
    parameters: int
    original_active_parameters: int
    active_parameters: int
    original_bytes: int
    bytes: int
    original_flops: int
    flops: int
    predicted_loss: float
    layers: tuple[LayerPlan, ...]
    metric: Metric | None = None
    compensate: bool = False
    refit_router: bool = False

    def layer(self, index: int) -> LayerPlan | None:
        """The plan of a decoder layer; None where it says nothing of it."""
        return next((layer for layer in self.layers if layer.layer == index), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields above, layers as a list."""
        flat = {name: value for name, value in vars(self).items() if name != "layers"}
        return flat | {"layers": [layer.as_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """The plan that `as_dict` described.

        Raises:
            InputError: something is missing or of a wrong type.
        """
        try:
            return cls(**{**data, "layers": tuple(LayerPlan.from_dict(layer) for layer in data["layers"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a plan: {type(error).__name__} {error}; make it again with `plan`") from error
