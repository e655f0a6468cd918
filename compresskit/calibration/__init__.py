"""Calibration: what a model's layers see on some text, so that fits know which errors matter."""

from compresskit.calibration.calibrate import calibrate
from compresskit.calibration.data import read_batches
from compresskit.calibration.files import load_calibration
from compresskit.calibration.moments import Calibration, Use
from compresskit.calibration.refine import Refine
from compresskit.calibration.rotate import rotate_values_
from compresskit.calibration.sensitivity import balanced, measure_sensitivities
from compresskit.calibration.trials import Judge

__all__ = [
    "Calibration",
    "Judge",
    "Refine",
    "Use",
    "balanced",
    "calibrate",
    "load_calibration",
    "measure_sensitivities",
    "read_batches",
    "rotate_values_",
]
