"""Text in, statistics of every layer's experts out: made once, used for every ratio and method."""

from moesvd_core.calibration.driver import calibrate
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.statistics import LayerStatistics, Statistics

__all__ = ["Calibration", "LayerStatistics", "Statistics", "calibrate"]
