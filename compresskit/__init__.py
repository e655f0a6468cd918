"""compresskit: transformer compression by weight decomposition.

import compresskit
from transformers import AutoModel

model = AutoModel.from_pretrained("bert-base-uncased")
report = compresskit.compress(model, "kronecker", ratio=19)
model.save_pretrained("small")  # opens again with AutoModel.from_pretrained after `import compresskit`
"""

import importlib
from typing import Any

import compresskit.decompositions  # noqa: F401 - registers them
from compresskit.api import apply, compress, plan
from compresskit.calibration import Calibration, calibrate, load_calibration
from compresskit.core.cost import Gemm, Machine, Pass, Rates, Speeds, Target, dense_operations
from compresskit.core.decomposition import Analysis, Decomposition, Fitted
from compresskit.core.importance import Importance
from compresskit.core.kron_gpu import use_kernels
from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear
from compresskit.core.native_build import KernelState, build_kernels, kernel_advice, kernel_state
from compresskit.core.registry import decomposition, register
from compresskit.core.registry import decompositions as methods
from compresskit.core.structure import Structure, TensorSpec
from compresskit.decompositions.kronecker import Kronecker
from compresskit.decompositions.svd import SVD
from compresskit.errors import CompresskitError
from compresskit.hub import dequantize_
from compresskit.memory import keep_freed_memory
from compresskit.options import describe_options
from compresskit.surgery.apply import Report
from compresskit.surgery.layout import install_, layout_of
from compresskit.surgery.plan import FrontPoint, Plan, plan_from_json
from compresskit.surgery.pricing import OnProgress, Progress
from compresskit.surgery.sites import find_sites
from compresskit.version import __version__

__all__ = [
    "SVD",
    "Analysis",
    "Calibration",
    "CompresskitError",
    "Decomposition",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "Fitted",
    "FrontPoint",
    "Gemm",
    "Importance",
    "KernelState",
    "Kronecker",
    "Machine",
    "OnProgress",
    "Pass",
    "Plan",
    "Progress",
    "Rates",
    "Report",
    "Speeds",
    "Structure",
    "Target",
    "TensorSpec",
    "__version__",
    "apply",
    "build_kernels",
    "calibrate",
    "compress",
    "decomposition",
    "dense_operations",
    "dequantize_",
    "describe_options",
    "find_sites",
    "install_",
    "keep_freed_memory",
    "kernel_advice",
    "kernel_state",
    "layout_of",
    "load_calibration",
    "methods",
    "plan",
    "plan_from_json",
    "register",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    if name in ("distill", "recipes"):
        return importlib.import_module(f"compresskit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
