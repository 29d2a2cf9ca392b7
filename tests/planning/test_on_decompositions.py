"""Plans of real decompositions: whatever the method and ratio, the factors that come out store what the plan counted."""

from dataclasses import replace

import pytest
from tiny_curves import shape_of
from tiny_layer import INDEX, TinyLayer, tiny_layer

from moesvd_core.decomposition.decompose import Decomposition, decompose
from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.planning import Recipe, max_ratio, plans
from moesvd_core.sensitivity import LayerSensitivity, scores


def model(experts: int, hidden: int, width: int) -> list[TinyLayer]:
    """Two layers, the second with an expert that no token reached."""
    first, second = (tiny_layer(experts, hidden, width, seed=seed, starved=1 if seed else None) for seed in (0, 1))
    second.layer, second.statistics = replace(second.layer, index=INDEX + 1), replace(second.statistics, layer=INDEX + 1)
    return [first, second]


@pytest.fixture(scope="module")
def eight() -> list[TinyLayer]:
    return model(8, 24, 20)


def decomposed(layers: list[TinyLayer], chosen: Method) -> list[Decomposition]:
    return [decompose(each.weights, each.layer, each.statistics, chosen) for each in layers]


def check(layers: list[TinyLayer], chosen: Method, block: int) -> None:
    made = decomposed(layers, chosen)
    curves = [curve for each in made for curve in each.curves]
    shape = shape_of(curves, other=1000)
    recipe = Recipe(chosen.name, allocation=chosen.allocation, block=block)
    sensitivity = scores([LayerSensitivity.of(each.statistics) for each in layers], chosen.allocation)
    largest = max_ratio(curves, shape, recipe)
    for plan in plans(curves, shape, recipe, [largest * number / 12 for number in range(13)], sensitivity):
        stored = 0
        for each, layer_plan in zip(made, plan.layers, strict=True):
            factors = each.materialise(layer_plan)
            assert factors.input.parameters == layer_plan.input.parameters
            assert factors.output.parameters == layer_plan.output.parameters
            stored += factors.parameters
        assert plan.parameters == stored + 1000


@pytest.mark.parametrize("name", METHODS)
def test_factors_of_every_method_store_what_the_plan_counted(eight: list[TinyLayer], name: str) -> None:
    check(eight, method(name), block=4)


@pytest.mark.parametrize("allocation", ["greedy", "uniform", "selective"])
@pytest.mark.parametrize("name", ["moe-svd", "moe-svd-refit"])
def test_groups_of_many_experts_do_too(name: str, allocation: str) -> None:
    check(model(64, 12, 8), method(name).customised(allocation=allocation), block=2)  # type: ignore[arg-type]


def test_the_recommended_method_predicts_the_least_loss(eight: list[TinyLayer]) -> None:
    losses: dict[str, list[float]] = {}
    for name in ("auto", "fisher", "latent", "svd-llm", "svd"):
        curves = [curve for each in decomposed(eight, method(name)) for curve in each.curves]
        recipe = Recipe(name, allocation=method(name).allocation, block=1)
        losses[name] = [each.predicted_loss for each in plans(curves, shape_of(curves), recipe, [0.2, 0.4, 0.6])]
    for name in ("fisher", "latent", "svd-llm", "svd"):
        assert all(best <= other * 1.01 for best, other in zip(losses["auto"], losses[name], strict=True)), name
