"""A run whose plans were made from made-up curves: of any size in seconds, without a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tiny_curves import model_curves, shape_of

from moesvd_core import atomic
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.curve_files import save_curves
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.pipeline import decomposition_key, single_structures
from moesvd_core.planning import ModelShape, Plan, Recipe, max_ratio, plans
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.workbench import Text, plan_key

RUN = "planned-0000000c"
NLL = 3.5


def planned_run(
    root: Path, name: str = RUN, *, layers: int = 3, experts: int = 4, hidden: int = 64, width: int = 32,
    methods: Sequence[str] = ("auto", "svd"),
) -> RunFolder:
    """Make it under `root`, older than any other run, so that no page opens on it unasked."""
    run = RunFolder.create(root / name, Identity(name, f"models/{name}", {"samples": 1}, "2023-06-01T00:00:00+00:00"))
    described = [ExpertLayer(index, f"model.layers.{index}.mlp.experts", experts, hidden, width, active=2) for index in range(layers)]
    shape = shape_of(model_curves(layers, experts, hidden, width), other=10_000)
    atomic.write_json(run.path / "source.json", {"path": "gone", "fingerprint": "", "facts": _facts(described, shape)})
    for method in methods:
        atomic.write_json(run.station("plans") / f"all-{method}.json", plan_table(method, layers, experts, hidden, width))
    rng = np.random.default_rng(0)
    rows = [
        {"layer": layer, "expert": expert, "f": float(f)}
        for layer in range(layers)
        for expert, f in enumerate(2 * rng.dirichlet(np.full(experts, 2.0)))
    ]
    atomic.write_json(run.station("evaluations") / "sensitivity.json", {"layers": [], "experts": rows, "correlations": []})
    atomic.write_json(run.station("evaluations") / f"original--{Text().key}.json", figures(Text(), NLL))
    return run


def add_curves(run: RunFolder, method: str) -> None:
    """The curves that the plans of a run of the usual size came from."""
    curves = model_curves(3, 4, 64, 32, structures=METHODS[method].structures)
    for single in single_structures(METHODS[method]):
        folder = run.path / "curves" / decomposition_key(single)
        folder.mkdir(parents=True)
        for layer in range(3):
            its = [curve for curve in curves if (curve.layer, curve.structure) == (layer, single.structures[0])]
            save_curves(folder / f"layer-{layer:03d}.safetensors", its)


def plan_table(method: str, layers: int, experts: int, hidden: int, width: int) -> dict[str, Any]:
    """Content of `plans/all-NAME.json`."""
    chosen = METHODS[method]
    curves = model_curves(layers, experts, hidden, width, structures=chosen.structures)
    shape = shape_of(curves, other=10_000)
    recipe = Recipe(method=method, allocation=chosen.allocation)
    most = max_ratio(curves, shape, recipe)
    reached = [percent / 100 for percent in range(81) if percent / 100 <= most]
    made = plans(curves, shape, recipe, reached, dict.fromkeys(range(layers), 1.0))
    return {"recipe": Recipe(method=method, ratio=0.0).as_dict(), "max_ratio": most, "plans": [plan.as_dict() for plan in made]}


def measured(run: RunFolder, recipe: Recipe, added: float, text: Text | None = None) -> None:
    """Note a plan of whole percents as measured, `added` nats above the original."""
    text = text or Text()
    table = run.read_json("plans", f"all-{recipe.method}.json")
    plan = Plan.from_dict(table["plans"][round(100 * recipe.ratio)])
    distance = {"kl_mean": added, "kl_p95": 4 * added, "top1_agreement": 0.9, "delta_nll": added, "delta_nll_stderr": added / 20}
    record = plan.as_dict() | figures(text, NLL + added) | distance | {"original": figures(text, NLL), "recipe": recipe.as_dict()}
    atomic.write_json(run.station("evaluations") / f"plan.{plan_key(recipe)}--{text.key}.json", record)


def cut_alone(run: RunFolder, losses: Mapping[int, tuple[float, float]], **text: Any) -> None:
    """Note layers as cut alone by half with `auto`, by layer what that was predicted to lose and what was measured."""
    on, name = Text(**text), plan_key(Recipe(ratio=0.5))
    rows = [{"layer": layer, "predicted": predicted, "measured_nll": added} for layer, (predicted, added) in losses.items()]
    for layer, (_, added) in losses.items():
        distance = {"delta_nll": added, "delta_nll_stderr": abs(added) / 20}
        atomic.write_json(run.station("evaluations") / f"{name}.layer-{layer:03d}--{on.key}.json", figures(on, NLL + added) | distance)
    if not (table := run.station("evaluations") / f"sensitivity-{name}.json").exists():
        atomic.write_json(table, {"layers": rows, "experts": [], "correlations": []})


def figures(text: Text, nll: float) -> dict[str, Any]:
    """Fields of `Evaluation`, without the distance to an original."""
    none = dict.fromkeys(("kl_mean", "kl_p95", "top1_agreement", "delta_nll", "delta_nll_stderr"))
    on = {"dataset": text.dataset, "windows": text.windows, "length": 256, "tokens": 255 * (text.windows or 1)}
    return {**on, "nll": nll, "perplexity": math.exp(nll), "perplexity_stderr": 0.5, **none}


def _facts(layers: Sequence[ExpertLayer], shape: ModelShape) -> dict[str, Any]:
    """As much of `ModelFacts` as pages look at."""
    first = layers[0]
    return {
        "expert_layers": [asdict(layer) for layer in layers], "layers": len(layers), "moe_layers": len(layers), "experts": first.experts,
        "active": first.active, "shared_experts": 0, "hidden": first.hidden, "width": first.width, "parameters": shape.parameters,
        "expert_parameters": shape.expert_parameters, "active_parameters": shape.active_parameters, "bytes": shape.bytes,
        "dtype": "bfloat16", "context_length": 256, "family": "mixtral", "model_type": "mixtral", "licence": None, "factored": False,
        "warnings": [], "source": "",
    }
