"""Plans as a whole: ratios, totals, limits, JSON, speed, and no torch."""

import json
import subprocess
import sys
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from tiny_curves import curve, model_curves, shape_of

import moesvd_core
from moesvd_core.errors import InputError
from moesvd_core.planning import ModelShape, Plan, Recipe, layer_plans, max_ratio, plan, plans

SCORES = {layer: float((7 * layer) % 5) for layer in range(8)}


@pytest.mark.parametrize("allocation", ["greedy", "uniform", "owl", "selective"])
@pytest.mark.parametrize("structure", ["per-expert", "latent"])
def test_never_below_the_ratio_asked_for_and_at_most_one_block_above(allocation: str, structure: str) -> None:
    curves = model_curves(8, 4, 96, 64, structures=(structure,))  # type: ignore[arg-type]
    shape = shape_of(curves, other=100_000)
    recipe = Recipe(allocation=allocation)  # type: ignore[arg-type]
    largest = max_ratio(curves, shape, recipe)
    block = max(8 * int(each.rank_cost_S.sum()) for each in curves) / shape.parameters
    ratios = [number / 100 for number in range(81) if number / 100 <= largest]
    assert len(ratios) > 60
    for asked, each in zip(ratios, plans(curves, shape, recipe, ratios, SCORES), strict=True):
        assert each.asked_ratio == asked
        assert asked <= each.ratio < asked + block
        assert each.parameters == shape.parameters - sum(layer.original_parameters - layer.parameters for layer in each.layers)
        assert each.ratio == pytest.approx(1 - each.parameters / shape.parameters)
        assert each.expert_ratio == pytest.approx((shape.parameters - each.parameters) / shape.expert_parameters)
        assert each.bytes == 2 * each.parameters
        assert each.predicted_loss == pytest.approx(sum(layer.predicted_loss for layer in each.layers))


def test_a_ratio_between_whole_parameters_is_rounded_up() -> None:
    losses = [np.arange(9.0, -1.0, -1.0)]
    curves = [curve(losses, side=side, rank_cost=1, dense_cost=10) for side in ("input", "output")]
    ratios = [number / 1000 for number in range(1000)] + [0.35 + 1e-9]
    removed = [20 - each.parameters for each in plans(curves, shape_of(curves), Recipe(allocation="greedy", block=1), ratios)]
    assert all(asked <= got / 20 for asked, got in zip(ratios, removed, strict=True))
    assert (removed[0], removed[330], removed[350], removed[351], removed[1000]) == (0, 7, 7, 8, 8)


def test_ratio_zero_leaves_everything_as_it_is() -> None:
    curves = model_curves(3, 4, 64, 64, structures=("per-expert", "latent"))
    shape = shape_of(curves, other=1000)
    found = plan(curves, shape, Recipe(allocation="greedy", ratio=0))
    assert (found.ratio, found.parameters, found.predicted_loss) == (0.0, shape.parameters, 0.0)
    assert (found.bytes, found.active_parameters, found.flops) == (shape.bytes, shape.active_parameters, found.original_flops)
    assert all(side.structure == "dense" and not layer.selected for layer in found.layers for side in (layer.input, layer.output))


@pytest.mark.parametrize("allocation", ["greedy", "uniform", "owl", "selective"])
def test_the_largest_ratio_is_reached_and_named_by_the_error_beyond_it(allocation: str) -> None:
    curves = model_curves(4, 4, 64, 64)
    shape = shape_of(curves, other=50_000)
    recipe = Recipe("svd", allocation=allocation)  # type: ignore[arg-type]
    largest = max_ratio(curves, shape, recipe)
    assert plans(curves, shape, recipe, [largest], SCORES)[0].ratio == pytest.approx(largest)
    with pytest.raises(InputError, match=rf"ratio must be in \[0, {int(largest * 1e4) / 1e4:g}\] for svd on this model, got 0.99"):
        plans(curves, shape, recipe, [0.1, 0.99], SCORES)


def test_active_parameters_fall_with_the_busy_experts() -> None:
    curves = model_curves(2, 4, 64, 64)
    shape = shape_of(curves, other=1000)
    found = plan(curves, shape, Recipe(allocation="uniform", ratio=0.5))
    expected = sum(
        sum(float(load) * rank * int(cost) for load, rank, cost in zip(made.load_S, side.ranks, made.rank_cost_S, strict=True))
        for layer in found.layers
        for side, made in zip((layer.input, layer.output), [each for each in curves if each.layer == layer.layer], strict=True)
    )
    assert found.active_parameters == pytest.approx(1000 + expected, abs=1)
    assert found.flops == 2 * found.active_parameters


def test_the_input_embedding_is_active_but_not_multiplied() -> None:
    curves = model_curves(1, 2, 32, 32)
    shape = shape_of(curves, other=1000)
    embedded = ModelShape(shape.parameters, shape.active_parameters, shape.bytes, shape.expert_parameters, 2.0, embedding_parameters=600)
    found = plan(curves, embedded, Recipe(allocation="greedy"))
    assert found.original_flops == 2 * (shape.active_parameters - 600)


def test_layer_plans_cut_one_layer_each() -> None:
    curves = model_curves(3, 4, 64, 64)
    shape = shape_of(curves, other=10_000)
    for allocation in ("greedy", "uniform", "owl", "selective"):
        alone = layer_plans(curves, shape, Recipe(allocation=allocation, ratio=0.5))  # type: ignore[arg-type]
        assert sorted(alone) == [0, 1, 2]
        for index, each in alone.items():
            (layer,) = each.layers
            assert (layer.layer, layer.selected) == (index, True)
            assert 0.4 < layer.parameters / layer.original_parameters <= 0.5
            assert each.parameters == shape.parameters - layer.original_parameters + layer.parameters
            assert each.predicted_loss == layer.predicted_loss > 0
            assert layer.reason == "alone: 50 % of this layer's experts removed, every other layer as it is"


def test_a_cut_of_one_layer_saves_its_share_of_the_layers_own_operations() -> None:
    curves = model_curves(3, 4, 64, 64)
    shape = shape_of(curves, other=100_000)
    free, tight = (layer_plans(curves, shape, Recipe(allocation="greedy", ratio=0.1, flops_ratio=share)) for share in (None, 0.6))
    for index, each in tight.items():
        dense = sum(float(own.dense_flops) for own in curves if own.layer == index)
        assert each.original_flops - each.flops >= 2 * 0.6 * dense - 2
        assert free[index].original_flops - free[index].flops < 2 * 0.6 * dense


def test_a_cut_beyond_reach_names_its_layer() -> None:
    curves = model_curves(3, 4, 64, 64)
    with pytest.raises(InputError, match=r"ratio must be in \[0, 0\.\d+\] for \w+ on layer 0 alone, got 0\.99"):
        layer_plans(curves, shape_of(curves), Recipe(allocation="uniform", ratio=0.99))


def test_json_there_and_back() -> None:
    curves = model_curves(2, 4, 64, 64, structures=("per-expert", "latent"))
    found = plan(curves, shape_of(curves), Recipe(allocation="greedy", ratio=0.6))
    text = json.dumps(found.as_dict())
    assert Plan.from_dict(json.loads(text)) == found
    row = json.loads(text)["layers"][0]
    assert {"layer", "selected", "reason", "structure", "ranks", "parameters", "original_parameters", "predicted_loss"} <= row.keys()
    assert row["ranks"]["output"] == list(found.layers[0].output.ranks)


def test_json_that_is_no_plan_is_refused() -> None:
    curves = model_curves(1, 2, 32, 32)
    data = plan(curves, shape_of(curves), Recipe(allocation="greedy")).as_dict()
    short = {name: value for name, value in data.items() if name != "ratio"}
    for damaged in (short, data | {"extra": 1}, data | {"layers": [{"layer": 0}]}, data | {"layers": None}):
        with pytest.raises(InputError, match="not a plan"):
            Plan.from_dict(damaged)


def test_refuses_curves_that_do_not_fit() -> None:
    curves = model_curves(2, 2, 32, 32)
    shape = shape_of(curves)
    with pytest.raises(InputError, match="none for the output side of layer 1"):
        plan(curves[:-1], shape, Recipe(allocation="greedy"))
    with pytest.raises(InputError, match="layer 0, input side, per-expert twice"):
        plan([*curves, curves[0]], shape, Recipe(allocation="greedy"))
    with pytest.raises(InputError, match=r"structure must be one that was decomposed \(per-expert\), got 'latent'"):
        plan(curves, shape, Recipe(allocation="greedy", structure="latent"))
    with pytest.raises(InputError, match=r"leaves the allocation to method 'fisher'"):
        plan(curves, shape, Recipe("fisher"))


def test_refuses_a_shape_that_contradicts_itself() -> None:
    with pytest.raises(InputError, match=r"expert_parameters must be in \[1, 100\]"):
        ModelShape(100, 50, 200, 101, 2.0)
    with pytest.raises(InputError, match=r"active_parameters must be in \[1, 100\]"):
        ModelShape(100, 500, 200, 50, 2.0)
    with pytest.raises(InputError, match="bytes must be at least those of the experts"):
        ModelShape(100, 50, 99, 50, 2.0)


def test_no_ratios_no_plans() -> None:
    curves = model_curves(1, 2, 32, 32)
    assert plans(curves, shape_of(curves), Recipe(allocation="greedy"), []) == []


@pytest.mark.parametrize(("layers", "experts", "hidden", "width", "seconds"), [(8, 8, 256, 256, 1.0), (60, 128, 2048, 768, 5.0)])
def test_plans_of_81_ratios_are_quick(layers: int, experts: int, hidden: int, width: int, seconds: float) -> None:
    curves = model_curves(layers, experts, hidden, width, structures=("per-expert", "latent"))
    start = process_time()
    found = plans(curves, shape_of(curves), Recipe(allocation="greedy"), [number / 100 for number in range(81)])
    assert process_time() - start < seconds
    assert len(found) == 81


def test_runs_where_there_is_no_torch() -> None:
    """The pages' process plans without loading torch: the package is imported as a bare namespace with torch out of reach."""
    script = """
import sys, types
for name in ("torch", "transformers", "safetensors", "datasets"):
    sys.modules[name] = None
package = types.ModuleType("moesvd_core")
package.__path__ = [sys.argv[1]]
sys.modules["moesvd_core"] = package
import moesvd_core.planning
"""
    folder = str(Path(moesvd_core.__file__).parent)
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
