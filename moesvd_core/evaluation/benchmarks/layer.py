"""What compressing one layer of a large model takes: calibration as it is shipped, then every method, timed step by step.

A random model of two equal layers is built where the work is done. The upper one is timed: gradients have to be pushed through it, as
through every layer of a model but the lowest. What belongs to no layer (embedding, head and loss) is left out. Times are those of real
weights but for how evenly a trained router spreads its tokens.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import method
from moesvd_core.devices import finish_all
from moesvd_core.evaluation.benchmarks.checks import require_device
from moesvd_core.evaluation.benchmarks.decompose import compressed, require, warm_up
from moesvd_core.evaluation.benchmarks.machine import place
from moesvd_core.evaluation.benchmarks.synthetic import Family, ModelSize, RandomLayer, random_model
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.progress import Progress, Report, silent

VOCABULARY = 4096
"""Words of the random text."""
TIMED = 1
"""The layer that is timed, of two."""


@dataclass(frozen=True)
class LayerBenchmark:
    """Settings.

    Attributes:
        family: which model the layer is of.
        hidden, width, experts, active: d, m, E, k.
        samples, length, batch: windows of text, tokens in each, and windows at once.
        gradient_samples: windows of the backward pass; None: all.
        methods: what the layer is compressed by; each at the ratio.
        ratio: share of the experts' parameters to remove.
        device: where everything is done.
    """

    family: Family = "mixtral"
    hidden: int = 512
    width: int = 896
    experts: int = 8
    active: int = 2
    samples: int = 16
    length: int = 256
    batch: int = Calibration.batch
    gradient_samples: int | None = None
    methods: tuple[str, ...] = ("latent", "svd-llm", "fisher")
    ratio: float = 0.4
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        require(self.methods, self.ratio)
        require_device(self.device)
        self.calibration("words.txt")
        self.model  # noqa: B018 - both refuse what is out of bounds

    @property
    def model(self) -> ModelSize:
        """The random model's size."""
        shape = (self.family, self.hidden, self.width, self.experts, self.active)
        return ModelSize(*shape, layers=TIMED + 1, context=self.length, vocabulary=VOCABULARY)

    def calibration(self, text: str) -> Calibration:
        """The settings of calibrating on a file."""
        return Calibration(text, self.samples, self.length, batch=self.batch, gradient_samples=self.gradient_samples)

    def run(self, report: Report = silent) -> Table:
        """Build the model, calibrate it, and compress its upper layer by every method."""
        stream, tokenizer = MemoryStream(random_model(self.model, self.device, seed=self.seed)), _tokenizer()
        with TemporaryDirectory() as folder:
            text = Path(folder) / "words.txt"
            text.write_text(_words(self.samples * self.length, self.seed), encoding="utf-8")
            calibration = self.calibration(str(text))
            if torch.device(self.device).type != "cpu":
                calibrate(stream, tokenizer, replace(calibration, samples=min(self.batch, self.samples), gradient_samples=None))
                warm_up(self._compressed, self.methods, self.device)
            clock = _Clock(self.device, report)
            statistics = calibrate(stream, tokenizer, calibration, report=clock)
        layer = stream.expert_layers[TIMED]
        weights = read_experts(stream.model.get_submodule(layer.name), layer)
        sample = RandomLayer(layer, weights, statistics.layers[layer.index], ())
        passes = {kind: clock.seconds[f"{kind}, layer {TIMED}"] for kind in ("forward", "backward")}
        rows: list[dict[str, Cell]] = [_row(f"calibration, {kind} pass", seconds) for kind, seconds in passes.items()]
        for done, name in enumerate(self.methods, start=1):
            clock.lap()
            factors = self._compressed(sample, name)
            seconds = clock.lap()
            kept = factors.parameters / layer.parameters
            rows += [_row(f"{name} decomposed", seconds, 1 - kept), _row(f"{name} in all", seconds + sum(passes.values()), 1 - kept)]
            report(Progress("benchmark", done, len(self.methods), name))
        title = f"Compressing one layer of a random model ({self.model}, bfloat16, {place(self.device)})"
        return Table.of(title, rows, self._notes(stream.model))

    def _compressed(self, sample: RandomLayer, name: str) -> LayerFactors:
        return compressed(sample.weights, sample.layer, sample.statistics, method(name), self.ratio, self.device)[1]

    def _notes(self, model: PreTrainedModel) -> list[str]:
        labels = 1 + Calibration.drawn_labels
        experts = getattr(model.config, "_experts_implementation", None) or "eager"
        return [
            f"calibration on {self.samples} windows of {self.length} tokens, {self.batch} at once; gradients of "
            f"{self.gradient_samples or self.samples} of them, {labels} labels a position; experts of the model by {experts}",
            "decomposed: at every rank, with its loss curves, and the factors at the ratio; in all: with both passes of calibration",
        ]


def _tokenizer() -> PreTrainedTokenizerFast:
    """A word of the random text is a token."""
    tokenizer = Tokenizer(WordLevel({_word(index): index for index in range(VOCABULARY)}, unk_token=_word(0)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_word(0))


def _words(count: int, seed: int) -> str:
    chosen = Random(seed)  # noqa: S311 - no secret
    return " ".join(_word(chosen.randrange(VOCABULARY)) for _ in range(count))


def _word(index: int) -> str:
    return f"w{index}"


@dataclass
class _Clock:
    """Hears of calibration's steps, and how long each took on the device.

    Attributes:
        seconds: of every step, by its name.
    """

    device: str
    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = 0.0

    def __post_init__(self) -> None:
        self.lap()

    def __call__(self, progress: Progress) -> None:
        self.seconds[progress.message] = self.lap()
        self.report(progress)

    def lap(self) -> float:
        """Seconds since the last time that this was asked; all work on the device is done by then."""
        finish_all(torch.device(self.device))
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def _row(step: str, seconds: float, ratio: float | None = None) -> dict[str, Cell]:
    return {"step": step, "seconds": seconds, "experts' ratio": ratio}
