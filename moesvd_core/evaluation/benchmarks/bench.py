"""What benchmarks of quality share: one model, one held-out text, and calibrations to compare on it; what was measured is kept.

A folder of work goes on where an interrupted run was. Everything in it lies under a digest of what decided it: model, calibration, number
format, variant, and the engine's own code, so that figures of two versions of a method never mix.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import moesvd_core
from moesvd_core.architectures.files import resolve_model
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.atomic import write_json
from moesvd_core.calibration import Calibration, Statistics, calibrate
from moesvd_core.calibration.identity import identify
from moesvd_core.calibration.text import evaluation_windows, window_length
from moesvd_core.decomposition.registry import METHODS, Method
from moesvd_core.evaluation.hidden import FinalHidden, context_limit, final_hidden
from moesvd_core.evaluation.perplexity import Evaluation, compare
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan
from moesvd_core.progress import Report, silent


@dataclass(frozen=True)
class QualitySettings:
    """What is measured, and on what.

    Attributes:
        model: a folder or a hub id.
        calibration: what all methods are calibrated on.
        dataset, windows, length: held-out text and how much of it is scored.
        dtype: number format of weights and factors; None: the checkpoint's own.
        work: folder that keeps statistics, decompositions and measurements; None: memory.
    """

    model: str
    calibration: Calibration = field(default_factory=Calibration)
    dataset: str = "sotu"
    windows: int | None = None
    length: int | None = None
    dtype: torch.dtype | None = None
    work: Path | None = None

    def bench(self, report: Report = silent) -> "Bench":
        """Open the model and run the original over the text.

        Raises:
            InputError: settings that the model or the text do not allow.
        """
        path = resolve_model(self.model)
        tokenizer = AutoTokenizer.from_pretrained(path)
        stream = LayerStream(path, dtype=self.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
        limit = context_limit(stream.config)
        window_length(self.calibration.length, limit)  # refused before the original is run over the text
        window_NL = evaluation_windows(tokenizer, self.dataset, window_length(self.length, limit), self.windows)
        return Bench(stream, tokenizer, final_hidden(stream, window_NL, report=report), self.dataset, self.work)

    def measured_on(self, bench: "Bench", seeds: tuple[int, ...]) -> str:
        """The text and the calibration, for the notes of a table."""
        count, length = bench.reference.window_NL.shape
        read = window_length(self.calibration.length, context_limit(bench.stream.config))
        number = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        return (
            f"measured on {Path(self.dataset).name}, {count} windows of {length} tokens ({count * (length - 1)} predicted), "
            f"in {dtype_name(bench.stream.dtype)}; calibrated on {Path(self.calibration.dataset).name}, "
            f"{self.calibration.samples} windows of {read} tokens, {number}"
        )


@dataclass(frozen=True)
class Bench:
    """A model, and the original's last hidden states over the held-out text.

    Attributes:
        calibrations: what was calibrated in this session, for variants that differ in something else.
    """

    stream: LayerStream
    tokenizer: PreTrainedTokenizerBase
    reference: FinalHidden
    dataset: str
    work: Path | None = None
    calibrations: dict[Calibration, Statistics] = field(default_factory=dict)

    @property
    def original(self) -> Evaluation:
        """Figures of the original model."""
        return compare(self.reference, None, self.dataset)

    def calibrated(
        self,
        calibration: Calibration,
        report: Report = silent,
        *,
        methods: Mapping[str, Method] = METHODS,
        changed: Callable[[Statistics], Statistics] | None = None,
        variant: str = "",
    ) -> "CalibratedBench":
        """The model calibrated one way.

        Args:
            methods: what the names of recipes stand for.
            changed: statistics to use in place of those collected.
            variant: name of what `methods` and `changed` do; results are kept apart by it.

        Raises:
            InputError: settings that the model or the text do not allow.
        """
        folder = self._folder(calibration)
        if calibration not in self.calibrations:
            into = None if folder is None else folder / "statistics"
            self.calibrations[calibration] = calibrate(self.stream, self.tokenizer, calibration, report=report, folder=into)
        used = self.calibrations[calibration] if changed is None else changed(self.calibrations[calibration])
        kept = None if folder is None else folder / (variant or "as-registered").replace(" ", "-")
        return CalibratedBench(self, Pipeline(self.stream, used, kept, methods=methods), kept)

    def _folder(self, calibration: Calibration) -> Path | None:
        if self.work is None:
            return None
        facts = {
            "engine": engine_digest(), "model": identify(self.stream).digest, "dtype": str(self.stream.dtype),
            "calibration": calibration.as_dict(),
        }
        return self.work / _digest(facts)


@dataclass(frozen=True)
class CalibratedBench:
    """One calibration of a bench's model; plans are measured on the bench's text, each once.

    Attributes:
        folder: where measurements are kept; None: in `known`.
        known: measurements of this session.
    """

    bench: Bench
    pipeline: Pipeline
    folder: Path | None
    known: dict[str, Evaluation] = field(default_factory=dict)

    def measured(self, plan: Plan) -> Evaluation:
        """Figures of what a plan makes of the model, beside the original."""
        reference = self.bench.reference
        text = {"dataset": self.bench.dataset, "windows": hashlib.sha256(reference.window_NL.numpy().data).hexdigest()}
        key = _digest({"plan": plan.as_dict(), **text})
        file = None if self.folder is None else self.folder / "evaluations" / f"{key}.json"
        if key not in self.known and file is not None and file.exists():
            self.known[key] = Evaluation(**json.loads(file.read_text(encoding="utf-8")))
        if key not in self.known:
            self.pipeline.compensate(plan)
            compressed = final_hidden(self.pipeline.compressed(plan), reference.window_NL)
            self.known[key] = compare(compressed, reference, self.bench.dataset)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, self.known[key].as_dict())
        return self.known[key]


def with_seed(calibration: Calibration, seed: int) -> Calibration:
    """The same calibration on other windows."""
    return replace(calibration, seed=seed)


@cache
def engine_digest() -> str:
    """Digest of the engine's code but for the benchmarks themselves."""
    root = Path(moesvd_core.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if Path(__file__).parent not in path.parents:
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
