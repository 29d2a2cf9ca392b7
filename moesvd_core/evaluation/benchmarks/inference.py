"""Speed of the compressed model beside the original, in turns within one run: prefill, decoding, memory and operations.

The original runs by every implementation of experts that transformers has and that makes sense on the device; each phase of each cell is
held against the fastest of them there.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.files import resolve_model
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.apply import compressed, pack
from moesvd_core.cpu_kernels import cpu_library
from moesvd_core.decomposition.registry import method
from moesvd_core.errors import InputError, is_number
from moesvd_core.evaluation.benchmarks.checks import require_device
from moesvd_core.evaluation.benchmarks.synthetic import ModelSize, byte_tokenizer, random_model
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.speed import Rate, Speed, SpeedTest, measure_speed
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Report, silent

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
"""How transformers computes experts; the last copies a matrix for every pair of a token and an expert, so only for few of them."""
FEW_PAIRS = 16
PHASES = ("prefill", "decode")
OF_CPUS = ("factors by kernels of our own, compiled here (`cpu_kernels.c`), bases that all tokens pass beside them included",)
PACKED = "packed (`moesvd_core.pack`): large matrices in the order in which torch's kernels read them; small ones need none"
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000"
"""A CPU's compiled kernels that are kept. The library's own bound, 1024, suits one model in a process; here a dozen take turns, and would
compile anew what the others drove out. Read when the first kernel is made."""


@dataclass(frozen=True)
class InferenceBenchmark:
    """Settings.

    Attributes:
        model: a folder or a hub id; None: a random model of `size`.
        size: of the random model.
        kept: shares of the experts' parameters that are kept.
        methods: what is compressed and timed at each of them; those of greedy allocation also keep at most that share of the experts'
            operations ("auto with a FLOP budget").
        batches, prompts: every number of prompts with every length.
        test: new tokens and repetitions.
        calibration: decides the ranks, not their number.
        device: where the models run.
    """

    model: str | None = None
    size: ModelSize = field(default_factory=lambda: ModelSize(width=3584, layers=1))
    kept: tuple[float, ...] = (0.8, 0.6, 0.4)
    methods: tuple[str, ...] = ("latent", "auto")
    batches: tuple[int, ...] = (1, 4, 16, 64)
    prompts: tuple[int, ...] = (32, 128)
    test: SpeedTest = field(default_factory=lambda: SpeedTest(new_tokens=8, repeats=3))
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=8, length=256))
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        for share in self.kept:
            if not (is_number(share) and 0 < share < 1):
                raise InputError(f"kept must be shares in (0, 1) of the experts' parameters, got {share!r}")
        if not (self.kept and self.methods and self.batches and self.prompts):
            raise InputError("at least one share, method, batch and prompt length must be given to compare")
        require_device(self.device)
        self.tests  # noqa: B018 - refuses what is out of bounds

    @property
    def tests(self) -> list[SpeedTest]:
        """What is timed, cell by cell."""
        return [replace(self.test, batch=batch, prompt_tokens=prompt) for batch, prompt in product(self.batches, self.prompts)]

    def run(self, report: Report = silent) -> Table:
        """Compress and time.

        Raises:
            InputError: settings that the model does not allow.
        """
        os.environ.setdefault(*KERNELS)
        path = None if self.model is None else resolve_model(self.model)
        config = self.size.config() if path is None else AutoConfig.from_pretrained(path)
        for test in self.tests:
            test.require_room(config, _title(self))  # before minutes of compressing
        tokenizer: PreTrainedTokenizerBase
        if path is None:
            tokenizer, model = byte_tokenizer(), random_model(self.size, self.device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval().to(self.device)
        pipeline = Pipeline(MemoryStream(model), calibrate(MemoryStream(model), tokenizer, self.calibration, report=report))
        plans = self._plans(pipeline, report)
        models = {name: _compressed(model, pipeline, plan) for name, plan in plans.items()}
        count = len(models)
        if self.device == "cpu" and model.dtype == torch.bfloat16:
            for name, plan in tuple(plans.items()):
                packed = _compressed(model, pipeline, plan)
                if pack(packed):
                    models[f"{name}, packed"], plans[f"{name}, packed"] = packed, plan
        rows = []
        for test in self.tests:
            cell = {f"original, {name}": each for name, each in _originals(model, test.batch * test.prompt_tokens)} | models
            rows += _rows(measure_speed(cell, test, report=report), plans, test)
        return Table.of(f"Speed of the original and of compressed models: {_title(self)}", rows, self._notes(model, len(models) > count))

    def _notes(self, model: PreTrainedModel, packed: bool) -> list[str]:
        where = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
        return [
            f"on {where}, {dtype_name(model.dtype)}; prompts of random tokens, {self.test.new_tokens} new tokens each; "
            f"medians of {self.test.repeats} turns, original and compressed models alternating",
            "× original: tokens a second beside the fastest implementation of the original in that cell and phase; experts: counting the "
            "time within the experts alone; of ideal: that times the share of the experts' parameters kept, 1 where speed rises as size "
            "falls",
            *(OF_CPUS if self.device == "cpu" and model.dtype == torch.bfloat16 and cpu_library() is not None else ()),
            *([PACKED] if packed else []),
            "auto: whichever structures lose least with at most that share of the experts' parameters and of their operations; auto, "
            "per-expert: of each expert's own factors, stored whole (`structure: per-expert` in a recipe)",
        ]

    def _plans(self, pipeline: Pipeline, report: Report) -> dict[str, Plan]:
        """Every method at every share; `auto` also with factors stored whole, which are faster where an order of columns costs time."""
        shape, found = pipeline.shape, {}
        active = sum(layer.parameters * layer.active / layer.experts for layer in pipeline.layers.values())
        for name, share in product(self.methods, self.kept):
            recipe = Recipe(name, (1 - share) * shape.expert_parameters / shape.parameters)
            if name == "auto":
                recipe = replace(recipe, flops_ratio=(1 - share) * active / (shape.active_parameters - shape.embedding_parameters))
            found[f"{name} {share:.0%} kept"] = pipeline.plan(recipe, report)
            if name == "auto":
                found[f"auto, per-expert {share:.0%} kept"] = pipeline.plan(replace(recipe, structure="per-expert"), report)
        return found


def _title(benchmark: InferenceBenchmark) -> str:
    if benchmark.model is not None:
        return Path(benchmark.model).name
    return f"a random model ({benchmark.size})"


def _compressed(model: PreTrainedModel, pipeline: Pipeline, plan: Plan) -> PreTrainedModel:
    layers = [(layer, pipeline.factors(plan, layer.index)) for layer in pipeline.layers.values()]
    return compressed(model, [(layer, factors) for layer, factors in layers if factors is not None])


def _originals(model: PreTrainedModel, tokens: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model by every implementation of its experts, on the same weights."""
    config = model.config.get_text_config()
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or tokens * config.num_experts_per_tok <= FEW_PAIRS:
            shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            own = copy.deepcopy(model, shared)
            own.set_experts_implementation(name)
            yield name, own


def _rows(speeds: Mapping[str, Speed], plans: Mapping[str, Plan], test: SpeedTest) -> list[dict[str, Cell]]:
    """One row a model: rates, and what they are beside the fastest original."""
    originals = [speed for name, speed in speeds.items() if name not in plans]
    rows = []
    for name, speed in speeds.items():
        kept = 1 - plans[name].expert_ratio if name in plans else 1.0
        row: dict[str, Cell] = {
            "model": f"{name}, {test.batch} × {test.prompt_tokens}",
            "batch": test.batch,
            "prompt": test.prompt_tokens,
            "experts kept": kept,
        }
        for kind in PHASES:
            rate, experts = _rate(speed, kind), _rate(speed, f"experts_{kind}")
            gained = experts.median / max(_rate(each, f"experts_{kind}").median for each in originals)
            row[f"{kind} tokens/s"] = rate.median
            row[f"{kind} quartiles"] = f"[{rate.low:.4g}, {rate.high:.4g}]"
            row[f"{kind} × original"] = rate.median / max(_rate(each, kind).median for each in originals)
            row[f"{kind}, experts × original"] = gained
            row[f"{kind}, of ideal"] = gained * kept
        row["MFLOP/token"] = speed.flops_per_token / 1e6
        row["weights, bytes"] = speed.weight_bytes
        row["peak bytes"] = speed.peak_bytes
        rows.append(row)
    return rows


def _rate(speed: Speed, name: str) -> Rate:
    rate: Rate = getattr(speed, name)
    return rate
