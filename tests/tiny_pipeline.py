"""A tiny model, calibrated and ready to be planned, for tests of what is done to finished plans."""

from pathlib import Path

import pytest
from tiny_models import save_tiny, tiny_tokenizer

from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan
from moesvd_core.progress import Progress


class StoppedError(Exception):
    """The process ended here."""


def calibrated(folder: Path, name: str = "mixtral", samples: int = 40, keep: Path | None = None) -> Pipeline:
    """The family's tiny model under `folder`, calibrated on so many windows; `keep` is the pipeline's folder."""
    stream = LayerStream(save_tiny(name, folder / name))
    statistics = calibrate(stream, tiny_tokenizer(), Calibration(samples=samples, length=24, batch=8))
    return Pipeline(stream, statistics, keep)


def compensated_with_stops(pipeline: Pipeline, plan: Plan) -> list[str]:
    """Compensate a plan, with the process ended behind each of the first two layers; what was told of each layer that was worked on."""
    layers: list[str] = []

    def stop(progress: Progress) -> None:
        if progress.stage == "compensate":
            layers.append(progress.message)
            raise StoppedError

    for _ in range(2):
        with pytest.raises(StoppedError):
            pipeline.compensate(plan, stop)
    pipeline.compensate(plan, lambda progress: layers.append(progress.message))
    return layers
