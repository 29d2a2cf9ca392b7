"""MoE-SVD Explorer's engine: training-free compression of Mixture-of-Experts language models by singular value decomposition.

    import moesvd_core as moesvd

    model, tokenizer = moesvd.load_model("assets/demo-moe")
    statistics = moesvd.calibrate(model, tokenizer, moesvd.Calibration(dataset="sotu", samples=128))
    plan = moesvd.plan(statistics, moesvd.Recipe(method="auto", ratio=0.4))
    compressed = moesvd.compress(model, statistics, plan)
    moesvd.evaluate(compressed, tokenizer, dataset="sotu")
    moesvd.export(compressed, tokenizer, "out/demo-40")

Importing the package is cheap: torch and transformers are imported when something is used that needs them. Checkpoints of factored experts
load through `from_pretrained` from then on (see `registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesvd_core.registration import register_when_needed

if TYPE_CHECKING:
    from moesvd_core.api import calibrate, compress, evaluate, export, inspect, load_model, plan
    from moesvd_core.calibration.settings import Calibration
    from moesvd_core.calibration.statistics import Statistics
    from moesvd_core.checkpoint.apply import pack, unpack
    from moesvd_core.evaluation.perplexity import Evaluation
    from moesvd_core.planning import Plan, Recipe

_HOME = {
    "Calibration": "moesvd_core.calibration.settings",
    "Evaluation": "moesvd_core.evaluation.perplexity",
    "Plan": "moesvd_core.planning",
    "Recipe": "moesvd_core.planning",
    "Statistics": "moesvd_core.calibration.statistics",
    **dict.fromkeys(("pack", "unpack"), "moesvd_core.checkpoint.apply"),
    **dict.fromkeys(("calibrate", "compress", "evaluate", "export", "inspect", "load_model", "plan"), "moesvd_core.api"),
}

__all__ = [
    "Calibration", "Evaluation", "Plan", "Recipe", "Statistics",
    "calibrate", "compress", "evaluate", "export", "inspect", "load_model", "pack", "plan", "unpack",
]
__version__ = "0.1.0"

register_when_needed()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
