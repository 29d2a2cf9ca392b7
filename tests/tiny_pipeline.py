"""A tiny model, calibrated and ready to be planned, for tests of what is done to finished plans."""

from pathlib import Path

from tiny_models import save_tiny, tiny_tokenizer

from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.pipeline import Pipeline


class StoppedError(Exception):
    """The process ended here."""


def calibrated(folder: Path, name: str = "mixtral", samples: int = 40, keep: Path | None = None) -> Pipeline:
    """The family's tiny model under `folder`, calibrated on so many windows; `keep` is the pipeline's folder."""
    stream = LayerStream(save_tiny(name, folder / name))
    statistics = calibrate(stream, tiny_tokenizer(), Calibration(samples=samples, length=24, batch=8))
    return Pipeline(stream, statistics, keep)
