"""What calibration learns about each layer, and the files that keep it.

Shapes: E experts, d hidden size, m expert width, n input rows (2m with a gate), N = n. All sums run over the calibration tokens routed to
the expert; p is the routing weight with which the expert's output enters the layer's.
"""

import json
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream, as_stream
from moesvd_core.atomic import sync, write_json
from moesvd_core.calibration.settings import Calibration
from moesvd_core.devices import room, to_device
from moesvd_core.errors import StatisticsError
from moesvd_core.tensor_files import load_tensors, save_tensors

SUMMARY = "statistics.json"
"""File that makes a folder of statistics complete; written last."""
WINDOWS = "windows.safetensors"
"""File of the token ids that were read."""
_SYMMETRIC = (
    "input_gram_EDD",
    "output_gram_EDD",
    "intermediate_gram_EMM",
    "gradient_gram_DD",
    "gradient_gram_EDD",
    "row_gram_ENN",
    "weighted_input_gram_EDD",
)


@dataclass
class LayerStatistics:
    """Sums over the calibration text for one layer's routed experts; float32 or float64 on the host.

    Where labels were drawn beside the text's own (`Calibration.drawn_labels`), sums of products of gradients are means over the labels.

    Attributes:
        layer: index of the decoder layer.
        tokens: calibration tokens that passed the layer.
        count_E: tokens routed to each expert (n_e), int64.
        weight_square_E: Σ p², what a sum over p² has to be divided by to become a mean.
        input_gram_EDD: C_e = Σ p² x xᵀ.
        output_gram_EDD: O_e = Σ p² y yᵀ (y without its bias: it is what the output matrix makes).
        intermediate_gram_EMM: H_e = Σ p² h hᵀ, or None when calibration did not collect it (wide experts).
        input_mean_ED: mean |x| of each channel (unweighted; ASVD).
        intermediate_mean_EM: mean |h| of each channel (unweighted; ASVD).
        outlier_E: a_e, the share of the expert's activations h with |h| > τ·mean|h| (Eq. 10).
        input_outlier: OWL's layer outlier ratio: share of |W_ij|·‖x_j‖ above M times their mean (M = 5), over all experts' input matrices.
        principal_rank_E: r_e = #{σ_i > 1e-2·σ_max}, summed over the expert's input and output matrix (Alg. 1), int64.
        saliency_E: mean(p·‖y‖) (REAP).
        slope_EN: Σ p² (∂h_i(j)/∂pre_j)² for every input row j.
        gradient_gram_DD: Γ·tokens = Σ g gᵀ, g the gradient of the summed NLL at the layer's expert output; None without a backward pass.
        gradient_tokens: tokens behind `gradient_gram_DD` and everything below.
        gradient_gram_EDD: Σ p² g gᵀ over the expert's tokens; this and what follows is None without a backward pass.
        gradient_weight_square_E: Σ p² over the tokens of the backward pass, what `gradient_gram_EDD` has to be divided by.
        row_square_EN: Σ δ² of every input row, δ = p·(Dᵀ g) ⊙ ∂h/∂pre the gradient of the summed NLL at the expert's pre-activations.
        row_gram_ENN: Σ δ δᵀ, or None when calibration did not collect it (wide experts).
        weighted_input_gram_EDD: Σ ‖δ‖² x xᵀ.
        output_sum_ED: Σ p² y (y without its bias, as in O_e), which tells how much an expert's answer and its bias have in common; None
            where experts have no output biases, and in files of an older version.
    """

    layer: int
    tokens: int
    count_E: torch.Tensor
    weight_square_E: torch.Tensor
    input_gram_EDD: torch.Tensor
    output_gram_EDD: torch.Tensor
    input_mean_ED: torch.Tensor
    intermediate_mean_EM: torch.Tensor
    outlier_E: torch.Tensor
    input_outlier: float
    principal_rank_E: torch.Tensor
    saliency_E: torch.Tensor
    slope_EN: torch.Tensor
    intermediate_gram_EMM: torch.Tensor | None = None
    gradient_gram_DD: torch.Tensor | None = None
    gradient_tokens: int = 0
    gradient_gram_EDD: torch.Tensor | None = None
    gradient_weight_square_E: torch.Tensor | None = None
    row_square_EN: torch.Tensor | None = None
    row_gram_ENN: torch.Tensor | None = None
    weighted_input_gram_EDD: torch.Tensor | None = None
    output_sum_ED: torch.Tensor | None = None

    def on(self, device: torch.device) -> "LayerStatistics":
        """The same with its Grams on a card, for whoever reads them many times; itself where that has no room for them, or is none."""
        grams = {name: value for name in _SYMMETRIC if (value := getattr(self, name)) is not None}
        if sum(value.nbytes for value in grams.values()) > room(device):
            return self
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in grams.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class ModelIdentity:
    """Which model the statistics are of.

    Attributes:
        source: folder it was read from, or the name it was loaded under; may be empty.
        digest: fingerprint of configuration and samples of the weights (`identity.identify`).
        dtype: number format it was calibrated in, "bfloat16".
    """

    source: str
    digest: str
    dtype: str


@dataclass
class Statistics:
    """Everything that one calibration learned; made once, used for every ratio and method.

    Attributes:
        layers: statistics by index of the decoder layer; read from the folder on each access if there is one.
        expert_layers: the layers with routed experts, in order.
        calibration: the settings.
        model: which model.
        text: fingerprint of the token ids that were read.
        windows, length: windows of text, and tokens in each.
        gradient: how the gradient Grams were made: "backward" pass, or "probe" (an identity scaled by one measured KL a layer).
        window_NL: the token ids that were read, int64; None when they were not kept (statistics of an older version).
        stream: the model itself where it is at hand; not saved.
        decompositions: what `pipeline` has made from them in this session; not saved.
    """

    layers: Mapping[int, LayerStatistics]
    expert_layers: tuple[ExpertLayer, ...]
    calibration: Calibration
    model: ModelIdentity
    text: str
    windows: int
    length: int
    gradient: Literal["backward", "probe"]
    window_NL: torch.Tensor | None = field(default=None, repr=False, compare=False)
    stream: DecoderStream | None = field(default=None, repr=False, compare=False)
    decompositions: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Calibration tokens that passed every layer."""
        return self.windows * self.length

    def save(self, folder: Path | str) -> None:
        """Write one file a layer and then the summary that makes the folder complete; what a folder held before goes first, so that one in
        which writing was interrupted is not taken for complete.

        Raises:
            ResourceError: the disk is full.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if not (isinstance(self.layers, LayerFolder) and self.layers.folder.resolve() == path.resolve()):
            (path / SUMMARY).unlink(missing_ok=True)
            (path / WINDOWS).unlink(missing_ok=True)
            sync(path)
            target = LayerFolder(path)
            for index in set(target) - set(self.layers):
                del target[index]
            for index, layer in self.layers.items():
                target[index] = layer
        if self.window_NL is not None:
            save_tensors(path / WINDOWS, {"windows": self.window_NL}, {})
        write_json(path / SUMMARY, self.summary())

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON: all but the layers' sums."""
        return {
            "expert_layers": [asdict(layer) for layer in self.expert_layers],
            "calibration": self.calibration.as_dict(),
            "model": asdict(self.model),
            "text": self.text,
            "windows": self.windows,
            "length": self.length,
            "gradient": self.gradient,
        }

    @classmethod
    def load(cls, folder: Path | str, *, stream: PreTrainedModel | DecoderStream | None = None) -> "Statistics":
        """Statistics that `save` or `calibrate` wrote; layers are read when they are asked for.

        Args:
            stream: the model that was calibrated, where it is not in the folder any more that it was loaded from.

        Raises:
            InputError: `stream` is no model.
            StatisticsError: the calibration was not finished, a file is damaged, or a layer is missing.
        """
        path, opened = Path(folder), None if stream is None else as_stream(stream)
        try:
            data = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
            statistics = cls(
                layers=LayerFolder(path),
                expert_layers=tuple(ExpertLayer(**layer) for layer in data["expert_layers"]),
                calibration=Calibration.from_dict(data["calibration"]),
                model=ModelIdentity(**data["model"]),
                text=data["text"],
                windows=data["windows"],
                length=data["length"],
                gradient=data["gradient"],
                window_NL=load_tensors(path / WINDOWS)[0]["windows"] if (path / WINDOWS).exists() else None,
                stream=opened,
            )
        except FileNotFoundError as error:
            raise StatisticsError(f"{path} holds no finished calibration ({SUMMARY} is missing): calibrate into it to finish") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise StatisticsError(f"{path / SUMMARY} is damaged ({reason}): remove the folder and calibrate again") from error
        missing = sorted({layer.index for layer in statistics.expert_layers} - set(statistics.layers))
        if missing:
            raise StatisticsError(f"{path} lacks the statistics of layer {missing[0]}: remove the folder and calibrate again")
        return statistics


class LayerFolder(MutableMapping[int, LayerStatistics]):
    """Statistics in a folder, one file a layer, read on each access: all of a large model's would not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, index: int) -> LayerStatistics:
        if index not in self:
            raise KeyError(index)
        return load(self._file(index))

    def __setitem__(self, index: int, statistics: LayerStatistics) -> None:
        save(statistics, self._file(index))

    def __delitem__(self, index: int) -> None:
        self._file(index).unlink()

    def __iter__(self) -> Iterator[int]:
        found = (re.fullmatch(r"layer-(\d+)\.safetensors", path.name) for path in self.folder.glob("layer-*.safetensors"))
        return iter(sorted(int(match[1]) for match in found if match))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self._file(index).is_file()

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"


def save(statistics: LayerStatistics, path: Path) -> None:
    """Write one layer's statistics, whole or not at all; of symmetric matrices only the upper triangle is stored, and nothing of what was
    not collected.

    Raises:
        ResourceError: the disk is full.
    """
    tensors, facts = {}, {}
    for item in fields(statistics):
        value = getattr(statistics, item.name)
        if isinstance(value, torch.Tensor):
            tensors[item.name] = _upper(value) if item.name in _SYMMETRIC else value
        elif value is not None:
            facts[item.name] = value
    save_tensors(path, tensors, facts)


def load(path: Path) -> LayerStatistics:
    """One layer's statistics, as they were saved.

    Raises:
        StatisticsError: missing or damaged; names the file.
    """
    tensors, facts = load_tensors(path)
    try:
        sums: dict[str, Any] = {name: _full(value) if name in _SYMMETRIC else value for name, value in tensors.items()}
        return LayerStatistics(**facts, **sums)
    except TypeError as error:
        raise StatisticsError(f"{path} was written by another version of this program ({error}): calibrate again") from error


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    """Upper triangle of symmetric matrices [..., n, n] -> [..., n(n+1)/2]."""
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., row, column]


def _full(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrices whose upper triangle `_upper` gave."""
    size = round(((8 * upper.shape[-1] + 1) ** 0.5 - 1) / 2)
    row, column = torch.triu_indices(size, size)
    matrix = upper.new_empty(*upper.shape[:-1], size, size)
    matrix[..., row, column] = upper
    matrix[..., column, row] = upper
    return matrix
