"""Uniform, OWL and selective allocation."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_curves import curve, model_curves, shape_of

from moesvd_core.errors import InputError, StatisticsError
from moesvd_core.planning import DENSE, SIDES, Allocation, LayerPlan, Recipe, SideCurve, Structure, max_ratio, plan, plans


def share(layer: LayerPlan) -> float:
    return layer.parameters / layer.original_parameters


def test_uniform_keeps_the_same_share_of_every_matrix_to_one_block() -> None:
    curves = model_curves(4, 4, 96, 64)
    for each in plans(curves, shape_of(curves), Recipe(allocation="uniform", block=4), [0.2, 0.5, 0.7]):
        kept = []
        for layer in each.layers:
            for side, made in zip((layer.input, layer.output), [c for c in curves if c.layer == layer.layer], strict=True):
                assert len(set(side.ranks)) == 1
                block = 4 * int(made.rank_cost_S.sum()) / made.dense_parameters
                kept.append((side.parameters / made.dense_parameters, block))
        assert max(kept)[0] - min(kept)[0] <= max(block for _, block in kept) + 1e-9
        assert max(kept)[0] < 1


def test_uniform_of_one_layer_is_the_published_rank() -> None:
    """r = m·n·(1 - ratio) / (m + n) for every matrix (SVD-LLM)."""
    curves = model_curves(1, 1, 64, 64)
    found = plan(curves, shape_of(curves), Recipe(allocation="uniform", block=1, ratio=0.4))
    assert found.layers[0].input.ranks[0] in (25, 26)  # 128·64·0.6 / 192 = 25.6
    assert found.layers[0].output.ranks == (19,)  # 64·64·0.6 / 128 = 19.2


def test_owl_keeps_more_where_outliers_are_many() -> None:
    curves = model_curves(4, 4, 96, 64)
    outliers = {0: 0.01, 1: 0.04, 2: 0.02, 3: 0.03}
    found = plan(curves, shape_of(curves), Recipe(allocation="owl", block=1, ratio=0.5), outliers)
    shares = [share(layer) for layer in found.layers]
    assert np.argsort(shares).tolist() == [0, 2, 3, 1]
    assert shares[1] - shares[0] == pytest.approx(0.16, abs=0.02)  # 2λ
    assert "outlier ratio 0.04, mean of all layers 0.025" in found.layers[1].reason


def test_owl_with_equal_outliers_is_uniform() -> None:
    curves = model_curves(3, 4, 64, 64)
    shape = shape_of(curves)
    owl = plan(curves, shape, Recipe(allocation="owl", ratio=0.5), dict.fromkeys(range(3), 0.02))
    uniform = plan(curves, shape, Recipe(allocation="uniform", ratio=0.5))
    assert [layer.input.ranks for layer in owl.layers] == [layer.input.ranks for layer in uniform.layers]


def test_selective_decomposes_the_least_sensitive_layers_and_no_more_than_needed() -> None:
    curves = model_curves(8, 4, 64, 64)
    sensitivity = {layer: score for layer, score in enumerate([9.0, 3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0])}
    order = [2, 3, 1, 4, 5, 6, 7, 0]
    counts = []
    for number in range(1, 80):
        found = plan(curves, shape_of(curves), Recipe(allocation="selective", block=1, ratio=number / 100), sensitivity)
        selected = [layer.layer for layer in found.layers if layer.selected]
        assert sorted(order[: len(selected)]) == selected
        assert len(selected) == int(np.ceil(round(number / 100 * 8 / 0.875, 9)))
        counts.append(len(selected))
        for layer in found.layers:
            assert (DENSE in layer.input.ranks) == (layer.layer not in selected)
    assert counts[0] == 1
    assert counts[-1] == 8


def test_selective_states_the_threshold() -> None:
    curves = model_curves(4, 4, 64, 64)
    found = plan(curves, shape_of(curves), Recipe(allocation="selective", ratio=0.3), {0: 40.0, 1: 10.0, 2: 20.0, 3: 30.0})
    assert found.layers[1].reason == "decomposed: sensitivity 10 is below the threshold 30"
    assert found.layers[2].reason == "decomposed: sensitivity 20 is below the threshold 30"
    assert found.layers[0].reason == "dense: sensitivity 40 is not below the threshold 30"
    nothing = plan(curves, shape_of(curves), Recipe(allocation="selective", ratio=0), dict.fromkeys(range(4), 1.0))
    assert not any(layer.selected for layer in nothing.layers)


def test_selective_goes_below_the_usual_cut_when_every_layer_is_taken() -> None:
    curves = model_curves(2, 4, 64, 64)
    shape, recipe = shape_of(curves), Recipe(allocation="selective", block=1, ratio=0.95)
    found = plan(curves, shape, recipe, {0: 1.0, 1: 2.0})
    assert found.ratio >= 0.95
    assert max_ratio(curves, shape, recipe) > 0.95


def test_a_layer_of_a_shared_structure_gives_at_least_what_sharing_saves() -> None:
    """Without U's for most experts even the largest rank stores little: one layer is enough for more than was asked."""
    curves = model_curves(4, 8, 64, 64, structures=("shared-v",))
    found = plan(curves, shape_of(curves), Recipe(allocation="selective", ratio=0.05), {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    assert [layer.selected for layer in found.layers] == [True, False, False, False]
    assert found.layers[0].input.ranks == (64,)
    assert 0.05 < found.ratio < 0.25


def test_scores_are_asked_for_by_name() -> None:
    curves = model_curves(2, 4, 32, 32)
    with pytest.raises(InputError, match="S_L of every layer, got none for layer 0"):
        plan(curves, shape_of(curves), Recipe(allocation="selective"))
    with pytest.raises(InputError, match="outlier ratio of every layer, got none for layer 1"):
        plan(curves, shape_of(curves), Recipe(allocation="owl"), {0: 1.0})
    with pytest.raises(StatisticsError, match="S_L of layer 1 is nan"):
        plan(curves, shape_of(curves), Recipe(allocation="selective"), {0: 1.0, 1: float("nan")})


def _both_structures() -> list[SideCurve]:
    return model_curves(1, 4, 32, 32, structures=("per-expert", "latent"))


def test_only_greedy_chooses_between_structures() -> None:
    curves = _both_structures()
    with pytest.raises(InputError, match="got per-expert and latent for layer 0"):
        plan(curves, shape_of(curves), Recipe(allocation="uniform"))
    assert plan(curves, shape_of(curves), Recipe(allocation="uniform", structure="latent")).layers[0].input.structure == "latent"


def test_selective_refuses_a_block_that_no_matrix_has_room_for() -> None:
    curves = [curve([[3.0, 2.0, 1.0]], side=side, rank_cost=6, dense_cost=10) for side in ("input", "output")]
    with pytest.raises(InputError, match="block must leave a rank below break-even in layer 0, input side"):
        plan(curves, shape_of(curves), Recipe(allocation="selective", block=2, ratio=0), {0: 1.0})


def coupled(layers: int, experts: int) -> list[SideCurve]:
    """Layers whose experts can be dropped, the later the better, but for two."""
    rng = np.random.default_rng(0)
    curves = []
    for layer in range(layers):
        score_E1 = np.arange(experts, dtype=float)[:, None] + rng.random((experts, 1))
        for side, cost in (("input", 20), ("output", 10)):
            losses = np.hstack([score_E1 * 1e-3, np.zeros_like(score_E1)])
            made = curve(losses, layer=layer, side=side, structure="kept-experts", rank_cost=cost, dense_cost=cost)  # type: ignore[arg-type]
            curves.append(replace(made, gain_SR=score_E1, least=2, fixed_flops=made.dense_flops, rank_flops_S=0 * made.rank_flops_S))
    return curves


@pytest.mark.parametrize("allocation", ["uniform", "owl", "selective"])
def test_both_sides_of_an_expert_stay_or_go(allocation: Allocation) -> None:
    curves = coupled(4, 8)
    shape, scores = shape_of(curves), {layer: float(layer) for layer in range(4)}
    recipe = Recipe("expert-pruning", allocation=allocation)
    assert max_ratio(curves, shape, recipe) == 6 / 8
    for found in plans(curves, shape, recipe, [number / 32 for number in range(25)], scores):
        for layer in found.layers:
            assert allocation != "uniform" or layer.reason.endswith("the same share of every layer, as nearly as whole experts allow")
            kept = layer.input.ranks.count(DENSE)
            assert layer.input.ranks == layer.output.ranks
            assert layer.input.ranks == (0,) * (8 - kept) + (DENSE,) * kept and kept >= 2
            assert layer.parameters == 30 * kept
            assert layer.predicted_loss == pytest.approx(sum(each.loss_SR[: 8 - kept, 0].sum() for each in curves[2 * layer.layer :][:2]))
        assert found.active_parameters == shape.active_parameters  # a token is answered by as many experts as before
        assert 0 <= found.ratio - found.asked_ratio < 1 / 32 + 1e-9


def test_a_base_is_paid_for_at_every_rank() -> None:
    sides = [curve([[9, 4, 1]], side=side, structure="base-delta", rank_cost=5, dense_cost=40) for side in SIDES]
    made = [replace(each, fixed_cost=10, least=0) for each in sides]
    shape, recipe = shape_of(made), Recipe(allocation="uniform", block=1)
    assert max_ratio(made, shape, recipe) == 1 - 20 / 80
    found = plans(made, shape, recipe, [0.0, 0.4, 0.75])
    assert [(each.layers[0].input.ranks, each.layers[0].parameters) for each in found] == [((DENSE,), 80), ((2,), 40), ((0,), 20)]


@pytest.mark.parametrize("structure", ["base-delta", "kept-experts", "kept-neurons", "merged-experts"])
def test_what_does_not_stand_alone_is_not_for_greedy_allocation(structure: Structure) -> None:
    curves = [replace(each, structure=structure, fixed_cost=1) for each in model_curves(1, 4, 32, 32)]
    with pytest.raises(InputError, match=f"allocation must be uniform, owl or selective for structure {structure}"):
        plan(curves, shape_of(curves), Recipe(allocation="greedy"))


def test_experts_are_counted_one_by_one_and_the_best_stay() -> None:
    curves = coupled(1, 8)
    assert curves[0].ranks_on_offer(8).tolist() == [0, 1]
    assert curves[0].as_one_slot().ranks_on_offer(8).tolist() == list(range(9))
    assert curves[0].slot_ranks(DENSE) == (DENSE,) * 8
    assert curve([[2, 1, 0]] * 3).slot_ranks(2) == (2, 2, 2)
