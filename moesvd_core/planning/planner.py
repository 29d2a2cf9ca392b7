"""From curves and a recipe to plans: what is on offer, how much may be stored, who gets it, what it comes to."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil, floor, isfinite

import numpy as np

from moesvd_core.errors import InputError, StatisticsError
from moesvd_core.planning.allocation import Allotment, Choice, LayerCurves
from moesvd_core.planning.curves import COUPLED, DENSE, SIDES, SideCurve
from moesvd_core.planning.greedy import greedy
from moesvd_core.planning.recipe import Recipe
from moesvd_core.planning.result import LayerPlan, ModelShape, Plan, SidePlan
from moesvd_core.planning.shares import by_share, ladders, selective


def plan(curves: Sequence[SideCurve], shape: ModelShape, recipe: Recipe, sensitivity: Mapping[int, float] | None = None) -> Plan:
    """Ranks of every layer at the recipe's ratio.

    Args:
        curves: of every layer and side, one for each structure on offer.
        shape: the whole model's size.
        recipe: with its allocation filled in from the method.
        sensitivity: score by layer: S_L for selective allocation, OWL's outlier ratio for "owl", not needed for the others.

    Raises:
        InputError: a ratio beyond the method's reach (the message names the largest), or curves that do not fit the recipe.
        StatisticsError: a score that is not finite.
    """
    return plans(curves, shape, recipe, [recipe.ratio], sensitivity)[0]


def plans(
    curves: Sequence[SideCurve], shape: ModelShape, recipe: Recipe, ratios: Sequence[float], sensitivity: Mapping[int, float] | None = None
) -> list[Plan]:
    """Plans of many ratios at once, for the price of little more than one; otherwise as `plan`, the recipe's own ratio is not looked at.

    Raises:
        InputError, StatisticsError: as `plan`; `max_ratio` tells beforehand how far the ratios may go.
    """
    recipes = [replace(recipe, ratio=ratio) for ratio in ratios]
    layers = _on_offer(curves, recipe)
    largest = _largest_removal(layers, recipe)
    removed = [_parameters_to_remove(each, shape.parameters, largest) for each in recipes]
    most_flops = _most_flops(layers, shape.active_parameters - shape.embedding_parameters, recipe)
    return _planned(layers, removed, shape, recipes, sensitivity, most_flops) if recipes else []


def layer_plans(curves: Sequence[SideCurve], shape: ModelShape, recipe: Recipe) -> dict[int, Plan]:
    """For each layer the plan that removes the recipe's ratio of this layer's own experts and leaves every other layer as it is.

    What the recipe asks for in operations is a share of what this layer's experts do, too. The reference cut of the sensitivity page: a
    plan's `predicted_loss` is the layer's predicted sensitivity, and compressing by it is what gets measured. Its `ratio` is of the whole
    model, as always.

    Raises:
        InputError: as `plan`, with both ratios counted in one layer, which the message names.
    """
    alone: dict[int, Plan] = {}
    for layer in _on_offer(curves, recipe):
        largest = _largest_removal([layer], recipe)
        removed = _parameters_to_remove(recipe, layer.dense_parameters, largest, f"layer {layer.layer} alone")
        most_flops = _most_flops([layer], _dense_flops([layer]), recipe)
        made = _planned([layer], [removed], shape, [recipe], {layer.layer: 0.0}, most_flops)[0]
        reason = f"alone: {100 * recipe.ratio:g} % of this layer's experts removed, every other layer as it is"
        alone[layer.layer] = replace(made, layers=(replace(made.layers[0], reason=reason),))
    return alone


def max_ratio(curves: Sequence[SideCurve], shape: ModelShape, recipe: Recipe) -> float:
    """The largest ratio that the recipe reaches on this model.

    Raises:
        InputError: curves that do not fit the recipe.
    """
    layers = _on_offer(curves, recipe)
    return _largest_removal(layers, recipe) / shape.parameters


def _on_offer(curves: Sequence[SideCurve], recipe: Recipe) -> list[LayerCurves]:
    """The curves by layer and side, in the model's order, of the structure that the recipe asks for."""
    if recipe.allocation is None:
        raise InputError(f"recipe leaves the allocation to method {recipe.method!r}: fill it in from the registry before planning")
    found: dict[tuple[int, str], dict[str, SideCurve]] = {}
    for curve in curves:
        if recipe.structure is None or curve.structure == recipe.structure:
            offered = found.setdefault((curve.layer, curve.side), {})
            if curve.structure in offered:
                raise InputError(f"curves must name each structure of a side once, got {curve.where} twice")
            offered[curve.structure] = curve
    if not found:
        offered_names = ", ".join(sorted({curve.structure for curve in curves})) or "nothing"
        raise InputError(f"structure must be one that was decomposed ({offered_names}), got {recipe.structure!r}")
    if recipe.allocation == "greedy":
        for offered in found.values():
            _check_stands_alone(offered.values())
    layers = []
    for index in sorted({layer for layer, _ in found}):
        for side in SIDES:
            if (index, side) not in found:
                raise InputError(f"curves must cover both sides of a layer, got none for the {side} side of layer {index}")
        layers.append(LayerCurves(index, tuple(found[index, "input"].values()), tuple(found[index, "output"].values())))
    return layers


def _check_stands_alone(offered: Collection[SideCurve]) -> None:
    """Greedy allocation takes sides and slots one by one, down to nothing: a base can be one of several structures, not the only one."""
    for curve in offered:
        if curve.structure in COUPLED or (curve.fixed_cost and len(offered) == 1):
            raise InputError(
                f"allocation must be uniform, owl or selective for structure {curve.structure}, whose sides or slots do not stand "
                "alone, got greedy"
            )


def _largest_removal(layers: Sequence[LayerCurves], recipe: Recipe) -> int:
    """The most parameters that the recipe can remove: all of them by greedy allocation, all but a block everywhere by the others."""
    dense = sum(layer.dense_parameters for layer in layers)
    if recipe.allocation == "greedy":
        return dense
    return dense - sum(int(side.parameters_P[0]) for pair in ladders(layers, recipe.block) for side in pair)


def _parameters_to_remove(recipe: Recipe, parameters: int, largest: int, where: str = "this model") -> int:
    """The fewest whole parameters that reach the recipe's ratio of `parameters`; at most `largest` can be removed.

    Args:
        where: what has so many parameters, for the message.
    """
    removed = ceil(recipe.ratio * parameters - 1e-6)  # 0.4 of 10 is 4, whatever the last bit of 0.4 says
    if removed / parameters < recipe.ratio:
        removed += 1
    if removed > largest and recipe.ratio <= largest / parameters + 1e-12:
        return largest  # asked for the largest, give or take the last bit
    if removed > largest:
        bound = floor(1e4 * largest / parameters) / 1e4
        fix = "choose a smaller ratio" if bound else "it can leave nothing out of this one, choose another method"
        raise InputError(f"ratio must be in [0, {bound:g}] for {recipe.method} on {where}, got {recipe.ratio:g}: {fix}")
    return removed


def _scores(layers: Sequence[LayerCurves], sensitivity: Mapping[int, float] | None, name: str) -> dict[int, float]:
    """A finite score for every layer."""
    scores: dict[int, float] = {}
    for layer in layers:
        if sensitivity is None or layer.layer not in sensitivity:
            raise InputError(f"allocation needs the {name} of every layer, got none for layer {layer.layer}: pass `sensitivity`")
        scores[layer.layer] = float(sensitivity[layer.layer])
        if not isfinite(scores[layer.layer]):
            raise StatisticsError(f"{name} of layer {layer.layer} is {scores[layer.layer]}: check the layer's statistics for NaN or Inf")
    return scores


def _planned(
    layers: list[LayerCurves],
    removed: list[int],
    shape: ModelShape,
    recipes: list[Recipe],
    sensitivity: Mapping[int, float] | None,
    most_flops: float,
) -> list[Plan]:
    """One plan a recipe, which differ in nothing but the ratio; each removes at least its number of parameters."""
    first = recipes[0]
    budget_N = sum(layer.dense_parameters for layer in layers) - np.array(removed, dtype=np.int64)
    if first.allocation == "greedy":
        allotment = greedy(layers, budget_N, first, most_flops)
    elif first.allocation == "selective":
        allotment = selective(layers, budget_N, first, _scores(layers, sensitivity, "S_L"))
    else:
        outliers = _scores(layers, sensitivity, "outlier ratio") if first.allocation == "owl" else None
        allotment = by_share(layers, budget_N, first, outliers)
    return [_assembled(number, recipe, layers, allotment, shape) for number, recipe in enumerate(recipes)]


def _dense_flops(layers: Sequence[LayerCurves]) -> float:
    """Multiply-adds a token that the layers' original experts come to."""
    return sum(side[0].dense_flops for layer in layers for side in (layer.input, layer.output))


def _most_flops(layers: Sequence[LayerCurves], total: float, recipe: Recipe) -> float:
    """Multiply-adds a token that the layers' experts may come to; inf where the recipe does not say.

    Args:
        total: what the recipe asks for a share of.
    """
    if recipe.flops_ratio is None:
        return np.inf
    if recipe.allocation != "greedy":
        raise InputError(f"flops_ratio needs greedy allocation, which weighs operations against parameters, got {recipe.allocation}")
    dense = _dense_flops(layers)
    if recipe.flops_ratio * total > dense:
        bound = floor(1e4 * dense / total) / 1e4
        asked = f"got {recipe.flops_ratio:g}: ask for less"
        raise InputError(f"flops_ratio must be in [0, {bound:g}] on this model, whose experts do no more, {asked}")
    return dense - recipe.flops_ratio * total


def _assembled(number: int, recipe: Recipe, layers: Sequence[LayerCurves], allotment: Allotment, shape: ModelShape) -> Plan:
    """One plan of an allotment, with what it comes to for the whole model."""
    chosen = []
    for place, (layer, (input_choice, output_choice)) in enumerate(zip(layers, allotment.sides, strict=True)):
        sides = (_side_plan(input_choice, number), _side_plan(output_choice, number))
        selected = any(side.structure != "dense" for side in sides)
        chosen.append(LayerPlan(layer.layer, selected, allotment.reason(place, number), *sides, layer.dense_parameters))
    removed = sum(layer.original_parameters - layer.parameters for layer in chosen)
    dense_flops = _dense_flops(layers)
    flops = sum(float(choice.flops_N[number]) for pair in allotment.sides for choice in pair)
    active = round(shape.active_parameters - dense_flops + flops)  # an expert's parameter is active as often as it is multiplied
    return Plan(
        method=recipe.method,
        metric=recipe.metric,
        asked_ratio=recipe.ratio,
        ratio=removed / shape.parameters,
        expert_ratio=removed / shape.expert_parameters,
        original_parameters=shape.parameters,
        parameters=shape.parameters - removed,
        original_active_parameters=shape.active_parameters,
        active_parameters=active,
        original_bytes=shape.bytes,
        bytes=shape.bytes - round(removed * shape.bytes_per_expert_parameter),
        original_flops=2 * (shape.active_parameters - shape.embedding_parameters),
        flops=2 * (active - shape.embedding_parameters),
        predicted_loss=sum(layer.predicted_loss for layer in chosen),
        layers=tuple(chosen),
    )


def _side_plan(choice: Choice, number: int) -> SidePlan:
    """One side of one plan."""
    ranks = choice.ranks[number]
    structure = "dense" if all(rank == DENSE for rank in ranks) else choice.structures[number]
    return SidePlan(structure, ranks, int(choice.parameters_N[number]), float(choice.loss_N[number]))
